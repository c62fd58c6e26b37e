//! Every command and snippet of `README.md` and `docs`: typed as it stands there, and what it prints looked at.
//!
//! A page is read from top to bottom, in one directory and against one router, as its reader would. Only addresses,
//! host names and the directory of a model are replaced by those of the test. Commands that cannot be typed here are
//! listed with the test that shows them or with their requirements; a command in no list is an error.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use muster_tests::process::{PATIENCE, muster, run_command};
use muster_tests::workspace_root;

use crate::python_clients;

/// Treatment of a command.
#[derive(Clone, Copy)]
enum How {
    /// It succeeds and prints each of `texts`. `more` shortens it or sets addresses that it has by default.
    Prints { more: &'static str, texts: &'static [&'static str] },
    /// As [`Prints`], with standard input.
    Asked { input: &'static str, more: &'static str, texts: &'static [&'static str] },
    /// It prints `text` and keeps running; earlier commands on the same addresses are stopped.
    Serves { more: &'static str, text: &'static str },
    /// A test in this file shows it.
    By(&'static str),
    /// A requirement that is missing here, for readers of the list.
    #[expect(dead_code, reason = "it is for people")]
    Needs(&'static str),
}

use How::{Asked, By, Needs, Prints, Serves};

const GRPC: &str = "--grpc http://127.0.0.1:50051";
const LISTENING: &str = "--http 127.0.0.1:8080 --grpc 127.0.0.1:50051";
const CLUSTER: How = Needs("a cluster: `tests/kubernetes/run` does it");
const HOURS: How = Needs("hours");

/// Commands as they stand on a page, without comments.
type Commands = &'static [(&'static str, How)];

const README: Commands = &[
    (
        "cargo run --release -- up --prompt \"Once upon a time\"",
        By("main_job.rs: up_with_a_prompt_prints_the_story"),
    ),
    ("cargo test --release --workspace", Needs("itself")),
    ("muster up", Serves { more: LISTENING, text: "Ctrl-C" }),
    (
        "muster chat",
        Asked {
            input: "What is the capital of Italy?",
            more: GRPC,
            texts: &["The capital of Italy is Rome."],
        },
    ),
    (
        "muster generate --chat \"What is 37 + 45?\" --grpc http://127.0.0.1:50051",
        Prints { more: "", texts: &["82"] },
    ),
    (
        "muster bench --chaos",
        Prints {
            more: "--concurrency 2 --output-tokens 200",
            texts: &["a worker gets SIGKILL", "all workers are restarted"],
        },
    ),
    (
        "muster plan mixtral-8x7b --worker 24GiB",
        Prints { more: "", texts: &["47 B held", "2 copies", "helm install"] },
    ),
    ("muster router --model DIR", Serves { more: LISTENING, text: "router: loaded" }),
    ("muster worker --join 127.0.0.1:50051 --listen 127.0.0.1:0", Serves { more: "", text: "joined" }),
    ("muster status", Prints { more: GRPC, texts: &["48 of 48 experts held"] }),
];

const USE: Commands = &[
    ("muster up --workers 3 --replicas 2", Serves { more: LISTENING, text: "Ctrl-C" }),
    (
        "muster bench --soak 10m --grpc http://127.0.0.1:50051",
        Prints { more: "--output-tokens 32", texts: &["0 failed, 0 differ"] },
    ),
    ("helm install demo helm/muster --set image.repository=REGISTRY/muster", CLUSTER),
    (
        "muster pull ibm-granite/granite-3.1-1b-a400m-instruct",
        Needs("the Hugging Face hub: tests of muster-pull have one of their own"),
    ),
    (
        "muster check-model models/demo",
        Prints { more: "", texts: &["8 experts each", "every weight was read"] },
    ),
    (
        "muster generate \"Once\" --model models/demo --json",
        Prints { more: "", texts: &["\"text\":", "\"finish_reason\":"] },
    ),
    (
        "muster bench --model models/demo --workers 2 --concurrency 1,8",
        Prints { more: "--rounds 1 --output-tokens 16", texts: &["decode tok/s", "dispatch/layer"] },
    ),
    (
        "muster logits --model models/demo --tokens tokens.json --out logits.safetensors",
        Prints { more: "", texts: &["logits.safetensors"] },
    ),
    ("muster plan mixtral-8x7b --gpu 24GiB", By("documented.rs: what_pages_show_is_printed")),
    ("muster chat --grpc HOST:50051,OTHER:50051", By("resume.rs: the_command_line_names_several_routers")),
];

const PLACEMENT: Commands = &[
    (
        "muster router --model DIR --grpc 127.0.0.1:50051",
        Serves { more: "--http 127.0.0.1:8080", text: "router: loaded" },
    ),
    ("muster worker --join 127.0.0.1:50051 --listen 127.0.0.1:0", Serves { more: "", text: "joined" }),
    ("muster status", Prints { more: GRPC, texts: &["48 of 48 experts held"] }),
    (
        "kill -TERM PID",
        By("operations.rs: a_drain_that_is_asked_for_ends_when_it_is_safe_and_the_process_waits"),
    ),
];

const SECURITY: Commands = &[
    (
        "muster certs init certs --name muster.example.org --name 10.0.0.5",
        Prints { more: "", texts: &["certs/router"] },
    ),
    ("muster keys new alice --file api-keys > alice.key", Prints { more: "", texts: &[] }),
    (
        "muster router --model DIR --http 0.0.0.0:8080 --grpc 0.0.0.0:50051 --api-keys api-keys --tls-cert certs/router/tls.crt --tls-key certs/router/tls.key --tls-ca certs/router/ca.crt",
        Serves { more: "", text: "router: loaded" },
    ),
    (
        "muster worker --join 10.0.0.5:50051 --listen 0.0.0.0:7070 --tls-cert certs/worker/tls.crt --tls-key certs/worker/tls.key --tls-ca certs/worker/ca.crt",
        Serves { more: "", text: "joined" },
    ),
    (
        "muster status --grpc https://muster.example.org:50051 --ca certs/ca.crt --api-key-file alice.key",
        Prints { more: "", texts: &["48 of 48 experts held"] },
    ),
    (
        "curl --cacert certs/ca.crt -H \"authorization: Bearer $(cat alice.key)\" https://muster.example.org:8080/v1/models",
        Prints { more: "--silent --show-error", texts: &["\"demo\""] },
    ),
];

const PERFORMANCE: Commands = &[
    ("cargo xtask ab", HOURS),
    ("cargo xtask ab --only decode-1,split --rounds 3", HOURS),
    ("cargo xtask ab --write-docs", HOURS),
    (
        "muster bench --grpc http://127.0.0.1:50051 --json > before.json",
        Prints { more: "--rounds 1 --output-tokens 8", texts: &[] },
    ),
    (
        "muster bench --grpc http://127.0.0.1:50051 --against before.json",
        Prints { more: "--rounds 1 --output-tokens 8", texts: &["decode tok/s"] },
    ),
];

/// A page, the commands to type before its own, and its own in order.
const PAGES: &[(&str, Commands, Commands)] = &[
    ("README.md", &[], README),
    ("docs/use.md", &[], USE),
    ("docs/placement.md", &[], PLACEMENT),
    ("docs/security.md", &[], SECURITY),
    ("docs/performance.md", &[("muster up", Serves { more: LISTENING, text: "Ctrl-C" })], PERFORMANCE),
];

/// Pages none of whose commands can be typed here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("docs/kubernetes.md", "a cluster: `tests/kubernetes/run`"),
    ("docs/invariants.md", "minutes: `cargo test` runs the simulation with fewer seeds"),
    ("docs/testing.md", "minutes"),
    ("docs/openai.md", "packages of gigabytes: python_clients.rs runs those of less"),
];

