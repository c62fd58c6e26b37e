//! Child processes with a deadline, pinned to the first cores of the machine.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread::{JoinHandle, available_parallelism, sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

const POLL: Duration = Duration::from_millis(20);
/// Most characters of a failed program's output in an error.
const TOLD: usize = 400;

/// A command pinned to the first `cores` cores, so that every side has the same.
pub(crate) fn on_cores(cores: u32, program: impl AsRef<OsStr>) -> Command {
    let all = available_parallelism().map_or(usize::MAX, std::num::NonZero::get);
    if cores as usize >= all {
        return Command::new(program);
    }
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &format!("0-{}", cores - 1)]).arg(program);
    command
}

/// Runs a command to its end and returns its standard output.
pub(crate) fn output(mut command: Command, deadline: Duration) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("cannot run {name}"))?;
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > deadline {
            kill(&mut child);
            bail!("{name} did not end within {} s", deadline.as_secs());
        }
        sleep(POLL);
    };
    let (out, err) = (collected(out), collected(err));
    if !status.success() {
        bail!("{name} ended with {status}: {}", tail(if err.trim().is_empty() { &out } else { &err }));
    }
    Ok(out)
}

/// Kills a process and waits for it.
pub(crate) fn kill(child: &mut Child) {
    // Both fail only when it has exited already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Asks a process to exit, and kills it after `patience`.
pub(crate) fn stop(child: &mut Child, patience: Duration) {
    let asked = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    let started = Instant::now();
    while asked.is_ok() && started.elapsed() < patience {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        sleep(POLL);
    }
    kill(child);
}

/// Reads a pipe to its end on a thread of its own, so that the writer never waits.
pub(crate) fn drain(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // Bytes before an error are still of use.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

pub(crate) fn collected(reader: JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
}

/// End of a program's output, on one line.
pub(crate) fn tail(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let skip = line.chars().count().saturating_sub(TOLD);
    line.chars().skip(skip).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_is_what_was_printed() {
        assert_eq!(output(shell("echo out; echo err >&2"), Duration::from_secs(30)).unwrap(), "out\n");
    }

    #[test]
    fn failures_say_why() {
        let error =
            output(shell("echo 'no\nluck' >&2; exit 3"), Duration::from_secs(30)).unwrap_err().to_string();
        assert!(error.contains("no luck") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let error = output(shell("exec sleep 600"), Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
    }

    #[test]
    fn long_messages_keep_their_end() {
        let told = tail(&format!("{} end", "x".repeat(1000)));
        assert!(told.len() == TOLD && told.ends_with(" end"));
    }
}
