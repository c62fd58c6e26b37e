//! What a loaded expert takes of a worker's memory.
//!
//! Owns the bytes of an expert, layer by layer, for workers of each numerics class. All experts of the model together fit in
//! 48 bits, so the bytes that workers hold can be added up without overflow.

use muster_types::{LayerId, NumericsClass};

use crate::Shape;

/// Bytes of one expert, by class and layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertSizes([Vec<u64>; NumericsClass::ALL.len()]);

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

    /// The sizes with these bytes per expert, layer 0 first, whatever the class. What is given for a dense layer has no
    /// meaning.
    ///
    /// # Errors
    /// When there is not one size per layer of `shape`, or all experts together take more than 48 bits can count.
    pub fn new(shape: &Shape, bytes: Vec<u64>) -> Result<Self, SizesError> {
        let bytes = Self::check(shape, bytes)?;
        Ok(Self(NumericsClass::ALL.map(|_| bytes.clone())))
    }

    /// The same, with these bytes on workers of one class.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(mut self, shape: &Shape, class: NumericsClass, bytes: Vec<u64>) -> Result<Self, SizesError> {
        self.0[class.index()] = Self::check(shape, bytes)?;
        Ok(self)
    }

    fn check(shape: &Shape, bytes: Vec<u64>) -> Result<Vec<u64>, SizesError> {
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
        Ok(bytes)
    }

    /// The sizes of a model whose experts are all alike.
    ///
    /// # Errors
    /// When all experts together take more than 48 bits can count.
    pub fn uniform(shape: &Shape, bytes: u64) -> Result<Self, SizesError> {
        Self::new(shape, vec![bytes; shape.experts().len()])
    }

    /// Bytes of one expert of this layer on a worker of this class; 0 when the model has no such layer.
    #[must_use]
    pub fn get(&self, class: NumericsClass, layer: LayerId) -> u64 {
        self.0[class.index()].get(layer.index()).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_size_per_layer() {
        let shape = Shape::new(vec![0, 4, 2]);
        let sizes = ExpertSizes::new(&shape, vec![0, 10, 20]).unwrap();
        let of = |class| LayerId::all(4).map(|layer| sizes.get(class, layer)).collect::<Vec<_>>();
        assert_eq!(NumericsClass::ALL.map(of), [[0, 10, 20, 0]; 3]);
        assert_eq!(ExpertSizes::uniform(&shape, 7), ExpertSizes::new(&shape, vec![7; 3]));
        let error = ExpertSizes::new(&shape, vec![1, 2]).unwrap_err();
        assert_eq!(error, SizesError::WrongLength { given: 2, layers: 3 });
    }

    #[test]
    fn a_class_may_have_sizes_of_its_own() {
        let shape = Shape::new(vec![4]);
        let sizes = ExpertSizes::uniform(&shape, 10).unwrap();
        let sizes = sizes.with(&shape, NumericsClass::CudaMma, vec![12]).unwrap();
        let layer = LayerId::new(0, 1).unwrap();
        assert_eq!(NumericsClass::ALL.map(|class| sizes.get(class, layer)), [10, 12, 10]);
        assert!(sizes.with(&shape, NumericsClass::CudaMma, vec![1 << 47]).is_err());
    }

    #[test]
    fn sizes_that_cannot_be_added_up_are_refused() {
        let shape = Shape::new(vec![2]);
        assert!(ExpertSizes::uniform(&shape, 1 << 47).is_ok());
        assert!(matches!(ExpertSizes::uniform(&shape, u64::MAX), Err(SizesError::TooLarge { .. })));
    }
}
