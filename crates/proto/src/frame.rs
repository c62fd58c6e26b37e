//! Hidden rows as bytes and back: row-major, little-endian, no header, no padding.
//!
//! The loops work on chunks of constant size and compile to plain copies on little-endian machines. A [`RowBuffer`]
//! never holds a value that is not finite.

use bytes::Bytes;
use muster_types::DType;

/// A payload that does not match its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The payload's length does not match its claimed shape.
    #[error("payload is {got} bytes; {rows} rows of {hidden} x {dtype} are {want}")]
    Length {
        /// Rows claimed.
        rows: usize,
        /// Elements per row.
        hidden: usize,
        /// Element type.
        dtype: DType,
        /// Expected bytes.
        want: usize,
        /// Received bytes.
        got: usize,
    },
    /// `rows * hidden * size` does not fit the address space.
    #[error("{rows} rows of {hidden} elements are more than can be addressed")]
    Overflow {
        /// Rows claimed.
        rows: usize,
        /// Elements per row.
        hidden: usize,
    },
    /// NaN or infinity.
    #[error("row {row} has a value that is not finite")]
    NonFinite {
        /// First row that has one.
        row: usize,
    },
}

/// Bytes of `rows` rows.
///
/// # Errors
/// `Overflow`.
pub fn byte_len(rows: usize, hidden: usize, dtype: DType) -> Result<usize, FrameError> {
    rows.checked_mul(hidden)
        .and_then(|n| n.checked_mul(dtype.size()))
        .ok_or(FrameError::Overflow { rows, hidden })
}

/// Checks that `data` is as long as `rows` rows are.
///
/// # Errors
/// `Overflow`, `Length`.
pub fn check_len(data: &[u8], rows: usize, hidden: usize, dtype: DType) -> Result<(), FrameError> {
    let want = byte_len(rows, hidden, dtype)?;
    if data.len() == want {
        Ok(())
    } else {
        Err(FrameError::Length { rows, hidden, dtype, want, got: data.len() })
    }
}

/// Rows of a bf16 tensor `[_, hidden]`, picked by number, as one payload.
///
/// # Panics
/// When a row number is outside `rows`; callers take row numbers from a checked batch.
#[must_use]
pub fn gather_bf16(rows: &[u16], hidden: usize, picked: &[u32]) -> Bytes {
    let mut out = vec![0; picked.len() * hidden * 2];
    for (target, &row) in out.chunks_exact_mut(hidden * 2).zip(picked) {
        let source = &rows[row as usize * hidden..][..hidden];
        for (bytes, value) in target.as_chunks_mut::<2>().0.iter_mut().zip(source) {
            *bytes = value.to_le_bytes();
        }
    }
    out.into()
}

/// Rows of an f32 tensor `[_, hidden]`, picked by number, as one payload.
///
/// # Panics
/// When a row number is outside `rows`; callers take row numbers from a checked batch.
#[must_use]
pub fn gather_f32(rows: &[f32], hidden: usize, picked: &[u32]) -> Bytes {
    let mut out = vec![0; picked.len() * hidden * 4];
    for (target, &row) in out.chunks_exact_mut(hidden * 4).zip(picked) {
        let source = &rows[row as usize * hidden..][..hidden];
        for (bytes, value) in target.as_chunks_mut::<4>().0.iter_mut().zip(source) {
            *bytes = value.to_le_bytes();
        }
    }
    out.into()
}

/// Received rows in their wire dtype. The buffer is kept from one payload to the next.
#[derive(Debug, Default)]
pub struct RowBuffer {
    f32: Vec<f32>,
    bf16: Vec<u16>,
}

impl RowBuffer {
    /// Drops all rows.
    pub fn clear(&mut self) {
        self.f32.clear();
        self.bf16.clear();
    }

    /// The f32 rows that were read since the last [`Self::clear`].
    #[must_use]
    pub fn f32(&self) -> &[f32] {
        &self.f32
    }

    /// The bf16 rows that were read since the last [`Self::clear`], as bit patterns.
    #[must_use]
    pub fn bf16(&self) -> &[u16] {
        &self.bf16
    }

    /// Appends a payload `[rows, hidden]`.
    ///
    /// # Errors
    /// `Overflow`, `Length`, `NonFinite`; nothing is added then.
    pub fn append(
        &mut self,
        data: &[u8],
        dtype: DType,
        rows: usize,
        hidden: usize,
    ) -> Result<(), FrameError> {
        check_len(data, rows, hidden, dtype)?;
        let bad = match dtype {
            DType::F32 => {
                let start = self.f32.len();
                self.f32.extend(data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)));
                let added = self.f32.get(start..).unwrap_or_default();
                let bad = first_bad(added, |v| v.to_bits() & F32_EXPONENT == F32_EXPONENT);
                bad.inspect(|_| self.f32.truncate(start))
            }
            DType::Bf16 => {
                let start = self.bf16.len();
                self.bf16.extend(data.as_chunks::<2>().0.iter().map(|&bytes| u16::from_le_bytes(bytes)));
                let added = self.bf16.get(start..).unwrap_or_default();
                let bad = first_bad(added, |bits| bits & BF16_EXPONENT == BF16_EXPONENT);
                bad.inspect(|_| self.bf16.truncate(start))
            }
        };
        match bad {
            None => Ok(()),
            Some(element) => Err(FrameError::NonFinite { row: element / hidden }),
        }
    }
}

