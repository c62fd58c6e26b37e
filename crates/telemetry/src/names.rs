//! Every metric of every process, by name.
//!
//! Names follow Prometheus' custom: `_total` counts, `_seconds` measures time in histograms, the rest are gauges.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

macro_rules! metric_names {
    ($($kind:ident $constant:ident = $name:literal, $unit:ident, $text:literal;)*) => {
        $(
            #[doc = $text]
            pub const $constant: &str = $name;
        )*

        /// Gives the recorder every name's unit and description.
        pub(crate) fn describe() {
            $($kind!($constant, Unit::$unit, $text);)*
        }

        /// Every name, for the test that compares them with what the crates count.
        pub const ALL: &[&str] = &[$($constant),*];
    };
}

metric_names! {
    // Router: edges.
    describe_counter HTTP_REQUESTS = "muster_http_requests_total", Count, "HTTP requests answered, by route and status.";
    describe_counter GRPC_REQUESTS = "muster_grpc_requests_total", Count, "gRPC calls answered, by method and status code.";
    describe_counter ACCEPT_ERRORS = "muster_accept_errors_total", Count, "Connections that could not be accepted, for lack of file descriptors or the like.";
    describe_counter CONNECTIONS_EVICTED = "muster_connections_evicted_total", Count, "Connections closed because their peer made no progress.";
    describe_counter CONNECTIONS_FLOODING = "muster_connections_flooding_total", Count, "Connections closed because their peer sent more control frames than its traffic needs.";
    describe_counter BODIES_EVICTED = "muster_bodies_evicted_total", Count, "Large HTTP bodies given up because they came slowest, or too slowly.";
    describe_counter JOINS_EVICTED = "muster_joins_evicted_total", Count, "Workers that joined, were never reached and gave way to others.";
    describe_counter LOG_LINES_LEFT_OUT = "muster_log_lines_left_out_total", Count, "Log lines left out because the same place had written too many; the next line from there says how many.";
    // Certificates and keys.
    describe_gauge CERTIFICATE_END = "muster_certificate_end_seconds", Seconds, "When this process's certificate ends, since 1970.";
    describe_gauge API_KEYS = "muster_api_keys", Count, "API keys that are good.";
    describe_counter RELOAD_FAILURES = "muster_reload_failures_total", Count, "Changed files that could not be taken into use.";
    describe_counter ACCESS_DENIED = "muster_access_denied_total", Count, "Calls refused because of who asked, and TLS handshakes that failed.";
    // Router: discovery.
    describe_gauge DISCOVERY_WORKERS = "muster_discovery_workers", Count, "Workers that a source of discovery names.";
    describe_gauge DISCOVERY_FAILING = "muster_discovery_failing", Count, "1 while a source of discovery gives no answer or says no.";
    // Router: requests.
    describe_counter REQUESTS_REFUSED = "muster_requests_refused_total", Count, "Requests refused because the queue was full, the wait too long, or too much text waited to be read.";
    describe_counter REQUESTS_RESUMED = "muster_requests_resumed_total", Count, "Requests that went on with a stream that had broken off.";
    describe_counter REQUESTS_FAILED = "muster_requests_failed_total", Count, "Completions that ended with an error.";
    describe_counter SEQUENCES_CANCELLED = "muster_sequences_cancelled_total", Count, "Sequences given up because their client went away.";
    describe_histogram TIME_TO_FIRST_TOKEN = "muster_time_to_first_token_seconds", Seconds, "From admission to the first token.";
    describe_histogram INTER_TOKEN = "muster_inter_token_seconds", Seconds, "Between two tokens of one sequence.";
    // Router: engine.
    describe_counter TOKENS_GENERATED = "muster_tokens_generated_total", Count, "Tokens sampled.";
    describe_counter TOKENS_COMPUTED = "muster_tokens_computed_total", Count, "Tokens run through the trunk, prompts included.";
    describe_counter PREEMPTIONS = "muster_preemptions_total", Count, "Sequences put back to be computed again because the KV cache was full.";
    describe_gauge SEQUENCES_RUNNING = "muster_sequences_running", Count, "Sequences in the batch.";
    describe_gauge SEQUENCES_WAITING = "muster_sequences_waiting", Count, "Sequences waiting for a place in the batch.";
    describe_gauge KV_BLOCKS_TOTAL = "muster_kv_blocks_total", Count, "Blocks of the KV cache.";
    describe_gauge KV_BLOCKS_FREE = "muster_kv_blocks_free", Count, "Blocks of the KV cache that no sequence holds.";
    describe_gauge KV_BLOCKS_CACHED = "muster_kv_blocks_cached", Count, "Those of the free blocks whose content is kept for prompts to come.";
    describe_counter PREFIX_HIT_TOKENS = "muster_prefix_hit_tokens_total", Count, "Tokens of sequences let into the batch whose keys and values were cached.";
    describe_counter PREFIX_MISS_TOKENS = "muster_prefix_miss_tokens_total", Count, "Tokens of sequences let into the batch that had to be computed.";
    describe_histogram STEP_SECONDS = "muster_step_seconds", Seconds, "One pass of the batch through all layers.";
    describe_counter STEPS_REPEATED = "muster_steps_repeated_total", Count, "Sequences set back to the start of a step because experts could not be had.";
    // Router: dispatch.
    describe_gauge DISPATCH_WORKERS = "muster_dispatch_workers", Count, "Workers that rows can be sent to.";
    describe_histogram DISPATCH_SECONDS = "muster_dispatch_seconds", Seconds, "From sending the rows of one layer and micro-batch until the last worker answered.";
    describe_histogram DISPATCH_OVERHEAD_SECONDS = "muster_dispatch_overhead_seconds", Seconds, "What dispatch and combine of one layer and micro-batch cost the engine thread, without the time the experts took.";
    describe_counter DISPATCH_LATE_REPLIES = "muster_dispatch_late_replies_total", Count, "Replies that nobody waited for any more.";
    describe_counter DISPATCH_BAD_REPLIES = "muster_dispatch_bad_replies_total", Count, "Replies that break the protocol.";
    describe_counter DISPATCH_DEADLINES = "muster_dispatch_deadlines_total", Count, "Layers whose experts did not answer in time.";
    describe_counter DISPATCH_FAULTS = "muster_dispatch_faults_total", Count, "Shards that failed: lost with their connection, bad replies, and errors that workers reported, by code.";
    describe_counter DISPATCH_RESENT = "muster_dispatch_resent_shards_total", Count, "Shards sent to stand in for one that failed or was late.";
    describe_counter DISPATCH_BANNED = "muster_dispatch_workers_banned_total", Count, "Workers cut off for a while because they broke the protocol.";
    describe_counter DISPATCH_REFUSED = "muster_dispatch_workers_refused_total", Count, "Workers refused because they hold other weights than the router's checkpoint.";
    describe_counter DISPATCH_LINKS_LOST = "muster_dispatch_links_lost_total", Count, "Connections to workers that broke.";
    describe_counter DISPATCH_FALLBACK_SHARDS = "muster_dispatch_fallback_shards_total", Count, "Shards computed by the router itself, for lack of a worker.";
    describe_gauge ROUTER_HEALTH = "muster_router_health", Count, "2 ready, 1 degraded, 0 not ready.";
    describe_counter CANARY_FAILURES = "muster_canary_failures_total", Count, "Test tokens that did not come.";
    // Router: placement.
    describe_gauge PLACEMENT_LEADS = "muster_placement_leads", Count, "1 while this router leads the placement.";
    describe_counter PLACEMENT_PLANS = "muster_placement_plans_total", Count, "Plans that change who ought to hold what.";
    describe_counter PLACEMENT_BYTES_PLANNED = "muster_placement_bytes_planned_total", Bytes, "Weights that plans have workers load.";
    describe_counter PLACEMENT_ORDERS = "muster_placement_orders_total", Count, "Orders that workers took.";
    describe_gauge PLACEMENT_IMBALANCE = "muster_placement_imbalance", Count, "Load over speed of the busiest worker in the last plan, in terms of the mean.";
    describe_gauge PLACEMENT_UNCOVERED = "muster_placement_uncovered_experts", Count, "Experts that no worker has the memory for.";
    describe_gauge PLACEMENT_UNDER_REPLICATED = "muster_placement_under_replicated_experts", Count, "Experts that the plan gives fewer copies, or fewer failure domains, than asked for.";
    describe_gauge PLACEMENT_STUCK = "muster_placement_stuck_experts", Count, "Experts that wait for memory which only the last copy of another could give.";
    // Worker.
    describe_counter WORKER_SHARDS = "muster_worker_shards_total", Count, "Shards answered, by outcome.";
    describe_counter WORKER_SHARDS_ABANDONED = "muster_worker_shards_abandoned_total", Count, "Shards dropped because their router went away.";
    describe_counter WORKER_SHARDS_MERGED = "muster_worker_shards_merged_total", Count, "Shards computed together with others of their layer.";
    describe_counter WORKER_ROWS = "muster_worker_rows_total", Count, "Expert output rows computed.";
    describe_gauge WORKER_PRESSURE = "muster_worker_pressure", Count, "Part of the time, from 0 to 1 and over about 15 s, in which the experts' thread computed.";
    describe_gauge WORKER_EXPERTS = "muster_worker_experts", Count, "Experts that a worker serves.";
    describe_gauge WORKER_LOADING_EXPERTS = "muster_worker_loading_experts", Count, "Experts that a worker was told to hold and does not hold yet.";
    describe_gauge WORKER_RESIDENT_BYTES = "muster_worker_resident_bytes", Bytes, "Experts' weights in a worker's memory.";
    describe_gauge WORKER_CAPACITY_BYTES = "muster_worker_capacity_bytes", Bytes, "Memory that a worker has for experts.";
    describe_gauge WORKER_START_SECONDS = "muster_worker_start_seconds", Seconds, "From a worker's start until it was useful (first expert) and full (all that it was told to hold first).";
    describe_counter WORKER_EXPERTS_LOADED = "muster_worker_experts_loaded_total", Count, "Experts loaded on orders, by source: peer, checkpoint or router.";
    describe_counter WORKER_EXPERT_BYTES_LOADED = "muster_worker_expert_bytes_loaded_total", Bytes, "Bytes of these, packed.";
    describe_counter WORKER_EXPERT_LOAD_ERRORS = "muster_worker_expert_load_errors_total", Count, "Experts that a source did not give as they must be.";
    describe_counter EXPERTS_SENT = "muster_experts_sent_total", Count, "Experts whose weights were sent to another process.";
    describe_counter EXPERTS_WITHHELD = "muster_experts_withheld_total", Count, "Experts that were not handed on because they are no longer what they were when they were loaded.";
    describe_counter WORKER_HANDSHAKES_REFUSED = "muster_worker_handshakes_refused_total", Count, "Routers refused at the handshake.";
    describe_histogram WORKER_QUEUE_SECONDS = "muster_worker_queue_seconds", Seconds, "Between the arrival of a shard and the start of its computation.";
    describe_histogram WORKER_COMPUTE_SECONDS = "muster_worker_compute_seconds", Seconds, "Computation of one shard.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::ALL;

    #[test]
    fn names_are_unique_and_plain() {
        let unique: BTreeSet<&&str> = ALL.iter().collect();
        assert_eq!(unique.len(), ALL.len());
        let plain = |name: &&str| {
            name.starts_with("muster_") && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        };
        assert!(ALL.iter().all(plain));
    }
}
