//! Whether this router can serve, told truthfully.

/// State of the router as probes see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Every (layer, expert) has a live worker.
    Ready,
    /// The router runs, but some experts have no live worker: requests fail until they do.
    NotReady {
        /// Why, in a sentence without addresses.
        reason: String,
    },
}

impl Health {
    /// Whether requests can be served.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}
