//! Integer arithmetic on bytes: the inner product of four unsigned by four signed bytes in each of sixteen lanes, and
//! the compilation of kernel bodies for each machine's support of it.
//!
//! What must hold: every operation is exact, so that instruction sets differ in speed alone.

use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, V16};
use crate::simd::{LANES, Portable, Simd};

/// Bytes of sixteen lanes.
pub(crate) const LINE: usize = 4 * LANES;

/// Sixteen lanes of 32 bits, each a number or four bytes, the first in the lowest.
pub(crate) trait Bytes<S: Simd>: Copy {
    /// The lanes.
    type I: Copy;
    /// `value` in every lane.
    fn splat(self, value: i32) -> Self::I;
    /// Sixty-four bytes.
    fn load(self, from: &[u8; LINE]) -> Self::I;
    /// The low four bits of every byte.
    fn low(self, v: Self::I) -> Self::I;
    /// The high four bits of every byte.
    fn high(self, v: Self::I) -> Self::I;
    /// `acc` plus the four products of each lane's unsigned bytes of `w` with its signed bytes of `x`.
    fn dot(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// [`Self::dot`] where no byte of `w` is above 15.
    fn dot_small(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// Prefetches as much memory as `block` takes, `ahead` bytes after it. A hint: any address is allowed.
    fn prefetch<T>(self, block: &T, ahead: usize);
    /// The numbers, which must be below 2^24, as floats.
    fn to_f32(self, v: Self::I) -> S::V;
}

/// A kernel body over floats and bytes, written once for any instruction set.
pub(crate) trait ByteKernel {
    /// The body. It must be `inline(always)`, as must every function that it passes vectors to.
    fn run<S: Simd, B: Bytes<S>>(self, s: S, b: B);
}

/// A way to compile a body: an instruction set, with or without its inner product of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    Portable,
    Avx2,
    AvxVnni,
    Avx512,
    Avx512Vnni,
}

impl Body {
    /// The fastest body within `isa` that this machine can run.
    #[inline]
    pub(crate) fn of(isa: Isa) -> Self {
        let (vnni, plain) = match isa {
            Isa::Portable | Isa::Neon => return Self::Portable,
            Isa::Avx2 => (Self::AvxVnni, Self::Avx2),
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => (Self::Avx512Vnni, Self::Avx512),
        };
        if vnni.is_available() { vnni } else { plain }
    }

    #[inline]
    pub(crate) fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => Isa::Avx2.is_available(),
            Self::Avx512 => Isa::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::AvxVnni | Self::Avx512Vnni => false,
        }
    }
}

