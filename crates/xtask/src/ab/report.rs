//! From samples to tables: medians, ratios, and distances from the goals and from the machine's limits.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

use serde::Serialize;

use super::muster::{About, KV_BYTES};
use super::peers::{DECODE_PROMPT, DECODE_STEPS, PREFILL, REPEATS};
use super::rows::{Limit, Row, Side, Unit};
use super::{Args, Outcome};
use crate::page;
use crate::probe::Limits;

/// The complete report.
#[derive(Serialize)]
pub(super) struct Report {
    commit: String,
    date: String,
    machine: String,
    threads: u32,
    rounds: u32,
    limits: Limits,
    model: About,
    lines: Vec<Line>,
    sides: Vec<SideNote>,
}

#[derive(Serialize)]
struct Line {
    group: &'static str,
    label: &'static str,
    #[serde(skip)]
    unit: Unit,
    muster: Figure,
    against: Option<Figure>,
    ratio: Option<f64>,
    goal: Option<f64>,
    limit: Option<f64>,
}

/// One figure of one side.
#[derive(Serialize)]
struct Figure {
    side: &'static str,
    samples: Vec<f64>,
    median: Option<f64>,
    /// Reason for missing samples.
    failure: Option<String>,
}

#[derive(Serialize)]
struct SideNote {
    side: &'static str,
    note: Option<String>,
    failures: Vec<String>,
}

impl Report {
    pub(super) fn new(
        rows: &[&Row],
        outcomes: &BTreeMap<Side, Outcome>,
        limits: Limits,
        about: &About,
        args: &Args,
        root: &Path,
    ) -> Self {
        let lines = rows.iter().map(|row| line(row, outcomes, &limits, about)).collect();
        let sides = outcomes.iter().map(|(side, outcome)| SideNote {
            side: side.name(),
            note: outcome.note.clone(),
            failures: outcome.failures.clone(),
        });
        Self {
            commit: page::commit(root),
            date: page::date(),
            machine: machine(),
            threads: args.threads,
            rounds: args.rounds,
            sides: sides.collect(),
            limits,
            model: about.clone(),
            lines,
        }
    }

    pub(super) fn markdown(&self) -> String {
        let mut page = format!(
            "Commit {}, {}, {}; {} threads for every side, {} rounds. {PREFILL} tokens of prompt for prefill; \
             {DECODE_STEPS} steps after {DECODE_PROMPT} tokens for decode; {REPEATS} of each in a round. Medians, with the least and the \
             greatest of the rounds in brackets.\n\n",
            self.commit, self.date, self.machine, self.threads, self.rounds
        );
        page.push_str("| | Muster | beside | | ratio | goal | limit | of the limit |\n");
        page.push_str("|---|---|---|---|---|---|---|---|\n");
        for line in &self.lines {
            page.push_str(&line.markdown());
        }
        page.push_str(&self.limits_markdown());
        for side in &self.sides {
            let failures = side.failures.first().map(|reason| match reason.starts_with("not ") {
                true => one_line(reason),
                false => {
                    let count = side.failures.len();
                    format!("failed in {count} of {} rounds: {}", self.rounds, one_line(reason))
                }
            });
            let told: Vec<String> = side.note.iter().map(|note| one_line(note)).chain(failures).collect();
            if !told.is_empty() {
                page.push_str(&format!("- {}: {}\n", side.side, told.join("; ")));
            }
        }
        page
    }

    fn limits_markdown(&self) -> String {
        let Limits { read_1_thread, read_all_threads, copy_1_thread, copy_all_threads, .. } = self.limits;
        let Limits { f32_1_thread, f32_all_threads, bf16_all_threads, ref instructions, .. } = self.limits;
        let giga = |rate: f64| digits(rate / 1e9);
        format!(
            "\nThis machine in the same run ({instructions}; 1 thread / {} threads): reads {} / {} GB/s, copies {} / {} GB/s, \
             f32 multiply-add {} / {} GFLOP/s{}. Model: {} parameters, {} MB of trunk, {} MB of experts; a step reads {} MB at batch 1, \
             {} MB at batch 8, {} MB at batch 32.\n\n",
            self.threads,
            giga(read_1_thread),
            giga(read_all_threads),
            giga(copy_1_thread),
            giga(copy_all_threads),
            giga(f32_1_thread),
            giga(f32_all_threads),
            bf16_all_threads
                .map_or_else(String::new, |rate| format!(", bf16 dot products {} GFLOP/s", giga(rate))),
            self.model.parameters,
            self.model.trunk_bytes / 1_000_000,
            self.model.expert_bytes() / 1_000_000,
            digits(self.model.bytes_of_a_step(1) / 1e6),
            digits(self.model.bytes_of_a_step(8) / 1e6),
            digits(self.model.bytes_of_a_step(32) / 1e6),
        )
    }
}

