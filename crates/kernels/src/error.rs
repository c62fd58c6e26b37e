//! Errors of this crate's constructors.

use muster_types::Packing;

use crate::isa::Isa;

/// Why a kernel object could not be made. Trying again helps only after [`KernelError::OutOfMemory`], once memory is
/// free, or elsewhere after [`KernelError::IsaUnavailable`].
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// This machine cannot run the instruction set.
    #[error("instruction set `{isa}` is not available on this machine: the best one here is `{best}`")]
    IsaUnavailable {
        /// The requested set.
        isa: Isa,
        /// The best set that this machine has.
        best: Isa,
    },
    /// The operating system refused the compute threads.
    #[error("cannot start {threads} compute threads: {source}")]
    Threads {
        /// Number of requested threads, the calling thread included.
        threads: usize,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A size is outside its range.
    #[error("{field} is {value}: it must be {rule}")]
    Size {
        /// The size's name.
        field: &'static str,
        /// The offending value.
        value: usize,
        /// The range, in words.
        rule: &'static str,
    },
    /// A weight's data does not fill its shape.
    #[error("weight of shape [{n}, {k}] has {found} elements: it must have n * k")]
    Elements {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Elements given.
        found: usize,
    },
    /// Bytes that are no packed weight of this shape.
    #[error("{bytes} bytes are no packed weight of shape [{n}, {k}], or have a value that is not finite")]
    Packed {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// A packing that weights cannot be rounded to, only published in.
    #[error("weights cannot be rounded to {0}: it is accepted only as published")]
    Unrounded(Packing),
    /// A weight that is to be quantised has a NaN or an infinity.
    #[error("row {n} of the weight is not finite: it cannot be quantised")]
    NonFinite {
        /// The output feature.
        n: usize,
    },
    /// A weight's scales are not as many as its groups.
    #[error("weight of shape [{n}, {k}] has {found} scales: it must have one per 32 inputs of a row")]
    Scales {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Scales given.
        found: usize,
    },
    /// A scale of eight bits is no number, or makes weights of it that bf16 cannot hold.
    #[error("scale {group} of row {n} of the weight is {scale}: it must be at most 252, 255 is not a number")]
    Scale {
        /// The output feature.
        n: usize,
        /// The group of 32 input features.
        group: usize,
        /// The scale as stored.
        scale: u8,
    },
    /// One matrix of an expert does not fit the others.
    #[error("expert's {field} is [{n}, {k}], its gate asks for [{want_n}, {want_k}]")]
    ExpertShape {
        /// The matrix that does not fit.
        field: &'static str,
        /// Its output features.
        n: usize,
        /// Its input features.
        k: usize,
        /// The output features that fit.
        want_n: usize,
        /// The input features that fit.
        want_k: usize,
    },
    /// Matrices that are read together differ in element type.
    #[error(
        "expert's matrices have element types that do not go together: pack gate and up alike, and quantise all three \
         alike or none"
    )]
    ExpertTypes,
    /// A bias is not as long as its linear has outputs.
    #[error("expert's {field} bias has {found} elements: its linear has {want} outputs")]
    BiasLength {
        /// The linear.
        field: &'static str,
        /// Elements given.
        found: usize,
        /// Outputs of the linear.
        want: usize,
    },
    /// A bias has a NaN or an infinity.
    #[error("expert's {field} bias is not finite at {index}: check the checkpoint")]
    BiasNonFinite {
        /// The linear.
        field: &'static str,
        /// The output.
        index: usize,
    },
    /// The constants of a clamped activation are unusable.
    #[error(
        "activation's alpha is {alpha}, its limit {limit}: both must be finite, and the limit above zero"
    )]
    Gating {
        /// Factor on the gate inside the sigmoid.
        alpha: f32,
        /// Bound on gate and up.
        limit: f32,
    },
    /// The base of the rotary frequencies is unusable.
    #[error("rope theta is {theta}: it must be finite and above zero")]
    Theta {
        /// The offending value.
        theta: f64,
    },
    /// The size in bytes does not fit the address space.
    #[error("{field} needs more bytes than an address can count: lower its shape")]
    TooLarge {
        /// Name of the allocation.
        field: &'static str,
    },
    /// The operating system refused the memory.
    #[error("out of memory: {field} needs {bytes} bytes")]
    OutOfMemory {
        /// Name of the allocation.
        field: &'static str,
        /// Its size.
        bytes: usize,
    },
}
