//! `cargo xtask chaos`: the chaos tests, many times, and a table of how long streams stood still.
//!
//! The tests themselves decide whether a run is good; this only repeats them, one at a time, and adds up what they say.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::process::output;
use crate::{note, page, print};

/// How long one run of all faults may take, a build included.
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

/// What a test says of its streams.
#[derive(Debug, Deserialize)]
struct Said {
    fault: String,
    stalls_ms: Vec<u64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut stalls: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for round in 1..=args.repeats {
        let mut tests = Command::new("cargo");
        tests.args(["test", "--release", "--workspace", "--locked", "--test", "suite", "--"]);
        tests.args(["chaos::", "--nocapture", "--test-threads", "1"]);
        let text = output(tests, RUN).with_context(|| format!("round {round} of {}", args.repeats))?;
        let before = stalls.values().map(Vec::len).sum::<usize>();
        for said in said(&text)? {
            stalls.entry(said.fault).or_default().extend(said.stalls_ms);
        }
        if stalls.values().map(Vec::len).sum::<usize>() == before {
            bail!("the chaos tests said nothing; were they left out?");
        }
        note(&format!("round {round}/{}: every stream as undisturbed", args.repeats));
    }
    let table = table(args.repeats, &mut stalls);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = format!(
        "Commit {}, {}, {} faults, {} repeats, 32 streams each.\n\n{table}",
        page::commit(&root),
        page::date(),
        stalls.len(),
        args.repeats
    );
    print(&page);
    if args.write_docs {
        page::put(&root.join("docs/testing.md"), "chaos", &page)?;
    }
    Ok(())
}

/// What the tests said: lines of `chaos` and an object.
fn said(text: &str) -> Result<Vec<Said>> {
    let objects = text.lines().filter_map(|line| line.strip_prefix("chaos "));
    objects.map(|object| serde_json::from_str(object).with_context(|| format!("chaos {object}"))).collect()
}

fn table(repeats: u32, stalls: &mut BTreeMap<String, Vec<u64>>) -> String {
    let mut table =
        "| fault | runs | streams | failed or different | longest pause of a stream: p50 | p99 | most |\n\
                     |---|---|---|---|---|---|---|"
            .to_owned();
    for (fault, stalls) in stalls {
        stalls.sort_unstable();
        let at = |part: usize| stalls[(stalls.len() * part / 100).min(stalls.len() - 1)];
        table += &format!(
            "\n| {fault} | {repeats} | {} | 0 | {} ms | {} ms | {} ms |",
            stalls.len(),
            at(50),
            at(99),
            at(100)
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tests_say_is_added_up() {
        let text = "running 2 tests\nchaos {\"fault\":\"a\",\"stalls_ms\":[3,1,200]}\ntest x ... ok\n";
        let mut stalls = BTreeMap::new();
        for said in said(text).unwrap() {
            stalls.insert(said.fault, said.stalls_ms);
        }
        let table = table(1, &mut stalls);
        assert!(table.ends_with("| a | 1 | 3 | 0 | 3 ms | 200 ms | 200 ms |"), "{table}");
        assert!(said("chaos nonsense").is_err());
    }
}
