//! A calendar date, for templates that write today's.
//!
//! Knows the proleptic Gregorian calendar and English names; no clock and no time zone.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const SECONDS_PER_DAY: u64 = 86_400;
/// 9999-12-31, so that a year has four digits.
const LAST_DAY: u64 = 2_932_896;

/// A day from 1970-01-01 to 9999-12-31.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CivilDate {
    days: u64,
    year: u64,
    /// 1 to 12.
    month: u64,
    /// 1 to 31.
    day: u64,
}

impl CivilDate {
    /// The day (in UTC) of a time in seconds since 1970-01-01T00:00:00Z; times past 9999 are its last day.
    #[must_use]
    pub fn from_unix_seconds(seconds: u64) -> Self {
        let days = (seconds / SECONDS_PER_DAY).min(LAST_DAY);
        let mut year = 1970;
        let mut left = days;
        while left >= year_length(year) {
            left -= year_length(year);
            year += 1;
        }
        let mut month = 1;
        while left >= month_length(year, month) {
            left -= month_length(year, month);
            month += 1;
        }
        Self { days, year, month, day: left + 1 }
    }

    /// The date in Python's `strftime` notation: `%Y %y %m %d %e %B %b %A %a %j %%`, and `%-m`, `%-d` without
    /// the leading zero. The time of day (`%H %I %M %S %p`) is midnight, for texts of one day to be equal.
    ///
    /// # Errors
    /// Names any other directive.
    pub(crate) fn strftime(self, format: &str) -> Result<String, String> {
        let mut out = String::with_capacity(format.len());
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            out.push_str(&rest[..at]);
            let directive = &rest[at + 1..];
            let length = directive.chars().take(if directive.starts_with('-') { 2 } else { 1 });
            let (directive, after) = directive.split_at(length.map(char::len_utf8).sum());
            let text = self.directive(directive).ok_or_else(|| {
                format!("strftime_now: `%{directive}` is not supported; dates are, as in `%d %b %Y`")
            })?;
            out.push_str(&text);
            rest = after;
        }
        out.push_str(rest);
        Ok(out)
    }

    fn directive(self, directive: &str) -> Option<String> {
        let (month, weekday) = (MONTHS[self.month as usize - 1], WEEKDAYS[(self.days % 7) as usize]);
        Some(match directive {
            "Y" => self.year.to_string(),
            "y" => format!("{:02}", self.year % 100),
            "m" => format!("{:02}", self.month),
            "-m" => self.month.to_string(),
            "d" => format!("{:02}", self.day),
            "-d" => self.day.to_string(),
            "B" => month.to_owned(),
            "b" => month[..3].to_owned(),
            "A" => weekday.to_owned(),
            "a" => weekday[..3].to_owned(),
            "j" => {
                let before: u64 = (1..self.month).map(|m| month_length(self.year, m)).sum();
                format!("{:03}", before + self.day)
            }
            "e" => format!("{:2}", self.day),
            "H" | "M" | "S" => "00".to_owned(),
            "I" => "12".to_owned(),
            "p" => "AM".to_owned(),
            "%" => "%".to_owned(),
            _ => return None,
        })
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_length(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn month_length(year: u64, month: u64) -> u64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if is_leap(year) => 29,
        2 => 28,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = SECONDS_PER_DAY;

    #[test]
    fn known_days() {
        for (seconds, text) in [
            (0, "1970-01-01 Thursday 001"),
            (951_782_400, "2000-02-29 Tuesday 060"),
            (1_721_952_000, "2024-07-26 Friday 208"),
            (1_735_689_599, "2024-12-31 Tuesday 366"),
            (1_735_689_600, "2025-01-01 Wednesday 001"),
            (LAST_DAY * DAY, "9999-12-31 Friday 365"),
            (u64::MAX, "9999-12-31 Friday 365"),
        ] {
            let date = CivilDate::from_unix_seconds(seconds);
            assert_eq!(date.strftime("%Y-%m-%d %A %j").unwrap(), text);
        }
    }

    #[test]
    fn every_day_follows_the_day_before() {
        let mut previous = CivilDate::from_unix_seconds(0);
        for day in 1..150_000 {
            let next = CivilDate::from_unix_seconds(day * DAY);
            let first_of_month = next.day == 1 && previous.day == month_length(previous.year, previous.month);
            assert!(next.day == previous.day + 1 || first_of_month, "{previous:?} then {next:?}");
            previous = next;
        }
    }

    #[test]
    fn formats_of_published_templates_and_what_is_refused() {
        let date = CivilDate::from_unix_seconds(1_721_952_000 - 20 * DAY);
        assert_eq!(date.strftime("%d %b %Y").unwrap(), "06 Jul 2024");
        assert_eq!(date.strftime("%B %-d, %y: 100%% at %H:%M").unwrap(), "July 6, 24: 100% at 00:00");
        for format in ["%q", "%", "%-", "%é", "x %-Z"] {
            assert!(date.strftime(format).unwrap_err().contains("not supported"), "{format}");
        }
    }
}
