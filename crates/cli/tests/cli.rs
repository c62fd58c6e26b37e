//! The command line as a person or a script meets it: exit codes, one reason a line, never a panic.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The program with an empty environment in an empty directory.
fn muster(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command.args(arguments).env_clear().current_dir(directory).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    muster(directory.path(), arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Exit code 2, a reason that contains `reason`, and no panic.
#[track_caller]
fn refused(output: &Output, reason: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.starts_with("error: ") && text.contains(reason), "{reason:?} is not in {text:?}");
    assert!(!text.contains("panicked"), "{text}");
    assert!(output.stdout.is_empty(), "{}", stdout(output));
}

#[test]
fn a_variable_that_nothing_reads_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let output = muster(directory.path(), &["keys", "new", "a"]).env("MUSTER_APIKEY", "x").output().unwrap();
    let text = stderr(&output);
    assert!(output.status.success() && text.contains("did you mean MUSTER_API_KEY?"), "{text}");
    let unheard =
        muster(directory.path(), &["keys", "new", "a"]).env("MUSTER_API_KEY", "x").output().unwrap();
    assert!(!stderr(&unheard).contains("nothing reads it"), "{}", stderr(&unheard));
}

#[test]
fn help_and_version_are_answers_and_no_errors() {
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["up", "--help"],
        &["router", "--help"],
        &["worker", "-h"],
        &["help", "bench"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(stdout(&output).contains("Usage: muster"), "{arguments:?}");
    }
    let output = run(&["--version"]);
    assert_eq!(
        (output.status.code(), stdout(&output)),
        (Some(0), format!("muster {}\n", env!("CARGO_PKG_VERSION")))
    );
}

#[test]
fn every_command_shows_help_with_an_example_or_what_it_does() {
    for command in ["up", "router", "worker", "chat", "generate", "check-model", "plan", "logits", "bench"] {
        let text = stdout(&run(&[command, "--help"]));
        assert!(text.contains(&format!("muster {command}")) && text.contains("xample"), "{command}: {text}");
    }
}

#[test]
fn nothing_at_all_shows_help_and_fails() {
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("Usage: muster"));
}

#[test]
fn flags_that_are_wrong_are_refused() {
    for (arguments, reason) in [
        (&["dance"][..], "unrecognized subcommand 'dance'"),
        (&["up", "--wokers", "2"], "unexpected argument '--wokers'"),
        (&["up", "--port", "8000"], "tip: --http IP:PORT is where OpenAI HTTP listens"),
        (&["up", "--port=8000"], "tip: --http IP:PORT"),
        (&["worker", "--port", "8000"], "tip: --listen HOST:PORT"),
        (&["status", "--http", "127.0.0.1:8080"], "tip: --grpc http://HOST:PORT"),
        (&["serve", "demo"], "tip: `muster up` serves a model"),
        (&["run", "demo"], "`muster chat` talks to it"),
        (&["worker", "--join", "http://127.0.0.1:50051"], "http://, is left out here; write host:port"),
        (&["router", "--model", "demo", "--worker", "http://127.0.0.1:1"], "write host:port"),
        (&["up", "--workers"], "a value is required"),
        (&["up", "--workers", "2", "--workers", "3"], "cannot be used multiple times"),
        (&["up", "--workers", "0"], "0 is not in 1..=256"),
        (&["up", "--workers", "host:7070"], "invalid value 'host:7070'"),
        (&["up", "--workers", "0x2"], "invalid value"),
        (&["up", "--workers", "1_000"], "invalid value"),
        (&["up", "--workers", "99999999999999999999"], "invalid value"),
        (&["up", "--kv-memory", "512"], "512MiB"),
        (&["up", "--http", "8080"], "127.0.0.1:8080"),
        (&["up", "--http", "127.0.0.1:70000"], "invalid value"),
        (&["up", "--http", "0.0.0.0:0"], "--insecure-plaintext"),
        (&["up", "--temperature", "nan"], "it is not a number"),
        (&["up", "--temperature", "-1"], "it is below 0"),
        (&["up", "--temperature", "0.7"], "--temperature is for --prompt"),
        (&["up", "--ignore-eos"], "--ignore-eos is for --prompt"),
        (&["generate", "--prompt-tokens", "1", "--chat"], "--prompt-tokens"),
        (&["generate", "x", "--seed", "1.5"], "whole number of 64 bits"),
        (&["up", "--temperature=-1"], "it is below 0"),
        (&["up", "--max-tokens", "5"], "--prompt"),
        (&["up", "--model", ""], "is empty"),
        (&["generate"], "PROMPT"),
        (&["generate", "x", "--prompt-tokens", "1"], "cannot be used with"),
        (&["generate", "--prompt-tokens", "1,-2", "--model", "demo"], "invalid value '-2'"),
        (&["generate", "x", "--workers", "2"], "--model"),
        (&["generate", "x", "--model", "demo", "--grpc", "http://127.0.0.1:1"], "cannot be used with"),
        (&["generate", "x", "--top-p", "1.5"], "not between 0 and 1"),
        (&["generate", "x", "--compute", "f16"], "possible values"),
        (&["generate", "x", "--expert-dtype", "q5"], "use native, q8 or q4"),
        (&["worker", "--model", "demo", "--expert-dtype", "bf16"], "use native, q8 or q4"),
        (&["generate", "x", "--grpc", "ftp://127.0.0.1:1"], "neither http:// nor https://"),
        (&["generate", "x", "--cert", "c.pem"], "--key"),
        (&["status", "--api-key-file", "absent"], "absent: No such file"),
        (&["up", "--http", "0.0.0.0:0", "--insecure-plaintext"], "--insecure-no-keys"),
        (&["router", "--model", "demo", "--http", "0.0.0.0:0"], "muster certs init"),
        (&["router", "--model", "demo", "--tls-cert", "c"], "tls_key: is missing"),
        (&["certs", "init"], "<DIR"),
        (&["certs", "init", "/proc/none"], "/proc/none"),
        (&["certs", "init", "x", "--trust-domain", "A B"], "trust domain"),
        (&["keys", "new", "a b"], "a key's name has"),
        (&["keys", "hash", "a"], "a key has"),
        (&["probe", "--admin", "here"], "http://host:port"),
        (&["bench", "--soak", "1m", "--chaos"], "cannot be used with"),
        (&["generate", "x", "--grpc", "not a url"], "write http://host:port"),
        (&["logits", "--model", "demo", "--tokens", "no.json", "--out", "o"], "no.json"),
        (&["logits", "--model", "demo", "--tokens", "x", "--out", "o", "--chunk", "0"], "1 to 8192"),
        (
            &["logits", "--model", "demo", "--tokens", "x", "--out", "o", "--reference", "--workers", "2"],
            "cannot be used",
        ),
        (&["check-model"], "<MODEL>"),
        (&["check-model", "demo", "--tokens", "x"], "--quality"),
        (&["bench", "--concurrency", "0", "--model", "demo"], "0 is not in 1..=1024"),
        (&["--log", "loudest", "check-model", "demo"], "log filter"),
        (&["--log-format", "xml", "check-model", "demo"], "use human or json"),
    ] {
        refused(&run(arguments), reason);
    }
}

