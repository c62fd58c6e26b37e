//! Codes of four bits (e2m1) as bf16: the table behind the decoders of all instruction sets.

/// Words of 32 bits that hold the codes of one output in a block of 32 inputs.
pub(crate) const LINES: usize = 4;

/// Every code as bf16 with a scale of 0; a scale adds to the exponent, unless the number is zero. Exponents too small
/// for bf16 wrap around, and the addition wraps them back.
pub(crate) const CODES: [u16; 16] = {
    // 0.5, 1, 1.5, 2, 3, 4, 6.
    let magnitudes = [0x3f00_u16, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0];
    let mut codes = [0; 16];
    codes[8] = 0x8000;
    let mut i = 0;
    while i < magnitudes.len() {
        codes[i + 1] = magnitudes[i].wrapping_sub(127 << 7);
        codes[i + 9] = codes[i + 1] ^ 0x8000;
        i += 1;
    }
    codes
};

/// The bf16 of the code in the low four bits.
#[inline(always)]
pub(crate) fn decode(code: u32, scale: u8) -> u16 {
    let scale = if code & 7 == 0 { 0 } else { u16::from(scale) << 7 };
    CODES[code as usize & 15].wrapping_add(scale)
}
