//! Times of dispatch and combine, from an engine in this process or from a router's metrics.

use std::time::Duration;

use muster_dispatch_grpc::StatsHandle;
use muster_engine::delivery::Summed;

use crate::BenchError;
use crate::scrape::{Histogram, Metrics};
use crate::stats::quantile;

/// Router's histogram of dispatch and combine of one layer, without queue and compute time in the workers.
const OVERHEAD: &str = "muster_dispatch_overhead_seconds";

/// Source of dispatch times.
#[derive(Clone)]
pub enum Clock {
    /// No times.
    None,
    /// The engine in this process.
    Samples(StatsHandle),
    /// Metrics of a running router.
    Metrics(Metrics),
}

/// Position in a clock, from which later times are counted.
pub(crate) enum Mark {
    Nothing,
    Samples(usize),
    Histogram(Histogram),
}

/// Times between two positions.
pub(crate) enum DispatchTimes {
    Samples(Vec<Duration>),
    Histogram(Histogram),
}

impl Clock {
    pub(crate) async fn mark(&self) -> Result<Mark, BenchError> {
        Ok(match self {
            Self::None => Mark::Nothing,
            Self::Samples(stats) => Mark::Samples(stats.snapshot().samples.len()),
            Self::Metrics(metrics) => Mark::Histogram(metrics.histogram(OVERHEAD).await?),
        })
    }

    /// Times since `mark`.
    pub(crate) async fn since(&self, mark: Mark) -> Result<Option<DispatchTimes>, BenchError> {
        Ok(match (self, mark) {
            (Self::Samples(stats), Mark::Samples(before)) => {
                let samples = stats.snapshot().samples;
                // The buffer of samples is bounded; once full, it holds recent ones only.
                let fresh = samples.get(before..).filter(|fresh| !fresh.is_empty()).unwrap_or(&samples);
                Some(DispatchTimes::Samples(fresh.iter().map(Summed::overhead).collect()))
            }
            (Self::Metrics(metrics), Mark::Histogram(before)) => {
                Some(DispatchTimes::Histogram(metrics.histogram(OVERHEAD).await?.since(&before)))
            }
            _ => None,
        })
    }
}

impl DispatchTimes {
    /// Median and 99th percentile over several stretches of one clock, seconds.
    pub(crate) fn p50_p99(stretches: Vec<Self>) -> Option<(f64, f64)> {
        let (mut samples, mut sum) = (Vec::new(), Histogram::default());
        for stretch in stretches {
            match stretch {
                Self::Samples(more) => samples.extend(more),
                Self::Histogram(more) => sum.add(&more),
            }
        }
        let of = |q| match quantile(&mut samples, q) {
            Some(time) => Some(time.as_secs_f64()),
            None => sum.quantile(q),
        };
        let [p50, p99] = [0.50, 0.99].map(of);
        p50.zip(p99)
    }
}
