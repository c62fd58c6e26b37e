//! Hidden rows as bytes and back: row-major, little-endian, no header, no padding.
//!
//! The loops work on chunks of constant size and compile to plain copies on little-endian machines. A value
//! that is not finite never gets through a `read_*` function.

use bytes::Bytes;
use muster_types::DType;

/// Bytes that are not the rows they should be.
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
        /// Bytes that these make.
        want: usize,
        /// Bytes that came.
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
    /// A value with more precision than the wire has; sending it would change it.
    #[error("element {element} is not rounded to bf16")]
    NotRounded {
        /// First such element.
        element: usize,
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
/// When a row number is outside `rows`; callers take them from a batch they checked.
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
/// When a row number is outside `rows`; callers take them from a batch they checked.
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

/// All of `rows` as one payload of `dtype`. For bf16 every value must already be one that bf16 has.
///
/// # Errors
/// `NotRounded` names the first value that would change on the way.
pub fn write_rows(rows: &[f32], dtype: DType) -> Result<Bytes, FrameError> {
    let mut out = vec![0; rows.len() * dtype.size()];
    match dtype {
        DType::F32 => {
            for (bytes, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(rows) {
                *bytes = value.to_le_bytes();
            }
        }
        DType::Bf16 => {
            let mut lost = 0;
            for (bytes, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(rows) {
                let bits = value.to_bits();
                lost |= bits & 0xffff;
                let [_, _, low, high] = bits.to_le_bytes();
                *bytes = [low, high];
            }
            if lost != 0 {
                let element = rows.iter().position(|v| v.to_bits() & 0xffff != 0).unwrap_or(0);
                return Err(FrameError::NotRounded { element });
            }
        }
    }
    Ok(out.into())
}

/// Received rows in their wire dtype. The buffers are kept from one payload to the next.
#[derive(Debug, Default)]
pub struct RowBuffer {
    f32: Vec<f32>,
    bf16: Vec<u16>,
}

impl RowBuffer {
    /// Reads an f32 payload `[rows, hidden]`.
    ///
    /// # Errors
    /// `Overflow`, `Length`, `NonFinite`.
    pub fn read_f32(&mut self, data: &[u8], rows: usize, hidden: usize) -> Result<&[f32], FrameError> {
        self.f32.clear();
        append_f32(data, DType::F32, rows, hidden, &mut self.f32)?;
        Ok(&self.f32)
    }

    /// Reads a bf16 payload `[rows, hidden]` as bit patterns.
    ///
    /// # Errors
    /// `Overflow`, `Length`, `NonFinite`.
    pub fn read_bf16(&mut self, data: &[u8], rows: usize, hidden: usize) -> Result<&[u16], FrameError> {
        check_len(data, rows, hidden, DType::Bf16)?;
        let chunks = data.as_chunks::<2>().0;
        self.bf16.clear();
        self.bf16.extend(chunks.iter().map(|&bytes| u16::from_le_bytes(bytes)));
        match first_bad(&self.bf16, |bits| bits & BF16_EXPONENT == BF16_EXPONENT) {
            None => Ok(&self.bf16),
            Some(element) => Err(FrameError::NonFinite { row: element / hidden }),
        }
    }
}

/// Appends a payload `[rows, hidden]` of either dtype to `out` as f32, exactly.
///
/// # Errors
/// `Overflow`, `Length`, `NonFinite`; `out` is as it was after the first two.
pub fn append_f32(
    data: &[u8],
    dtype: DType,
    rows: usize,
    hidden: usize,
    out: &mut Vec<f32>,
) -> Result<(), FrameError> {
    check_len(data, rows, hidden, dtype)?;
    let start = out.len();
    match dtype {
        DType::F32 => out.extend(data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes))),
        DType::Bf16 => out.extend(
            data.as_chunks::<2>()
                .0
                .iter()
                .map(|&bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)),
        ),
    }
    let added = out.get(start..).unwrap_or_default();
    match first_bad(added, |v| v.to_bits() & F32_EXPONENT == F32_EXPONENT) {
        None => Ok(()),
        Some(element) => Err(FrameError::NonFinite { row: element / hidden }),
    }
}

const BF16_EXPONENT: u16 = 0x7f80;
const F32_EXPONENT: u32 = 0x7f80_0000;

