//! Discovered workers.

use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Most addresses of one source. Further ones are left out and reported.
pub(crate) const MOST: usize = 4096;

/// A worker's zone and machine, if known.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Place {
    /// The zone of the machine.
    pub zone: Option<String>,
    /// The machine.
    pub node: Option<String>,
}

impl Place {
    /// Failure domain of a worker there: `zone/node`, or the known part.
    #[must_use]
    pub fn domain(&self) -> Option<String> {
        match (&self.zone, &self.node) {
            (Some(zone), Some(node)) => Some(format!("{zone}/{node}")),
            // One machine of an unknown zone; or of a zone, an unknown one.
            (None, Some(one)) | (Some(one), None) => Some(one.clone()),
            (None, None) => None,
        }
    }
}

/// Current state of a source.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// The workers it names.
    pub workers: BTreeMap<SocketAddr, Place>,
    /// Why that may be outdated or incomplete, and the remedy, in a sentence without addresses.
    pub problem: Option<String>,
}

impl Seen {
    pub(crate) fn not_yet() -> Self {
        Self { problem: Some("it has not answered yet".to_owned()), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_what_is_known_of_the_place() {
        let domain = |zone: &str, node: &str| {
            let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Place { zone: known(zone), node: known(node) }.domain()
        };
        assert_eq!(domain("z", "n").as_deref(), Some("z/n"));
        assert_eq!(domain("", "n").as_deref(), Some("n"));
        assert_eq!(domain("z", "").as_deref(), Some("z"));
        assert_eq!(domain("", ""), None);
    }
}