const BF16_EXPONENT: u16 = 0x7f80;
const F32_EXPONENT: u32 = 0x7f80_0000;

/// Index of the first bad element. A whole block is scanned without branching, so that the loop vectorises.
fn first_bad<T: Copy>(values: &[T], bad: impl Fn(T) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    let mut start = 0;
    for block in values.chunks(BLOCK) {
        if block.iter().fold(false, |found, &v| found | bad(v)) {
            return block.iter().position(|&v| bad(v)).map(|at| start + at);
        }
        start += block.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn finite_bf16() -> impl Strategy<Value = u16> {
        any::<u16>().prop_filter("finite", |bits| bits & BF16_EXPONENT != BF16_EXPONENT)
    }

    fn finite_f32() -> impl Strategy<Value = f32> {
        any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |v| v.is_finite())
    }

    fn read(data: &[u8], dtype: DType, rows: usize, hidden: usize) -> Result<RowBuffer, FrameError> {
        let mut buffer = RowBuffer::default();
        buffer.append(data, dtype, rows, hidden).map(|()| buffer)
    }

    proptest! {
        #[test]
        fn f32_rows_survive_bit_for_bit(hidden in 1usize..9, values in prop::collection::vec(finite_f32(), 0..64)) {
            let rows = values.len() / hidden;
            let values = &values[..rows * hidden];
            let picked: Vec<u32> = (0..rows as u32).collect();
            let data = gather_f32(values, hidden, &picked);
            let mut buffer = read(&data, DType::F32, rows, hidden).unwrap();
            buffer.append(&data, DType::F32, rows, hidden).unwrap();
            let twice = [values, values].concat();
            prop_assert!(buffer.f32().iter().map(|v| v.to_bits()).eq(twice.iter().map(|v| v.to_bits())));
        }

        #[test]
        fn bf16_rows_survive_bit_for_bit(
            hidden in 1usize..9,
            values in prop::collection::vec(finite_bf16(), 0..64),
        ) {
            let rows = values.len() / hidden;
            let values = &values[..rows * hidden];
            let picked: Vec<u32> = (0..rows as u32).collect();
            let data = gather_bf16(values, hidden, &picked);
            let mut buffer = read(&data, DType::Bf16, rows, hidden).unwrap();
            prop_assert_eq!(buffer.bf16(), values);
            buffer.clear();
            prop_assert!(buffer.bf16().is_empty());
        }

        #[test]
        fn any_bytes_of_any_claimed_shape_are_read_or_refused(
            data in prop::collection::vec(any::<u8>(), 0..128),
            rows in prop_oneof![0usize..32, Just(usize::MAX)],
            hidden in prop_oneof![1usize..32, Just(usize::MAX)],
        ) {
            let fits = rows.checked_mul(hidden).and_then(|n| n.checked_mul(2)) == Some(data.len());
            match read(&data, DType::Bf16, rows, hidden) {
                Ok(buffer) => prop_assert!(fits && buffer.bf16().len() == rows * hidden),
                Err(FrameError::NonFinite { row }) => prop_assert!(fits && row < rows),
                Err(_) => prop_assert!(!fits),
            }
            let _ = read(&data, DType::F32, rows, hidden);
        }
    }

    #[test]
    fn gather_repeats_and_reorders() {
        let rows = [1.0, 2.0, 3.0, 4.0];
        let data = gather_f32(&rows, 2, &[1, 0, 1]);
        assert_eq!(read(&data, DType::F32, 3, 2).unwrap().f32(), [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn denormals_and_extremes_pass_but_nan_and_infinity_do_not() {
        for good in [f32::MIN_POSITIVE / 8.0, f32::MAX, f32::MIN, -0.0] {
            assert!(read(&good.to_le_bytes(), DType::F32, 1, 1).is_ok(), "{good}");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)] {
            let data = [0.0f32.to_le_bytes(), bad.to_le_bytes()].concat();
            let mut buffer = read(&data[..4], DType::F32, 1, 1).unwrap();
            assert_eq!(
                buffer.append(&data, DType::F32, 2, 1),
                Err(FrameError::NonFinite { row: 1 }),
                "{bad}"
            );
            assert_eq!(buffer.f32(), [0.0], "nothing of a bad payload stays");
        }
        assert_eq!(read(&[0x80, 0x7f], DType::Bf16, 1, 1).err(), Some(FrameError::NonFinite { row: 0 }));
    }

    #[test]
    fn a_bad_value_past_the_first_block_is_found() {
        let mut values = vec![0.0_f32; 10_000];
        values[9_001] = f32::NAN;
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(read(&data, DType::F32, 100, 100).err(), Some(FrameError::NonFinite { row: 90 }));
    }
}
