//! Numerics: classes of devices with the same bits, whether a cluster requires them, and the binding of experts to
//! classes.

use std::fmt;
use std::str::FromStr;

/// Devices whose kernels give identical bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NumericsClass {
    /// Every CPU: all instruction sets reproduce one canonical reduction order.
    CpuCanonical,
    /// CUDA devices that multiply with `mma.sync`.
    CudaMma,
    /// CUDA devices that multiply with `wgmma`.
    CudaWgmma,
}

impl NumericsClass {
    /// All classes, in the order of preference for binding an expert.
    pub const ALL: [Self; 3] = [Self::CpuCanonical, Self::CudaMma, Self::CudaWgmma];

    /// Its place in [`Self::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    const fn bit(self) -> u8 {
        1 << self.index()
    }
}

impl fmt::Display for NumericsClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuCanonical => "cpu-canonical",
            Self::CudaMma => "cuda-mma",
            Self::CudaWgmma => "cuda-wgmma",
        })
    }
}

/// Text that is not a numerics class.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no numerics class; write cpu-canonical, cuda-mma or cuda-wgmma")]
pub struct ParseNumericsClassError(String);

impl FromStr for NumericsClass {
    type Err = ParseNumericsClassError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|class| class.to_string() == text);
        found.ok_or_else(|| ParseNumericsClassError(text.chars().take(64).collect()))
    }
}

/// A set of classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ClassSet(u8);

impl ClassSet {
    /// The empty set.
    pub const EMPTY: Self = Self(0);

    /// Adds a class.
    pub const fn insert(&mut self, class: NumericsClass) {
        self.0 |= class.bit();
    }

    /// Adds all classes of another set.
    pub const fn extend(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Whether the set has a class.
    #[must_use]
    pub const fn contains(self, class: NumericsClass) -> bool {
        self.0 & class.bit() != 0
    }

    /// The set's classes, in the order of [`NumericsClass::ALL`].
    pub fn iter(self) -> impl Iterator<Item = NumericsClass> {
        NumericsClass::ALL.into_iter().filter(move |&class| self.contains(class))
    }
}

impl FromIterator<NumericsClass> for ClassSet {
    fn from_iter<T: IntoIterator<Item = NumericsClass>>(classes: T) -> Self {
        let mut set = Self::EMPTY;
        classes.into_iter().for_each(|class| set.insert(class));
        set
    }
}

/// Whether workers of several classes may compute one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Numerics {
    /// Each expert is bound to one class, so that a request always gives the same bits.
    #[default]
    Exact,
    /// Every worker is used, and bits depend on which one computed a row.
    Any,
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Any => "any",
        })
    }
}

/// Text that is not a numerics mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no way to treat numerics; write exact or any")]
pub struct ParseNumericsError(String);

impl FromStr for Numerics {
    type Err = ParseNumericsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = [Self::Exact, Self::Any].into_iter().find(|numerics| numerics.to_string() == text);
        found.ok_or_else(|| ParseNumericsError(text.chars().take(64).collect()))
    }
}

/// Identity of a binding of experts to classes: routers with equal ones give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BindingName {
    /// All experts are bound to this class.
    One(NumericsClass),
    /// Experts are bound to several classes; a digest of the binding.
    Several([u8; 32]),
    /// Experts are not bound: any class may compute them.
    Any,
}

impl BindingName {
    /// Identity of the binding to `classes`, by layer and expert.
    #[must_use]
    pub fn of(classes: impl Iterator<Item = NumericsClass> + Clone) -> Self {
        let mut set: ClassSet = classes.clone().collect();
        if set == ClassSet::EMPTY {
            set.insert(NumericsClass::CpuCanonical);
        }
        let mut each = set.iter();
        match (each.next(), each.next()) {
            (Some(only), None) => Self::One(only),
            _ => {
                let mut hash = blake3::Hasher::new();
                for class in classes {
                    hash.update(class.to_string().as_bytes());
                    hash.update(b"\n");
                }
                Self::Several(hash.finalize().into())
            }
        }
    }
}

impl Default for BindingName {
    /// The binding of a cluster of CPUs.
    fn default() -> Self {
        Self::One(NumericsClass::CpuCanonical)
    }
}

impl fmt::Display for BindingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(class) => class.fmt(f),
            Self::Several(digest) => digest.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
            Self::Any => f.write_str("any"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use NumericsClass::{CpuCanonical, CudaMma, CudaWgmma};

    #[test]
    fn words_are_read_as_they_are_written_and_others_are_refused() {
        for class in NumericsClass::ALL {
            assert_eq!(class.to_string().parse(), Ok(class));
            assert_eq!(NumericsClass::ALL[class.index()], class);
        }
        for numerics in [Numerics::Exact, Numerics::Any] {
            assert_eq!(numerics.to_string().parse(), Ok(numerics));
        }
        let refused = "cuda".parse::<NumericsClass>().unwrap_err().to_string();
        assert_eq!(refused, "\"cuda\" is no numerics class; write cpu-canonical, cuda-mma or cuda-wgmma");
        let refused = "Exact".parse::<Numerics>().unwrap_err().to_string();
        assert_eq!(refused, "\"Exact\" is no way to treat numerics; write exact or any");
    }

    #[test]
    fn sets_hold_what_was_put_into_them() {
        let mut set: ClassSet = [CudaWgmma, CpuCanonical, CudaWgmma].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [CpuCanonical, CudaWgmma]);
        assert!(!set.contains(CudaMma));
        set.extend([CudaMma].into_iter().collect());
        assert_eq!(set.iter().count(), 3);
    }

    #[test]
    fn a_binding_is_named_by_its_class_or_by_all_of_it() {
        let name = |classes: &[NumericsClass]| BindingName::of(classes.iter().copied());
        assert_eq!(name(&[]), BindingName::default());
        assert_eq!(name(&[CudaMma, CudaMma]), BindingName::One(CudaMma));
        let mixed = name(&[CudaMma, CpuCanonical]);
        assert_ne!(mixed, name(&[CpuCanonical, CudaMma]));
        assert_ne!(mixed, name(&[CudaWgmma, CpuCanonical]));
        assert_eq!((mixed.to_string().len(), name(&[CudaMma]).to_string()), (64, "cuda-mma".into()));
    }
}
