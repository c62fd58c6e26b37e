//! `cargo xtask ab`: a Muster cluster compared with its alternatives.
//!
//! Every round runs every side once, so that a slower or busier machine affects all of them. A failed side is reported
//! with its reason, never left out.

mod muster;
mod peers;
mod report;
mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::builder::PossibleValuesParser;

use self::muster::Muster;
use self::peers::Peers;
use self::report::Report;
use self::rows::{GROUPS, ROWS, Row, Side};
use crate::{model, note, print, probe};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask ab\n  cargo xtask ab --only decode-1,split --rounds 3\n  \
                        cargo xtask ab --model DIR --peers-venv DIR --write-docs")]
pub(crate) struct Args {
    /// Measure only these groups of rows, separated by commas.
    #[arg(long, value_name = "GROUP", value_delimiter = ',', value_parser = PossibleValuesParser::new(GROUPS))]
    only: Vec<String>,
    /// How often every side is measured.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Threads and cores of every side.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// A granitemoe model directory [default: one made under target/].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// A Python environment with the packages of crates/xtask/peers/requirements.txt [default: one made under target/].
    #[arg(long, value_name = "DIR")]
    peers_venv: Option<PathBuf>,
    /// Where the model is kept as GGUF [default: beside the models under target/].
    #[arg(long, value_name = "DIR")]
    gguf: Option<PathBuf>,
    /// The muster binary [default: built from this workspace].
    #[arg(long, value_name = "FILE")]
    muster: Option<PathBuf>,
    /// Measure Muster alone.
    #[arg(long, conflicts_with = "write_docs")]
    no_peers: bool,
    /// Write all samples as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Put the tables into docs/performance.md.
    #[arg(long)]
    write_docs: bool,
}

/// Measurements of one side: samples of every figure, and failures.
#[derive(Debug, Default)]
struct Outcome {
    figures: BTreeMap<String, Vec<f64>>,
    failures: Vec<String>,
    note: Option<String>,
}

/// Figures of one run of one side.
#[derive(Debug, Default)]
struct Run {
    figures: BTreeMap<String, f64>,
    note: Option<String>,
}

/// Settings common to all sides.
struct Common {
    model: PathBuf,
    threads: u32,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let target = target_directory()?;
    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|row| args.only.is_empty() || args.only.iter().any(|only| only == row.group))
        .collect();
    let muster = match &args.muster {
        Some(path) => Muster::at(path)?,
        None => Muster::build(&root)?,
    };
    let common = Common { model: model_directory(args, &target)?, threads: args.threads };
    let about = muster.about(&common.model)?;
    let mut sides = wanted(&rows);
    let mut outcomes: BTreeMap<Side, Outcome> = BTreeMap::new();
    sides.retain(|side, _| match muster.lacks(*side) {
        Some(reason) => {
            outcomes.entry(*side).or_default().failures.push(reason);
            false
        }
        None => true,
    });
    let peers = prepare_peers(args, &root, &target, &common, &mut sides, &mut outcomes);
    note("measuring the machine");
    let before = probe::measure(args.threads as usize);
    for round in 1..=args.rounds {
        for (side, figures) in &sides {
            let started = Instant::now();
            let run = match (&peers, side.is_muster()) {
                (_, true) => muster.measure(*side, figures, &common),
                (Some(peers), false) => peers.measure(*side, figures, &common),
                (None, false) => continue,
            };
            let outcome = outcomes.entry(*side).or_default();
            let told = outcome.take(run);
            let seconds = started.elapsed().as_secs_f64();
            note(&format!("round {round}/{}  {:<22} {seconds:>6.1} s  {told}", args.rounds, side.name()));
        }
    }
    // Repeated, because another process may have disturbed the first measurement.
    let limits = probe::measure(args.threads as usize).or_better(&before);
    let report = Report::new(&rows, &outcomes, limits, &about, args, &root);
    let page = report.markdown();
    print(&page);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.markdown {
        std::fs::write(path, &page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.write_docs {
        crate::page::put(&root.join("docs/performance.md"), "ab", &page)?;
    }
    Ok(())
}

impl Outcome {
    /// Records a run and describes it in a line.
    fn take(&mut self, run: Result<Run>) -> String {
        let run = match run {
            Ok(run) => run,
            Err(error) => {
                let reason = format!("{error:#}");
                let told = format!("failed: {reason}");
                self.failures.push(reason);
                return told;
            }
        };
        let told: Vec<String> =
            run.figures.iter().map(|(name, value)| format!("{name} {}", report::digits(*value))).collect();
        for (name, value) in run.figures {
            self.figures.entry(name).or_default().push(value);
        }
        self.note = run.note.or(self.note.take());
        told.join(", ")
    }
}

/// Sides needed by the rows, with the figures of each.
fn wanted(rows: &[&Row]) -> BTreeMap<Side, BTreeSet<&'static str>> {
    let mut sides: BTreeMap<Side, BTreeSet<&'static str>> = BTreeMap::new();
    for row in rows {
        for (side, figure) in [Some((row.side, row.figure)), row.against].into_iter().flatten() {
            sides.entry(side).or_default().insert(figure);
        }
    }
    sides
}

/// Prepares the peers, if any is needed; removes sides that cannot be prepared and records the reason.
fn prepare_peers(
    args: &Args,
    root: &Path,
    target: &Path,
    common: &Common,
    sides: &mut BTreeMap<Side, BTreeSet<&'static str>>,
    outcomes: &mut BTreeMap<Side, Outcome>,
) -> Option<Peers> {
    if sides.keys().all(|side| side.is_muster()) {
        return None;
    }
    let mut leave_out = |reason: String| {
        sides.retain(|side, _| {
            if !side.is_muster() {
                outcomes.entry(*side).or_default().failures.push(reason.clone());
            }
            side.is_muster()
        });
        None
    };
    if args.no_peers {
        return leave_out("not measured (--no-peers)".to_owned());
    }
    let gguf = args.gguf.clone().unwrap_or_else(|| target.join("bench/gguf"));
    match Peers::prepare(root, target, args.peers_venv.as_deref(), gguf, &common.model) {
        Ok(peers) => Some(peers),
        Err(error) => leave_out(format!("{error:#}")),
    }
}

/// The `target/` directory, found from this program's path in `target/release`.
fn target_directory() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let directory = program.ancestors().nth(2).context("xtask does not run from a target directory")?;
    Ok(directory.to_owned())
}

fn model_directory(args: &Args, target: &Path) -> Result<PathBuf> {
    if let Some(model) = &args.model {
        if !model.join("config.json").is_file() {
            bail!("--model {}: there is no config.json", model.display());
        }
        return Ok(model.clone());
    }
    let directory = target.join("bench/model");
    if !directory.join("config.json").is_file() {
        note(&format!("writing the model to {}", directory.display()));
        model::write(&directory)?;
    }
    Ok(directory)
}
