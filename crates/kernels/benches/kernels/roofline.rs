//! Limits of this machine: bytes read from memory and multiply-adds, per second, on some threads at once.

use std::hint::black_box;
use std::sync::Barrier;

use muster_kernels::Isa;
use muster_types::Compute;

use crate::seconds;

/// Rates of all threads together.
pub(crate) struct Roofline {
    /// Bytes read per second.
    pub(crate) read: f64,
    /// f32 operations per second with fused multiply-adds.
    pub(crate) fma: f64,
    /// Operations per second with `vdpbf16ps`.
    pub(crate) pairs: Option<f64>,
    /// Operations per second with `tdpbf16ps`.
    pub(crate) tiles: Option<f64>,
}

impl Roofline {
    pub(crate) fn measure(threads: usize) -> Self {
        let has = |isa| Isa::available().contains(&isa);
        Self {
            read: read(threads),
            fma: rate(threads, &|n| if has(Isa::Avx512) { fma_512(n) } else { fma_plain(n) }),
            pairs: has(Isa::Avx512Bf16).then(|| rate(threads, &pairs_512)),
            tiles: has(Isa::Amx).then(|| rate(threads, &tiles)),
        }
    }

    /// Operations per second that a linear on bf16 weights could reach.
    pub(crate) fn compute(&self, compute: Compute) -> f64 {
        match compute {
            Compute::Bf16Pairs => self.pairs.unwrap_or(self.fma),
            Compute::Bf16 => self.tiles.unwrap_or(self.fma),
            Compute::F32 => self.fma,
        }
    }
}

/// Units per second of the fastest of some rounds, in which every thread does `units` of them by `work`.
fn fastest<T: Sync>(inputs: &[T], units: f64, work: &(dyn Fn(&T) + Sync)) -> f64 {
    let (mut best, count) = (0.0_f64, inputs.len());
    for _ in 0..15 {
        let start = Barrier::new(count);
        let slowest = std::thread::scope(|scope| {
            let threads: Vec<_> = inputs
                .iter()
                .map(|input| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        let started = seconds(count);
                        work(input);
                        seconds(count) - started
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("the work ends")).fold(0.0, f64::max)
        });
        best = best.max(units * count as f64 / slowest);
    }
    best
}

/// Bytes read per second from more memory than caches hold.
fn read(threads: usize) -> f64 {
    const WORDS: usize = 32 << 20;
    let memory: Vec<Vec<u64>> = (0..threads).map(|_| vec![1; WORDS]).collect();
    fastest(&memory, (WORDS * 8) as f64, &|words| {
        // Four streams, like the panels of a tile, and enough sums that none waits for another.
        let streams: Vec<_> = words.chunks(WORDS / 4).map(|stream| stream.as_chunks::<8>().0).collect();
        let mut sums = [[0_u64; 8]; 4];
        for i in 0..streams[0].len() {
            for (sums, stream) in sums.iter_mut().zip(&streams) {
                for (sum, word) in sums.iter_mut().zip(&stream[i]) {
                    *sum = sum.wrapping_add(*word);
                }
            }
        }
        black_box(sums);
    })
}

const ROUNDS: usize = 1_000_000;

/// Operations per second; `work` returns how many it did for a number of rounds.
fn rate(threads: usize, work: &(dyn Fn(usize) -> f64 + Sync)) -> f64 {
    let units = work(1000) / 1000.0 * ROUNDS as f64;
    fastest(&vec![(); threads], units, &|()| {
        black_box(work(ROUNDS));
    })
}

#[cfg(target_arch = "x86_64")]
fn fma_512(rounds: usize) -> f64 {
    use std::arch::x86_64::{__m512, _mm512_fmadd_ps, _mm512_set1_ps};

    #[target_feature(enable = "avx512f")]
    fn run(rounds: usize) -> [__m512; 16] {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut sums = [a; 16];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        sums
    }
    // SAFETY: called only where the machine has AVX-512.
    black_box(unsafe { run(rounds) });
    (rounds * 16 * 32) as f64
}

#[cfg(not(target_arch = "x86_64"))]
fn fma_512(rounds: usize) -> f64 {
    fma_plain(rounds)
}

/// [`rate`]'s work in plain code: compiled for AVX2 where there is FMA, for the target's own instructions elsewhere.
fn fma_plain(rounds: usize) -> f64 {
    #[inline(always)]
    fn body(rounds: usize) -> [[f32; 8]; 10] {
        let (a, b) = (black_box([0.5_f32; 8]), black_box([0.25_f32; 8]));
        let mut sums = [a; 10];
        for _ in 0..rounds {
            for sum in &mut sums {
                for lane in 0..8 {
                    sum[lane] = a[lane].mul_add(b[lane], sum[lane]);
                }
            }
        }
        sums
    }
    #[cfg(target_arch = "x86_64")]
    if Isa::available().contains(&Isa::Avx2) {
        #[target_feature(enable = "avx2,fma")]
        fn run(rounds: usize) -> [[f32; 8]; 10] {
            body(rounds)
        }
        // SAFETY: AVX2 with FMA was found.
        black_box(unsafe { run(rounds) });
        return (rounds * 10 * 16) as f64;
    }
    black_box(body(rounds));
    (rounds * 10 * 16) as f64
}

#[cfg(target_arch = "x86_64")]
fn pairs_512(rounds: usize) -> f64 {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_set1_ps};

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn run(rounds: usize) -> [__m512; 16] {
        let pair = _mm512_set1_epi32(black_box(0x3f00_3e80));
        // SAFETY: both types are 512 bits.
        let pair: __m512bh = unsafe { std::mem::transmute(pair) };
        let mut sums = [_mm512_set1_ps(0.0); 16];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, pair, pair);
            }
        }
        sums
    }
    // SAFETY: called only where the machine has AVX512-BF16.
    black_box(unsafe { run(rounds) });
    (rounds * 16 * 64) as f64
}

#[cfg(not(target_arch = "x86_64"))]
fn pairs_512(rounds: usize) -> f64 {
    fma_plain(rounds)
}

#[cfg(target_arch = "x86_64")]
fn tiles(rounds: usize) -> f64 {
    use std::arch::asm;

    // Palette 1, eight tiles of sixteen rows of 64 bytes.
    let mut config = [0_u8; 64];
    config[0] = 1;
    config[16..32].copy_from_slice(&[64, 0].repeat(8));
    config[48..56].fill(16);
    let rounds = rounds / 16;
    // SAFETY: called only where the machine has AMX and this process may use it; the compiler uses no tiles.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) config.as_ptr(), options(nostack, preserves_flags));
        for _ in 0..rounds {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                options(nomem, nostack, preserves_flags),
            );
        }
        asm!("tilerelease", options(nomem, nostack, preserves_flags));
    }
    (rounds * 4 * 16 * 16 * 64) as f64
}

#[cfg(not(target_arch = "x86_64"))]
fn tiles(rounds: usize) -> f64 {
    fma_plain(rounds)
}
