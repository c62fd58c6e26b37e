//! Numbers for users: sizes, rates, counts and measurements.

pub(crate) use muster_bench::text::{span, table};

use crate::numbers::Unit;

/// `18.7 MB`.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count, "B", &[(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")])
}

/// `24 GiB`, `19.2 GiB` or `24 GB`: memory in the unit of the input.
pub(crate) fn memory(count: u64, unit: Unit) -> String {
    let units = match unit {
        Unit::Binary => [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")],
        Unit::Decimal => [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")],
    };
    match units.iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) if count.is_multiple_of(*size) => format!("{} {unit}", count / size),
        _ => scaled(count, "B", &units),
    }
}

/// `1.2 Gbit/s`.
pub(crate) fn bit_rate(bytes_per_second: f64) -> String {
    let bits = bytes_per_second * 8.0;
    let units = [(1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")];
    let (size, unit) = units.into_iter().find(|(size, _)| bits >= *size).unwrap_or((1.0, "bit/s"));
    format!("{:.1} {unit}", bits / size)
}

/// `9.4 M`.
pub(crate) fn count(count: u64) -> String {
    scaled(count, "", &[(1_000_000_000_000, "T"), (1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")])
        .trim_end()
        .to_owned()
}

fn scaled(count: u64, one: &str, units: &[(u64, &str)]) -> String {
    match units.iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => format!("{:.1} {unit}", count as f64 / *size as f64),
        None => format!("{count} {one}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(18_723_552), "18.7 MB");
        assert_eq!(memory(24 << 30, Unit::Binary), "24 GiB");
        assert_eq!(memory((24 << 30) / 5 * 4, Unit::Binary), "19.2 GiB");
        assert_eq!(memory(1023, Unit::Binary), "1023 B");
        assert_eq!(memory(24_000_000_000, Unit::Decimal), "24 GB");
        assert_eq!(memory(19_200_000_000, Unit::Decimal), "19.2 GB");
        assert_eq!(bit_rate(1.25e8), "1.0 Gbit/s");
        assert_eq!(count(46_702_792_704), "46.7 B");
        assert_eq!(count(12), "12");
    }
}
