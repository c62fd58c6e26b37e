//! Rotary position embedding: rotates pairs of elements of a head by an angle that grows with the position.
//!
//! What must hold: the angle is the f32 product of position and inverse frequency, as the reference implementation
//! (transformers' rotary embedding) has it; its sine and cosine are those of exactly that f32, taken in f64 and
//! rounded. It does not know which rows are queries and which keys.

use crate::error::KernelError;

/// Elements of a rotated pair.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + dim / 2`.
    #[default]
    Halves,
    /// `2i` and `2i + 1`.
    Neighbours,
}

/// Scaling of an embedding's frequencies, for contexts longer than the one trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling<'a> {
    /// No scaling.
    None,
    /// All frequencies are divided by this.
    Linear(f64),
    /// Slow frequencies are divided, fast ones stay, those between are mixed by their number.
    Yarn(Yarn),
    /// Slow frequencies are divided, fast ones stay, those between are mixed by their wavelength.
    Llama3(Llama3),
    /// Each frequency is divided by a number of its own.
    Each {
        /// One per pair.
        divisors: &'a [f32],
        /// Factor on sines and cosines.
        amplitude: f32,
    },
}

/// YaRN (Peng et al., 2023).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// Divisor of slow frequencies.
    pub factor: f64,
    /// Length of the context trained on.
    pub original_context: f64,
    /// Turns within that context above which a frequency stays.
    pub beta_fast: f64,
    /// Turns within that context below which a frequency is divided.
    pub beta_slow: f64,
    /// The bounds between fast, mixed and slow are rounded outwards to whole numbers.
    pub truncate: bool,
    /// Factor on sines and cosines.
    pub amplitude: f32,
}

/// Llama 3's scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3 {
    /// Divisor of slow frequencies.
    pub factor: f64,
    /// Length of the context trained on.
    pub original_context: f64,
    /// Turns within that context below which a frequency is divided.
    pub low: f64,
    /// Turns within that context above which a frequency stays.
    pub high: f64,
}

/// The inverse frequencies of a rotary embedding, `theta^(-2i/dim)` in f32 unless scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    inverse_frequencies: Vec<f32>,
    pairs: RopePairs,
    amplitude: f32,
}

impl Rope {
    /// A rotary embedding of the first `dim` elements of a head.
    ///
    /// # Errors
    /// [`KernelError::Theta`] unless `theta` is finite and above zero; [`KernelError::Size`] unless `dim` is even and
    /// above zero, or unless divisors, if any, are one per pair.
    pub fn new(
        theta: f64,
        dim: usize,
        pairs: RopePairs,
        scaling: &RopeScaling<'_>,
    ) -> Result<Self, KernelError> {
        if !(theta.is_finite() && theta > 0.0) {
            return Err(KernelError::Theta { theta });
        }
        if dim == 0 || !dim.is_multiple_of(2) || dim > u16::MAX.into() {
            return Err(KernelError::Size {
                field: "dim",
                value: dim,
                rule: "even, at least 2 and below 65536",
            });
        }
        // The reference computes exponent, power and reciprocal in f32, one after the other.
        let plain = (0..dim / 2).map(|i| 1.0 / period(theta, dim, i));
        let (inverse_frequencies, amplitude) = match *scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear(factor) => (plain.map(|frequency| frequency / factor as f32).collect(), 1.0),
            RopeScaling::Yarn(yarn) => (yarn.frequencies(theta, dim), yarn.amplitude),
            RopeScaling::Llama3(scaling) => (plain.map(|frequency| scaling.of(frequency)).collect(), 1.0),
            RopeScaling::Each { divisors, amplitude } => {
                if divisors.len() != dim / 2 {
                    let rule = "as many as there are pairs";
                    return Err(KernelError::Size { field: "divisors", value: divisors.len(), rule });
                }
                let divided = |(i, divisor): (usize, &f32)| 1.0 / (divisor * period(theta, dim, i));
                (divisors.iter().enumerate().map(divided).collect(), amplitude)
            }
        };
        Ok(Self { inverse_frequencies, pairs, amplitude })
    }

    /// Elements of a head that are rotated.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.inverse_frequencies.len() * 2
    }

    /// Sines and cosines of rows at `positions`, into `out`, whose memory is reused. They are the same for all layers
    /// and heads of a step.
    pub fn angles(&self, positions: &[u32], out: &mut Angles) {
        out.half = self.inverse_frequencies.len();
        out.pairs = self.pairs;
        out.cos.clear();
        out.sin.clear();
        for &position in positions {
            for frequency in &self.inverse_frequencies {
                let angle = f64::from(position as f32 * frequency);
                let (sin, cos) = libm::sincos(angle);
                out.sin.push(sin as f32 * self.amplitude);
                out.cos.push(cos as f32 * self.amplitude);
            }
        }
    }
}

