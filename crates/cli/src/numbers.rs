//! Numbers of the command line, parsed strictly.

use std::num::{NonZeroU32, NonZeroUsize};

use muster_config::parse_size;

/// Most tokens of a step, and so most rows of one message to private workers.
pub(crate) const MOST_ROWS: u32 = 8192;

/// A finite number.
fn number(text: &str) -> Result<f32, String> {
    text.parse::<f32>()
        .ok()
        .filter(|number| number.is_finite())
        .ok_or_else(|| "it is not a number".to_owned())
}

/// A finite number that is 0 or more.
pub(crate) fn not_negative(text: &str) -> Result<f32, String> {
    let number = number(text)?;
    if number < 0.0 { Err("it is below 0".to_owned()) } else { Ok(number) }
}

/// A number from 0 to 1.
pub(crate) fn fraction(text: &str) -> Result<f32, String> {
    let number = number(text)?;
    if (0.0..=1.0).contains(&number) { Ok(number) } else { Err("it is not between 0 and 1".to_owned()) }
}

/// A seed: 64 bits, with a sign or without.
pub(crate) fn seed(text: &str) -> Result<u64, String> {
    let signed = |_| text.parse::<i64>().map(i64::cast_unsigned);
    text.parse().or_else(signed).map_err(|_| "it is not a whole number of 64 bits".to_owned())
}

/// A number of threads.
pub(crate) fn threads(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse::<NonZeroUsize>().ok().filter(|number| number.get() <= 1024);
    number.ok_or_else(|| "it is not a whole number from 1 to 1024".to_owned())
}

/// Tokens of a step.
pub(crate) fn chunk(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse::<NonZeroUsize>().ok().filter(|number| number.get() <= MOST_ROWS as usize);
    number.ok_or_else(|| format!("it is not a whole number from 1 to {MOST_ROWS}"))
}

/// How many worker processes.
pub(crate) fn worker_count(text: &str) -> Result<NonZeroU32, String> {
    let number = text.parse::<NonZeroU32>().ok().filter(|number| number.get() <= 256);
    number.ok_or_else(|| "it is not a whole number from 1 to 256".to_owned())
}

/// Unit for printing memory sizes: as in the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Powers of 1024: MiB, GiB.
    Binary,
    /// Powers of 1000: MB, GB.
    Decimal,
}

impl Unit {
    /// Unit of a valid size. Plain bytes count as binary.
    fn of(size: &str) -> Self {
        match size.trim_start_matches(|c: char| c.is_ascii_digit()) {
            "kB" | "MB" | "GB" | "TB" => Self::Decimal,
            _ => Self::Binary,
        }
    }

    /// Bytes of the unit in commands: a MiB or a MB.
    pub(crate) const fn step(self) -> u64 {
        match self {
            Self::Binary => 1 << 20,
            Self::Decimal => 1_000_000,
        }
    }

    /// `bytes` as an argument of a command, in whole steps and at least one.
    pub(crate) fn argument(self, bytes: u64) -> String {
        let unit = match self {
            Self::Binary => "MiB",
            Self::Decimal => "MB",
        };
        format!("{}{unit}", (bytes / self.step()).max(1))
    }

    /// `bytes` as a Kubernetes quantity.
    pub(crate) fn quantity(self, bytes: u64) -> String {
        self.argument(bytes).trim_end_matches('B').to_owned()
    }
}

/// Machines of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Machines {
    /// Bytes of memory of each.
    pub(crate) memory: u64,
    /// Unit for printing it.
    pub(crate) unit: Unit,
    /// How many; `None`: as many as needed.
    pub(crate) count: Option<NonZeroU32>,
}

/// `64GiB` or `64GiBx2`.
pub(crate) fn machines(text: &str) -> Result<Machines, String> {
    let Some((size, count)) = text.split_once('x') else {
        return parse_size(text).map(|memory| Machines { memory, unit: Unit::of(text), count: None });
    };
    let (memory, unit) = (parse_size(size)?, Unit::of(size));
    let count = count.parse::<NonZeroU32>().ok().filter(|count| count.get() <= 100_000);
    let reason = || format!("{text:?} does not end in a number of machines; write as in 64GiBx2");
    count.map(|count| Machines { memory, unit, count: Some(count) }).ok_or_else(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_strict() {
        assert!(
            not_negative("nan").is_err() && not_negative("-0.1").is_err() && not_negative("inf").is_err()
        );
        assert!(fraction("1.1").is_err() && fraction("1").is_ok());
        let two = Machines { memory: 64 << 30, unit: Unit::Binary, count: NonZeroU32::new(2) };
        assert_eq!(machines("64GiBx2"), Ok(two));
        assert_eq!(machines("64GiB"), Ok(Machines { count: None, ..two }));
        for wrong in ["64", "64x2", "64GiBx", "64GiBx0", "64GiBx-1", "64GiBx2x2", "x2", "0GiB", ""] {
            assert!(machines(wrong).is_err(), "{wrong}");
        }
        for (text, unit) in [
            ("64GB", Unit::Decimal),
            ("64kBx2", Unit::Decimal),
            ("64KiB", Unit::Binary),
            ("64B", Unit::Binary),
        ] {
            assert_eq!(machines(text).map(|machines| machines.unit), Ok(unit), "{text}");
        }
        let (mib, mb) = (Unit::Binary, Unit::Decimal);
        assert_eq!(
            (mib.argument(3 << 20), mb.argument(3_999_999), mb.argument(1)),
            ("3MiB".into(), "3MB".into(), "1MB".into())
        );
        assert_eq!((mib.quantity(3 << 20), mb.quantity(3_000_000)), ("3Mi".into(), "3M".into()));
        assert!(threads("0").is_err() && threads("1_000").is_err() && threads("8").is_ok());
    }
}
