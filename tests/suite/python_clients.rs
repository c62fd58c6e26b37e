//! Clients other people wrote, installed from PyPI into scratch environments: the `openai` package, frameworks over it, and
//! stubs that grpcio-tools generates from `proto/`.
//!
//! Needs `python3` and a network that reaches PyPI. `MUSTER_SKIP_PYTHON=1` leaves these tests out and says so.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use muster_tests::cluster::{Cluster, Setup};
use muster_tests::process::{muster, run_command};
use muster_tests::{demo_model, workspace_root};

const PACKAGES: [&str; 4] =
    ["openai==3.54.0", "grpcio==1.85.1", "grpcio-tools==1.85.1", "grpcio-health-checking==1.85.1"];

/// Frameworks that people put in front of the OpenAI API.
const FRAMEWORKS: [&str; 4] =
    ["openai==3.57.0", "litellm==1.110.2", "langchain-openai==1.7.4", "lm_eval[api]==0.4.13"];

/// The scratch environment of the clients.
pub(crate) fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    PYTHON.get_or_init(|| environment("python-clients", &PACKAGES)).as_deref()
}

/// The interpreter of a scratch environment with these packages, made once and kept in the target directory between
/// runs. `None` where such tests are to be left out.
pub(crate) fn environment(name: &str, packages: &[&str]) -> Option<PathBuf> {
    if std::env::var_os("MUSTER_SKIP_PYTHON").is_some() {
        eprintln!("skipped: MUSTER_SKIP_PYTHON is set");
        return None;
    }
    let environment = muster().parent().unwrap().join(name);
    let python = environment.join("bin/python");
    let wanted = packages.join("\n");
    let stamp = environment.join("packages.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
        return Some(python);
    }
    succeed(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment));
    succeed(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(packages),
    );
    std::fs::write(&stamp, wanted).unwrap();
    Some(python)
}

/// Runs a command that must succeed.
pub(crate) fn succeed(command: &mut Command) {
    let output = run_command(command);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "{command:?}\n{out}\n{err}\n(MUSTER_SKIP_PYTHON=1 leaves this test out)"
    );
}

fn script(name: &str) -> PathBuf {
    workspace_root().join("tests/python").join(name)
}

#[test]
fn the_openai_package_works() {
    let Some(python) = python() else { return };
    let cluster = Cluster::start(Setup::new(&demo_model()).compute("f32"));
    succeed(Command::new(python).arg(script("openai_client.py")).arg(cluster.http()).arg(demo_model()));
}

#[test]
fn frameworks_work() {
    let Some(python) = environment("python-frameworks", &FRAMEWORKS) else { return };
    let cluster = Cluster::start(Setup::new(&demo_model()));
    succeed(Command::new(python).arg(script("foreign_clients.py")).arg(cluster.http()));
}

#[test]
fn a_generated_grpc_client_works() {
    let Some(python) = python() else { return };
    let cluster = Cluster::start(Setup::new(&demo_model()).compute("f32"));
    let stubs = tempfile::tempdir().unwrap();
    let proto = workspace_root().join("proto");
    succeed(
        Command::new(python)
            .args(["-m", "grpc_tools.protoc"])
            .arg(format!("-I{}", proto.display()))
            .arg(format!("--python_out={}", stubs.path().display()))
            .arg(format!("--grpc_python_out={}", stubs.path().display()))
            .arg(proto.join("muster/v1/inference.proto")),
    );
    succeed(
        Command::new(python)
            .arg(script("grpc_client.py"))
            .arg(cluster.grpc())
            .arg(demo_model())
            .env("PYTHONPATH", stubs.path()),
    );
}
