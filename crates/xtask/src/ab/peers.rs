//! Muster's peers: their Python environment, their model files, and one run of each.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::rows::{Side, batch_of};
use super::{Common, Run};
use crate::note;
use crate::process::{on_cores, output, tail};

/// Build flags of llama.cpp: for this machine, with RPC servers.
const CMAKE_ARGS: &str = "-DGGML_NATIVE=ON -DGGML_RPC=ON";
const INSTALL: Duration = Duration::from_secs(3 * 3600);
const CONVERT: Duration = Duration::from_secs(3600);
const MEASURE: Duration = Duration::from_secs(1200);
/// Equal on every side: tokens before decoding, and decoding steps.
pub(super) const DECODE_PROMPT: u32 = 32;
pub(super) const DECODE_STEPS: u32 = 64;
pub(super) const PREFILL: u32 = 512;
pub(super) const REPEATS: u32 = 3;

pub(super) struct Peers {
    python: PathBuf,
    scripts: PathBuf,
    gguf: PathBuf,
    model: PathBuf,
}

/// The line printed by a peer's script.
#[derive(Deserialize)]
struct Printed {
    figures: std::collections::BTreeMap<String, f64>,
    note: String,
}

impl Peers {
    /// Installs missing packages and converts the model, if not done before.
    pub(super) fn prepare(
        root: &Path,
        target: &Path,
        venv: Option<&Path>,
        gguf: PathBuf,
        model: &Path,
    ) -> Result<Self> {
        let scripts = root.join("crates/xtask/peers");
        let venv = match venv {
            Some(venv) => venv.to_owned(),
            None => install(&scripts.join("requirements.txt"), &target.join("peers"))?,
        };
        let python = venv.join("bin/python");
        let mut convert = Command::new(&python);
        convert.arg(scripts.join("convert.py")).arg(model).arg(&gguf);
        note(&format!("model files of llama.cpp in {}", gguf.display()));
        output(convert, CONVERT).context("converting the model for llama.cpp")?;
        Ok(Self { python, scripts, gguf, model: model.to_owned() })
    }

    /// Runs a peer once, in a process of its own.
    pub(super) fn measure(
        &self,
        side: Side,
        figures: &BTreeSet<&'static str>,
        common: &Common,
    ) -> Result<Run> {
        let mut command = on_cores(common.threads, &self.python);
        let (script, model) = match side {
            Side::Transformers => ("hf.py", self.model.clone()),
            Side::LlamaBf16 | Side::LlamaRpc => ("llama.py", self.gguf.join("bf16.gguf")),
            Side::LlamaQ8 => ("llama.py", self.gguf.join("q8_0.gguf")),
            Side::LlamaQ4 => ("llama.py", self.gguf.join("q4_k_m.gguf")),
            _ => bail!("{} is no peer", side.name()),
        };
        command.arg(self.scripts.join(script)).arg(model);
        if side == Side::LlamaRpc {
            // A thread for every server, and one for the client, which hardly computes.
            command.args(["--rpc", "2", "--threads", "1"]);
        } else {
            command.args(["--threads", &common.threads.to_string()]);
        }
        if figures.contains("prefill") {
            command.args(["--prefill", &PREFILL.to_string()]);
        }
        let batches: Vec<String> =
            figures.iter().filter_map(|figure| batch_of(figure)).map(|batch| batch.to_string()).collect();
        command.args(["--decode", &batches.join(",")]);
        command.args(["--prompt", &DECODE_PROMPT.to_string(), "--steps", &DECODE_STEPS.to_string()]);
        command.args(["--repeats", &REPEATS.to_string()]);
        let printed = output(command, MEASURE)?;
        let line = printed.lines().last().unwrap_or_default();
        let Printed { figures, note } = serde_json::from_str(line)
            .with_context(|| format!("{script} printed no figures: {}", tail(&printed)))?;
        Ok(Run { figures, note: Some(note) })
    }
}

/// Creates a Python environment with exactly the required packages.
fn install(requirements: &Path, venv: &Path) -> Result<PathBuf> {
    let wanted = fs::read_to_string(requirements)?;
    let stamp = venv.join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(venv.to_owned());
    }
    note(&format!("installing the peers into {}; llama.cpp is built, which takes a while", venv.display()));
    let mut make = Command::new("python3");
    make.args(["-m", "venv"]).arg(venv);
    output(make, INSTALL).context("making a Python environment")?;
    let mut pip = Command::new(venv.join("bin/python"));
    pip.args(["-m", "pip", "install", "--no-binary", "llama-cpp-python", "--requirement"])
        .arg(requirements)
        .env("CMAKE_ARGS", CMAKE_ARGS);
    output(pip, INSTALL).context("installing the peers")?;
    fs::write(&stamp, wanted)?;
    Ok(venv.to_owned())
}
