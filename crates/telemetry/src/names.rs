//! Every metric of every process, by name.
//!
//! Names follow Prometheus' custom: `_total` counts, `_seconds` measures time in histograms, the rest are gauges. Counters
//! are there from the start, at 0, so that `rate()` sees the first event; only those whose labels nobody can list come later.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram};

/// Which process has a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// Every one.
    Any,
    /// Routers.
    Router,
    /// Workers.
    Worker,
}

/// What Prometheus makes of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Series of one metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Series {
    One,
    /// One for each value of a label.
    By(&'static str, &'static [&'static str]),
    /// Labels with values that are not known beforehand.
    Open,
}

/// A metric.
struct Metric {
    name: &'static str,
    kind: Kind,
    unit: Unit,
    text: &'static str,
    process: Process,
    series: Series,
}

macro_rules! metric_names {
    ($($process:ident { $($kind:ident $constant:ident = $name:literal, $unit:ident, $text:literal $(by $series:tt)?;)* })*) => {
        $($(
            #[doc = $text]
            pub const $constant: &str = $name;
        )*)*

        const METRICS: &[Metric] = &[$($(Metric {
            name: $name,
            kind: metric_names!(kind $kind),
            unit: Unit::$unit,
            text: $text,
            process: Process::$process,
            series: metric_names!(series $($series)?),
        },)*)*];
    };
    (kind counter) => { Kind::Counter };
    (kind gauge) => { Kind::Gauge };
    (kind histogram) => { Kind::Histogram };
    (series) => { Series::One };
    (series OPEN) => { Series::Open };
    (series ($label:literal, $values:expr)) => { Series::By($label, $values) };
}

/// Every name.
pub fn all() -> impl Iterator<Item = &'static str> {
    METRICS.iter().map(|metric| metric.name)
}

/// Values of a metric's label that are known beforehand.
#[must_use]
pub fn label_values(name: &str) -> &'static [&'static str] {
    match METRICS.iter().find(|metric| metric.name == name).map(|metric| metric.series) {
        Some(Series::By(_, values)) => values,
        _ => &[],
    }
}

/// Gives the recorder the unit and description of every metric that `process` has, and its counters their 0.
pub(crate) fn register(process: Process) {
    let has = |metric: &&Metric| metric.process == Process::Any || metric.process == process;
    for Metric { name, kind, unit, text, series, .. } in METRICS.iter().filter(has) {
        match kind {
            Kind::Counter => describe_counter!(*name, *unit, *text),
            Kind::Gauge => describe_gauge!(*name, *unit, *text),
            Kind::Histogram => describe_histogram!(*name, *unit, *text),
        }
        match (kind, series) {
            (Kind::Counter, Series::One) => counter!(*name).increment(0),
            (Kind::Counter, Series::By(label, values)) => {
                values.iter().for_each(|value| counter!(*name, *label => *value).increment(0));
            }
            _ => {}
        }
    }
}

