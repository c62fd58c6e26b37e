//! What is seen of workers.

use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Addresses that one source may give. What it has beyond them is left out, and said.
pub(crate) const MOST: usize = 4096;

/// Where a worker runs, as far as that is known.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Place {
    /// The zone of the machine.
    pub zone: Option<String>,
    /// The machine.
    pub node: Option<String>,
}

impl Place {
    /// What a worker there shares its fate with: `zone/node`, or what is known of it.
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

/// What a source says now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// The workers it names.
    pub workers: BTreeMap<SocketAddr, Place>,
    /// Why that may be out of date or not all, in a sentence without addresses, and what to do about it.
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