impl Yarn {
    fn frequencies(&self, theta: f64, dim: usize) -> Vec<f32> {
        // Index, as a real number, of the pair that turns this often in the original context.
        let place = |turns: f64| {
            let ratio = self.original_context / (turns * 2.0 * std::f64::consts::PI);
            dim as f64 * libm::log(ratio) / (2.0 * libm::log(theta))
        };
        let (mut low, mut high) = (place(self.beta_fast), place(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min((dim - 1) as f64));
        if low == high {
            high += 0.001;
        }
        let (low, width, factor) = (low as f32, (high - low) as f32, self.factor as f32);
        let frequency = |i: usize| {
            let kept = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
            let period = period(theta, dim, i);
            1.0 / (factor * period) * (1.0 - kept) + 1.0 / period * kept
        };
        (0..dim / 2).map(frequency).collect()
    }
}

impl Llama3 {
    fn of(&self, frequency: f32) -> f32 {
        let (factor, low, high) = (self.factor as f32, self.low as f32, self.high as f32);
        let wavelength = (2.0 * std::f64::consts::PI) as f32 / frequency;
        if wavelength > (self.original_context / self.low) as f32 {
            return frequency / factor;
        }
        if wavelength < (self.original_context / self.high) as f32 || low == high {
            return frequency;
        }
        let kept = (self.original_context as f32 / wavelength - low) / (high - low);
        (1.0 - kept) * frequency / factor + kept * frequency
    }
}

/// Sines and cosines for the rows of a call, `[rows, dim / 2]` each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Angles {
    half: usize,
    pairs: RopePairs,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Cosines, `[rows, dim / 2]`.
    #[must_use]
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines, `[rows, dim / 2]`.
    #[must_use]
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// Rotates every head of `x` (`[rows, heads * head_dim]`) by its row's angles. Where the embedding's dimension is below
/// `head_dim`, the rest of a head stays as it is. Products and sums are rounded one by one.
///
/// # Panics
/// If `head_dim` is below the angles' dimension, or `x` is not rows of whole heads.
pub fn rotate(angles: &Angles, x: &mut [f32], head_dim: usize) {
    let half = angles.half;
    if x.is_empty() && angles.cos.is_empty() {
        return;
    }
    assert!(half > 0 && !angles.cos.is_empty(), "angles: they hold no rows, x does");
    assert!(2 * half <= head_dim, "head_dim: {head_dim} is below the dimension of the angles, {}", 2 * half);
    let rows = angles.cos.len() / half;
    assert!(
        x.len().is_multiple_of(rows * head_dim),
        "x: its length must be {rows} rows of heads of {head_dim}"
    );
    let width = x.len() / rows;
    if width == 0 {
        return;
    }
    let pairs = angles.pairs;
    let angles = angles.cos.chunks_exact(half).zip(angles.sin.chunks_exact(half));
    for (row, (cos, sin)) in x.chunks_exact_mut(width).zip(angles) {
        for head in row.chunks_exact_mut(head_dim) {
            let turned = &mut head[..2 * half];
            match pairs {
                RopePairs::Halves => {
                    let (low, high) = turned.split_at_mut(half);
                    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        (*low, *high) = turn(*low, *high, *cos, *sin);
                    }
                }
                RopePairs::Neighbours => {
                    for (([low, high], cos), sin) in turned.as_chunks_mut().0.iter_mut().zip(cos).zip(sin) {
                        (*low, *high) = turn(*low, *high, *cos, *sin);
                    }
                }
            }
        }
    }
}

/// `theta^(2i/dim)`, whose reciprocal is the frequency.
fn period(theta: f64, dim: usize, i: usize) -> f32 {
    let exponent = (2 * i) as f32 / dim as f32;
    libm::pow(f64::from(theta as f32), f64::from(exponent)) as f32
}

fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}
