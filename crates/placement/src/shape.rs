//! The routed experts of a model, counted per layer.

use muster_types::{ExpertId, ExpertKey, LayerId};

/// Routed experts per layer; a dense layer has 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape(Vec<u32>);

impl Shape {
    /// The shape with these expert counts, layer 0 first.
    #[must_use]
    pub const fn new(experts: Vec<u32>) -> Self {
        Self(experts)
    }

    /// Routed experts of every layer, layer 0 first.
    #[must_use]
    pub fn experts(&self) -> &[u32] {
        &self.0
    }

    /// Routed experts of the whole model.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().map(|&experts| u64::from(experts)).sum()
    }

    /// Whether the model has this expert.
    #[must_use]
    pub fn contains(&self, key: ExpertKey) -> bool {
        self.0.get(key.layer.index()).is_some_and(|&experts| key.expert.get() < experts)
    }

    /// Every layer with its number of routed experts, ascending.
    pub(crate) fn layers(&self) -> impl Iterator<Item = (LayerId, u32)> {
        // Layers are numbered in 32 bits, so a longer list would have layers that cannot be named.
        LayerId::all(u32::try_from(self.0.len()).unwrap_or(u32::MAX)).zip(self.0.iter().copied())
    }

    /// Every expert of the model, by layer and then by number.
    pub fn keys(&self) -> impl Iterator<Item = ExpertKey> {
        self.layers().flat_map(|(layer, experts)| {
            ExpertId::all(experts).map(move |expert| ExpertKey { layer, expert })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_layers_have_no_keys() {
        let shape = Shape::new(vec![0, 2, 0, 1]);
        let keys: Vec<_> = shape.keys().map(|key| (key.layer.get(), key.expert.get())).collect();
        assert_eq!(keys, [(1, 0), (1, 1), (3, 0)]);
        assert_eq!(shape.total(), 3);
    }

    #[test]
    fn contains_checks_layer_and_expert() {
        let larger = Shape::new(vec![1, 3, 1, 1]);
        let shape = Shape::new(vec![0, 2, 1]);
        let known: Vec<_> = larger.keys().filter(|&key| shape.contains(key)).collect();
        assert_eq!(known, shape.keys().collect::<Vec<_>>());
    }
}
