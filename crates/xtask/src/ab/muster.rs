//! Muster's own sides: a cluster of three processes, and a single process.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::peers::{DECODE_PROMPT, DECODE_STEPS, PREFILL, REPEATS};
use super::rows::{Side, batch_of};
use super::{Common, Run};
use crate::note;
use crate::process::{collected, drain, on_cores, output, stop, tail};

const ASK: Duration = Duration::from_secs(120);
const START: Duration = Duration::from_secs(300);
const MEASURE: Duration = Duration::from_secs(900);
const PATIENCE: Duration = Duration::from_secs(15);
const WORKERS: u32 = 2;
/// The router's default KV cache, stated explicitly.
pub(super) const KV_BYTES: u64 = 512 << 20;

/// The `muster` binary.
pub(super) struct Muster {
    program: PathBuf,
    /// Output of `muster up --help`.
    help: String,
}

/// Sizes of the model.
#[derive(Debug, Clone, Serialize)]
pub(super) struct About {
    pub(super) parameters: u64,
    /// Without the embedding table, of which a prompt token reads one row.
    pub(super) active_parameters_of_a_prompt_token: u64,
    pub(super) bytes: u64,
    pub(super) trunk_bytes: u64,
    pub(super) layers: Vec<Layer>,
}

/// Routed experts of a layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Layer {
    pub(super) experts: u32,
    pub(super) experts_per_token: u32,
    pub(super) expert_bytes: u64,
}

impl About {
    pub(super) fn expert_bytes(&self) -> u64 {
        self.bytes - self.trunk_bytes
    }

    /// Bytes of weights read by a decoding step of `batch` sequences: the trunk, and the expected number of experts
    /// chosen at least once if all choices are equally likely.
    pub(super) fn bytes_of_a_step(&self, batch: u32) -> f64 {
        let experts = self.layers.iter().map(|layer| {
            let all = f64::from(layer.experts);
            let missed = (1.0 - f64::from(layer.experts_per_token) / all).powf(f64::from(batch));
            all * (1.0 - missed) * layer.expert_bytes as f64
        });
        self.trunk_bytes as f64 + experts.sum::<f64>()
    }
}

impl Muster {
    pub(super) fn at(program: &Path) -> Result<Self> {
        let mut ask = Command::new(program);
        ask.args(["up", "--help"]);
        Ok(Self { program: program.to_owned(), help: output(ask, ASK)? })
    }

    /// Builds the binary from this workspace.
    pub(super) fn build(root: &Path) -> Result<Self> {
        note("building muster");
        let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--package", "muster-cli"])
            .current_dir(root)
            .status()
            .context("cannot run cargo")?;
        if !built.success() {
            bail!("muster does not build");
        }
        Self::at(&super::target_directory()?.join("release/muster"))
    }

    /// Reason why this binary lacks a side, if it does.
    pub(super) fn lacks(&self, side: Side) -> Option<String> {
        let missing = side.flags().iter().find(|(flag, value)| !offers(&self.help, flag, value))?;
        Some(format!("not available: this muster has no {} {}", missing.0, missing.1))
    }

    /// Flags of `up` for a side. The combine mode is always explicit.
    fn flags(&self, side: Side) -> Vec<(&'static str, &'static str)> {
        let mut flags = side.flags().to_vec();
        if offers(&self.help, "--combine", "exact") && !flags.iter().any(|(flag, _)| *flag == "--combine") {
            flags.push(("--combine", "exact"));
        }
        flags
    }

    pub(super) fn about(&self, model: &Path) -> Result<About> {
        let mut ask = Command::new(&self.program);
        ask.args(["check-model", "--headers-only", "--json"]).arg(model);
        let answer: Value = serde_json::from_str(&output(ask, ASK)?)?;
        let number = |pointer: &str| {
            answer
                .pointer(pointer)
                .and_then(Value::as_u64)
                .with_context(|| format!("check-model has no {pointer}"))
        };
        let layers: Vec<Layer> = serde_json::from_value(answer["layers"].clone())?;
        let table = number("/vocabulary")? * number("/hidden")?;
        Ok(About {
            parameters: number("/parameters")?,
            active_parameters_of_a_prompt_token: number("/active_parameters")?.saturating_sub(table),
            bytes: number("/weights/bytes")?,
            trunk_bytes: number("/weights/trunk_bytes")?,
            layers: layers.into_iter().filter(|layer| layer.experts > 0).collect(),
        })
    }

