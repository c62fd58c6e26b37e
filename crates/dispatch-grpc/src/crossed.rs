//! Peers that speak another protocol than a port does: recognised by their first bytes, and told in words that they can read.

use std::io;
use std::time::Duration;

use muster_net::Opening;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::secured::Speaks;

/// First byte of a TLS handshake.
const HANDSHAKE: u8 = 0x16;

/// A peer is given so long to send a request.
const ASKING: Duration = Duration::from_millis(500);

/// A peer is given so long to take what it is told.
const TELLING: Duration = Duration::from_secs(1);

/// Bytes of its request that are read and left.
const LEFT: u64 = 64 << 10;

/// What a peer took a port for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Crossed {
    /// No TLS came where it is spoken.
    #[error("this port speaks TLS, and a client came without; use https:// in its URL")]
    Plain,
    /// TLS came where it is not spoken.
    #[error("this port speaks no TLS, and a client came with it; use http:// in its URL")]
    Tls,
    /// HTTP/2 came where HTTP/1.1 is spoken.
    #[error("this is the HTTP port, which speaks HTTP/1.1; gRPC listens on another")]
    Http2,
}

impl Crossed {
    /// Looks at the first byte of a peer where TLS is spoken.
    pub(crate) fn before_tls(first: u8) -> Option<Self> {
        (first != HANDSHAKE).then_some(Self::Plain)
    }

    /// Looks at the first bytes of a peer where it is not.
    pub(crate) fn without_tls(first: &[u8], speaks: Speaks) -> Option<Self> {
        match (first, speaks) {
            // A record of the handshake, of whatever version.
            ([HANDSHAKE, 3, ..] | [HANDSHAKE], _) => Some(Self::Tls),
            (first, Speaks::Http1) if first.starts_with(b"PRI * HTTP/2") => Some(Self::Http2),
            _ => None,
        }
    }

    /// What such a peer is answered; nothing where the protocol's own error says enough.
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

    /// Answers, and waits until the peer has taken it or will not.
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
            // What is not read would have the system take the answer back.
            tokio::io::copy(&mut io.take(LEFT), &mut tokio::io::sink()).await
        };
        let _ = timeout(TELLING, telling).await;
    }
}

/// What a peer is told, and when: a client of HTTP/2 gives the reason to the requests that it has sent, to none before.
pub(crate) struct Answer {
    bytes: Vec<u8>,
    /// Up to the request that is waited for.
    opening: Option<Opening>,
}

impl Answer {
    /// Whether it is to be sent, now that the peer has sent these bytes.
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
