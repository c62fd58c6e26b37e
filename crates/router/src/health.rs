//! Whether this router can serve requests.

/// State of the router as probes see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Every expert has a live worker and all wanted replicas, and tokens come.
    Ready,
    /// Requests are served, but something is missing.
    Degraded {
        /// The shortcomings, in sentences without addresses.
        reasons: Vec<String>,
    },
    /// The router runs, but requests wait or fail.
    NotReady {
        /// Why, in a sentence without addresses.
        reason: String,
    },
}

impl Health {
    /// Whether requests can be served.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        matches!(self, Self::Ready | Self::Degraded { .. })
    }
}