/// Runs `kernel` compiled as `body`.
///
/// # Panics
/// If this machine cannot run it.
#[inline]
pub(crate) fn run_as(body: Body, kernel: impl ByteKernel) {
    assert!(body.is_available(), "isa: {body:?} is not available on this machine");
    match body {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above found the features that the function enables.
        Body::Avx2 => unsafe { run_avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Body::AvxVnni => unsafe { run_avx_vnni(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Body::Avx512 => unsafe { run_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Body::Avx512Vnni => unsafe { run_avx512_vnni(kernel) },
        _ => kernel.run(Portable, PlainBytes),
    }
}

/// Plain Rust: the definition that the other implementations reproduce.
#[derive(Debug, Clone, Copy)]
struct PlainBytes;

#[inline(always)]
fn map2(a: [i32; LANES], b: [i32; LANES], op: impl Fn([u8; 4], [u8; 4]) -> i32) -> [i32; LANES] {
    std::array::from_fn(|i| op(a[i].to_le_bytes(), b[i].to_le_bytes()))
}

impl Bytes<Portable> for PlainBytes {
    type I = [i32; LANES];
    #[inline(always)]
    fn splat(self, value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[u8; LINE]) -> Self::I {
        std::array::from_fn(|i| {
            i32::from_le_bytes([from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]])
        })
    }
    #[inline(always)]
    fn low(self, v: Self::I) -> Self::I {
        v.map(|v| v & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn high(self, v: Self::I) -> Self::I {
        v.map(|v| v >> 4 & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn dot(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        let products =
            map2(w, x, |w, x| (0..4).map(|j| i32::from(w[j]) * i32::from(x[j].cast_signed())).sum());
        std::array::from_fn(|i| acc[i] + products[i])
    }
    #[inline(always)]
    fn dot_small(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        self.dot(acc, w, x)
    }
    #[inline(always)]
    fn prefetch<T>(self, _: &T, _: usize) {}
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> [f32; LANES] {
        v.map(|v| v as f32)
    }
}

#[cfg(target_arch = "x86_64")]
use x86::{run_avx_vnni, run_avx2, run_avx512, run_avx512_vnni};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Avx2, Avx512, ByteKernel, Bytes, LINE, V16};

    /// Evaluates an intrinsic; `self` is the proof that it may be.
    macro_rules! simd {
        ($e:expr) => {
            // SAFETY: the byte types below are made only by the functions that enable their instruction sets, which
            // run only where those were detected; loads go through references to arrays and stay within them.
            unsafe { $e }
        };
    }

    /// Products by widening to 16 bits, for machines without VNNI: exact, where `maddubs` alone would saturate.
    #[derive(Clone, Copy)]
    struct Wide256;
    /// AVX-VNNI.
    #[derive(Clone, Copy)]
    struct Vnni256;
    /// As [`Wide256`].
    #[derive(Clone, Copy)]
    struct Wide512;
    /// AVX512-VNNI.
    #[derive(Clone, Copy)]
    struct Vnni512;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn run_avx2(kernel: impl ByteKernel) {
        // SAFETY: this function runs only on a machine with the features that it enables.
        kernel.run(unsafe { Avx2::new() }, Wide256);
    }

    #[target_feature(enable = "avx2,fma,avxvnni")]
    pub(super) fn run_avx_vnni(kernel: impl ByteKernel) {
        // SAFETY: as for `run_avx2`.
        kernel.run(unsafe { Avx2::new() }, Vnni256);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) fn run_avx512(kernel: impl ByteKernel) {
        // SAFETY: as for `run_avx2`.
        kernel.run(unsafe { Avx512::<false>::new() }, Wide512);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
    pub(super) fn run_avx512_vnni(kernel: impl ByteKernel) {
        // SAFETY: as for `run_avx2`.
        kernel.run(unsafe { Avx512::<false>::new() }, Vnni512);
    }

    #[inline(always)]
    fn prefetch<T>(block: &T, ahead: usize) {
        let start: *const i8 = std::ptr::from_ref(block).cast();
        for line in (0..size_of::<T>()).step_by(LINE) {
            // SAFETY: a prefetch reads nothing and never faults, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(ahead + line)) };
        }
    }

    /// Eight low and eight high lanes.
    #[derive(Clone, Copy)]
    struct Pair(__m256i, __m256i);

    #[inline(always)]
    fn wide_dot_half(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        simd!({
            let even_w = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
            let even_x = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
            let even = _mm256_madd_epi16(even_w, even_x);
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(w), _mm256_srai_epi16::<8>(x));
            _mm256_add_epi32(_mm256_add_epi32(acc, even), odd)
        })
    }

    /// At most 2 * 15 * 128 in 16 bits, so nothing saturates.
    #[inline(always)]
    fn small_dot_half(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        simd!({
            let products = _mm256_maddubs_epi16(w, x);
            _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
        })
    }

    #[inline(always)]
    fn vnni_dot_half(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        simd!(_mm256_dpbusd_avx_epi32(acc, w, x))
    }

    macro_rules! bytes256 {
        ($name:ident, $dot:path, $dot_small:path) => {
            impl Bytes<Avx2> for $name {
                type I = Pair;
                #[inline(always)]
                fn splat(self, value: i32) -> Pair {
                    let v = simd!(_mm256_set1_epi32(value));
                    Pair(v, v)
                }
                #[inline(always)]
                fn load(self, from: &[u8; LINE]) -> Pair {
                    let from: *const __m256i = from.as_ptr().cast();
                    simd!(Pair(_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))))
                }
                #[inline(always)]
                fn low(self, v: Pair) -> Pair {
                    simd!({
                        let mask = _mm256_set1_epi8(15);
                        Pair(_mm256_and_si256(v.0, mask), _mm256_and_si256(v.1, mask))
                    })
                }
                #[inline(always)]
                fn high(self, v: Pair) -> Pair {
                    self.low(simd!(Pair(_mm256_srli_epi16::<4>(v.0), _mm256_srli_epi16::<4>(v.1))))
                }
                #[inline(always)]
                fn dot(self, acc: Pair, w: Pair, x: Pair) -> Pair {
                    Pair($dot(acc.0, w.0, x.0), $dot(acc.1, w.1, x.1))
                }
                #[inline(always)]
                fn dot_small(self, acc: Pair, w: Pair, x: Pair) -> Pair {
                    Pair($dot_small(acc.0, w.0, x.0), $dot_small(acc.1, w.1, x.1))
                }
                #[inline(always)]
                fn prefetch<T>(self, block: &T, ahead: usize) {
                    prefetch(block, ahead);
                }
                #[inline(always)]
                fn to_f32(self, v: Pair) -> V16 {
                    simd!(V16(_mm256_cvtepi32_ps(v.0), _mm256_cvtepi32_ps(v.1)))
                }
            }
        };
    }

    bytes256!(Wide256, wide_dot_half, small_dot_half);
    bytes256!(Vnni256, vnni_dot_half, vnni_dot_half);

    #[inline(always)]
    fn wide_dot(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        simd!({
            let even_w = _mm512_and_si512(w, _mm512_set1_epi16(0xff));
            let even_x = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
            let even = _mm512_madd_epi16(even_w, even_x);
            let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(w), _mm512_srai_epi16::<8>(x));
            _mm512_add_epi32(_mm512_add_epi32(acc, even), odd)
        })
    }

    /// As `small_dot_half`.
    #[inline(always)]
    fn small_dot(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        simd!({
            let products = _mm512_maddubs_epi16(w, x);
            _mm512_add_epi32(acc, _mm512_madd_epi16(products, _mm512_set1_epi16(1)))
        })
    }

    #[inline(always)]
    fn vnni_dot(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        simd!(_mm512_dpbusd_epi32(acc, w, x))
    }

    macro_rules! bytes512 {
        ($name:ident, $dot:path, $dot_small:path) => {
            impl Bytes<Avx512<false>> for $name {
                type I = __m512i;
                #[inline(always)]
                fn splat(self, value: i32) -> __m512i {
                    simd!(_mm512_set1_epi32(value))
                }
                #[inline(always)]
                fn load(self, from: &[u8; LINE]) -> __m512i {
                    simd!(_mm512_loadu_si512(from.as_ptr().cast()))
                }
                #[inline(always)]
                fn low(self, v: __m512i) -> __m512i {
                    simd!(_mm512_and_si512(v, _mm512_set1_epi8(15)))
                }
                #[inline(always)]
                fn high(self, v: __m512i) -> __m512i {
                    self.low(simd!(_mm512_srli_epi16::<4>(v)))
                }
                #[inline(always)]
                fn dot(self, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
                    $dot(acc, w, x)
                }
                #[inline(always)]
                fn dot_small(self, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
                    $dot_small(acc, w, x)
                }
                #[inline(always)]
                fn prefetch<T>(self, block: &T, ahead: usize) {
                    prefetch(block, ahead);
                }
                #[inline(always)]
                fn to_f32(self, v: __m512i) -> __m512 {
                    simd!(_mm512_cvtepi32_ps(v))
                }
            }
        };
    }

    bytes512!(Wide512, wide_dot, small_dot);
    bytes512!(Vnni512, vnni_dot, vnni_dot);
}

#[cfg(test)]
pub(crate) fn available() -> Vec<Body> {
    let all = [Body::Portable, Body::Avx2, Body::AvxVnni, Body::Avx512, Body::Avx512Vnni];
    all.into_iter().filter(|body| body.is_available()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::lanes;

    /// Applies every operation to one line and one word.
    struct Try<'a> {
        line: &'a [u8; LINE],
        word: [u8; 4],
        out: &'a mut Vec<[f32; LANES]>,
    }

    impl ByteKernel for Try<'_> {
        #[inline(always)]
        fn run<S: Simd, B: Bytes<S>>(self, s: S, b: B) {
            let (w, x) = (b.load(self.line), b.splat(i32::from_le_bytes(self.word)));
            let whole = b.dot(b.splat(-77), w, x);
            let low = b.dot_small(b.splat(5), b.low(w), x);
            let high = b.dot_small(low, b.high(w), x);
            for v in [whole, low, high] {
                self.out.push(lanes(s, b.to_f32(v)));
            }
        }
    }

    fn plain(line: &[u8; LINE], word: [u8; 4]) -> Vec<[f32; LANES]> {
        let sum = |start: i32, weight: &dyn Fn(u8) -> u8| -> [f32; LANES] {
            std::array::from_fn(|lane| {
                let product = |j: usize| i32::from(weight(line[4 * lane + j])) * i32::from(word[j] as i8);
                (start + (0..4).map(product).sum::<i32>()) as f32
            })
        };
        let low = sum(5, &|w| w & 15);
        let high = sum(0, &|w| w >> 4);
        vec![sum(-77, &|w| w), low, std::array::from_fn(|i| low[i] + high[i])]
    }

    #[test]
    fn every_body_is_exact_at_the_ends_of_the_range() {
        let bodies = available();
        assert_eq!(bodies[0], Body::Portable);
        let lines: [[u8; LINE]; 4] = [
            [255; LINE],
            [0; LINE],
            std::array::from_fn(|i| (i * 37) as u8),
            std::array::from_fn(|i| !(i as u8)),
        ];
        let words = [[127; 4], [129; 4], [127, 129, 127, 129], [129, 127, 1, 255], [0, 3, 0, 200]];
        for body in bodies {
            for line in &lines {
                for word in words {
                    let mut out = Vec::new();
                    run_as(body, Try { line, word, out: &mut out });
                    assert_eq!(out, plain(line, word), "{body:?} {word:?}");
                }
            }
        }
    }

    #[test]
    fn a_set_without_its_inner_product_falls_back_within_itself() {
        for isa in Isa::available() {
            let body = Body::of(isa);
            assert!(body.is_available());
            let within = match isa {
                Isa::Portable | Isa::Neon => [Body::Portable; 2],
                Isa::Avx2 => [Body::Avx2, Body::AvxVnni],
                _ => [Body::Avx512, Body::Avx512Vnni],
            };
            assert!(within.contains(&body), "{isa} runs {body:?}");
        }
    }
}
