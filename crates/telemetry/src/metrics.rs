//! The metrics recorder: Prometheus text on demand.
//!
//! Every `*_seconds` histogram has the same fixed buckets, so that quantiles can be read from them and series of
//! different processes can be added up.

use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::TelemetryError;
use crate::names::{self, Process};
use crate::sorted::sorted;

/// Samples wait in memory until they are sorted into buckets; this often is enough to keep that small.
const UPKEEP: Duration = Duration::from_secs(1);

/// The process's metrics.
#[derive(Clone)]
pub struct MetricsHandle {
    prometheus: PrometheusHandle,
}

impl MetricsHandle {
    /// All metrics in the Prometheus text format, version 0.0.4, sorted by name and labels.
    #[must_use]
    pub fn render(&self) -> String {
        sorted(&self.prometheus.render())
    }
}

/// Installs the recorder that all crates count with, and describes what a `process` counts.
///
/// # Errors
/// When a recorder is installed already, or a thread cannot be started.
pub fn install_metrics(process: Process) -> Result<MetricsHandle, TelemetryError> {
    let prometheus = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &seconds_buckets())
        .map_err(|error| TelemetryError::Metrics(error.to_string()))?
        .install_recorder()
        .map_err(|error| TelemetryError::Metrics(error.to_string()))?;
    names::register(process);
    let upkeep = prometheus.clone();
    std::thread::Builder::new()
        .name("muster-metrics".into())
        .spawn(move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        })
        .map_err(TelemetryError::Thread)?;
    Ok(MetricsHandle { prometheus })
}

/// Upper bounds from 10 µs to 100 s, eight to a decade: a quantile read from them is off by 15 % at most.
fn seconds_buckets() -> Vec<f64> {
    const PER_DECADE: i32 = 8;
    (-5 * PER_DECADE..=2 * PER_DECADE)
        .map(|step| {
            let bound = 10f64.powf(f64::from(step) / f64::from(PER_DECADE));
            // Three digits, so that the labels can be read.
            let digits = 10f64.powi(2 - bound.log10().floor() as i32);
            (bound * digits).round() / digits
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_ascend_and_are_close() {
        let buckets = seconds_buckets();
        assert_eq!((buckets.len(), buckets.first(), buckets.last()), (57, Some(&1e-5), Some(&100.0)));
        assert!(buckets.windows(2).all(|pair| (1.30..1.37).contains(&(pair[1] / pair[0]))));
    }

    #[test]
    fn histograms_of_seconds_have_buckets_and_descriptions() {
        let handle = install_metrics(Process::Router).unwrap();
        let text = handle.render();
        assert!(text.contains("\nmuster_requests_failed_total 0\n"), "{text}");
        assert!(text.contains("\nmuster_requests_refused_total{reason=\"queue\"} 0\n"), "{text}");
        assert!(!text.contains("muster_worker_rows_total"), "{text}");
        metrics::histogram!(names::STEP_SECONDS).record(0.02);
        metrics::counter!(names::TOKENS_GENERATED).increment(3);
        let text = handle.render();
        assert!(text.contains("# TYPE muster_step_seconds histogram"), "{text}");
        assert!(text.contains("muster_step_seconds_bucket{le=\"0.0237\"} 1"), "{text}");
        assert!(text.contains("muster_step_seconds_bucket{le=\"0.0178\"} 0"), "{text}");
        assert!(text.contains("# HELP muster_tokens_generated_total "), "{text}");
        assert!(install_metrics(Process::Worker).is_err(), "a second recorder would count nothing");
    }
}
