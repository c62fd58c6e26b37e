//! Limits of this machine: reading memory, copying it, and multiplying.
//!
//! Limits for comparison with figures. Every rate is the best of several tries, because a limit is a maximum.

use std::hint::black_box;
use std::time::Instant;

use serde::{Deserialize, Serialize};

const GIB: usize = 1 << 30;
const TRIES: usize = 5;
const ROUNDS: usize = 4_000_000;
/// Independent accumulators, so that no multiplication waits for the one before.
const SUMS: usize = 16;

/// Bytes or floating-point operations per second.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Limits {
    pub(crate) read_1_thread: f64,
    pub(crate) read_all_threads: f64,
    pub(crate) copy_1_thread: f64,
    pub(crate) copy_all_threads: f64,
    pub(crate) f32_1_thread: f64,
    pub(crate) f32_all_threads: f64,
    /// Dot products of bf16 pairs; `None` without an instruction for them.
    pub(crate) bf16_all_threads: Option<f64>,
    pub(crate) instructions: String,
}

impl Limits {
    /// The better of two measurements, for each limit.
    pub(crate) fn or_better(self, other: &Self) -> Self {
        Self {
            read_1_thread: self.read_1_thread.max(other.read_1_thread),
            read_all_threads: self.read_all_threads.max(other.read_all_threads),
            copy_1_thread: self.copy_1_thread.max(other.copy_1_thread),
            copy_all_threads: self.copy_all_threads.max(other.copy_all_threads),
            f32_1_thread: self.f32_1_thread.max(other.f32_1_thread),
            f32_all_threads: self.f32_all_threads.max(other.f32_all_threads),
            bf16_all_threads: self.bf16_all_threads.zip(other.bf16_all_threads).map(|(a, b)| a.max(b)),
            instructions: self.instructions,
        }
    }
}

/// Measures all limits.
pub(crate) fn measure(threads: usize) -> Limits {
    let level = Level::of_this_machine();
    let mut words = vec![1u64; GIB / 8];
    let read = |threads: usize| {
        let share = words.len() / threads;
        best(GIB as f64, || {
            each(words.chunks_exact(share), |words| {
                black_box(level.sum(words));
            });
        })
    };
    let (read_1_thread, read_all_threads) = (read(1), read(threads));
    let (from, to) = words.split_at_mut(GIB / 16);
    let mut copy = |threads: usize| {
        let share = from.len() / threads;
        best((GIB / 2) as f64, || {
            each(from.chunks_exact(share).zip(to.chunks_exact_mut(share)), |(from, to)| {
                to.copy_from_slice(from);
            });
        })
    };
    let (copy_1_thread, copy_all_threads) = (copy(1), copy(threads));
    let multiply = |threads: usize, kind: fn(Level) -> Option<f64>| {
        let operations = kind(level)?;
        Some(best(operations * threads as f64, || {
            each(0..threads, |_| {
                black_box(kind(level));
            });
        }))
    };
    Limits {
        read_1_thread,
        read_all_threads,
        copy_1_thread,
        copy_all_threads,
        f32_1_thread: multiply(1, Level::multiply_f32).unwrap_or(0.0),
        f32_all_threads: multiply(threads, Level::multiply_f32).unwrap_or(0.0),
        bf16_all_threads: multiply(threads, Level::multiply_bf16),
        instructions: level.name().to_owned(),
    }
}

/// Runs `work` on every item, each on its own thread.
fn each<T: Send>(items: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let work = &work;
    std::thread::scope(|scope| {
        for item in items {
            scope.spawn(move || work(item));
        }
    });
}

/// Amount per second in the fastest try.
fn best(amount: f64, mut work: impl FnMut()) -> f64 {
    let fastest = (0..TRIES)
        .map(|_| {
            let started = Instant::now();
            work();
            started.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    amount / fastest
}

/// Widest available vector instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Level {
    fn of_this_machine() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") {
                return Self::Avx512Bf16;
            }
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Plain
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "baseline",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "AVX-512 BF16",
        }
    }

    fn sum(self, words: &[u64]) -> u64 {
        match self {
            Self::Plain => sum(words),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level is only made after the features were detected.
            Self::Avx2 => unsafe { x86::sum_avx2(words) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Avx512 | Self::Avx512Bf16 => unsafe { x86::sum_avx512(words) },
        }
    }

    /// Runs a fixed number of multiplications and additions, and returns it.
    fn multiply_f32(self) -> Option<f64> {
        let lanes = match self {
            Self::Plain => plain(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level is only made after the features were detected.
            Self::Avx2 => unsafe { x86::fma_avx2() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Avx512 | Self::Avx512Bf16 => unsafe { x86::fma_avx512() },
        };
        Some((2 * ROUNDS * SUMS * lanes) as f64)
    }

    fn multiply_bf16(self) -> Option<f64> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                // SAFETY: this level is only made after the features were detected.
                let lanes = unsafe { x86::dot_bf16() };
                Some((2 * ROUNDS * SUMS * lanes) as f64)
            }
            _ => None,
        }
    }
}

#[inline(always)]
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 64];
    for chunk in words.chunks_exact(64) {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |sum, part| sum.wrapping_add(*part))
}

/// Returns the number of values in one sum.
fn plain() -> usize {
    const LANES: usize = 4;
    let (a, b) = (black_box([0.5f32; LANES]), black_box([0.5f32; LANES]));
    let mut sums = [[0f32; LANES]; SUMS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            for lane in 0..LANES {
                sum[lane] += a[lane] * b[lane];
            }
        }
        black_box(&mut sums);
    }
    LANES
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512bh, _mm256_add_ps, _mm256_fmadd_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm512_add_ps,
        _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps,
    };
    use std::hint::black_box;

    use super::{ROUNDS, SUMS};

    #[target_feature(enable = "avx2")]
    pub(super) fn sum_avx2(words: &[u64]) -> u64 {
        super::sum(words)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn sum_avx512(words: &[u64]) -> u64 {
        super::sum(words)
    }

    /// Returns the number of values in one sum.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma_avx2() -> usize {
        // Eight accumulators rather than sixteen: there are only sixteen registers.
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.5)));
        let mut sums = [_mm256_setzero_ps(); SUMS / 2];
        for _ in 0..2 * ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums.into_iter().reduce(|x, y| _mm256_add_ps(x, y)));
        8
    }

    /// Returns the number of values in one sum.
    #[target_feature(enable = "avx512f")]
    pub(super) fn fma_avx512() -> usize {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.5)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums.into_iter().reduce(|x, y| _mm512_add_ps(x, y)));
        16
    }

    /// Returns the number of products in one sum.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn dot_bf16() -> usize {
        // SAFETY: both are 64 bytes of which every pattern is valid.
        let half: __m512bh = unsafe { std::mem::transmute(black_box([0x3f00u16; 32])) };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, half, half);
            }
        }
        black_box(sums.into_iter().reduce(|x, y| _mm512_add_ps(x, y)));
        32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_agree_on_every_level() {
        let words: Vec<u64> = (0..640).collect();
        assert_eq!(Level::of_this_machine().sum(&words), 640 * 639 / 2);
        assert_eq!(Level::Plain.sum(&words), 640 * 639 / 2);
    }

    #[test]
    fn the_fastest_try_counts() {
        let mut pauses = [3, 1, 2, 3, 4].into_iter();
        let mut tries = 0;
        let rate = best(1.0, || {
            tries += 1;
            std::thread::sleep(std::time::Duration::from_millis(pauses.next().unwrap_or(9)));
        });
        assert_eq!(tries, TRIES);
        assert!(rate <= 1000.0, "no try was shorter than a millisecond");
    }
}
