//! Child processes of this same executable.
//!
//! Always holds: a child never outlives this process, however that ends. Two mechanisms see to it: the kernel kills the
//! child when the thread that spawned it dies (so children are spawned from the main thread only), and the child exits
//! at the end of its standard input, whose other end this process holds. Children are in process groups of their own,
//! so that Ctrl-C reaches only this process, which then stops them in order.

use std::ffi::OsString;
use std::io::Read;
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use muster_model::LoadProgress;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::failure::Failure;
use crate::out;

/// Flags for a role that runs as a child.
const CHILD_FLAGS: [&str; 3] = ["--announce", "--announce-loading", "--exit-with-parent"];

/// A line that a child prints for its parent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Announcement {
    /// Weights are being read.
    Loading {
        /// Bytes read.
        done: u64,
        /// Bytes there are.
        total: u64,
    },
    /// The child serves.
    Ready(Listening),
}

/// Addresses on which a child listens.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Listening {
    /// A router's HTTP address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) http: Option<SocketAddr>,
    /// A router's gRPC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grpc: Option<SocketAddr>,
    /// Address of probes and metrics, if set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) admin: Option<SocketAddr>,
    /// A worker's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) listen: Option<String>,
}

/// Prints an announcement. Write errors are ignored: a parent that is gone is noticed elsewhere.
pub(crate) fn announce(announcement: &Announcement) {
    if let Ok(line) = serde_json::to_string(announcement) {
        let _ = out::line(&line);
    }
}

/// Exits this process at the end of standard input.
pub(crate) fn exit_with_parent() -> Result<(), Failure> {
    let watch = || {
        let mut stdin = std::io::stdin().lock();
        let mut byte = [0];
        while matches!(stdin.read(&mut byte), Ok(1..)) {}
        std::process::exit(1);
    };
    let thread = std::thread::Builder::new().name("muster-parent".into()).spawn(watch);
    thread.map(drop).map_err(|error| Failure::runtime(format!("cannot watch the parent process: {error}")))
}

/// A running child.
pub(crate) struct Running {
    name: String,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// Closing it makes the child exit.
    _stdin: ChildStdin,
}

/// Starts a child with these arguments. Only for the main thread.
pub(crate) fn spawn(name: &str, arguments: &[OsString]) -> Result<Running, Failure> {
    let failed = |reason: String| Failure::runtime(format!("cannot start {name}: {reason}"));
    let executable = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(executable);
    command
        .args(arguments)
        .args(CHILD_FLAGS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    #[cfg(target_os = "linux")]
    {
        let parent = std::process::id();
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid, and building an
        // io::Error from a number, which allocates nothing.
        unsafe {
            command.pre_exec(move || die_with(parent));
        }
    }
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    let pipes = child.stdin.take().zip(child.stdout.take());
    let (stdin, stdout) = pipes.ok_or_else(|| failed("it has no pipes".to_owned()))?;
    Ok(Running { name: name.to_owned(), child, lines: BufReader::new(stdout).lines(), _stdin: stdin })
}

/// Asks the kernel to kill this process when its parent thread dies.
#[cfg(target_os = "linux")]
fn die_with(parent: u32) -> std::io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory of ours.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // The parent may have died before the request, which then would never fire.
    // SAFETY: getppid has no preconditions.
    if unsafe { libc::getppid() }.cast_unsigned() != parent {
        return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

impl Running {
    /// Waits until the child serves.
    pub(crate) async fn ready(
        &mut self,
        mut progress: impl FnMut(LoadProgress),
    ) -> Result<Listening, Failure> {
        while let Ok(Some(line)) = self.lines.next_line().await {
            match serde_json::from_str(&line) {
                Ok(Announcement::Loading { done, total }) => {
                    progress(LoadProgress { done_bytes: done, total_bytes: total });
                }
                Ok(Announcement::Ready(listening)) => return Ok(listening),
                Err(error) => {
                    return Err(Failure::runtime(format!(
                        "{} said something unexpected: {error}",
                        self.name
                    )));
                }
            }
        }
        let status = self.exited().await;
        let message = format!("{} ended before it was ready ({status}); its own message is above", self.name);
        // Exit code 2 is bad input, which is this command's input as well.
        Err(if status.code() == Some(2) { Failure::Input(message) } else { Failure::Runtime(message) })
    }

    /// Waits until the child has ended.
    pub(crate) async fn exited(&mut self) -> ExitStatus {
        loop {
            match self.child.wait().await {
                Ok(status) => return status,
                // A wait for an own child can only be interrupted.
                Err(error) => tracing::debug!(%error, child = self.name, "wait"),
            }
        }
    }

    /// Its process id; `None` once it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Kills the child without warning, and waits until it is gone.
    pub(crate) async fn kill(&mut self) {
        if let Err(error) = self.child.kill().await {
            tracing::warn!(%error, child = self.name, "kill");
        }
    }

    /// Asks the child to exit, and kills it after `grace`.
    pub(crate) async fn stop(mut self, grace: Duration) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // SAFETY: kill takes two integers. The pid is that of a child not yet waited for, so it is still ours.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        if tokio::time::timeout(grace, self.exited()).await.is_err() {
            tracing::warn!(child = self.name, ?grace, "did not end in time and is killed");
            self.kill().await;
        }
    }
}