fn line(row: &Row, outcomes: &BTreeMap<Side, Outcome>, limits: &Limits, about: &About) -> Line {
    let muster = figure(row.side, row.figure, outcomes);
    let against = row.against.map(|(side, name)| figure(side, name, outcomes));
    let ratio =
        muster.median.zip(against.as_ref().and_then(|other| other.median)).map(|(ours, other)| ours / other);
    let limit = row.limit.map(|limit| match limit {
        Limit::Reading(batch) => limits.read_all_threads * f64::from(batch) / about.bytes_of_a_step(batch),
        Limit::MultiplyingF32 => limits.f32_all_threads / per_prompt_token(about),
        Limit::MultiplyingBf16 => limits.bf16_all_threads.unwrap_or(0.0) / per_prompt_token(about),
        Limit::Copying => about.bytes as f64 / limits.copy_all_threads,
        Limit::RouterBytes => (about.trunk_bytes + KV_BYTES) as f64,
        Limit::WorkersBytes => about.expert_bytes() as f64,
    });
    Line {
        group: row.group,
        label: row.label,
        unit: row.unit,
        muster,
        against,
        ratio,
        goal: row.goal,
        limit: limit.filter(|limit| *limit > 0.0),
    }
}

/// Floating-point operations of the linear layers.
fn per_prompt_token(about: &About) -> f64 {
    2.0 * about.active_parameters_of_a_prompt_token as f64
}

fn figure(side: Side, name: &str, outcomes: &BTreeMap<Side, Outcome>) -> Figure {
    let outcome = outcomes.get(&side);
    let samples = outcome.and_then(|outcome| outcome.figures.get(name)).cloned().unwrap_or_default();
    let failure = match outcome.and_then(|outcome| outcome.failures.first()) {
        Some(reason) => Some(reason.clone()),
        None if samples.is_empty() => Some(format!("no figure {name}")),
        None => None,
    };
    Figure { side: side.name(), median: median(&samples), samples, failure }
}

impl Line {
    fn markdown(&self) -> String {
        let ratio = match (&self.against, self.ratio) {
            (None, _) => String::new(),
            (Some(_), None) => "-".to_owned(),
            (Some(_), Some(ratio)) => format!("{}x", digits(ratio)),
        };
        let goal = match (self.goal, self.ratio) {
            (None, _) => String::new(),
            (Some(goal), None) => format!("{goal}x"),
            (Some(goal), Some(ratio)) if ratio >= goal => format!("{goal}x: reached"),
            (Some(goal), Some(_)) => format!("{goal}x: missed"),
        };
        let of_limit = match (self.limit, self.muster.median) {
            (Some(limit), Some(value)) if self.unit == Unit::TokensPerSecond => {
                format!("{:.0} %", 100.0 * value / limit)
            }
            (Some(limit), Some(value)) => format!("{}x", digits(value / limit)),
            _ => String::new(),
        };
        let limit = self.limit.map_or_else(String::new, |limit| self.unit.text(limit));
        let (beside, theirs) = match &self.against {
            Some(other) => (other.side, other.markdown(self.unit)),
            None => ("", String::new()),
        };
        let (label, ours) = (self.label, self.muster.markdown(self.unit));
        format!("| {label} | {ours} | {beside} | {theirs} | {ratio} | {goal} | {limit} | {of_limit} |\n")
    }
}

impl Figure {
    fn markdown(&self, unit: Unit) -> String {
        match (self.median, &self.failure) {
            (Some(median), _) => {
                let least = self.samples.iter().copied().fold(f64::INFINITY, f64::min);
                let greatest = self.samples.iter().copied().fold(0.0, f64::max);
                let value = unit.text(median);
                format!("{value} ({} – {})", unit.number(least), unit.number(greatest))
            }
            (None, Some(reason)) if reason.starts_with("not ") => one_line(reason),
            (None, Some(reason)) => format!("failed: {}", one_line(reason)),
            (None, None) => "-".to_owned(),
        }
    }
}