    /// Runs a side once, in processes of its own.
    pub(super) fn measure(
        &self,
        side: Side,
        figures: &BTreeSet<&'static str>,
        common: &Common,
    ) -> Result<Run> {
        if side == Side::Local {
            let mut target = Vec::new();
            target.extend(["--model".to_owned(), common.model.display().to_string()]);
            target.extend(["--threads".to_owned(), common.threads.to_string()]);
            return Ok(Run { figures: self.bench(&target, figures, common)?, note: None });
        }
        let mut cluster = Cluster::start(&self.program, &self.flags(side), common)?;
        let target = ["--grpc", &cluster.grpc, "--metrics", &cluster.http].map(str::to_owned);
        let measured = self.bench(&target, figures, common);
        let resident = cluster.resident();
        let said = cluster.stop();
        let mut figures = measured.with_context(|| format!("the cluster said {said:?}"))?;
        figures.insert("start-seconds".to_owned(), cluster.started.as_secs_f64());
        let (router, workers) = resident?;
        figures.insert("router-bytes".to_owned(), router as f64);
        figures.insert("workers-bytes".to_owned(), workers as f64);
        Ok(Run { figures, note: None })
    }

    fn bench(
        &self,
        target: &[String],
        figures: &BTreeSet<&'static str>,
        common: &Common,
    ) -> Result<BTreeMap<String, f64>> {
        let mut measured = BTreeMap::new();
        let bench = |prompt: u32, outputs: u32, batches: &str| -> Result<Vec<Value>> {
            let mut command = on_cores(common.threads, &self.program);
            command.arg("bench").args(target).args(["--json", "--concurrency", batches]);
            command.args(["--prompt-tokens", &prompt.to_string(), "--output-tokens", &outputs.to_string()]);
            command.args(["--rounds", &REPEATS.to_string()]);
            let printed: Value = serde_json::from_str(&output(command, MEASURE)?)?;
            Ok(printed["results"].as_array().cloned().unwrap_or_default())
        };
        if figures.contains("prefill") {
            for result in bench(PREFILL, 1, "1")? {
                insert(&mut measured, "prefill".to_owned(), &result["prefill_tokens_per_second"]);
            }
        }
        let batches: BTreeSet<u32> = figures.iter().filter_map(|figure| batch_of(figure)).collect();
        if !batches.is_empty() {
            let list = batches.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            for result in bench(DECODE_PROMPT, DECODE_STEPS + 1, &list)? {
                let batch = &result["concurrency"];
                insert(&mut measured, format!("decode-{batch}"), &result["decode_tokens_per_second"]);
                for quantile in ["p50", "p99"] {
                    let value = &result["dispatch_per_layer"][quantile];
                    insert(&mut measured, format!("dispatch-{batch}-{quantile}"), value);
                }
            }
        }
        Ok(measured)
    }
}

/// Inserts a figure, unless it is missing.
fn insert(figures: &mut BTreeMap<String, f64>, name: String, value: &Value) {
    figures.extend(value.as_f64().map(|value| (name, value)));
}

/// Whether a help page offers `flag`, with `value` among its values.
fn offers(help: &str, flag: &str, value: &str) -> bool {
    let starts = |line: &str| line.trim_start().starts_with(flag);
    let mut lines = help.lines().skip_while(|line| !starts(line));
    let Some(first) = lines.next() else { return false };
    // The text of the flag ends at the next one.
    let rest = lines.take_while(|line| !line.trim_start().starts_with("--"));
    std::iter::once(first)
        .chain(rest)
        .any(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|word| word == value))
}

/// `muster up`: a router process and two worker processes.
struct Cluster {
    child: Child,
    errors: Option<JoinHandle<Vec<u8>>>,
    http: String,
    grpc: String,
    started: Duration,
}

