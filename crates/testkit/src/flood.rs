//! A hostile HTTP/2 peer: sends frames of one kind as fast as they are accepted.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An HTTP/2 client's preface, with settings that change nothing.
pub const OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Kind of the repeated frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flood {
    /// Empty `SETTINGS`.
    Settings,
    /// `PING`, each of which requires an answer.
    Ping,
    /// Answers to pings that were never sent.
    PingAnswer,
    /// `WINDOW_UPDATE` of the connection.
    WindowUpdate,
    /// `PRIORITY`.
    Priority,
    /// Streams that never complete, far more than a connection may have.
    RefusedStreams,
    /// Streams that are reset at once.
    RapidReset,
    /// `RST_STREAM` of a stream that was reset before.
    Resets,
    /// Empty `DATA`.
    EmptyData,
    /// `CONTINUATION` of headers that never end.
    Continuation,
    /// Frames of an unknown type.
    Unknown,
}

impl Flood {
    /// All kinds.
    pub const ALL: [Self; 11] = [
        Self::Settings,
        Self::Ping,
        Self::PingAnswer,
        Self::WindowUpdate,
        Self::Priority,
        Self::RefusedStreams,
        Self::RapidReset,
        Self::Resets,
        Self::EmptyData,
        Self::Continuation,
        Self::Unknown,
    ];

    /// Frames before the flood, on a server of this method.
    #[must_use]
    pub fn opening(self, method: &str) -> Vec<u8> {
        let opened = match self {
            Self::EmptyData => call(method, 1, END_HEADERS),
            Self::Continuation => call(method, 1, 0),
            Self::Resets => [call(method, 1, END_HEADERS), reset(1)].concat(),
            _ => Vec::new(),
        };
        [OPENING, &opened].concat()
    }

    /// The frames of the `number`th round.
    #[must_use]
    pub fn frames(self, method: &str, number: u32) -> Vec<u8> {
        let stream = 2 * number + 1;
        match self {
            Self::Settings => frame(4, 0, 0, &[]),
            Self::Ping => frame(6, 0, 0, &[7; 8]),
            Self::PingAnswer => frame(6, 1, 0, &[7; 8]),
            Self::WindowUpdate => frame(8, 0, 0, &[0, 0, 0, 1]),
            Self::Priority => frame(2, 0, 1, &[0, 0, 0, 0, 1]),
            Self::RefusedStreams => call(method, stream, END_HEADERS),
            Self::RapidReset => [call(method, stream, END_HEADERS), reset(stream)].concat(),
            Self::Resets => reset(1),
            Self::EmptyData => frame(0, 0, 1, &[]),
            Self::Continuation => frame(9, 0, 1, &[]),
            Self::Unknown => frame(0xfa, 0, 0, &[]),
        }
    }
}

const END_HEADERS: u8 = 4;

/// A frame.
///
/// # Panics
/// When the payload is longer than a frame.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame is short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The headers of a gRPC call, without its body.
fn call(method: &str, stream: u32, flags: u8) -> Vec<u8> {
    let text = |text: &str| {
        let length = u8::try_from(text.len()).expect("short");
        assert!(length < 127, "{text} is too long to be written in one byte");
        [&[length], text.as_bytes()].concat()
    };
    // POST, http, then :path, :authority and content-type as literals.
    let block = [
        &[0x83, 0x86, 0x04][..],
        &text(method),
        &[0x01],
        &text("x"),
        &[0x0f, 0x10],
        &text("application/grpc"),
    ];
    frame(1, flags, stream, &block.concat())
}

fn reset(stream: u32) -> Vec<u8> {
    frame(3, 0, stream, &[0, 0, 0, 8])
}

/// Floods the server until it closes the connection; returns the approximate number of rounds.
///
/// # Panics
/// When the server does not close within `patience`.
pub async fn flood(address: &str, method: &str, flood: Flood, patience: Duration) -> u32 {
    let stream = TcpStream::connect(address).await.expect("the server listens");
    let (mut from, mut to) = stream.into_split();
    // Answers are read, so that they do not stop the flood.
    let reading = async {
        let mut bytes = vec![0; 64 << 10];
        while from.read(&mut bytes).await.is_ok_and(|read| read > 0) {}
    };
    let mut round = 0;
    let writing = async {
        let mut outcome = to.write_all(&flood.opening(method)).await;
        while outcome.is_ok() {
            let some: Vec<u8> =
                (round..round + 100).flat_map(|number| flood.frames(method, number)).collect();
            outcome = to.write_all(&some).await;
            round += 100;
        }
    };
    let ended = tokio::time::timeout(patience, async {
        tokio::select! {
            () = reading => {}
            () = writing => {}
        }
    });
    ended.await.unwrap_or_else(|_| panic!("a flood of {flood:?} goes on after {patience:?}"));
    round
}
