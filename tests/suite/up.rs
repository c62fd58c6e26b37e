//! `muster up` as a keeper of processes: what it starts again, what it leaves behind, what it finds out before it
//! loads.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use muster_tests::process::{Process, eventually, muster, run, run_command};
use serde_json::{Value, json};

const FREE: [&str; 4] = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];

/// A cluster with its sockets below `temporary`.
fn up(temporary: &Path) -> Process {
    Process::start_by(Command::new(muster()).arg("up").args(FREE).env("TMPDIR", temporary)).unwrap()
}

/// The router among the children of a process.
fn router_of(pid: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().filter_map(|child| child.parse().ok()).find(|child: &u32| {
        let line = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0).nth(1) == Some(b"router")
    })
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

fn completion(address: &str) -> Value {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0});
    let answer = muster_tests::http::post(address, "/v1/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"][0]["text"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_dies_comes_back_where_it_was() {
    let temporary = tempfile::tempdir().unwrap();
    let mut up = up(temporary.path());
    let address = up.address("http");
    let said = completion(&address);
    for round in 1..=2 {
        let router = router_of(up.pid()).expect("a router");
        let pid = libc::pid_t::try_from(router).unwrap();
        // SAFETY: kill(2) takes two integers; the pid is that of a child of a process of this test's own.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
        eventually("another router serves", async || {
            let is_back = up.log().matches("is back").count() == round;
            (is_back && router_of(up.pid()).is_some_and(|now| now != router)).then_some(())
        })
        .await;
        assert_eq!(completion(&address), said, "round {round}");
    }
    up.signal(libc::SIGTERM);
    assert!(up.wait().is_some_and(|status| status.success()), "{}", up.log());
}

#[test]
fn what_a_killed_cluster_left_is_gone_after_the_next_start() {
    let temporary = tempfile::tempdir().unwrap();
    let mut killed = up(temporary.path());
    let left = entries(temporary.path());
    assert_eq!(left.len(), 1, "one directory for sockets: {left:?}");
    killed.kill();
    assert!(left[0].exists(), "nobody could take it away");
    let first = up(temporary.path());
    let now = entries(temporary.path());
    assert!(now.len() == 1 && now != left, "{now:?} after {left:?}");
    // A directory in use is not removed.
    let mut second = up(temporary.path());
    assert_eq!(entries(temporary.path()).len(), 2);
    completion(&first.address("http"));
    second.signal(libc::SIGTERM);
    assert!(second.wait().is_some_and(|status| status.success()));
    assert_eq!(entries(temporary.path()), now);
}

#[test]
fn a_long_directory_for_temporary_files_is_named_and_gone_around() {
    let temporary = tempfile::tempdir().unwrap();
    let long = temporary.path().join("x".repeat(130));
    std::fs::create_dir(&long).unwrap();
    let mut command = Command::new(muster());
    command.args(["up", "--prompt", "Once upon a time", "--max-tokens", "4"]).env("TMPDIR", &long);
    let output = run_command(&mut command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("TMPDIR") && said.contains("too long for the paths of Unix sockets"), "{said}");
    assert!(entries(&long).is_empty());

    let absent = temporary.path().join("absent");
    let mut command = Command::new(muster());
    let output = run_command(command.args(["up", "--prompt", "x"]).env("TMPDIR", &absent));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("TMPDIR: ") && said.contains("set TMPDIR"), "{said}");
}

#[test]
fn what_cannot_be_is_known_before_anything_is_loaded() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (args, says) in [
        (&["up", "--workers", "200"][..], &["--workers: ", "48 experts", "at most 48"][..]),
        (&["generate", "x", "--model", "demo", "--workers", "49"], &["--workers: ", "at most 48"]),
        (&["up", "--workers", "2", "--replicas", "3"], &["--replicas: ", "at most 2"]),
        (&["up", "--kv-memory", "1KiB"], &["--kv-memory: ", "1024 bytes holds no block"]),
        (&["up", "--http", &taken, "--grpc", "127.0.0.1:0"], &[&taken, "choose another with --http"]),
        (&["up", "--grpc", &taken, "--http", "127.0.0.1:0"], &[&taken, "choose another with --grpc"]),
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        for part in says {
            assert!(said.contains(part), "{args:?}: {part:?} in {said}");
        }
    }
}

#[test]
fn a_directory_of_links_is_served_by_all_processes_where_that_is_asked_for() {
    let links = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(muster_tests::demo_model()).unwrap().map(|entry| entry.unwrap().path()) {
        let whole = std::fs::canonicalize(&file).unwrap();
        std::os::unix::fs::symlink(whole, links.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = links.path().display().to_string();
    let asked = ["up", "--model", &path, "--prompt", "Once upon a time", "--max-tokens", "4"];
    let refused = run(&asked);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("leads out of the model directory") && said.contains("--allow-links"), "{said}");
    let served = run(&[&asked[..], &["--allow-links"]].concat());
    assert!(served.status.success(), "{}", String::from_utf8_lossy(&served.stderr));
    let as_demo = run(&["up", "--prompt", "Once upon a time", "--max-tokens", "4"]);
    assert_eq!(served.stdout, as_demo.stdout);
    for command in ["router", "worker"] {
        let settings = run(&[command, "--model", &path, "--allow-links", "--print-config"]);
        let settings = String::from_utf8_lossy(&settings.stdout);
        assert!(settings.contains("allow_links = true  # flag --allow-links"), "{settings}");
    }
}
