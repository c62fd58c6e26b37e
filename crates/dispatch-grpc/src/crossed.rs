//! Peers that speak another protocol than the port: recognised by their first bytes, and answered in their own protocol.

use std::io;
use std::time::Duration;

use muster_net::Opening;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// First byte of a TLS handshake.
const HANDSHAKE: u8 = 0x16;

/// Time for a peer to send its request.
const ASKING: Duration = Duration::from_millis(500);

/// Time for a peer to take the answer.
const TELLING: Duration = Duration::from_secs(1);

/// Bytes of its request that are read and discarded.
const LEFT: u64 = 64 << 10;

/// Protocol of a listener's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1, where a peer's cost is its requests.
    Http1,
    /// HTTP/2, where frames are counted.
    Http2,
}

/// The peer's mistake about the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Crossed {
    /// A client without TLS at a port with TLS.
    #[error("this port speaks TLS, and a client came without; use https:// in its URL")]
    Plain,
    /// A client with TLS at a port without.
    #[error("this port speaks no TLS, and a client came with it; use http:// in its URL")]
    Tls,
    /// HTTP/2 at a port of HTTP/1.1.
    #[error("this is the HTTP port, which speaks HTTP/1.1; gRPC listens on another")]
    Http2,
}

impl Crossed {
    /// Checks a peer's first byte at a port with TLS.
    pub(crate) fn before_tls(first: u8) -> Option<Self> {
        (first != HANDSHAKE).then_some(Self::Plain)
    }

    /// Checks a peer's first bytes at a port without TLS.
    pub(crate) fn without_tls(first: &[u8], speaks: Speaks) -> Option<Self> {
        match (first, speaks) {
            // A record of the handshake, of whatever version.
            ([HANDSHAKE, 3, ..] | [HANDSHAKE], _) => Some(Self::Tls),
            (first, Speaks::Http1) if first.starts_with(b"PRI * HTTP/2") => Some(Self::Http2),
            _ => None,
        }
    }

    /// Answer to such a peer; `None` where the protocol's own error says enough.
    pub(crate) fn answer(self, speaks: Speaks) -> Option<Answer> {
        /// Of HTTP/2, RFC 9113, section 7.
        const INADEQUATE_SECURITY: u8 = 0xc;
        const HTTP_1_1_REQUIRED: u8 = 0xd;
        let (bytes, opening) = match (self, speaks) {
            (Self::Plain, Speaks::Http1) => (bad_request(&self.to_string()), None),
            (Self::Plain, Speaks::Http2) => {
                (goaway(INADEQUATE_SECURITY, &self.to_string()), Some(Opening::default()))
            }
            (Self::Http2, _) => (goaway(HTTP_1_1_REQUIRED, &self.to_string()), Some(Opening::default())),
            (Self::Tls, _) => return None,
        };
        Some(Answer { bytes, opening })
    }

    /// Answers, and waits until the peer has taken the answer or its time is up.
    pub(crate) async fn tell(self, mut io: impl AsyncRead + AsyncWrite + Unpin, speaks: Speaks) {
        let Some(mut answer) = self.answer(speaks) else { return };
        let asking = async {
            let mut bytes = [0; 4096];
            loop {
                let read = io.read(&mut bytes).await?;
                if read == 0 || answer.is_due(&bytes[..read]) {
                    return io::Result::Ok(());
                }
            }
        };
        let (Ok(Ok(())) | Err(_)) = timeout(ASKING, asking).await else { return };
        let telling = async {
            io.write_all(answer.bytes()).await?;
            io.shutdown().await?;
            // Unread input would make the system reset the connection, and the answer with it.
            tokio::io::copy(&mut io.take(LEFT), &mut tokio::io::sink()).await
        };
        let _ = timeout(TELLING, telling).await;
    }
}

/// Answer to a peer, and its time: a client of HTTP/2 reports the reason only for requests that it has sent before.
pub(crate) struct Answer {
    bytes: Vec<u8>,
    /// Input up to the awaited request.
    opening: Option<Opening>,
}

impl Answer {
    /// Whether to send it after these further bytes of the peer.
    pub(crate) fn is_due(&mut self, bytes: &[u8]) -> bool {
        self.opening.as_mut().is_none_or(|opening| opening.received(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn bad_request(text: &str) -> Vec<u8> {
    let body = format!(
        r#"{{"error":{{"message":"{text}","type":"invalid_request_error","param":null,"code":null}}}}"#
    );
    let length = body.len();
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Settings, which come first, and the end of the connection with a reason.
fn goaway(code: u8, text: &str) -> Vec<u8> {
    let mut frames = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    // The text is one of ours, far below a frame's 16 KiB.
    let length = u16::try_from(8 + text.len()).unwrap_or(u16::MAX).to_be_bytes();
    frames.extend([0, length[0], length[1], 7, 0, 0, 0, 0, 0]);
    frames.extend([0, 0, 0, 0, 0, 0, 0, code]);
    frames.extend_from_slice(text.as_bytes());
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_say_what_a_peer_speaks() {
        assert_eq!(Crossed::before_tls(0x16), None);
        for first in [b'G', b'P', 0, 0xff] {
            assert_eq!(Crossed::before_tls(first), Some(Crossed::Plain));
        }
        for speaks in [Speaks::Http1, Speaks::Http2] {
            assert_eq!(Crossed::without_tls(b"\x16\x03\x01\x02\x00", speaks), Some(Crossed::Tls));
            assert_eq!(Crossed::without_tls(b"GET / HTTP/1.1", speaks), None);
            assert_eq!(Crossed::without_tls(b"", speaks), None);
        }
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        assert_eq!(Crossed::without_tls(preface, Speaks::Http1), Some(Crossed::Http2));
        assert_eq!(Crossed::without_tls(preface, Speaks::Http2), None);
    }

    #[tokio::test]
    async fn a_peer_is_told_in_its_own_protocol() {
        let request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x01\x01\x05\0\0\0\x01\x82";
        for (speaks, request) in [(Speaks::Http1, &b"GET / HTTP/1.1\r\n\r\n"[..]), (Speaks::Http2, request)] {
            let (ours, mut theirs) = tokio::io::duplex(1 << 16);
            theirs.write_all(request).await.unwrap();
            theirs.shutdown().await.unwrap();
            Crossed::Plain.tell(ours, speaks).await;
            let mut told = Vec::new();
            theirs.read_to_end(&mut told).await.unwrap();
            let text = String::from_utf8_lossy(&told);
            assert!(text.contains("use https:// in its URL"), "{text}");
            assert_eq!(text.starts_with("HTTP/1.1 400 "), speaks == Speaks::Http1, "{text}");
        }
    }
}
