//! How weights are stored in a checkpoint, and the bytes that they take so. Does not know what a weight is for.

use muster_types::DType;

/// Rows and columns of a block of FP8 that shares a scale.
pub(crate) const FP8_BLOCK: usize = 128;
/// Elements along a row that share a scale of MXFP4.
pub(crate) const MXFP4_GROUP: usize = 32;

/// How weights are stored in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredAs {
    /// Plain elements.
    Plain(DType),
    /// IEEE half precision, which is computed with as f32.
    F16,
    /// A byte each, with an f32 scale for every block of 128 by 128.
    Fp8,
    /// OCP Microscaling: four bits each, with a byte of scale for every 32 along a row: 4.25 bits.
    Mxfp4,
}

impl StoredAs {
    /// What plain numbers are read as, and those beside few bits.
    #[must_use]
    pub const fn read_as(self) -> DType {
        match self {
            Self::Plain(dtype) => dtype,
            Self::F16 => DType::F32,
            Self::Fp8 | Self::Mxfp4 => DType::Bf16,
        }
    }

    /// Bytes of a matrix `[rows, cols]`.
    #[must_use]
    pub const fn bytes(self, rows: usize, cols: usize) -> u64 {
        let (rows, cols) = (rows as u64, cols as u64);
        match self {
            Self::Plain(dtype) => rows * cols * dtype.size() as u64,
            Self::F16 => rows * cols * 2,
            Self::Fp8 => rows * cols + 4 * rows.div_ceil(FP8_BLOCK as u64) * cols.div_ceil(FP8_BLOCK as u64),
            Self::Mxfp4 => rows * cols.div_ceil(MXFP4_GROUP as u64) * (MXFP4_GROUP as u64 / 2 + 1),
        }
    }

    /// Of a norm or bias beside such weights.
    pub(crate) const fn vector_bytes(self, elements: u64) -> u64 {
        match self {
            Self::Plain(dtype) => elements * dtype.size() as u64,
            Self::F16 | Self::Fp8 | Self::Mxfp4 => elements * 2,
        }
    }
}

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredForms {
    /// Embedding, head and gates.
    pub tables: StoredAs,
    /// Attention's linears, dense MLPs and shared experts.
    pub linears: StoredAs,
    /// Routed experts.
    pub experts: StoredAs,
}

impl StoredForms {
    /// All alike.
    #[must_use]
    pub const fn plain(dtype: DType) -> Self {
        let form = StoredAs::Plain(dtype);
        Self { tables: form, linears: form, experts: form }
    }

    /// The same, with what is stored in plain numbers stored as these.
    pub(crate) fn with_plain(self, plain: StoredAs) -> Self {
        let of = |form| if matches!(form, StoredAs::Fp8 | StoredAs::Mxfp4) { form } else { plain };
        Self { tables: of(self.tables), linears: of(self.linears), experts: of(self.experts) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_bits_come_with_their_scales() {
        assert_eq!(StoredAs::Plain(DType::F32).bytes(3, 5), 60);
        assert_eq!(StoredAs::Fp8.bytes(256, 128), 256 * 128 + 4 * 2);
        assert_eq!(StoredAs::Fp8.bytes(1, 129), 129 + 4 * 2);
        // 4.25 bits each.
        assert_eq!(StoredAs::Mxfp4.bytes(2, 64) * 8, 2 * 64 * 17 / 4);
    }
}