metric_names! {
    Any {
        counter ACCEPT_ERRORS = "muster_accept_errors_total", Count, "Connections that could not be accepted, for lack of file descriptors or the like.";
        counter CONNECTIONS_EVICTED = "muster_connections_evicted_total", Count, "Connections closed because their peer made no progress.";
        counter CONNECTIONS_FLOODING = "muster_connections_flooding_total", Count, "Connections closed because their peer sent more control frames than its traffic needs.";
        counter LOG_LINES_LEFT_OUT = "muster_log_lines_left_out_total", Count, "Log lines left out because the same place had written too many; the next line from there says how many.";
        gauge CERTIFICATE_END = "muster_certificate_end_seconds", Seconds, "When this process's certificate ends, since 1970.";
        gauge API_KEYS = "muster_api_keys", Count, "API keys that are good.";
        counter RELOAD_FAILURES = "muster_reload_failures_total", Count, "Changed files that could not be taken into use." by ("what", &["API keys", "certificates"]);
        counter ACCESS_DENIED = "muster_access_denied_total", Count, "Calls refused because of who asked, and TLS handshakes that failed." by ("what", &["grpc", "http", "handshake", "role"]);
        counter EXPERTS_SENT = "muster_experts_sent_total", Count, "Experts whose weights were sent to another process.";
        counter EXPERTS_WITHHELD = "muster_experts_withheld_total", Count, "Experts that were not handed on because they are no longer what they were when they were loaded.";
    }
    Router {
        counter HTTP_REQUESTS = "muster_http_requests_total", Count, "HTTP requests answered, by route and status." by OPEN;
        counter GRPC_REQUESTS = "muster_grpc_requests_total", Count, "gRPC calls answered, by method and status code." by OPEN;
        counter BODIES_EVICTED = "muster_bodies_evicted_total", Count, "Large HTTP bodies given up because they came slowest, or too slowly.";
        counter JOINS_EVICTED = "muster_joins_evicted_total", Count, "Workers that joined, were never reached and gave way to others.";
        gauge DISCOVERY_WORKERS = "muster_discovery_workers", Count, "Workers that a source of discovery names.";
        gauge DISCOVERY_FAILING = "muster_discovery_failing", Count, "1 while a source of discovery gives no answer or says no.";
        counter REQUESTS_REFUSED = "muster_requests_refused_total", Count, "Requests refused because there is too much to do, by reason: the queue is full, the wait too long, or unknown at the start, too much text waits to be read, too many large bodies are under way." by ("reason", &["queue", "wait", "start", "text", "body"]);
        counter REQUESTS_RESUMED = "muster_requests_resumed_total", Count, "Requests that went on with a stream that had broken off.";
        counter REQUESTS_FAILED = "muster_requests_failed_total", Count, "Completions that ended with an error.";
        counter SEQUENCES_CANCELLED = "muster_sequences_cancelled_total", Count, "Sequences given up because their client went away.";
        histogram TIME_TO_FIRST_TOKEN = "muster_time_to_first_token_seconds", Seconds, "From admission to the first token.";
        histogram INTER_TOKEN = "muster_inter_token_seconds", Seconds, "Between two tokens of one sequence.";
        counter TOKENS_GENERATED = "muster_tokens_generated_total", Count, "Tokens sampled.";
        counter TOKENS_COMPUTED = "muster_tokens_computed_total", Count, "Tokens run through the trunk, prompts included.";
        counter PREEMPTIONS = "muster_preemptions_total", Count, "Sequences put back to be computed again because the KV cache was full.";
        gauge SEQUENCES_RUNNING = "muster_sequences_running", Count, "Sequences in the batch.";
        gauge SEQUENCES_WAITING = "muster_sequences_waiting", Count, "Sequences waiting for a place in the batch.";
        gauge KV_BLOCKS = "muster_kv_blocks", Count, "Blocks of the KV cache.";
        gauge KV_BLOCKS_FREE = "muster_kv_blocks_free", Count, "Blocks of the KV cache that no sequence holds.";
        gauge KV_BLOCKS_CACHED = "muster_kv_blocks_cached", Count, "Those of the free blocks whose content is kept for prompts to come.";
        counter PREFIX_HIT_TOKENS = "muster_prefix_hit_tokens_total", Count, "Tokens of sequences let into the batch whose keys and values were cached.";
        counter PREFIX_MISS_TOKENS = "muster_prefix_miss_tokens_total", Count, "Tokens of sequences let into the batch that had to be computed.";
        histogram STEP_SECONDS = "muster_step_seconds", Seconds, "One pass of the batch through all layers.";
        counter STEPS_REPEATED = "muster_steps_repeated_total", Count, "Sequences set back to the start of a step because experts could not be had.";
        gauge DISPATCH_WORKERS = "muster_dispatch_workers", Count, "Workers that rows can be sent to.";
        histogram DISPATCH_SECONDS = "muster_dispatch_seconds", Seconds, "From sending the rows of one layer and micro-batch until the last worker answered.";
        histogram DISPATCH_OVERHEAD_SECONDS = "muster_dispatch_overhead_seconds", Seconds, "What dispatch and combine of one layer and micro-batch cost the engine thread, without the time the experts took.";
        counter DISPATCH_LATE_REPLIES = "muster_dispatch_late_replies_total", Count, "Replies that nobody waited for any more.";
        counter DISPATCH_BAD_REPLIES = "muster_dispatch_bad_replies_total", Count, "Replies that break the protocol.";
        counter DISPATCH_DEADLINES = "muster_dispatch_deadlines_total", Count, "Layers whose experts did not answer in time.";
        counter DISPATCH_FAULTS = "muster_dispatch_faults_total", Count, "Shards that failed: lost with their connection, bad replies, and errors that workers reported, by code." by ("code", &["lost", "bad", "not_held", "draining", "overloaded", "bad_request", "deadline", "non_finite", "internal"]);
        counter DISPATCH_RESENT = "muster_dispatch_resent_shards_total", Count, "Shards sent to stand in for one that failed or was late.";
        counter DISPATCH_BANNED = "muster_dispatch_workers_banned_total", Count, "Workers cut off for a while because they broke the protocol.";
        counter DISPATCH_REFUSED = "muster_dispatch_workers_refused_total", Count, "Workers refused because they hold other weights than the router's checkpoint.";
        counter DISPATCH_LINKS_LOST = "muster_dispatch_links_lost_total", Count, "Connections to workers that broke.";
        counter DISPATCH_FALLBACK_SHARDS = "muster_dispatch_fallback_shards_total", Count, "Shards computed by the router itself, for lack of a worker.";
        gauge ROUTER_HEALTH = "muster_router_health", Count, "2 ready, 1 degraded, 0 not ready.";
        counter CANARY_FAILURES = "muster_canary_failures_total", Count, "Test tokens that did not come.";
        gauge PLACEMENT_LEADS = "muster_placement_leads", Count, "1 while this router leads the placement.";
        counter PLACEMENT_PLANS = "muster_placement_plans_total", Count, "Plans that change who ought to hold what.";
        counter PLACEMENT_BYTES_PLANNED = "muster_placement_bytes_planned_total", Bytes, "Weights that plans have workers load.";
        counter PLACEMENT_ORDERS = "muster_placement_orders_total", Count, "Orders that workers took.";
        gauge PLACEMENT_IMBALANCE = "muster_placement_imbalance", Count, "Load over speed of the busiest worker in the last plan, in terms of the mean.";
        gauge PLACEMENT_UNCOVERED = "muster_placement_uncovered_experts", Count, "Experts that no worker has the memory for.";
        gauge PLACEMENT_UNDER_REPLICATED = "muster_placement_under_replicated_experts", Count, "Experts that the plan gives fewer copies, or fewer failure domains, than asked for.";
        gauge PLACEMENT_STUCK = "muster_placement_stuck_experts", Count, "Experts that wait for memory which only the last copy of another could give.";
    }
    Worker {
        counter WORKER_SHARDS = "muster_worker_shards_total", Count, "Shards answered, by outcome." by ("code", &["ok", "not_held", "draining", "overloaded", "bad_request", "deadline", "non_finite", "internal"]);
        counter WORKER_SHARDS_ABANDONED = "muster_worker_shards_abandoned_total", Count, "Shards dropped because their router went away.";
        counter WORKER_SHARDS_MERGED = "muster_worker_shards_merged_total", Count, "Shards computed together with others of their layer.";
        counter WORKER_ROWS = "muster_worker_rows_total", Count, "Expert output rows computed.";
        gauge WORKER_PRESSURE = "muster_worker_pressure", Count, "Part of the time, from 0 to 1 and over about 15 s, in which the experts' thread computed.";
        gauge WORKER_EXPERTS = "muster_worker_experts", Count, "Experts that a worker serves.";
        gauge WORKER_LOADING_EXPERTS = "muster_worker_loading_experts", Count, "Experts that a worker was told to hold and does not hold yet.";
        gauge WORKER_RESIDENT_BYTES = "muster_worker_resident_bytes", Bytes, "Experts' weights in a worker's memory.";
        gauge WORKER_CAPACITY_BYTES = "muster_worker_capacity_bytes", Bytes, "Memory that a worker has for experts.";
        gauge WORKER_START_SECONDS = "muster_worker_start_seconds", Seconds, "From a worker's start until it was useful (first expert) and full (all that it was told to hold first).";
        counter WORKER_EXPERTS_LOADED = "muster_worker_experts_loaded_total", Count, "Experts loaded on orders, by source: peer, checkpoint or router." by ("source", &["peer", "checkpoint", "router"]);
        counter WORKER_EXPERT_BYTES_LOADED = "muster_worker_expert_bytes_loaded_total", Bytes, "Bytes of these, packed." by ("source", &["peer", "checkpoint", "router"]);
        counter WORKER_EXPERT_LOAD_ERRORS = "muster_worker_expert_load_errors_total", Count, "Experts that a source did not give as they must be.";
        counter WORKER_HANDSHAKES_REFUSED = "muster_worker_handshakes_refused_total", Count, "Routers refused at the handshake.";
        histogram WORKER_QUEUE_SECONDS = "muster_worker_queue_seconds", Seconds, "Between the arrival of a shard and the start of its computation.";
        histogram WORKER_COMPUTE_SECONDS = "muster_worker_compute_seconds", Seconds, "Computation of one shard.";
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Kind, METRICS, all};

    #[test]
    fn names_are_unique_and_plain() {
        let unique: BTreeSet<&str> = all().collect();
        assert_eq!(unique.len(), METRICS.len());
        let plain = |name: &str| {
            name.starts_with("muster_") && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        };
        assert!(all().all(plain));
    }

    #[test]
    fn counters_and_only_they_are_totals() {
        for metric in METRICS {
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.kind != Kind::Histogram || metric.name.ends_with("_seconds"), "{}", metric.name);
        }
    }
}
