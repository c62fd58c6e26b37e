//! Relative speed of a worker.
//!
//! Owns the check: every speed is finite and above zero, so that loads can be divided by it.

/// Work per time, in any unit that is the same for all workers.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Speed(f64);

/// A number that is not a speed.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("speed {0} is out of range: it must be between 0.000001 and 1000000000000")]
pub struct SpeedError(pub f64);

impl Speed {
    /// Assumed speed of an unknown worker.
    pub const ONE: Self = Self(1.0);

    const LEAST: f64 = 1e-6;
    const MOST: f64 = 1e12;

    /// Checks a number.
    ///
    /// # Errors
    /// When it is not a number, below a millionth or above a million millions.
    pub fn new(speed: f64) -> Result<Self, SpeedError> {
        if (Self::LEAST..=Self::MOST).contains(&speed) { Ok(Self(speed)) } else { Err(SpeedError(speed)) }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl Default for Speed {
    fn default() -> Self {
        Self::ONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_finite_and_above_zero() {
        assert_eq!(Speed::new(2.5).map(Speed::get), Ok(2.5));
        for bad in [0.0, -1.0, 1e-9, 1e13, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(Speed::new(bad), Err(SpeedError(bad)));
        }
        let error = Speed::new(f64::NAN).unwrap_err();
        assert!(error.to_string().starts_with("speed NaN is out of range"));
    }
}
