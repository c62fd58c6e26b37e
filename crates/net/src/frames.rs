//! Budget of an HTTP/2 connection's frames.
//!
//! An HTTP/2 library accepts every frame, and frames that carry nothing (`SETTINGS`, `PING`, `WINDOW_UPDATE`,
//! `PRIORITY`, streams that are refused or reset at once, empty `DATA`) cost work and answers for a few bytes each. A
//! [`Meter`] reads the headers of the frames that pass, both ways, and keeps an account: every frame from the peer costs,
//! and answers and data earn. A peer that has spent its burst and continues faster than the account refills is a flood.
//!
//! The account allows for peers that confirm all they get: two window updates and a ping for each `DATA` frame. Reads
//! bytes and decides; has no socket and no clock of its own.

use std::time::{Duration, Instant};

/// Burst: frames that a peer may send at once without traffic.
const BURST: u32 = 2000;
/// Refill of the burst, frames a second.
const RATE: u32 = 200;
/// Frames that an answer's frame earns: window updates of stream and connection, a ping, and the stream's own frames.
const ANSWER: u32 = 4;
/// Bytes of `DATA`, in either direction, that earn one frame beside that.
const BYTES: u32 = 1024;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Of a frame's header: three bytes of length, type, flags, stream.
const HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;

/// The peer sends more frames than its traffic needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer sends more control frames than its traffic needs")]
pub struct Flood;

/// The account of one connection, as its server sees it.
#[derive(Debug)]
pub struct Meter {
    inbound: Frames,
    outbound: Frames,
    credit: u32,
    /// When time was last counted.
    counted: Option<Instant>,
}

impl Default for Meter {
    fn default() -> Self {
        let (inbound, outbound) = (Frames::new(State::Preface(0)), Frames::new(State::Header(0)));
        Self { inbound, outbound, credit: BURST, counted: None }
    }
}

impl Meter {
    /// Counts bytes from the peer. `now` is called only where it matters.
    ///
    /// # Errors
    /// [`Flood`], when the account is spent.
    pub fn received(&mut self, bytes: &[u8], now: impl FnOnce() -> Instant) -> Result<(), Flood> {
        let (mut cost, mut earned) = (0_u32, 0_u32);
        self.inbound.feed(bytes, |head| {
            cost = cost.saturating_add(1);
            if head.kind == DATA {
                earned = earned.saturating_add(head.length / BYTES);
            }
        });
        self.earn(earned);
        if cost > self.credit || self.counted.is_none() {
            self.fill_up(now());
        }
        self.credit = self.credit.checked_sub(cost).ok_or(Flood)?;
        Ok(())
    }

    /// Counts bytes to the peer.
    pub fn sent(&mut self, bytes: &[u8]) {
        let mut earned = 0_u32;
        self.outbound.feed(bytes, |head| {
            if matches!(head.kind, DATA | HEADERS) {
                earned = earned.saturating_add(ANSWER + head.length / BYTES);
            }
        });
        self.earn(earned);
    }

    fn earn(&mut self, frames: u32) {
        self.credit = self.credit.saturating_add(frames).min(BURST);
    }

    fn fill_up(&mut self, now: Instant) {
        let since = self.counted.map_or(Duration::ZERO, |counted| now.saturating_duration_since(counted));
        self.counted = Some(now);
        let frames = since.as_millis().saturating_mul(u128::from(RATE)) / 1000;
        self.earn(u32::try_from(frames).unwrap_or(u32::MAX));
    }
}

/// A client's input up to its first request.
#[derive(Debug)]
pub struct Opening(Frames);

impl Default for Opening {
    fn default() -> Self {
        Self(Frames::new(State::Preface(0)))
    }
}

impl Opening {
    /// Whether these bytes bring a request, or are not HTTP/2 at all.
    pub fn received(&mut self, bytes: &[u8]) -> bool {
        let mut has_request = false;
        self.0.feed(bytes, |head| has_request |= head.kind == HEADERS);
        has_request || matches!(self.0.state, State::Foreign)
    }
}

