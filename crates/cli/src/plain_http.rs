//! One request over plain HTTP, to a process of this host or to a page of metrics.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Where a process answers what the machine around it asks, by convention.
pub(crate) const DEFAULT_ADMIN: &str = "http://127.0.0.1:9090";

/// Longest answer that is read.
const MOST_BYTES: u64 = 4 << 20;

/// The `host:port` of `http://host:port`, `http://host:port/` or `host:port`.
pub(crate) fn authority(url: &str) -> Option<&str> {
    let authority = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
    let is_one = authority.contains(':') && !authority.contains(['/', ' ', '\r', '\n']);
    (!authority.is_empty() && is_one).then_some(authority)
}

/// Status and body of the answer.
///
/// # Errors
/// What was seen instead of one.
pub(crate) async fn ask(
    authority: &str,
    method: &str,
    path: &str,
    timeout: Duration,
) -> Result<(u16, String), String> {
    let asking = async {
        let mut stream = TcpStream::connect(authority).await?;
        // HTTP/1.0: the body is neither chunked nor followed by anything.
        let request = format!("{method} {path} HTTP/1.0\r\nHost: {authority}\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MOST_BYTES).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(timeout, asking)
        .await
        .map_err(|_| format!("no answer within {timeout:?}"))?
        .map_err(|error| error.to_string())?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the answer is not HTTP")?;
    let line = head.lines().next().unwrap_or_default();
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| format!("the answer is {line:?}"))?, body.to_owned()))
}
