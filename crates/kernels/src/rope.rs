//! Rotary position embedding: pairs of elements of a head turn by an angle that grows with the position.
//!
//! What must hold: the angle is the f32 product of position and inverse frequency, as the reference implementation
//! (transformers' rotary embedding) has it; its sine and cosine are those of exactly that f32, taken in f64 and
//! rounded. It does not know which rows are queries and which keys.

use crate::error::KernelError;

/// Which elements turn together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + dim / 2`.
    #[default]
    Halves,
    /// `2i` and `2i + 1`.
    Neighbours,
}

/// Frequencies for contexts longer than those trained on: slow ones are divided by a factor, fast ones stay, those
/// between are mixed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// What slow frequencies are divided by.
    pub factor: f64,
    /// Length of the context trained on.
    pub original_context: f64,
    /// What turns more often than this in that context stays.
    pub beta_fast: f64,
    /// What turns less often than this is divided.
    pub beta_slow: f64,
    /// Factor on sines and cosines.
    pub amplitude: f32,
}

/// The inverse frequencies of a rotary embedding, `theta^(-2i/dim)` in f32 unless they are changed.
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
    /// above zero.
    pub fn new(theta: f64, dim: usize, pairs: RopePairs) -> Result<Self, KernelError> {
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
        let frequency = |i: usize| 1.0 / period(theta, dim, i);
        Ok(Self { inverse_frequencies: (0..dim / 2).map(frequency).collect(), pairs, amplitude: 1.0 })
    }

    /// The same with other frequencies.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn yarn(theta: f64, dim: usize, pairs: RopePairs, yarn: &Yarn) -> Result<Self, KernelError> {
        let mut rope = Self::new(theta, dim, pairs)?;
        // Where a pair that turns so often in the original context would stand.
        let place = |turns: f64| {
            let ratio = yarn.original_context / (turns * 2.0 * std::f64::consts::PI);
            dim as f64 * libm::log(ratio) / (2.0 * libm::log(theta))
        };
        let low = place(yarn.beta_fast).floor().max(0.0);
        let mut high = place(yarn.beta_slow).ceil().min((dim - 1) as f64);
        if low == high {
            high += 0.001;
        }
        let (low, width, factor) = (low as f32, (high - low) as f32, yarn.factor as f32);
        for (i, frequency) in rope.inverse_frequencies.iter_mut().enumerate() {
            let kept = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
            let divided = 1.0 / (factor * period(theta, dim, i));
            *frequency = divided * (1.0 - kept) + *frequency * kept;
        }
        rope.amplitude = yarn.amplitude;
        Ok(rope)
    }

    /// Elements of a head that are turned.
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

/// Turns every head of `x` (`[rows, heads * head_dim]`) by its row's angles. Where the embedding's dimension is below
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