/// The first element that is bad. A whole block is scanned without branching, so that the loop vectorises.
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

    proptest! {
        #[test]
        fn f32_rows_survive_bit_for_bit(hidden in 1usize..9, values in prop::collection::vec(finite_f32(), 0..64)) {
            let rows = values.len() / hidden;
            let values = &values[..rows * hidden];
            let picked: Vec<u32> = (0..rows as u32).collect();
            let data = gather_f32(values, hidden, &picked);
            prop_assert_eq!(&data, &write_rows(values, DType::F32).unwrap());
            let mut buffer = RowBuffer::default();
            let back = buffer.read_f32(&data, rows, hidden).unwrap();
            prop_assert!(back.iter().map(|v| v.to_bits()).eq(values.iter().map(|v| v.to_bits())));
        }

        #[test]
        fn bf16_rows_survive_bit_for_bit_and_widen_exactly(
            hidden in 1usize..9,
            values in prop::collection::vec(finite_bf16(), 0..64),
        ) {
            let rows = values.len() / hidden;
            let values = &values[..rows * hidden];
            let picked: Vec<u32> = (0..rows as u32).collect();
            let data = gather_bf16(values, hidden, &picked);
            let mut buffer = RowBuffer::default();
            prop_assert_eq!(buffer.read_bf16(&data, rows, hidden).unwrap(), values);
            let mut wide = Vec::new();
            append_f32(&data, DType::Bf16, rows, hidden, &mut wide).unwrap();
            prop_assert!(wide.iter().zip(values).all(|(w, &v)| w.to_bits() == u32::from(v) << 16));
            prop_assert_eq!(write_rows(&wide, DType::Bf16).unwrap(), data);
        }

        #[test]
        fn any_bytes_of_any_claimed_shape_are_read_or_refused(
            data in prop::collection::vec(any::<u8>(), 0..128),
            rows in prop_oneof![0usize..32, Just(usize::MAX)],
            hidden in prop_oneof![1usize..32, Just(usize::MAX)],
        ) {
            let mut buffer = RowBuffer::default();
            let fits = rows.checked_mul(hidden).and_then(|n| n.checked_mul(2)) == Some(data.len());
            match buffer.read_bf16(&data, rows, hidden) {
                Ok(read) => prop_assert!(fits && read.len() == rows * hidden),
                Err(FrameError::NonFinite { row }) => prop_assert!(fits && row < rows),
                Err(_) => prop_assert!(!fits),
            }
            let _ = buffer.read_f32(&data, rows, hidden);
        }
    }

    #[test]
    fn gather_repeats_and_reorders() {
        let rows = [1.0, 2.0, 3.0, 4.0];
        let data = gather_f32(&rows, 2, &[1, 0, 1]);
        let mut out = vec![9.0];
        append_f32(&data, DType::F32, 3, 2, &mut out).unwrap();
        assert_eq!(out, [9.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn denormals_and_extremes_pass_but_nan_and_infinity_do_not() {
        let mut buffer = RowBuffer::default();
        for good in [f32::MIN_POSITIVE / 8.0, f32::MAX, f32::MIN, -0.0] {
            assert!(buffer.read_f32(&good.to_le_bytes(), 1, 1).is_ok(), "{good}");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)] {
            let data = [0.0f32.to_le_bytes(), bad.to_le_bytes()].concat();
            assert_eq!(buffer.read_f32(&data, 2, 1), Err(FrameError::NonFinite { row: 1 }), "{bad}");
        }
        assert_eq!(buffer.read_bf16(&[0x80, 0x7f], 1, 1), Err(FrameError::NonFinite { row: 0 }));
    }

    #[test]
    fn a_bad_value_past_the_first_block_is_found() {
        let mut values = vec![0.0; 10_000];
        values[9_001] = f32::NAN;
        let data = write_rows(&values, DType::F32).unwrap();
        let mut buffer = RowBuffer::default();
        assert_eq!(buffer.read_f32(&data, 100, 100), Err(FrameError::NonFinite { row: 90 }));
    }

    #[test]
    fn a_value_that_bf16_lacks_is_not_sent() {
        assert_eq!(write_rows(&[1.0, 1.001], DType::Bf16), Err(FrameError::NotRounded { element: 1 }));
    }
}