#[test]
fn a_benchmark_that_does_not_fit_the_context_is_refused() {
    refused_with_logs(
        &run(&["bench", "--model", "demo", "--prompt-tokens", "600"]),
        "more than the context of 512",
    );
}

#[test]
fn a_model_that_is_nowhere_is_refused_with_where_it_was_looked_for() {
    refused(&run(&["check-model", "org/model"]), "fetch it with `muster pull org/model`");
    refused(&run(&["check-model", "./nothing"]), "no directory ./nothing");
    refused(&run(&["up", "--model", "org/model"]), "muster pull org/model");
    let home = tempfile::tempdir().unwrap();
    let output =
        muster(home.path(), &["check-model", "org/model"]).env("HOME", home.path()).output().unwrap();
    refused(&output, &home.path().join(".cache/huggingface/hub/models--org--model").display().to_string());
    File::create(home.path().join("file")).unwrap();
    refused(&muster(home.path(), &["check-model", "file"]).output().unwrap(), "is not a directory");
    refused(&muster(home.path(), &["check-model", "."]).output().unwrap(), "config.json");
}

#[test]
fn arguments_that_are_not_text_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let output = muster(directory.path(), &["check-model"])
        .arg(std::ffi::OsString::from_vec(vec![b'a', 0xff]))
        .output()
        .unwrap();
    refused(&output, "invalid UTF-8");
}

#[test]
fn servers_report_every_problem_of_their_configuration_before_they_listen() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("muster.toml");
    std::fs::write(&file, "[router]\nmodle = \"demo\"\nkv_memory = \"12\"\n").unwrap();
    let output = muster(directory.path(), &["router", "--config", "muster.toml", "--http", "0.0.0.0:0"])
        .env("MUSTER_ROUTER_THREADS", "many")
        .output()
        .unwrap();
    for reason in [
        "error: muster.toml:2: modle: unknown key; did you mean model?\n",
        "error: muster.toml:3: kv_memory: \"12\" is not a size",
        "error: environment variable MUSTER_ROUTER_THREADS: threads: \"many\"",
        "error: flag --http: http: 0.0.0.0:0 can be reached from other machines",
        "error: model: is missing; give --model, MUSTER_ROUTER_MODEL, or model in [router]\n",
    ] {
        refused(&output, reason);
    }
    refused(&run(&["worker", "--model", "demo", "--share", "2/2"]), "shares of 2 are 0/2 to 1/2");
    refused(&run(&["worker", "--model", "demo", "--listen", "::1:80"]), "an IPv6 address needs brackets");
    refused(&run(&["router", "--model", "demo", "--worker", "a b:1"]), "flag --worker: workers: \"a b:1\"");
}