fn page(name: &str) -> String {
    fs::read_to_string(workspace_root().join(name)).unwrap()
}

/// Blocks of a page in a language.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let mut parts = page.split("```");
    parts.next();
    parts
        .step_by(2)
        .filter_map(|block| Some(block.strip_prefix(language)?.strip_prefix('\n')?.to_owned()))
        .collect()
}

/// Commands of a page: lines that end in a backslash with those that follow, without what is said about them.
fn commands(page: &str) -> Vec<String> {
    let lines = blocks(page, "sh").join("\n").replace("\\\n", " ");
    let said = |line: &str| {
        line.split(" #").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    lines.lines().map(said).filter(|command| !command.is_empty()).collect()
}

/// One reader at work.
struct Reader {
    directory: tempfile::TempDir,
    ports: [(&'static str, u16); 3],
    serving: Vec<Child>,
}

impl Reader {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        symlink(workspace_root().join("models").canonicalize().unwrap(), directory.path().join("models"))
            .unwrap();
        fs::write(directory.path().join("tokens.json"), "[1, 844, 624]").unwrap();
        let listeners =
            ["50051", "8080", "7070"].map(|port| (port, TcpListener::bind("127.0.0.1:0").unwrap()));
        let ports = listeners.each_ref().map(|(port, own)| (*port, own.local_addr().unwrap().port()));
        Self { directory, ports, serving: Vec::new() }
    }

    /// The command with the test's addresses, host names and directories.
    fn typed(&self, command: &str, more: &str) -> String {
        let mut typed = match command.split_once(" > ") {
            Some((command, file)) => format!("{command} {more} > {file}"),
            None => format!("{command} {more}"),
        };
        for (port, own) in self.ports {
            typed = typed.replace(&format!(":{port}"), &format!(":{own}"));
        }
        let own = [
            ("muster.example.org", "localhost"),
            ("10.0.0.5", "127.0.0.1"),
            ("--model DIR", "--model models/demo"),
            ("--soak 10m", "--soak 3s"),
        ];
        own.into_iter().fold(typed, |typed, (theirs, own)| typed.replace(theirs, own))
    }

    fn shell(&self, typed: &str) -> Command {
        let mut shell = Command::new("sh");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let directories =
            std::iter::once(muster().parent().unwrap().to_owned()).chain(std::env::split_paths(&path));
        shell
            .args(["-c", typed])
            .current_dir(self.directory.path())
            .env("PATH", std::env::join_paths(directories).unwrap());
        shell
    }

    fn follow(&mut self, command: &str, how: How) {
        match how {
            Prints { more, texts } => self.until_it_prints(&self.typed(command, more), texts),
            Asked { input, more, texts } => {
                self.until_it_prints(&format!("echo '{input}' | {}", self.typed(command, more)), texts);
            }
            Serves { more, text } => {
                let typed = self.typed(command, more);
                if !command.starts_with("muster worker") {
                    self.end();
                }
                self.serve(&typed, text);
            }
            By(test) => {
                let (file, name) = test.split_once(": ").unwrap();
                let text = fs::read_to_string(workspace_root().join("tests/suite").join(file)).unwrap();
                assert!(text.contains(&format!("fn {name}(")), "{test} shows {command:?} and is not there");
            }
            Needs(_) => {}
        }
    }

    /// Types the command, repeatedly where a cluster may need a moment.
    fn until_it_prints(&self, typed: &str, texts: &[&str]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = run_command(&mut self.shell(typed));
            let (out, err) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let missing: Vec<_> =
                texts.iter().filter(|text| !out.contains(**text) && !err.contains(**text)).collect();
            if output.status.success() && missing.is_empty() {
                return;
            }
            let may_change = typed.starts_with("muster status") && Instant::now() < deadline;
            assert!(may_change, "{typed}: {}, without {missing:?}\n{out}\n{err}", output.status);
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn serve(&mut self, typed: &str, text: &str) {
        let told = self.directory.path().join(format!("told-{}", self.serving.len()));
        let file = File::create(&told).unwrap();
        let mut command = self.shell(&format!("exec {typed}"));
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        self.serving.push(command.spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        let child = self.serving.last_mut().unwrap();
        while !fs::read_to_string(&told).unwrap().contains(text) {
            let ended = child.try_wait().unwrap();
            let so_far = fs::read_to_string(&told).unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "{typed}: {ended:?}, without {text:?}\n{so_far}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends everything that serves; children end with their parents.
    fn end(&mut self) {
        for mut child in self.serving.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Children of a killed process let go of their addresses a moment later.
        let deadline = Instant::now() + PATIENCE;
        for (_, port) in self.ports {
            while TcpListener::bind(("127.0.0.1", port)).is_err() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end();
    }
}

fn follow_page(name: &str) {
    let (_, before, list) = PAGES.iter().find(|(page, ..)| *page == name).unwrap();
    let mut reader = Reader::new();
    for (command, how) in *before {
        reader.follow(command, *how);
    }
    for (command, how) in *list {
        reader.follow(command, *how);
    }
}

#[test]
fn commands_are_all_known() {
    for (name, _, list) in PAGES {
        let mut documented = commands(&page(name));
        documented.extend(shown(&page(name)).into_iter().map(|(command, _)| command));
        let listed: BTreeSet<&str> = list.iter().map(|(command, _)| *command).collect();
        let documented: BTreeSet<&str> = documented.iter().map(String::as_str).collect();
        assert_eq!(documented, listed, "{name}");
    }
    let docs = fs::read_dir(workspace_root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = docs.filter(|path| path.extension().is_some_and(|kind| kind == "md"));
    for path in pages {
        let name = format!("docs/{}", path.file_name().unwrap().to_str().unwrap());
        let is_known =
            PAGES.iter().any(|(page, ..)| *page == name) || ELSEWHERE.iter().any(|(page, _)| *page == name);
        assert!(is_known || commands(&page(&name)).is_empty(), "{name} has commands that nobody types");
    }
}

#[test]
fn the_readme_can_be_followed() {
    follow_page("README.md");
}

#[test]
fn the_page_about_use_can_be_followed() {
    follow_page("docs/use.md");
}

#[test]
fn the_page_about_placement_can_be_followed() {
    follow_page("docs/placement.md");
}

#[test]
fn the_page_about_security_can_be_followed() {
    follow_page("docs/security.md");
}

#[test]
fn the_page_about_performance_can_be_followed() {
    follow_page("docs/performance.md");
}

/// Commands that a page shows with what they print; `…` stands for lines left out.
fn shown(page: &str) -> Vec<(String, Vec<String>)> {
    let block = |block: String| {
        let mut lines = block.lines();
        let command = lines.next()?.strip_prefix("$ ")?.to_owned();
        Some((command, lines.filter(|line| *line != "…").map(str::to_owned).collect()))
    };
    blocks(page, "").into_iter().filter_map(block).collect()
}

#[test]
fn what_pages_show_is_printed() {
    let shown: Vec<_> = PAGES.iter().flat_map(|(name, ..)| shown(&page(name))).collect();
    assert!(!shown.is_empty());
    let reader = Reader::new();
    for (command, lines) in shown {
        let texts: Vec<&str> = lines.iter().map(String::as_str).collect();
        reader.until_it_prints(&command, &texts);
    }
}

#[test]
fn the_python_of_the_readme_works() {
    let Some(python) = python_clients::python() else { return };
    let mut reader = Reader::new();
    reader.follow("muster up", Serves { more: LISTENING, text: "Ctrl-C" });
    let snippets = blocks(&page("README.md"), "python");
    assert_eq!(snippets.len(), 1);
    let file: PathBuf = reader.directory.path().join("snippet.py");
    fs::write(&file, reader.typed(&snippets[0], "")).unwrap();
    let typed = format!("{} snippet.py", python.display());
    reader.until_it_prints(&typed, &["The capital of Italy is Rome."]);
}

/// Lines of code, without the indentation that they stand with.
fn code(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

#[test]
fn the_rust_of_the_page_about_use_is_compiled() {
    let snippets = blocks(&page("docs/use.md"), "rust");
    assert_eq!(snippets.len(), 1);
    let source = fs::read_to_string(workspace_root().join("crates/client/src/lib.rs")).unwrap();
    let example: String =
        source.lines().filter_map(|line| Some(format!("{}\n", line.strip_prefix("//!")?))).collect();
    let (wanted, example) = (code(&snippets[0]), code(&example));
    assert!(example.windows(wanted.len()).any(|lines| lines == wanted), "{wanted:?}\nis not in\n{example:?}");
}

/// Pages and records that the index of `docs` links to, and links of all pages that lead to a file.
#[test]
fn pages_are_in_the_index_and_links_lead_somewhere() {
    let docs = workspace_root().join("docs");
    let markdown = |directory: PathBuf| {
        let paths = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|kind| kind == "md")).collect::<Vec<_>>()
    };
    let (pages, records) = (markdown(docs.clone()), markdown(docs.join("decisions")));
    let index = page("docs/README.md");
    for path in pages.iter().chain(&records).filter(|path| !path.ends_with("README.md")) {
        let name = path.strip_prefix(&docs).unwrap().to_str().unwrap();
        assert!(index.contains(&format!("({name})")), "docs/README.md does not name {name}");
    }
    for path in pages.into_iter().chain(records).chain(markdown(workspace_root())) {
        let text = fs::read_to_string(&path).unwrap();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://") && !target.starts_with('#')) {
            let file = path.parent().unwrap().join(target.split('#').next().unwrap());
            assert!(file.exists(), "{} links to {target}, which is not there", path.display());
        }
    }
}
