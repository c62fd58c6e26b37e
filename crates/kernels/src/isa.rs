//! Instruction sets and their detection. Does not know the kernels.

use std::fmt;
use std::str::FromStr;

/// An instruction set that kernels are compiled for. All give the same bits; they differ in speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust; every machine has it.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// [`Isa::Avx512`] with AVX512-BF16, whose dot product has the order of [`Compute::Bf16Pairs`].
    ///
    /// [`Compute::Bf16Pairs`]: muster_types::Compute::Bf16Pairs
    Avx512Bf16,
    /// [`Isa::Avx512Bf16`] with AMX tiles, whose dot product has the canonical order.
    Amx,
    /// AArch64, all of which has it.
    Neon,
}

impl Isa {
    const ALL: [Self; 6] =
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx, Self::Neon];

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
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Self::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => tiles::available() && Self::Avx512Bf16.is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 | Self::Amx => false,
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
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
            Self::Neon => "neon",
        })
    }
}

/// The name is not that of an instruction set.
#[derive(Debug, thiserror::Error)]
#[error("unknown instruction set `{name}`: use portable, avx2, avx512, avx512bf16, amx or neon")]
pub struct UnknownIsa {
    /// The name as given.
    name: String,
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        let found = Self::ALL.into_iter().find(|isa| isa.to_string() == name);
        found.ok_or_else(|| UnknownIsa { name: name.to_owned() })
    }
}

#[cfg(target_arch = "x86_64")]
mod tiles {
    //! Detection of AMX, which the standard library does not detect.

    use std::arch::asm;
    use std::sync::OnceLock;

    /// Whether processor and system have tiles and this process may use them. Requests the permission from the system.
    pub(super) fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| supported() && permitted())
    }

    fn supported() -> bool {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        // Tiles and their bf16 products; the system saves the tile configuration and data.
        const FEATURES: u32 = 1 << 24 | 1 << 22;
        const OSXSAVE: u32 = 1 << 27;
        const STATES: u32 = 1 << 18 | 1 << 17;
        // SAFETY: every x86-64 processor has this instruction.
        #[allow(unused_unsafe, reason = "newer compilers make it a safe function")]
        let (leaves, extended) = unsafe { (__cpuid(0).eax, __cpuid(1).ecx & OSXSAVE != 0) };
        if leaves < 7 || !extended {
            return false;
        }
        // SAFETY: the leaf exists.
        #[allow(unused_unsafe, reason = "newer compilers make it a safe function")]
        let features = unsafe { __cpuid_count(7, 0).edx };
        let states: u32;
        // SAFETY: the system has enabled this instruction, as OSXSAVE says.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") states, out("edx") _, options(nomem, nostack, preserves_flags));
        }
        features & FEATURES == FEATURES && states & STATES == STATES
    }

    /// Requests the state component of tile data, which no process has from the start, from the system.
    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const REQUEST_PERMISSION: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: this call takes two numbers and changes nothing in memory.
        unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }
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
        assert_eq!(
            refused,
            "unknown instruction set `AVX2`: use portable, avx2, avx512, avx512bf16, amx or neon"
        );
    }

    #[test]
    fn detection_is_the_last_of_what_is_available() {
        let all = Isa::available();
        assert_eq!(all.first(), Some(&Isa::Portable));
        assert_eq!(all.last(), Some(&Isa::detect()));
    }
}
