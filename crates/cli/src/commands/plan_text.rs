//! A plan as text: facts, tables, and the commands to type next.

use super::plan_report::{Given, Report, Size, Wire};
use crate::numbers::Unit;
use crate::{models, text};

/// The complete text.
pub(super) fn for_people(report: &Report) -> String {
    let mut parts = vec![facts(report)];
    parts.extend(given(report));
    parts.extend(sizes(report));
    parts.push(wire(report));
    parts.push(next(report));
    parts.join("\n") + "\n"
}

/// `47 B held (46.7 B)`, or `6.9 B held`.
fn parameters(count: u64, what: &str) -> String {
    let exact = text::count(count);
    if count < 10_000_000_000 {
        return format!("{exact} {what}");
    }
    format!("{:.0} B {what} ({exact})", count as f64 / 1e9)
}

/// Whether the KV cache holds less than the keys and values of all tokens.
const fn gives_up(report: &Report) -> bool {
    let tokens = report.context.saturating_mul(report.sequences as u64);
    report.kv_bytes < report.kv_token_bytes.saturating_mul(tokens)
}

fn facts(report: &Report) -> String {
    let from = if report.preset {
        format!(", by the published config.json of {}", report.loaded_from)
    } else {
        String::new()
    };
    let native = |dtype: &str, stored: &str| {
        if dtype == "native" { stored.to_owned() } else { dtype.to_owned() }
    };
    let which = if report.moe_layers == report.layers {
        String::new()
    } else {
        format!(", {} of them with experts", report.moe_layers)
    };
    let mut facts = vec![
        ("model", format!("{} ({}){from}", report.model, report.family)),
        (
            "parameters",
            format!(
                "{}, {}",
                parameters(report.parameters, "held"),
                parameters(report.active_parameters, "active per token")
            ),
        ),
        (
            "layers",
            format!(
                "{}{which}; {} experts each, {} per token",
                report.layers, report.experts_per_layer, report.experts_per_token
            ),
        ),
        (
            "experts",
            format!(
                "{} of {} in {}: {}",
                report.experts,
                text::bytes(report.expert_bytes),
                native(&report.expert_dtype, report.experts_stored_as),
                text::bytes(report.all_experts_bytes)
            ),
        ),
        ("trunk", format!("{} ({}), in every router", text::bytes(report.trunk_bytes), report.trunk_dtype)),
        (
            "KV cache",
            format!(
                "{} per token{}; {} sequences of {} tokens: {}",
                text::bytes(report.kv_token_bytes),
                if gives_up(report) { ", less where layers no longer see it" } else { "" },
                report.sequences,
                report.context,
                text::bytes(report.kv_bytes)
            ),
        ),
        ("router", format!("{} each: trunk and KV cache", text::bytes(report.router_bytes))),
        (
            "worker",
            format!(
                "{} % of its memory is for experts; the rest is for rows, buffers and the system",
                report.memory_for_experts_percent
            ),
        ),
    ];
    if let Some(bytes) = report.indexed_bytes {
        facts.push((
            "note",
            format!(
                "the index says {} of weights, the configuration implies {}",
                text::bytes(bytes),
                text::bytes(report.stored_bytes)
            ),
        ));
    }
    if report.given.iter().any(|given| given.gpu) || report.sizes.iter().any(|size| size.gpu) {
        facts.push((
            "note",
            "this build computes on CPUs; memory of GPUs is counted like that of hosts".to_owned(),
        ));
    }
    facts.iter().map(|(name, value)| format!("{name:<14} {value}\n")).collect()
}

fn copies(count: u32) -> String {
    if count == 1 { "1 copy".to_owned() } else { format!("{count} copies") }
}

