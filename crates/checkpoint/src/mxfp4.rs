//! OCP Microscaling MXFP4 (version 1.0): numbers of four bits, and for every 32 of them a power of two.

/// Bytes of a group: two numbers each.
const GROUP_BYTES: usize = 16;

/// The numbers, which f32 and bf16 both have exactly: `blocks` has two per byte, the first in the lower half, and
/// `scales` a byte for every 32 of them, which is the exponent of two plus 127 and not 255.
#[must_use]
pub fn widen(blocks: &[u8], scales: &[u8]) -> Vec<f32> {
    let groups = blocks.chunks_exact(GROUP_BYTES).zip(scales);
    groups
        .flat_map(|(group, &scale)| {
            let scale = power(scale);
            group.iter().flat_map(move |byte| [byte & 0xf, byte >> 4].map(|number| e2m1(number) * scale))
        })
        .collect()
}

/// A sign, two bits of exponent and one of mantissa.
const fn e2m1(bits: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[(bits & 7) as usize];
    if bits & 8 == 0 { magnitude } else { -magnitude }
}

/// Two to the power of `scale - 127`.
const fn power(scale: u8) -> f32 {
    // The least is below the normal numbers of f32.
    if scale == 0 { f32::from_bits(1 << 22) } else { f32::from_bits((scale as u32) << 23) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_the_format_says() {
        let mut blocks = [0_u8; 32];
        blocks[..8].copy_from_slice(&[0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe]);
        blocks[16] = 0x71;
        let wide = widen(&blocks, &[127, 126]);
        assert_eq!(wide.len(), 64);
        assert_eq!(wide[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!(wide[8..16], [-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]);
        assert_eq!((wide[32], wide[33], wide[34]), (0.25, 3.0, 0.0));
        assert_eq!([0, 1, 254].map(power), [2.0_f32.powi(-127), 2.0_f32.powi(-126), 2.0_f32.powi(127)]);
    }
}
