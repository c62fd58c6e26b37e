//! A kernel body, and how it is compiled for each instruction set.
//!
//! What must hold: a body runs only with an instruction set that was detected, and gives the same bits with all.

use crate::isa::Isa;
#[cfg(target_arch = "aarch64")]
use crate::simd::Neon;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, FlushMode};
use crate::simd::{Portable, PortableFlush, Simd};

/// A kernel body, written once over any instruction set.
pub(crate) trait Kernel {
    /// Result of the body.
    type Output;
    /// The body. It must be `inline(always)`, as must every function that it passes vectors to.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `kernel` compiled for `isa`.
///
/// # Panics
/// If this machine does not have `isa`.
#[inline]
pub(crate) fn run_on<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    assert!(isa.is_available(), "isa: `{isa}` is not available on this machine");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above found AVX2 and FMA.
        Isa::Avx2 => unsafe { run_avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above found these AVX-512 parts.
        Isa::Avx512 => unsafe { run_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above found these AVX-512 parts and AVX512-BF16.
        Isa::Avx512Bf16 | Isa::Amx => unsafe { run_avx512_bf16(kernel) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => kernel.run(Neon),
        _ => kernel.run(Portable),
    }
}

/// As [`run_on`], with subnormal inputs and results of every operation flushed to zero. Linears run so, because the
/// hardware that defines their order does.
///
/// # Panics
/// As [`run_on`].
#[inline]
pub(crate) fn run_flushing<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
            let _mode = FlushMode::set();
            run_on(isa, kernel)
        }
        _ => kernel.run(PortableFlush),
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(never)] // see FlushMode
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function runs only on a machine with the features that it enables.
    kernel.run(unsafe { Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[inline(never)] // see FlushMode
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function runs only on a machine with the features that it enables.
    kernel.run(unsafe { Avx512::<false>::new() })
}

#[cfg(target_arch = "x86_64")]
#[inline(never)] // see FlushMode
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function runs only on a machine with the features that it enables.
    kernel.run(unsafe { Avx512::<true>::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{LANES, lanes};

    /// Every operation on three operands.
    struct Operations([[f32; LANES]; 3]);

    impl Kernel for Operations {
        type Output = [[f32; LANES]; 8];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let [a, b, c] = [s.load(&self.0[0]), s.load(&self.0[1]), s.load(&self.0[2])];
            [
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.fma(a, b, c),
                s.min(a, b),
                s.max(a, b),
                s.select_lt(a, b, b, c),
            ]
            .map(|v| lanes(s, v))
        }
    }

    /// Transposes rows.
    struct Transpose([[f32; LANES]; LANES]);

    impl Kernel for Transpose {
        type Output = [[f32; LANES]; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut rows = [s.splat(0.0); LANES];
            for (to, row) in rows.iter_mut().zip(&self.0) {
                *to = s.load(row);
            }
            let mut out = [[0.0; LANES]; LANES];
            for (to, row) in out.iter_mut().zip(s.transpose(rows)) {
                s.store(row, to);
            }
            out
        }
    }

    #[test]
    fn rows_become_columns_on_every_instruction_set() {
        let rows = std::array::from_fn(|row| std::array::from_fn(|lane| (row * LANES + lane) as f32));
        for isa in Isa::available() {
            let found = run_on(isa, Transpose(rows));
            for (i, found) in found.iter().enumerate() {
                assert_eq!(*found, rows.map(|row| row[i]), "{isa}");
            }
        }
    }

    /// Numbers of all kinds, most of which have sums, products and quotients near the least normal number.
    fn operand(state: &mut u64) -> f32 {
        *state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let bits = (*state >> 32) as u32;
        let with_exponent = |exponent: u32| f32::from_bits(bits & 0x807f_ffff | exponent << 23);
        match bits >> 4 & 15 {
            0 => f32::from_bits(bits),
            1 => {
                [0.0, f32::INFINITY, f32::NAN, f32::MAX][(bits >> 8 & 3) as usize].copysign(with_exponent(1))
            }
            2 | 3 => with_exponent(0),
            4..8 => f32::from_bits(0x0080_0000 + (bits >> 8 & 3)).copysign(with_exponent(1)),
            8 => with_exponent(127) * f32::EPSILON,
            9 => f32::from_bits(0x3f80_0000 - 1 + (bits >> 8 & 3)).copysign(with_exponent(1)),
            10 | 11 => with_exponent(62 + (bits >> 8 & 3)),
            12 | 13 => f32::from_bits(with_exponent(50 + (bits >> 8 & 3)).to_bits() & 0xff80_0000),
            _ => with_exponent(1 + (bits >> 8 & 3)),
        }
    }

    #[test]
    fn flushing_is_the_same_on_every_instruction_set() {
        let bits = |v: [f32; LANES]| v.map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() });
        let (mut state, mut lifted) = (7, 0);
        for _ in 0..200_000 {
            let operands: [[f32; LANES]; 3] =
                std::array::from_fn(|_| std::array::from_fn(|_| operand(&mut state)));
            let want = Operations(operands).run(PortableFlush);
            assert!(!want[..7].iter().flatten().any(|v| v.is_subnormal()), "{operands:?}");
            let kept = run_on(Isa::Portable, Operations(operands));
            lifted +=
                (0..LANES).filter(|&i| kept[4][i].abs() == f32::MIN_POSITIVE && want[4][i] == 0.0).count();
            for isa in Isa::available() {
                let found = run_flushing(isa, Operations(operands));
                assert_eq!(found.map(bits), want.map(bits), "{isa} {operands:?}");
            }
        }
        assert!(lifted > 1000, "{lifted}: the inputs miss results that only subnormal rounding lifts");
    }

    #[test]
    fn flushing_ends_with_the_call() {
        for isa in Isa::available() {
            let least = [f32::MIN_POSITIVE; LANES];
            run_flushing(isa, Operations([least; 3]));
            let thrown = std::panic::catch_unwind(|| run_flushing(isa, Throws));
            assert!(thrown.is_err());
            assert_eq!(std::hint::black_box(f32::MIN_POSITIVE) / 2.0, f32::from_bits(0x0040_0000), "{isa}");
        }
    }

    struct Throws;

    impl Kernel for Throws {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            panic!("a kernel fails");
        }
    }
}