impl Cluster {
    fn start(program: &Path, flags: &[(&str, &str)], common: &Common) -> Result<Self> {
        let mut command = on_cores(common.threads, program);
        command.args(["up", "--announce", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--model"]);
        command.arg(&common.model).args(["--workers", &WORKERS.to_string()]);
        command.args(["--kv-memory", &format!("{KV_BYTES}B")]);
        for (flag, value) in flags {
            command.args([flag, value]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let errors = drain(child.stderr.take());
        let mut cluster = Self {
            errors: Some(errors),
            http: String::new(),
            grpc: String::new(),
            started: Duration::ZERO,
            child,
        };
        let announced = cluster.child.stdout.take().context("no standard output").and_then(announced);
        cluster.started = began.elapsed();
        match announced {
            Ok((http, grpc)) => {
                (cluster.http, cluster.grpc) = (format!("http://{http}"), format!("http://{grpc}"));
                Ok(cluster)
            }
            Err(error) => {
                let said = cluster.stop();
                Err(error.context(format!("the cluster did not start: {said}")))
            }
        }
    }

    /// Resident bytes of the router and of all workers.
    fn resident(&self) -> Result<(u64, u64)> {
        let (mut router, mut workers) = (0, 0);
        for process in fs::read_dir("/proc")?.flatten() {
            let read = |file: &str| fs::read_to_string(process.path().join(file)).unwrap_or_default();
            let status = read("status");
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name))?;
                line.split_whitespace().next()?.parse::<u64>().ok()
            };
            if field("PPid:") != Some(u64::from(self.child.id())) {
                continue;
            }
            let bytes = field("VmRSS:").unwrap_or(0) * 1024;
            match read("cmdline").split('\0').nth(1) {
                Some("router") => router += bytes,
                Some("worker") => workers += bytes,
                _ => {}
            }
        }
        if router == 0 || workers == 0 {
            bail!("the router or its workers are gone");
        }
        Ok((router, workers))
    }

    /// Stops the cluster and returns the end of its output.
    fn stop(&mut self) -> String {
        stop(&mut self.child, PATIENCE);
        self.errors.take().map(|errors| tail(&collected(errors))).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.errors.is_some() {
            self.stop();
        }
    }
}

/// Waits for the addresses that `up` announces.
fn announced(out: ChildStdout) -> Result<(String, String)> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let Ok(line) = serde_json::from_str::<Value>(&line) else { continue };
            let address = |name: &str| line["ready"][name].as_str().map(str::to_owned);
            if let (Some(http), Some(grpc)) = (address("http"), address("grpc")) {
                // Fails after the deadline, when nobody receives.
                let _ = sender.send((http, grpc));
            }
        }
    });
    receiver.recv_timeout(START).context("it was not ready in time")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELP: &str = "Options:\n      --combine <MODE>\n          Where outputs are added up\n\n          \
                        Possible values:\n          - exact:   in the router\n          - partial: in the workers\n\n      \
                        --expert-dtype <DTYPE>  What experts are held in: q8, q4 or model\n  -h, --help\n";

    #[test]
    fn features_are_found_in_the_help() {
        assert!(offers(HELP, "--combine", "partial"));
        assert!(offers(HELP, "--expert-dtype", "q8") && offers(HELP, "--expert-dtype", "q4"));
        assert!(!offers(HELP, "--combine", "q8"), "that is another flag's");
        assert!(!offers(HELP, "--compute", "bf16-pairs"));
    }

    #[test]
    fn larger_batches_read_more_experts_but_never_more_than_all() {
        let layer = Layer { experts: 32, experts_per_token: 8, expert_bytes: 10 };
        let about = About {
            parameters: 0,
            active_parameters_of_a_prompt_token: 0,
            bytes: 0,
            trunk_bytes: 100,
            layers: vec![layer; 2],
        };
        assert!((about.bytes_of_a_step(1) - 260.0).abs() < 1e-9);
        // Two sequences: 32 (1 - (3/4)^2) = 14 experts.
        assert!((about.bytes_of_a_step(2) - 380.0).abs() < 1e-9);
        assert!(about.bytes_of_a_step(1000) <= 740.0);
    }
}