#[test]
fn the_effective_configuration_is_printed_with_origins() {
    let output = run(&["worker", "--model", "demo", "--share", "0/2", "--print-config"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for line in [
        "[worker]\n",
        "model = \"demo\"  # flag --model\n",
        "share = \"0/2\"  # flag --share\n",
        "log = \"info\"  # default\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refused_with_logs(&run(&["worker", "--model", "demo", "--listen", &address]), &address);
    refused_with_logs(
        &run(&["router", "--model", "demo", "--worker", "127.0.0.1:1", "--http", &address]),
        &address,
    );
}

#[track_caller]
fn refused_with_logs(output: &Output, reason: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.lines().any(|line| line.starts_with("error: ") && line.contains(reason)), "{text}");
}

#[test]
fn nobody_at_the_other_end_is_a_failure_and_no_bad_input() {
    for arguments in
        [&["chat", "--grpc", "127.0.0.1:1"][..], &["generate", "x", "--grpc", "http://127.0.0.1:1"]]
    {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(
            stderr(&output).starts_with("error: no router answers at http://127.0.0.1:1 "),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn something_else_at_the_other_end_is_told_apart() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = stream.read(&mut [0; 1024]);
    });
    let output = run(&["generate", "x", "--grpc", &address]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    server.join().unwrap();
}

/// Copies in another process: a file that this one has open for writing could be inherited by a child that a test
/// beside this one starts, and then not be run.
fn copy_program(to: &Path) {
    assert!(Command::new("/bin/cp").arg(env!("CARGO_BIN_EXE_muster")).arg(to).status().unwrap().success());
}

#[test]
fn pulling_without_the_program_names_how_to_build_it() {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("muster");
    copy_program(&copy);
    let output = Command::new(&copy).args(["pull", "org/model"]).env_clear().output().unwrap();
    refused(&output, "cargo build --release -p muster-pull");
}

#[test]
fn pulling_hands_everything_on() {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("muster");
    copy_program(&copy);
    std::os::unix::fs::symlink("/bin/echo", directory.path().join("muster-pull")).unwrap();
    let output =
        Command::new(&copy).args(["pull", "org/model", "--revision", "x", "--help"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(stdout(&output), "org/model --revision x --help\n");
}

#[test]
fn the_built_in_model_can_be_checked() {
    let output = run(&["check-model", "demo"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("every weight was read and is finite"), "{}", stdout(&output));
    let output = run(&["check-model", "demo", "--headers-only", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(report["family"], "mixtral");
    assert_eq!(report["layers"].as_array().map(Vec::len), Some(6));
    assert_eq!(report["layers"][0]["experts"], 8);
    assert_eq!(report["weights"]["read"], false);
}

#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = muster(directory.path(), &["check-model", "demo", "--headers-only"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn closed_standard_streams_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let script = format!("{} check-model demo --headers-only <&- >&- 2>&-", env!("CARGO_BIN_EXE_muster"));
    let status =
        Command::new("/bin/sh").args(["-c", &script]).current_dir(directory.path()).status().unwrap();
    assert_eq!(status.code(), Some(0));
}

/// A worker that announces itself, with a pipe for its standard input.
fn worker(directory: &Path, arguments: &[&str]) -> Child {
    let socket = format!("unix:{}", directory.join("w.sock").display());
    let mut all = vec![
        "worker",
        "--model",
        "demo",
        "--share",
        "0/8",
        "--threads",
        "1",
        "--listen",
        &socket,
        "--announce",
    ];
    all.extend(arguments);
    muster(directory, &all)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Reads announcements until the worker is ready; gives the last line.
fn ready(child: &mut Child) -> String {
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    lines.map(Result::unwrap).find(|line| line.contains("ready")).expect("the worker becomes ready")
}

fn ends_within(child: &mut Child, limit: Duration) -> Option<i32> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    panic!("still running after {limit:?}");
}

fn terminate(child: &Child) {
    let status = Command::new("/bin/kill").arg(child.id().to_string()).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_worker_announces_itself_and_drains_when_told_to_end() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = worker(directory.path(), &[]);
    let line = ready(&mut child);
    let socket = directory.path().join("w.sock");
    assert_eq!(line, format!("{{\"ready\":{{\"listen\":\"unix:{}\"}}}}", socket.display()));
    assert!(socket.exists());
    terminate(&child);
    assert_eq!(ends_within(&mut child, Duration::from_secs(20)), Some(0));
    assert!(!socket.exists(), "the socket is removed");
}

#[test]
fn a_child_ends_when_its_parent_lets_go() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = worker(directory.path(), &["--exit-with-parent"]);
    ready(&mut child);
    drop(child.stdin.take());
    assert_eq!(ends_within(&mut child, Duration::from_secs(20)), Some(1));
}