impl Unit {
    const fn scale(self) -> (f64, &'static str) {
        match self {
            Self::TokensPerSecond => (1.0, "tok/s"),
            Self::Seconds => (1e3, "ms"),
            Self::Bytes => (1e-6, "MB"),
        }
    }

    fn number(self, value: f64) -> String {
        digits(value * self.scale().0)
    }

    fn text(self, value: f64) -> String {
        format!("{} {}", self.number(value), self.scale().1)
    }
}

/// A number with three significant digits, or all before the point.
pub(super) fn digits(value: f64) -> String {
    let places = if value == 0.0 { 0.0 } else { (2.0 - value.abs().log10().floor()).clamp(0.0, 6.0) };
    format!("{value:.*}", places as usize)
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted.get(middle).copied()
    } else {
        Some((sorted.get(middle.checked_sub(1)?)? + sorted[middle]) / 2.0)
    }
}

/// Text for a cell of a table, on one line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "/")
}

fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpus.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let name = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let family = field("cpu family").map_or_else(String::new, |family| format!(" (family {family})"));
    let cores = available_parallelism().map_or(0, std::num::NonZero::get);
    format!("{name}{family}, {cores} cores")
}

#[cfg(test)]
mod tests {
    use super::super::rows::ROWS;
    use super::*;

    fn limits() -> Limits {
        Limits {
            read_1_thread: 2e10,
            read_all_threads: 4e10,
            copy_1_thread: 1e10,
            copy_all_threads: 1e10,
            f32_1_thread: 1e11,
            f32_all_threads: 2e11,
            bf16_all_threads: None,
            instructions: "AVX-512".to_owned(),
        }
    }

    fn about() -> About {
        About {
            parameters: 10,
            active_parameters_of_a_prompt_token: 100_000_000,
            bytes: 2_000_000_000,
            trunk_bytes: 400_000_000,
            layers: Vec::new(),
        }
    }

    fn row(group: &str, side: Side) -> &'static Row {
        ROWS.iter().find(|row| row.group == group && row.side == side).unwrap()
    }

    fn outcomes(of: &[(Side, &str, &[f64])]) -> BTreeMap<Side, Outcome> {
        let mut outcomes: BTreeMap<Side, Outcome> = BTreeMap::new();
        for (side, figure, samples) in of {
            outcomes.entry(*side).or_default().figures.insert((*figure).to_owned(), samples.to_vec());
        }
        outcomes
    }

    #[test]
    fn a_row_has_medians_ratio_goal_and_limit() {
        let outcomes = outcomes(&[
            (Side::Exact, "decode-1", &[50.0, 40.0, 60.0]),
            (Side::LlamaBf16, "decode-1", &[20.0, 25.0, 40.0]),
        ]);
        let line = line(row("decode-1", Side::Exact), &outcomes, &limits(), &about());
        assert_eq!(
            line.markdown(),
            "| decode, batch 1 | 50.0 tok/s (40.0 – 60.0) | llama.cpp BF16 | 25.0 tok/s (20.0 – 40.0) | 2.00x | \
             1.1x: reached | 100 tok/s | 50 % |\n"
        );
    }

    #[test]
    fn failures_and_missing_features_are_told_in_their_row() {
        let mut outcomes = outcomes(&[(Side::Exact, "prefill", &[80.0])]);
        outcomes.entry(Side::LlamaBf16).or_default().failures.push("it | crashed\nbadly".to_owned());
        outcomes.entry(Side::Partial).or_default().failures.push("not available: no flag".to_owned());
        let page = line(row("prefill", Side::Exact), &outcomes, &limits(), &about()).markdown();
        assert!(page.contains("| llama.cpp BF16 | failed: it / crashed badly | - | 8x |"), "{page}");
        let page = line(row("prefill", Side::Partial), &outcomes, &limits(), &about()).markdown();
        assert!(page.contains("| not available: no flag |"), "{page}");
        let page = line(row("prefill", Side::PairsPartial), &outcomes, &limits(), &about()).markdown();
        assert!(page.contains("failed: no figure prefill"), "{page}");
    }

    #[test]
    fn medians_and_digits() {
        assert_eq!(median(&[3.0, 1.0]), Some(2.0));
        assert_eq!(median(&[]), None);
        assert_eq!(
            [0.0123, 1.0, 12.34, 123.4, 1234.5].map(digits),
            ["0.0123", "1.00", "12.3", "123", "1234"]
        );
    }
}
