//! Which of a model's experts a worker starts with, and how that is written.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use muster_types::ExpertKey;

use crate::{Shape, SplitError, split};

/// Which experts a worker starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// None: it waits to be told what to load.
    None,
    /// Every expert of the model.
    All,
    /// Share `index` of `count`, counted from 0.
    Part {
        /// Below `count`.
        index: u32,
        /// How many shares there are.
        count: NonZeroU32,
        /// On how many workers every expert is; at most `count`: this share and those behind it are held.
        replicas: NonZeroU32,
    },
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let wrong = || {
            format!(
                "{text:?} is not a share; write I/N, as in 0/2 and 1/2 for two workers, I/NxR to have every expert on R \
                 of them, all or none"
            )
        };
        let (index, rest) = text.split_once('/').ok_or_else(wrong)?;
        let (of, replicas) = rest.split_once('x').unwrap_or((rest, "1"));
        let number = |text| digits(text).and_then(|text| text.parse::<u32>().ok()).ok_or_else(wrong);
        let positive = |text| NonZeroU32::new(number(text)?).ok_or_else(wrong);
        let (index, of, replicas) = (number(index)?, positive(of)?, positive(replicas)?);
        if index >= of.get() {
            return Err(format!(
                "share {text} does not exist: shares of {of} are 0/{of} to {}/{of}",
                of.get() - 1
            ));
        }
        if replicas > of {
            return Err(format!(
                "share {text}: {of} workers cannot hold {replicas} copies of an expert; use at most {of}"
            ));
        }
        Ok(Self::Part { index, count: of, replicas })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::All => f.write_str("all"),
            Self::Part { index, count, replicas: NonZeroU32::MIN } => write!(f, "{index}/{count}"),
            Self::Part { index, count, replicas } => write!(f, "{index}/{count}x{replicas}"),
        }
    }
}

impl Share {
    /// The experts in it, ascending.
    ///
    /// # Errors
    /// When the share does not exist, or has no expert of so many workers.
    pub fn keys(&self, shape: &Shape) -> Result<Vec<ExpertKey>, ShareError> {
        match *self {
            Self::None => Ok(Vec::new()),
            Self::All => Ok(shape.keys().collect()),
            Self::Part { index, count, replicas } => {
                let mut keys = split(shape, count, index)?;
                for more in 1..replicas.min(count).get() {
                    // Below `count`, which has 32 bits.
                    let next = (u64::from(index) + u64::from(more)) % u64::from(count.get());
                    keys.extend(split(shape, count, next as u32)?);
                }
                keys.sort_unstable();
                if keys.is_empty() {
                    return Err(ShareError::Empty { index, count: count.get(), experts: shape.total() });
                }
                Ok(keys)
            }
        }
    }
}

/// Why a worker cannot start with a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// It does not exist.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// It has no expert.
    #[error(
        "share {index} of {count} is empty: the model has {experts} experts; use at most as many workers"
    )]
    Empty {
        /// The share.
        index: u32,
        /// How many there are.
        count: u32,
        /// Experts of the model.
        experts: u64,
    },
}

/// Decimal digits and nothing else.
fn digits(text: &str) -> Option<&str> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_written_as_they_are_read() {
        assert_eq!(("all".parse(), "none".parse()), (Ok(Share::All), Ok(Share::None)));
        let part = |index, count, replicas| {
            let [count, replicas] = [count, replicas].map(|number| NonZeroU32::new(number).unwrap());
            Share::Part { index, count, replicas }
        };
        for (text, share) in [("1/2", part(1, 2, 1)), ("0/3x2", part(0, 3, 2)), ("2/3x3", part(2, 3, 3))] {
            assert_eq!(text.parse(), Ok(share));
            assert_eq!(share.to_string(), text);
        }
        assert!("0/2x3".parse::<Share>().unwrap_err().contains("use at most 2"));
        assert_eq!(
            "2/2".parse::<Share>().unwrap_err(),
            "share 2/2 does not exist: shares of 2 are 0/2 to 1/2"
        );
        for bad in
            ["", "1", "0/0", "-1/2", "a/b", "1/2/3", "4294967296/4294967297", "0/2x", "0/2x0", "0/2x1x1"]
        {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }

    fn part(index: u32, count: NonZeroU32, replicas: u32) -> Share {
        Share::Part { index, count, replicas: NonZeroU32::new(replicas).unwrap() }
    }

    #[test]
    fn every_expert_is_on_as_many_workers_as_asked_for() {
        let shape = Shape::new(vec![5, 0, 3]);
        for (count, replicas) in [(3, 2), (4, 3), (2, 2)] {
            let count = NonZeroU32::new(count).unwrap();
            let held: Vec<Vec<ExpertKey>> =
                (0..count.get()).map(|index| part(index, count, replicas).keys(&shape).unwrap()).collect();
            assert!(held.iter().all(|keys| keys.is_sorted_by(|a, b| a < b)), "ascending, none twice");
            for key in shape.keys() {
                let owners = held.iter().filter(|keys| keys.contains(&key)).count();
                assert_eq!(owners, replicas as usize, "{key}");
            }
        }
    }

    #[test]
    fn shares_are_disjoint_complete_and_never_empty() {
        let shape = Shape::new(vec![3, 0, 2]);
        let count = NonZeroU32::new(5).unwrap();
        let mut all: Vec<ExpertKey> =
            (0..5).flat_map(|index| part(index, count, 1).keys(&shape).unwrap()).collect();
        all.sort_unstable();
        assert_eq!(all, Share::All.keys(&shape).unwrap());

        let count = NonZeroU32::new(6).unwrap();
        let text = part(5, count, 1).keys(&shape).unwrap_err().to_string();
        assert!(text.contains("share 5 of 6 is empty: the model has 5 experts"), "{text}");
        assert!(matches!(part(6, count, 1).keys(&shape), Err(ShareError::Split(_))));
    }
}
