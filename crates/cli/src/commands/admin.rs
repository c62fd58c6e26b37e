//! `muster drain` and `muster probe`: requests to a process's admin address, for containers without a shell.

use muster_admin::client;

use crate::args::{DrainArgs, ProbeArgs};
use crate::failure::Failure;
use crate::out;

pub(crate) async fn drain(args: &DrainArgs) -> Result<(), Failure> {
    let authority = authority(&args.admin)?;
    match client::ask(authority, "POST", "/drain", args.timeout).await {
        Ok((200, body)) => out::write(&body),
        Ok((404, _)) => Err(Failure::input(format!(
            "{}: there is nothing to drain here; --admin names the address that a process was started with by this flag",
            args.admin
        ))),
        Ok((status, body)) => Err(Failure::runtime(format!("{}: {status}: {}", args.admin, body.trim_end()))),
        Err(reason) => Err(unanswered(&args.admin, &reason)),
    }
}

pub(crate) async fn probe(args: &ProbeArgs) -> Result<(), Failure> {
    let authority = authority(&args.admin)?;
    match client::ask(authority, "GET", "/readyz", args.timeout).await {
        Ok((200, body)) => out::write(&body),
        Ok((_, body)) => {
            // A kubelet copies standard output into the pod's events.
            out::write(&body)?;
            Err(Failure::Quiet)
        }
        Err(reason) => Err(unanswered(&args.admin, &reason)),
    }
}

fn authority(url: &str) -> Result<&str, Failure> {
    client::authority(url)
        .ok_or_else(|| Failure::input(format!("--admin: {url:?} is no address; write http://host:port")))
}

fn unanswered(url: &str, reason: &str) -> Failure {
    Failure::runtime(format!("{url}: {reason}; was it started with --admin?"))
}
