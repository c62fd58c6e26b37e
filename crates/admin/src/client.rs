//! Client of the admin interface: one request over plain HTTP, to a process of this host or to a page of metrics.

use std::io;
use std::time::Duration;

use muster_net::Found;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Default address of a process's admin interface.
pub const DEFAULT_ADMIN: &str = "http://127.0.0.1:9090";

/// Longest accepted answer, bytes.
const MOST_BYTES: u64 = 4 << 20;

/// The `host:port` of `http://host:port`, `http://host:port/` or `host:port`.
#[must_use]
pub fn authority(url: &str) -> Option<&str> {
    let authority = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
    let is_one = authority.contains(':') && !authority.contains(['/', ' ', '\r', '\n']);
    (!authority.is_empty() && is_one).then_some(authority)
}

/// Sends a request. Returns status and body of the answer.
///
/// # Errors
/// The failure, or what was received instead of an answer.
pub async fn ask(
    authority: &str,
    method: &str,
    path: &str,
    timeout: Duration,
) -> Result<(u16, String), String> {
    let answer = match tokio::time::timeout(timeout, exchange(authority, method, path)).await {
        Err(_) => return Err(format!("no answer within {timeout:?}")),
        Ok(answer) => answer.map_err(|error| error.to_string()),
    };
    let whole = answer.and_then(|answer| match Found::of(&answer) {
        Some(Found::Http1) => parse(&String::from_utf8_lossy(&answer)),
        _ => Err("the answer is not HTTP".to_owned()),
    });
    match whole {
        Ok(answer) => Ok(answer),
        Err(reason) => Err(match muster_net::look(authority).await {
            Some(Found::Tls) => "it speaks TLS, and this is asked in plain HTTP".to_owned(),
            Some(Found::Http2) => "it speaks gRPC and not HTTP/1.1".to_owned(),
            Some(Found::Http1) | None => reason,
        }),
    }
}

async fn exchange(authority: &str, method: &str, path: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(authority).await?;
    // HTTP/1.0: the body is neither chunked nor followed by anything.
    let request = format!("{method} {path} HTTP/1.0\r\nHost: {authority}\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MOST_BYTES).read_to_end(&mut answer).await?;
    Ok(answer)
}

fn parse(answer: &str) -> Result<(u16, String), String> {
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the answer is not HTTP")?;
    let line = head.lines().next().unwrap_or_default();
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| format!("the answer is {line:?}"))?, body.to_owned()))
}
