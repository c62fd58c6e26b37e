//! A `muster` process under test.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Deadline of any wait in a test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The binary under test: built by the same `cargo test --workspace`, next to this test's own executable.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn muster() -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its executable");
    let target = own.ancestors().nth(2).expect("target/<profile>/deps/<test>");
    let path = target.join(format!("muster{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is missing: run `cargo test --release --workspace`", path.display());
    path
}

/// Runs a command to its end.
///
/// # Panics
/// When it does not end in time.
#[must_use]
pub fn run(args: &[&str]) -> Output {
    run_command(Command::new(muster()).args(args))
}

/// Runs any command to its end, with empty standard input.
///
/// # Panics
/// When it does not start or does not end in time.
#[must_use]
pub fn run_command(command: &mut Command) -> Output {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = drain(child.stdout.take().expect("piped"));
    let stderr = drain(child.stderr.take().expect("piped"));
    let Some(status) = wait_within(&mut child, 5 * PATIENCE) else {
        let _ = child.kill();
        panic!("{command:?} did not end within {:?}", 5 * PATIENCE);
    };
    let collect = |pipe: std::thread::JoinHandle<Vec<u8>>| pipe.join().expect("a reader does not panic");
    Output { status, stdout: collect(stdout), stderr: collect(stderr) }
}

fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

fn wait_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A long-running process. Killed when dropped.
pub struct Process {
    child: Child,
    ready: Value,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts `muster` with `args` plus `--announce`, and waits until it announces that it is ready.
    ///
    /// # Errors
    /// Its standard error, if it ended instead.
    pub fn start(args: &[String]) -> Result<Self, String> {
        Self::start_by(Command::new(muster()).args(args))
    }

    /// [`Self::start`] with a command that becomes `muster`.
    ///
    /// # Errors
    /// Its standard error, if it ended instead.
    pub fn start_by(command: &mut Command) -> Result<Self, String> {
        let ready = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            line.get("ready").cloned()
        };
        Self::spawn(command.arg("--announce"), ready)
    }

    /// Starts `muster up` with these flags and waits for the end of its welcome text.
    ///
    /// # Errors
    /// Its standard error, if it ended instead.
    pub fn start_up(args: &[&str]) -> Result<Self, String> {
        let mut text = String::new();
        let told = move |line: &str| {
            text += line;
            text.push('\n');
            line.contains("Ctrl-C").then(|| text.clone().into())
        };
        Self::spawn(Command::new(muster()).arg("up").args(args), told)
    }

    fn spawn(
        command: &mut Command,
        ready: impl FnMut(&str) -> Option<Value> + Send + 'static,
    ) -> Result<Self, String> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let log = Arc::new(Mutex::new(String::new()));
        let follower = follow(child.stderr.take().expect("piped"), Arc::clone(&log));
        let announcement = when_ready(child.stdout.take().expect("piped"), ready);
        let mut process = Self { child, ready: Value::Null, log };
        match announcement.recv_timeout(PATIENCE) {
            Ok(announced) => {
                process.ready = announced;
                Ok(process)
            }
            Err(_) => {
                let status = process.wait();
                let _ = process.child.kill();
                // The rest of its standard error may still be in the pipe.
                let _ = follower.join();
                Err(format!("{command:?} ended with {status:?}:\n{}", process.log()))
            }
        }
    }

    /// An address from the announcement.
    ///
    /// # Panics
    /// When it was not announced.
    #[must_use]
    pub fn address(&self, what: &str) -> String {
        let address = self.ready[what].as_str();
        address.unwrap_or_else(|| panic!("no {what} in {}", self.ready)).to_owned()
    }

    /// Welcome text of [`Self::start_up`].
    ///
    /// # Panics
    /// When it was started by another function.
    #[must_use]
    pub fn told(&self) -> &str {
        self.ready.as_str().expect("it was started for a person")
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Process state as the system reports it: `T` when stopped.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it is there");
        // The name in brackets may contain anything.
        let after = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        after.chars().next().expect("a state")
    }

    /// Standard error so far.
    ///
    /// # Panics
    /// Never in practice.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().expect("no writer panics").clone()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the process is gone already: a fault that does not happen proves nothing.
    pub fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a pid fits");
        // SAFETY: kill(2) takes two integers and touches no memory of ours; the pid is that of a child not yet waited
        // for.
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(sent, 0, "signal {signal} to {pid}: {}", std::io::Error::last_os_error());
    }

    /// Kills it and waits for its death.
    ///
    /// # Panics
    /// When it does not die.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        let status = wait_within(&mut self.child, PATIENCE).expect("SIGKILL ends a process");
        assert!(!status.success());
    }

    /// Waits for its exit.
    pub fn wait(&mut self) -> Option<ExitStatus> {
        wait_within(&mut self.child, PATIENCE)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn follow(pipe: impl Read + Send + 'static, log: Arc<Mutex<String>>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let mut log = log.lock().expect("no reader panics");
            log.push_str(&line);
            log.push('\n');
        }
    })
}

/// What `ready` makes of the first line that it accepts. Reads on to the end, so that the process never blocks on a
/// full pipe.
fn when_ready(
    stdout: ChildStdout,
    mut ready: impl FnMut(&str) -> Option<Value> + Send + 'static,
) -> mpsc::Receiver<Value> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some(announced) = ready(&line) {
                let _ = sender.send(announced);
            }
        }
    });
    receiver
}

/// Polls until `check` returns a value.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not happen within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