/// Whether the given workers hold the model.
fn given(report: &Report) -> Option<String> {
    if report.given.is_empty() {
        return None;
    }
    let row = |given: &Given| {
        let shown = |bytes| text::memory(bytes, given.unit);
        let (memory, own) = (shown(given.memory_bytes), shown(given.expert_memory_bytes));
        vec![given.workers.to_string(), memory, own, given.experts_each.to_string()]
    };
    let rows: Vec<Vec<String>> = report.given.iter().map(row).collect();
    let table = text::table(&["given", "memory each", "for experts", "experts each"], &rows);
    let asked = copies(report.replicas);
    let verdict = if report.given_missing == 0 {
        format!("They hold {asked} of every expert, and could hold {}.", report.given_copies)
    } else {
        let bytes = report.given_missing.saturating_mul(report.expert_bytes);
        format!(
            "They do not hold {asked} of every expert: places for {} more are missing, {}.",
            report.given_missing,
            text::bytes(bytes)
        )
    };
    Some(format!("{table}\n{verdict}\n"))
}

/// Workers needed of each size.
fn sizes(report: &Report) -> Option<String> {
    let first = report.sizes.first()?;
    let beside = if report.given.is_empty() { "workers of" } else { "beside them" };
    let counts = first.workers_by_copies.iter().map(|(count, _)| copies(*count));
    let header: Vec<String> =
        [beside, "for experts", "experts each"].map(str::to_owned).into_iter().chain(counts).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let row = |size: &Size| {
        let mut row = vec![
            text::memory(size.memory_bytes, size.unit),
            text::memory(size.expert_memory_bytes, size.unit),
            format!("{} of {}", size.experts_each, report.experts),
        ];
        row.extend(size.workers_by_copies.iter().map(|(_, workers)| workers.to_string()));
        row
    };
    let rows: Vec<Vec<String>> = report.sizes.iter().map(row).collect();
    let table = text::table(&header, &rows);
    let spare = if report.replicas > 1 {
        ", and one more than that to have all copies again when one is lost"
    } else {
        ""
    };
    Some(format!("Workers needed for so many copies of every expert{spare}:\n{table}\n"))
}

fn wire(report: &Report) -> String {
    let row = |wire: &Wire| {
        let each =
            |sent: f64, back: f64| format!("{} / {}", text::bytes(sent as u64), text::bytes(back as u64));
        let rate = |sent: f64, back: f64| format!("{} / {}", text::bit_rate(sent), text::bit_rate(back));
        vec![
            wire.workers.to_string(),
            format!("{:.2}", wire.workers_per_row),
            each(wire.sent_per_layer, wire.returned_per_layer),
            each(wire.sent_per_token, wire.returned_per_token),
            rate(wire.sent_per_second, wire.returned_per_second),
        ]
    };
    let rows: Vec<Vec<String>> = report.wire.iter().map(row).collect();
    let at = format!("at {} tokens/s", report.rate);
    let header = ["workers", "workers per row", "a token and layer", "a token, all layers", &at];
    let saved =
        report.wire.iter().any(|wire| wire.returned_per_layer > 1.25 * wire.returned_per_layer_partial);
    let hint =
        if saved { "\n--combine partial returns less, with bits that depend on the placement." } else { "" };
    format!(
        "On the wire of a router, sent / returned, combine {}, {} rows of {}; on average, without framing:\n{}{hint}\n",
        report.combine,
        report.wire_dtype,
        report.hidden,
        text::table(&header, &rows)
    )
}

/// Whole MiB, at least one.
fn mebibytes(bytes: u64) -> u64 {
    (bytes >> 20).max(1)
}

/// Workers of one size, as arguments of commands.
struct Pool {
    workers: u64,
    memory: u64,
    /// Memory of each for experts.
    own: u64,
    unit: Unit,
}

