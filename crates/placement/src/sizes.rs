//! What a loaded expert takes of a worker's memory.
//!
//! Owns the bytes of an expert, layer by layer. All experts of the model together fit in 48 bits, so the bytes that
//! workers hold can be added up without overflow.

use muster_types::LayerId;

use crate::Shape;

/// Bytes of one expert, by layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertSizes(Vec<u64>);

/// Sizes that do not belong to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SizesError {
    /// Not one size per layer.
    #[error("{given} expert sizes were given for a model of {layers} layers; one per layer is needed")]
    WrongLength {
        /// Sizes given.
        given: usize,
        /// Layers of the model, dense ones included.
        layers: usize,
    },
    /// More bytes than any cluster holds.
    #[error("the experts take {total} bytes in all; at most {limit} can be placed")]
    TooLarge {
        /// All experts of the model together.
        total: u128,
        /// Most that are allowed.
        limit: u64,
    },
}

impl ExpertSizes {
    /// Most bytes all experts of a model may take together.
    const LIMIT: u64 = 1 << 48;

    /// The sizes with these bytes per expert, layer 0 first. What is given for a dense layer has no meaning.
    ///
    /// # Errors
    /// When there is not one size per layer of `shape`, or all experts together take more than 48 bits can count.
    pub fn new(shape: &Shape, bytes: Vec<u64>) -> Result<Self, SizesError> {
        let layers = shape.experts().len();
        if bytes.len() != layers {
            return Err(SizesError::WrongLength { given: bytes.len(), layers });
        }
        let total =
            shape.experts().iter().zip(&bytes).map(|(&experts, &b)| u128::from(experts) * u128::from(b));
        let total = total.sum();
        if total > u128::from(Self::LIMIT) {
            return Err(SizesError::TooLarge { total, limit: Self::LIMIT });
        }
        Ok(Self(bytes))
    }

    /// The sizes of a model whose experts are all alike.
    ///
    /// # Errors
    /// When all experts together take more than 48 bits can count.
    pub fn uniform(shape: &Shape, bytes: u64) -> Result<Self, SizesError> {
        Self::new(shape, vec![bytes; shape.experts().len()])
    }

    /// Bytes of one expert of this layer; 0 when the model has no such layer.
    #[must_use]
    pub fn get(&self, layer: LayerId) -> u64 {
        self.0.get(layer.index()).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_size_per_layer() {
        let shape = Shape::new(vec![0, 4, 2]);
        let sizes = ExpertSizes::new(&shape, vec![0, 10, 20]).unwrap();
        assert_eq!(LayerId::all(4).map(|layer| sizes.get(layer)).collect::<Vec<_>>(), [0, 10, 20, 0]);
        assert_eq!(ExpertSizes::uniform(&shape, 7), ExpertSizes::new(&shape, vec![7; 3]));
        let error = ExpertSizes::new(&shape, vec![1, 2]).unwrap_err();
        assert_eq!(error, SizesError::WrongLength { given: 2, layers: 3 });
    }

    #[test]
    fn sizes_that_cannot_be_added_up_are_refused() {
        let shape = Shape::new(vec![2]);
        assert!(ExpertSizes::uniform(&shape, 1 << 47).is_ok());
        assert!(matches!(ExpertSizes::uniform(&shape, u64::MAX), Err(SizesError::TooLarge { .. })));
    }
}
