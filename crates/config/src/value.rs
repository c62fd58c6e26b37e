//! Small strict parsers: sizes, durations, addresses. A unit is never guessed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use muster_types::{Compute, WeightDType, WorkerId};

/// Decimal digits and nothing else: no sign, no spaces, no underscores.
fn digits(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// A count from `least` to `most`.
pub(crate) fn count(text: &str, least: u64, most: u64) -> Result<u64, String> {
    let number = digits(text).filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("{text:?} is not a whole number from {least} to {most}"))
}

/// A count from 1 to `most`.
pub(crate) fn up_to<T: TryFrom<u64>>(most: u64) -> impl Fn(&str) -> Result<T, String> {
    move |text| T::try_from(count(text, 1, most)?).map_err(|_| too_many(text))
}

/// As [`up_to`], as a non-zero type.
pub(crate) fn positive<T: TryFrom<NonZeroU64>>(most: u64) -> impl Fn(&str) -> Result<T, String> {
    move |text| {
        let number = NonZeroU64::new(count(text, 1, most)?);
        number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| too_many(text))
    }
}

pub(crate) fn too_many(text: &str) -> String {
    format!("{text} is more than this machine can count")
}

/// Any text.
pub(crate) fn text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

pub(crate) fn path(text: &str) -> Result<PathBuf, String> {
    Ok(text.into())
}

/// A name that is allowed in logs and labels.
pub(crate) fn name(text: &str) -> Result<String, String> {
    WorkerId::new(text).map(|id| id.as_str().to_owned()).map_err(|error| error.to_string())
}

pub(crate) fn switch(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("{text:?} is neither true nor false"))
}

/// A value parsed by its type's own parser.
pub(crate) fn parsed<T: FromStr<Err: ToString>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

/// One of two words.
pub(crate) fn one_of<T>(text: &str, words: [(&str, T); 2]) -> Result<T, String> {
    let wrong = format!("{text:?} is neither {} nor {}", words[0].0, words[1].0);
    words.into_iter().find_map(|(word, value)| (word == text).then_some(value)).ok_or(wrong)
}

/// Copies of every expert.
///
/// # Errors
/// When it is not a valid number of copies.
pub fn parse_replicas(text: &str) -> Result<NonZeroU32, String> {
    positive(64)(text)
}

/// Microseconds of busy polling; at most a second, because a processor is busy for all of it.
pub(crate) fn busy_poll(text: &str) -> Result<Duration, String> {
    count(text, 0, 1_000_000).map(Duration::from_micros)
}

/// A number of threads, or `auto` for all cores.
pub(crate) fn threads(text: &str) -> Result<Option<NonZeroUsize>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let number =
        digits(text).filter(|number| (1..=1024).contains(number)).and_then(|n| usize::try_from(n).ok());
    number
        .and_then(NonZeroUsize::new)
        .map(Some)
        .ok_or_else(|| format!("{text:?} is neither 1 to 1024 nor auto"))
}

/// A size, or `auto`.
pub(crate) fn size_or_auto(text: &str) -> Result<Option<u64>, String> {
    if text == "auto" { Ok(None) } else { parse_size(text).map(Some) }
}

/// Splits a number from its unit and looks the unit up.
fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = units.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor)?;
    digits(number)?.checked_mul(factor)
}

/// Bytes: `512MiB`. Units are B, KiB, MiB, GiB, TiB (powers of 1024) and kB, MB, GB, TB (powers of 1000).
///
/// # Errors
/// When there is no unit or another one, or the size is 0 or over 2^63.
pub fn parse_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    with_unit(text, &UNITS).filter(|bytes| (1..=1 << 63).contains(bytes)).ok_or_else(|| {
        format!("{text:?} is not a size; write a whole number and a unit, as in 512MiB or 4GiB")
    })
}

/// A time span: `500ms`, `30s`, `5m`, `1h`.
///
/// # Errors
/// When there is no unit or another one, or the span is 0 or over a day.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
    const DAY_MS: u64 = 24 * 3_600_000;
    with_unit(text, &UNITS).filter(|ms| (1..=DAY_MS).contains(ms)).map(Duration::from_millis).ok_or_else(|| {
        format!("{text:?} is not a time span of 1ms to 24h; write a whole number and a unit, as in 500ms or 30s")
    })
}

/// A compute mode, or `auto` for the checkpoint's.
pub(crate) fn parse_compute(text: &str) -> Result<Option<Compute>, String> {
    match text {
        "auto" => Ok(None),
        "f32" => Ok(Some(Compute::F32)),
        "bf16" => Ok(Some(Compute::Bf16)),
        "bf16-pairs" => Ok(Some(Compute::Bf16Pairs)),
        other => Err(format!("{other:?} is not a compute mode; use auto, f32, bf16 or bf16-pairs")),
    }
}

/// A dtype of weights: `native`, `q8` or `q4`.
///
/// # Errors
/// When it is another word.
pub fn parse_weight_dtype(text: &str) -> Result<WeightDType, String> {
    parsed(text)
}

/// `ip:port` to listen on; `localhost` means 127.0.0.1, and port 0 lets the system choose.
///
/// # Errors
/// When it is not such an address.
pub fn parse_socket(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix("localhost:")
        && let Some(port) = digits(port).and_then(|port| u16::try_from(port).ok())
    {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse().map_err(|_| {
        format!("{text:?} is not an address to listen on; write ip:port, as in 127.0.0.1:8080 or [::1]:8080")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("4GB"), Ok(4_000_000_000));
        assert_eq!(parse_size("1B"), Ok(1));
        for bad in [
            "",
            "5",
            "0MiB",
            "-1MiB",
            "1.5GiB",
            "1 GiB",
            "1gib",
            "1_000B",
            "0x10B",
            "99999999999999999999B",
            "MiB",
        ] {
            assert!(parse_size(bad).unwrap_err().contains("512MiB"), "{bad}");
        }
        assert!(parse_size("9000000TiB").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        for bad in ["5", "-1s", "1y", "0s", "25h", "", "s", "1e3s", "18446744073709551615h"] {
            assert!(parse_duration(bad).unwrap_err().contains("30s"), "{bad}");
        }
    }

    #[test]
    fn sockets() {
        assert_eq!(parse_socket("localhost:80"), parse_socket("127.0.0.1:80"));
        assert_eq!(parse_socket("[::1]:0").map(|socket| socket.port()), Ok(0));
        for bad in
            ["", "8080", ":8080", "127.0.0.1", "127.0.0.1:70000", "localhost:x", "host:80", "127.0.0.1:80 "]
        {
            assert!(parse_socket(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn counts_and_threads() {
        assert_eq!(count("7", 1, 7), Ok(7));
        for bad in ["0", "8", "+7", "7_0", "0x7", "", "4294967296"] {
            assert!(count(bad, 1, 7).is_err(), "{bad}");
        }
        assert_eq!(threads("auto"), Ok(None));
        assert_eq!(threads("2"), Ok(NonZeroUsize::new(2)));
        assert!(threads("0").is_err() && threads("1025").is_err());
    }
}