fn next(report: &Report) -> String {
    let pool = |given: &Given| Pool {
        workers: given.workers.into(),
        memory: given.memory_bytes,
        own: given.expert_memory_bytes,
        unit: given.unit,
    };
    let mut pools: Vec<Pool> = report.given.iter().map(pool).collect();
    if report.given_missing > 0 || report.given.is_empty() {
        match report.sizes.as_slice() {
            &[Size { workers, memory_bytes: memory, expert_memory_bytes: own, unit, .. }] => {
                pools.push(Pool { workers, memory, own, unit });
            }
            [] => return "Next: more memory, --expert-dtype q8 or q4, or fewer --replicas.".to_owned(),
            _ => {
                let command = format!("muster plan {} --worker SIZE", report.model);
                return format!("Next: choose a size, as in `{command}`.");
            }
        }
    }
    pools.retain(|pool| pool.workers > 0);
    let mut lines = vec!["Next, on hosts (beyond one machine with TLS: docs/security.md):".to_owned()];
    if report.preset {
        lines.push(format!("  muster pull {}", report.loaded_from));
    }
    let dtype = |flag: &str, dtype: &str| {
        if dtype == "native" { String::new() } else { format!(" --{flag} {dtype}") }
    };
    let expert_dtype = dtype("expert-dtype", &report.expert_dtype);
    let combine =
        if report.combine == "exact" { String::new() } else { format!(" --combine {}", report.combine) };
    let kv = mebibytes(report.kv_bytes + (1 << 20) - 1);
    lines.push(format!(
        "  muster router --model {} --replicas {} --kv-memory {kv}MiB{expert_dtype}{}{combine}",
        quoted(&report.loaded_from),
        report.replicas,
        dtype("trunk-dtype", &report.trunk_dtype)
    ));
    for Pool { workers, own, unit, .. } in &pools {
        let own = unit.argument(*own);
        lines.push(format!(
            "  muster worker --join ROUTER:50051 --memory {own}{expert_dtype}    # {workers} times"
        ));
    }
    lines.extend(helm(report, &pools, kv));
    lines.join("\n")
}

/// Commands for Kubernetes, if one pool of workers suffices.
fn helm(report: &Report, pools: &[Pool], kv: u64) -> Vec<String> {
    let [Pool { workers, memory, own, unit }] = pools else {
        return vec!["On Kubernetes give every size a pool of its own: docs/kubernetes.md.".to_owned()];
    };
    let model = &report.loaded_from;
    let source = if model == models::DEMO {
        vec!["model.source=demo".to_owned()]
    } else if model.starts_with('/') {
        vec!["model.source=hostPath".to_owned(), format!("model.hostPath.path={}", quoted(model))]
    } else {
        vec!["model.source=download".to_owned(), format!("model.download.repository={model}")]
    };
    // Trunk and KV cache, a quarter more, and room for the process.
    let router = mebibytes(report.router_bytes + report.router_bytes / 4) + 512;
    let mut values = source;
    values.push(format!("expertReplicas={}", report.replicas));
    values.push(format!("router.config.kv_memory={kv}MiB"));
    for (key, dtype) in [("expert_dtype", &report.expert_dtype), ("trunk_dtype", &report.trunk_dtype)] {
        if dtype != "native" {
            values.push(format!("router.config.{key}={dtype}"));
        }
    }
    if report.expert_dtype != "native" {
        values.push(format!("workers.defaults.config.expert_dtype={}", report.expert_dtype));
    }
    if report.combine != "exact" {
        values.push(format!("router.config.combine={}", report.combine));
    }
    for kind in ["requests", "limits"] {
        values.push(format!("router.resources.{kind}.memory={router}Mi"));
        values.push(format!("workers.defaults.resources.{kind}.memory={}", unit.quantity(*memory)));
    }
    values.push(format!("workers.defaults.replicas={workers}"));
    values.push(format!("workers.defaults.memory={}", unit.argument(*own)));
    let values: Vec<String> = values.into_iter().map(|value| format!("    --set {value}")).collect();
    vec![
        "Next, on Kubernetes (docs/kubernetes.md):".to_owned(),
        format!("  helm install moe helm/muster \\\n{}", values.join(" \\\n")),
    ]
}

/// A path quoted for a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
