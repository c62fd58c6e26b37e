//! Histograms from a Prometheus page, over plain HTTP.

use std::collections::BTreeMap;
use std::time::Duration;

use muster_admin::client;

use crate::BenchError;

const DEADLINE: Duration = Duration::from_secs(5);

/// A process's metrics page.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// `host:port`.
    authority: String,
}

impl Metrics {
    /// `url` is `http://host:port` or `host:port`; `None` when it is neither.
    #[must_use]
    pub fn at(url: &str) -> Option<Self> {
        Some(Self { authority: client::authority(url)?.to_owned() })
    }

    /// The histogram `name`, summed over its series; empty when nothing was recorded yet.
    pub(crate) async fn histogram(&self, name: &str) -> Result<Histogram, BenchError> {
        let failed = |reason: String| {
            BenchError::Runtime(format!("the metrics at http://{}/metrics: {reason}", self.authority))
        };
        let (status, body) =
            client::ask(&self.authority, "GET", "/metrics", DEADLINE).await.map_err(failed)?;
        if status != 200 {
            return Err(failed(format!("the answer has status {status}")));
        }
        Ok(Histogram::parse(name, &body))
    }
}

/// Counts of values up to each bound.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Histogram {
    /// Keys are the bits of the bounds: positive floats order like their bits.
    counts: BTreeMap<u64, u64>,
}

impl Histogram {
    fn parse(name: &str, page: &str) -> Self {
        let mut histogram = Self::default();
        for line in page.lines() {
            let Some(labels) = line.strip_prefix(name).and_then(|rest| rest.strip_prefix("_bucket{")) else {
                continue;
            };
            let bound = labels.split_once("le=\"").and_then(|(_, rest)| rest.split('"').next());
            let bound = bound.and_then(|text| text.parse::<f64>().ok()).filter(|bound| *bound > 0.0);
            let count = labels.rsplit(' ').next().and_then(|text| text.parse::<u64>().ok());
            if let (Some(bound), Some(count)) = (bound, count) {
                let sum = histogram.counts.entry(bound.to_bits()).or_default();
                *sum = sum.saturating_add(count);
            }
        }
        histogram
    }

    /// Values recorded after `before`.
    pub(crate) fn since(mut self, before: &Self) -> Self {
        for (bound, count) in &mut self.counts {
            *count = count.saturating_sub(before.counts.get(bound).copied().unwrap_or(0));
        }
        self
    }

    /// Adds `other`, which must have the same bounds or none.
    pub(crate) fn add(&mut self, other: &Self) {
        for (bound, count) in &other.counts {
            let sum = self.counts.entry(*bound).or_default();
            *sum = sum.saturating_add(*count);
        }
    }

    /// Quantile `q`, interpolated linearly in its bucket; `None` when nothing was recorded.
    pub(crate) fn quantile(&self, q: f64) -> Option<f64> {
        let total = *self.counts.values().last()?;
        let rank = q * total as f64;
        let (mut lower, mut below) = (0.0, 0);
        for (bits, &count) in &self.counts {
            let bound = f64::from_bits(*bits);
            if count as f64 >= rank && count > below {
                // The last bucket has no upper end.
                let width = if bound.is_finite() { bound - lower } else { 0.0 };
                return Some(lower + width * (rank - below as f64) / (count - below) as f64);
            }
            (lower, below) = (bound, count);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# TYPE t_seconds histogram\n\
                        t_seconds_bucket{le=\"0.001\"} 10\n\
                        t_seconds_bucket{le=\"0.002\"} 30\n\
                        t_seconds_bucket{le=\"+Inf\"} 40\n\
                        t_seconds_sum 1.5\nt_seconds_count 40\n\
                        t_seconds_other_bucket{le=\"0.001\"} 7\n\
                        more_t_seconds_bucket{le=\"0.001\"} 7\n";

    #[test]
    fn quantiles_are_linear_within_a_bucket() {
        let histogram = Histogram::parse("t_seconds", PAGE);
        assert_eq!(histogram.quantile(0.5), Some(0.0015));
        assert_eq!(histogram.quantile(0.25), Some(0.001));
        // Values above the last finite bound are not resolved.
        assert_eq!(histogram.quantile(0.99), Some(0.002));
        assert_eq!(Histogram::parse("absent_seconds", PAGE).quantile(0.5), None);
    }

    #[test]
    fn stretches_are_differences_and_add_up() {
        let later = PAGE.replace("30", "31").replace("40", "41");
        let stretch = Histogram::parse("t_seconds", &later).since(&Histogram::parse("t_seconds", PAGE));
        assert_eq!(stretch.quantile(0.5), Some(0.0015), "one value, in the second bucket");
        assert_eq!(stretch.clone().since(&stretch).quantile(0.5), None);
        let mut sum = Histogram::default();
        sum.add(&stretch);
        sum.add(&stretch);
        assert_eq!(sum.counts.values().copied().collect::<Vec<_>>(), [0, 2, 2]);
    }

    #[test]
    fn labelled_series_are_added_up() {
        let page = "t_seconds_bucket{w=\"a\",le=\"1\"} 1\nt_seconds_bucket{w=\"b\",le=\"1\"} 2\n";
        let sum = Histogram::parse("t_seconds", page);
        assert_eq!(sum.counts.values().copied().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn addresses_are_checked() {
        for good in ["http://127.0.0.1:8080", "localhost:8080", "http://[::1]:8080/"] {
            assert!(Metrics::at(good).is_some(), "{good}");
        }
        for bad in ["", "https://a:1/x", "http://host", "a b:1", "h:1/metrics"] {
            assert!(Metrics::at(bad).is_none(), "{bad}");
        }
    }
}