/// The header of a frame, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    length: u32,
    kind: u8,
}

/// One direction of a connection, cut into frames.
#[derive(Debug)]
struct Frames {
    state: State,
    header: [u8; HEADER],
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Bytes of the preface that were seen.
    Preface(usize),
    /// Bytes of a header that were seen.
    Header(usize),
    /// Bytes of a payload that are to come.
    Payload(usize),
    /// The bytes are not HTTP/2, which their reader will find out.
    Foreign,
}

impl Frames {
    const fn new(state: State) -> Self {
        Self { state, header: [0; HEADER] }
    }

    /// Reads further bytes and reports every header that they complete.
    fn feed(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Head)) {
        while !bytes.is_empty() {
            match self.state {
                State::Foreign => return,
                State::Preface(had) => {
                    let taken = bytes.len().min(PREFACE.len() - had);
                    if bytes[..taken] != PREFACE[had..had + taken] {
                        self.state = State::Foreign;
                        return;
                    }
                    let had = had + taken;
                    self.state = if had == PREFACE.len() { State::Header(0) } else { State::Preface(had) };
                    bytes = &bytes[taken..];
                }
                State::Header(had) => {
                    let taken = bytes.len().min(HEADER - had);
                    self.header[had..had + taken].copy_from_slice(&bytes[..taken]);
                    bytes = &bytes[taken..];
                    self.state = State::Header(had + taken);
                    if had + taken == HEADER {
                        let [a, b, c, kind, ..] = self.header;
                        let length = u32::from_be_bytes([0, a, b, c]);
                        seen(Head { length, kind });
                        self.state =
                            if length == 0 { State::Header(0) } else { State::Payload(length as usize) };
                    }
                }
                State::Payload(left) => {
                    let taken = bytes.len().min(left);
                    self.state = if taken == left { State::Header(0) } else { State::Payload(left - taken) };
                    bytes = &bytes[taken..];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let mut bytes = u32::try_from(payload).unwrap().to_be_bytes()[1..].to_vec();
        bytes.extend([kind, 0, 0, 0, 0, 1]);
        bytes.resize(HEADER + payload, 0x55);
        bytes
    }

    fn heads(frames: &mut Frames, bytes: &[u8]) -> Vec<(u8, u32)> {
        let mut heads = Vec::new();
        frames.feed(bytes, |head| heads.push((head.kind, head.length)));
        heads
    }

    #[test]
    fn an_opening_ends_with_a_request_or_with_what_is_none() {
        let mut bytes = [PREFACE, &frame(4, 18), &frame(8, 4)].concat();
        let mut opening = Opening::default();
        for byte in &bytes {
            assert!(!opening.received(&[*byte]));
        }
        assert!(opening.received(&frame(HEADERS, 30)));
        bytes.extend(frame(HEADERS, 30));
        assert!(Opening::default().received(&bytes));
        assert!(Opening::default().received(b"GET / HTTP/1.1\r\n"));
    }

    proptest! {
        #[test]
        fn frames_are_found_however_they_are_cut(
            kinds in prop::collection::vec((0_u8..12, 0_usize..300), 0..40),
            cuts in prop::collection::vec(1_usize..50, 1..200),
        ) {
            let mut bytes = PREFACE.to_vec();
            kinds.iter().for_each(|&(kind, payload)| bytes.extend(frame(kind, payload)));
            let expected: Vec<(u8, u32)> = kinds.iter().map(|&(kind, payload)| (kind, payload as u32)).collect();
            let mut frames = Frames::new(State::Preface(0));
            let (mut found, mut rest) = (Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                found.extend(heads(&mut frames, now));
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut meter = Meter::default();
            let now = Instant::now();
            let _ = meter.received(PREFACE, || now);
            let _ = meter.received(&bytes, || now);
            meter.sent(&bytes);
        }
    }

    /// A connection that has begun, and its first moment.
    fn begun() -> (Meter, Instant) {
        let (mut meter, now) = (Meter::default(), Instant::now());
        meter.received(PREFACE, || now).unwrap();
        (meter, now)
    }

    #[test]
    fn a_flood_of_any_kind_ends_and_a_burst_does_not() {
        for kind in 0..12 {
            // Small enough to earn nothing.
            for payload in [0, 8] {
                let (mut meter, now) = begun();
                let frame = frame(kind, payload);
                for _ in 0..BURST {
                    assert_eq!(meter.received(&frame, || now), Ok(()));
                }
                assert_eq!(meter.received(&frame, || now), Err(Flood), "type {kind}");
            }
        }
    }

    #[test]
    fn one_large_read_counts_like_many_small_ones() {
        let (mut meter, now) = begun();
        assert_eq!(meter.received(&frame(6, 8).repeat(BURST as usize + 1), || now), Err(Flood));
    }

    #[test]
    fn time_fills_the_account_up_to_a_burst() {
        let (mut meter, mut now) = begun();
        let ping = frame(6, 8);
        assert_eq!(meter.received(&ping.repeat(BURST as usize), || now), Ok(()));
        for _ in 0..100 {
            now += Duration::from_secs(1);
            assert_eq!(meter.received(&ping.repeat(RATE as usize), || now), Ok(()));
        }
        assert_eq!(meter.received(&ping, || now), Err(Flood));
        now += Duration::from_secs(3600);
        assert_eq!(meter.received(&ping.repeat(BURST as usize + 1), || now), Err(Flood));
    }

    #[test]
    fn a_peer_that_confirms_every_token_is_never_a_flood() {
        let (mut meter, now) = begun();
        let confirm = [frame(8, 4), frame(8, 4), frame(6, 8)].concat();
        for _ in 0..100 * BURST {
            meter.sent(&frame(DATA, 60));
            assert_eq!(meter.received(&confirm, || now), Ok(()));
        }
    }

    #[test]
    fn calls_that_are_answered_are_never_a_flood_and_those_reset_at_once_are() {
        let (mut meter, now) = begun();
        let call = [frame(HEADERS, 60), frame(DATA, 20), frame(DATA, 0)].concat();
        for _ in 0..100 * BURST {
            assert_eq!(meter.received(&call, || now), Ok(()));
            meter.sent(&frame(HEADERS, 30));
        }
        let reset = [frame(HEADERS, 60), frame(3, 4)].concat();
        let flooded = (0..BURST).any(|_| meter.received(&reset, || now).is_err());
        assert!(flooded);
    }

    #[test]
    fn shards_of_a_router_earn_what_their_frames_cost() {
        let (mut meter, now) = begun();
        for _ in 0..100 * BURST {
            // Sixteen rows of 4 KiB in one frame, and what a client sends beside them.
            assert_eq!(meter.received(&frame(DATA, 16 << 12), || now), Ok(()));
            assert_eq!(meter.received(&[frame(8, 4), frame(6, 8)].concat(), || now), Ok(()));
        }
    }

    #[test]
    fn answers_to_pings_and_settings_earn_nothing() {
        let (mut meter, now) = begun();
        let mut sent = 0;
        while meter.received(&frame(6, 8), || now).is_ok() {
            meter.sent(&frame(6, 8));
            meter.sent(&frame(4, 0));
            meter.sent(&frame(3, 4));
            meter.sent(&frame(8, 4));
            sent += 1;
        }
        assert_eq!(sent, BURST);
    }

    #[test]
    fn what_is_not_http2_is_left_to_whoever_reads_it() {
        let (mut meter, now) = (Meter::default(), Instant::now());
        assert_eq!(meter.received(b"GET / HTTP/1.1\r\n", || now), Ok(()));
        assert_eq!(meter.received(&[0; 1 << 20], || now), Ok(()));
    }
}
