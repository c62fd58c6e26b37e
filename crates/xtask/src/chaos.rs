//! `cargo xtask chaos`: repeats the chaos tests and tabulates the pauses of streams.
//!
//! The tests themselves judge a run; this repeats them, one at a time, and sums up their output.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::process::output;
use crate::{note, page, print};

/// Deadline of one run of all faults, a build included.
const RUN: Duration = Duration::from_secs(1800);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often every fault is injected.
    #[arg(long, default_value = "20", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Put the table into docs/testing.md.
    #[arg(long)]
    write_docs: bool,
}

/// A test's report on its streams.
#[derive(Debug, Deserialize)]
struct Said {
    fault: String,
    stalls_ms: Vec<u64>,
    /// Other figures, by name.
    #[serde(flatten)]
    others: BTreeMap<String, u64>,
}

/// Reports on one fault, over all rounds.
#[derive(Debug, Default)]
struct Heard {
    stalls_ms: Vec<u64>,
    others: BTreeMap<String, Vec<u64>>,
}

impl Heard {
    fn take(&mut self, said: Said) {
        self.stalls_ms.extend(said.stalls_ms);
        for (name, value) in said.others {
            self.others.entry(name).or_default().push(value);
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut heard: BTreeMap<String, Heard> = BTreeMap::new();
    for round in 1..=args.repeats {
        let mut tests = Command::new("cargo");
        tests.args(["test", "--release", "--workspace", "--locked", "--test", "suite", "--"]);
        tests.args(["chaos::", "--nocapture", "--test-threads", "1"]);
        let text = output(tests, RUN).with_context(|| format!("round {round} of {}", args.repeats))?;
        let said = said(&text)?;
        if said.is_empty() {
            bail!("the chaos tests said nothing; were they left out?");
        }
        for said in said {
            heard.entry(said.fault.clone()).or_default().take(said);
        }
        note(&format!("round {round}/{}: every stream as undisturbed", args.repeats));
    }
    let table = table(args.repeats, &mut heard);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = format!(
        "Commit {}, {}, {} faults, {} repeats, 32 streams each.\n\n{table}",
        page::commit(&root),
        page::date(),
        heard.len(),
        args.repeats
    );
    print(&page);
    if args.write_docs {
        page::put(&root.join("docs/testing.md"), "chaos", &page)?;
    }
    Ok(())
}

/// Reports in the tests' output: lines of `chaos` and a JSON object.
fn said(text: &str) -> Result<Vec<Said>> {
    let objects = text.lines().filter_map(|line| line.strip_prefix("chaos "));
    objects.map(|object| serde_json::from_str(object).with_context(|| format!("chaos {object}"))).collect()
}

fn table(repeats: u32, heard: &mut BTreeMap<String, Heard>) -> String {
    let mut table = "| fault | runs | streams | failed or different | longest pause of a stream: p50 | p99 | most | other \
                     figures: median (most) |\n\
                     |---|---|---|---|---|---|---|---|"
        .to_owned();
    for (fault, Heard { stalls_ms, others }) in heard {
        let streams = stalls_ms.len();
        let stalls = [50, 99, 100].map(|part| at(stalls_ms, part));
        let other = |(name, values): (&String, &mut Vec<u64>)| {
            format!("{}: {} ({})", name.replace('_', " "), at(values, 50), at(values, 100))
        };
        let others: Vec<String> = others.iter_mut().map(other).collect();
        table += &format!(
            "\n| {fault} | {repeats} | {streams} | 0 | {} ms | {} ms | {} ms | {} |",
            stalls[0],
            stalls[1],
            stalls[2],
            others.join("; ")
        );
    }
    table
}

/// The given percentile; 0 without values.
fn at(values: &mut [u64], part: usize) -> u64 {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    values.get((values.len() * part / 100).min(last)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tests_say_is_added_up() {
        let text = "running 2 tests\nchaos {\"fault\":\"a\",\"stalls_ms\":[3,1,200],\"again_ms\":7}\ntest x ... ok\n";
        let mut heard: BTreeMap<String, Heard> = BTreeMap::new();
        for said in said(text).unwrap().into_iter().chain(said(&text.replace('7', "5")).unwrap()) {
            heard.entry(said.fault.clone()).or_default().take(said);
        }
        let table = table(2, &mut heard);
        assert!(table.ends_with("| a | 2 | 6 | 0 | 3 ms | 200 ms | 200 ms | again ms: 7 (7) |"), "{table}");
        assert!(said("chaos nonsense").is_err());
    }
}
