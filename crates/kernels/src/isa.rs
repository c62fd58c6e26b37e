//! Which instruction sets there are, which of them this machine has, and how a kernel body is compiled for each.
//!
//! What must hold: a body runs only with an instruction set that was detected, and gives the same bits with all.

use std::fmt;
use std::str::FromStr;

use crate::error::KernelError;
#[cfg(target_arch = "aarch64")]
use crate::simd::Neon;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};

/// An instruction set that kernels are compiled for. All give the same bits; they differ in speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust; every machine has it.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AArch64, all of which has it.
    Neon,
}

impl Isa {
    const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Neon];

    /// The fastest set that this machine has.
    #[must_use]
    pub fn detect() -> Self {
        let mut best = Self::Portable;
        for isa in Self::ALL {
            if isa.is_available() {
                best = isa;
            }
        }
        best
    }

    /// Every set that this machine has, the slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this machine has the set.
    #[inline]
    pub(crate) fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_available()
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
            Self::Neon => cfg!(target_arch = "aarch64"),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        })
    }
}

impl FromStr for Isa {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Self, KernelError> {
        let found = Self::ALL.into_iter().find(|isa| isa.to_string() == name);
        found.ok_or_else(|| KernelError::UnknownIsa { name: name.to_owned() })
    }
}

/// A kernel body, written once over any instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// The body. Must be `inline(always)`, and so must all it calls with vectors.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `kernel` compiled for `isa`.
///
/// # Panics
/// If this machine does not have `isa`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    assert!(isa.is_available(), "isa: `{isa}` is not available on this machine");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above found AVX2 and FMA.
        Isa::Avx2 => unsafe { run_avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above found these AVX-512 parts.
        Isa::Avx512 => unsafe { run_avx512(kernel) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => kernel.run(Neon),
        _ => kernel.run(Portable),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function runs only on a machine with the features that it enables.
    kernel.run(unsafe { Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function runs only on a machine with the features that it enables.
    kernel.run(unsafe { Avx512::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        }
        let refused = "AVX2".parse::<Isa>().unwrap_err().to_string();
        assert_eq!(refused, "unknown instruction set `AVX2`: use portable, avx2, avx512 or neon");
    }

    #[test]
    fn detection_is_the_last_of_what_is_available() {
        let all = Isa::available();
        assert_eq!(all.first(), Some(&Isa::Portable));
        assert_eq!(all.last(), Some(&Isa::detect()));
    }
}
