//! Detection of the protocol at an address that should speak gRPC: with another protocol the peer seems to break off, and the
//! libraries' errors do not name the cause.
//!
//! Servers of HTTP/2 speak first. Others are asked in HTTP/1.1 without TLS, which all answer in a way of their own.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// For a connection and its answer. A port of ours with TLS waits half a second for the end of a request before it answers.
const PATIENCE: Duration = Duration::from_secs(2);

/// For a server that speaks first.
const FIRST: Duration = Duration::from_millis(200);

/// Bytes of an answer that are read.
const LOOKED_AT: u64 = 4 << 10;

/// How rustls and tonic say that TLS is right and has no HTTP/2 under it.
const NO_HTTP2: [&str; 2] = ["NoApplicationProtocol", "HTTP/2 was not negotiated"];

/// Form of the gRPC request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Without TLS.
    Plain,
    /// With TLS.
    Tls,
}

/// Protocol at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// TLS, whatever is under it.
    Tls,
    /// HTTP/1.1 without TLS.
    Http1,
    /// HTTP/2 without TLS, as gRPC is.
    Http2,
}

/// Why gRPC does not work at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// It needs TLS; the request had none.
    #[error("speaks TLS")]
    Tls,
    /// It has no TLS; the request had it.
    #[error("speaks no TLS")]
    Plain,
    /// It does not speak gRPC.
    #[error("speaks HTTP/1.1 and not gRPC, as a router does at its --http address")]
    Http,
}

impl Found {
    /// Protocol of a server from its answer to HTTP/1.1 without TLS. `None` if unknown.
    #[must_use]
    pub fn of(answer: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(answer);
        let names_tls = ["TLS", "HTTPS", "SSL"].iter().any(|name| text.contains(name));
        match answer {
            // An alert of TLS, of whatever version.
            [0x15, 3, ..] => Some(Self::Tls),
            _ if text.starts_with("HTTP/1.") => {
                let status = text.split(' ').nth(1);
                Some(if status == Some("400") && names_tls { Self::Tls } else { Self::Http1 })
            }
            // Settings come first in HTTP/2; ports of ours with TLS say why they end it behind them.
            [0, _, _, 4, ..] => Some(if names_tls { Self::Tls } else { Self::Http2 }),
            _ => None,
        }
    }

    const fn instead_of(self, asked: Asked) -> Option<Mismatch> {
        match (self, asked) {
            (Self::Http1, _) => Some(Mismatch::Http),
            (Self::Tls, Asked::Plain) => Some(Mismatch::Tls),
            (Self::Http2, Asked::Tls) => Some(Mismatch::Plain),
            (Self::Tls, Asked::Tls) | (Self::Http2, Asked::Plain) => None,
        }
    }
}

/// Why gRPC does not work at an address (`host:port`), if the protocol there is the reason; `cause` is the innermost error of the
/// request.
pub async fn mismatch(authority: &str, asked: Asked, cause: &str) -> Option<Mismatch> {
    if asked == Asked::Tls && NO_HTTP2.iter().any(|words| cause.contains(words)) {
        return Some(Mismatch::Http);
    }
    look(authority).await?.instead_of(asked)
}

/// Detects the protocol at an address (`host:port`). `None` without an answer, or with an unknown one.
pub async fn look(authority: &str) -> Option<Found> {
    let mut answer = Vec::new();
    let asking = async {
        let mut stream = TcpStream::connect(authority).await?;
        let mut first = [0; 9];
        if let Ok(read) = tokio::time::timeout(FIRST, stream.read(&mut first)).await {
            answer.extend_from_slice(&first[..read?]);
            return Ok(0);
        }
        let request = format!("GET / HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        stream.take(LOOKED_AT).read_to_end(&mut answer).await
    };
    // The bytes so far count, whatever ended the answer.
    let _ = tokio::time::timeout(PATIENCE, asking).await;
    Found::of(&answer)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// The address of a server that says this to whoever connects, once, and closes.
    async fn saying(said: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let speaks_first = said.starts_with(b"\0") && said.len() == 9;
            if !speaks_first {
                let mut asked = [0; 512];
                let _ = stream.read(&mut asked).await;
            }
            stream.write_all(said).await.unwrap();
        });
        address.to_string()
    }

    #[tokio::test]
    async fn servers_are_told_from_each_other_by_what_they_answer() {
        let broken = "connection reset by peer";
        for (said, plain, tls) in [
            (&b"HTTP/1.1 404 Not Found\r\n\r\n"[..], Some(Mismatch::Http), Some(Mismatch::Http)),
            (b"HTTP/1.0 400 Bad Request\r\n\r\n", Some(Mismatch::Http), Some(Mismatch::Http)),
            (b"HTTP/1.1 404 Not Found\r\n\r\nno TLS here", Some(Mismatch::Http), Some(Mismatch::Http)),
            (b"HTTP/1.1 400 Bad Request\r\n\r\nthis port speaks TLS", Some(Mismatch::Tls), None),
            (
                b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
                Some(Mismatch::Tls),
                None,
            ),
            (b"\x15\x03\x01\0\x02\x02\x32", Some(Mismatch::Tls), None),
            (b"\0\0\0\x04\0\0\0\0\0\0\0\x3c\x07\0\0\0\0\0this port speaks TLS", Some(Mismatch::Tls), None),
            (b"\0\0\x12\x04\0\0\0\0\0", None, Some(Mismatch::Plain)),
            (b"", None, None),
            (b"HTTP", None, None),
            (b"SSH-2.0-x\r\n", None, None),
        ] {
            assert_eq!(mismatch(&saying(said).await, Asked::Plain, broken).await, plain, "{said:?}");
            assert_eq!(mismatch(&saying(said).await, Asked::Tls, broken).await, tls, "{said:?}");
        }
        for nobody in ["127.0.0.1:1", "nonsense", ""] {
            assert_eq!(mismatch(nobody, Asked::Plain, broken).await, None, "{nobody}");
        }
        let without = "received fatal alert: NoApplicationProtocol";
        assert_eq!(mismatch("nonsense", Asked::Tls, without).await, Some(Mismatch::Http));
    }
}
