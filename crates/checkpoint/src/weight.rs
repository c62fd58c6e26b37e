//! A weight in memory, as it is read.

/// One weight in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Rows of a matrix, or length of a vector.
    pub rows: usize,
    /// Columns of a matrix; 1 for a vector.
    pub cols: usize,
    /// `rows * cols` elements, row-major. Vectors (norms, biases) are always f32; of matrices, F16 and FP8 come as f32.
    pub data: WeightData,
}

/// Elements of a weight. All finite.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightData {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16, as its bits.
    Bf16(Vec<u16>),
    /// OCP Microscaling: groups of 32 along a row, which have a common scale.
    Mxfp4 {
        /// Half a byte per element (E2M1), the first of two in the lower half.
        blocks: Vec<u8>,
        /// A byte per group: the exponent of two that its elements are multiplied by, plus 127. None is 255.
        scales: Vec<u8>,
    },
}
