//! A TCP proxy in front of a server, which injects network faults into connections.
//!
//! Always holds: bytes of one direction of a connection arrive in order or not at all; a connection that lost bytes
//! never carries any again, as nothing after them would make sense; every fault is counted. Knows nothing of the
//! protocol.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

/// Most bytes of a chunk.
const CHUNK: usize = 64 << 10;
/// Most chunks in flight, per direction.
const UNDER_WAY: usize = 256;

/// State of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Forwards everything at once.
    Fair,
    /// Delays each chunk by `least` to `most`, evenly spread and determined by `seed` and the chunk's number.
    Slow {
        /// The shortest time.
        least: Duration,
        /// The longest time.
        most: Duration,
        /// Seed of the schedule.
        seed: u64,
    },
    /// Drops the bytes of both directions silently. New connections are accepted and stay silent.
    BlackHole,
    /// Reads nothing, so that senders' buffers fill. Loses nothing.
    Frozen,
}

/// Counts of what the proxy did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Connections accepted.
    pub connections: u64,
    /// Bytes that vanished.
    pub dropped_bytes: u64,
    /// Chunks that were held up.
    pub delayed_chunks: u64,
    /// Connections that were reset.
    pub resets: u64,
    /// Directions of connections that were frozen.
    pub frozen: u64,
}

/// A running proxy. Its connections end when it is dropped.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    upstream: String,
    weather: watch::Sender<Weather>,
    /// Number of resets by [`FaultProxy::reset`].
    reset: watch::Sender<u64>,
    connections: AtomicU64,
    dropped_bytes: AtomicU64,
    delayed_chunks: AtomicU64,
    resets: AtomicU64,
    frozen: AtomicU64,
}

impl FaultProxy {
    /// Starts a proxy for `host:port` on a free loopback port.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start(upstream: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            weather: watch::Sender::new(Weather::Fair),
            reset: watch::Sender::new(0),
            connections: AtomicU64::new(0),
            dropped_bytes: AtomicU64::new(0),
            delayed_chunks: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            frozen: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, accepting })
    }

    /// The proxy's own address, `host:port`.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Sets the state of the network from now on.
    pub fn set(&self, weather: Weather) {
        self.shared.weather.send_replace(weather);
    }

    /// Resets all open connections.
    pub fn reset(&self) {
        self.shared.reset.send_modify(|resets| *resets += 1);
    }

    /// Counts so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Shared { connections, dropped_bytes, delayed_chunks, resets, frozen, .. } = &*self.shared;
        Counts {
            connections: get(connections),
            dropped_bytes: get(dropped_bytes),
            delayed_chunks: get(delayed_chunks),
            resets: get(resets),
            frozen: get(frozen),
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn add(count: &AtomicU64, more: usize) {
    count.fetch_add(more as u64, Ordering::Relaxed);
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    for number in 0.. {
        let Ok((client, _)) = listener.accept().await else { return };
        // Subscribed now: earlier resets do not affect this connection.
        let reset = shared.reset.subscribe();
        add(&shared.connections, 1);
        connections.spawn(connection(client, number, reset, Arc::clone(&shared)));
        while connections.try_join_next().is_some() {}
    }
}

/// Forwards one connection to its end.
async fn connection(
    mut client: TcpStream,
    number: u64,
    mut reset: watch::Receiver<u64>,
    shared: Arc<Shared>,
) {
    let lost = AtomicBool::new(*shared.weather.borrow() == Weather::BlackHole);
    // In a black hole the server is not contacted.
    let mut server =
        if lost.load(Ordering::Relaxed) { None } else { TcpStream::connect(&shared.upstream).await.ok() };
    let is_reset = {
        let carried = async {
            match &mut server {
                Some(server) => carry(&mut client, server, number, &lost, &shared).await,
                None if lost.load(Ordering::Relaxed) => swallow(&mut client, &shared).await,
                None => {}
            }
        };
        tokio::select! {
            () = carried => false,
            changed = reset.changed() => changed.is_ok(),
        }
    };
    if is_reset {
        for stream in [Some(&client), server.as_ref()].into_iter().flatten() {
            // With zero linger, closing is a reset.
            let _ = stream.set_zero_linger();
        }
        drop((client, server));
        add(&shared.resets, 1);
    }
}

async fn carry(
    client: &mut TcpStream,
    server: &mut TcpStream,
    number: u64,
    lost: &AtomicBool,
    shared: &Shared,
) {
    for stream in [&*client, &*server] {
        let _ = stream.set_nodelay(true);
    }
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    tokio::join!(
        pump(&mut from_client, &mut to_server, 2 * number, lost, shared),
        pump(&mut from_server, &mut to_client, 2 * number + 1, lost, shared),
    );
    if lost.load(Ordering::Relaxed) {
        // Kept open: neither side may notice that the other has gone.
        std::future::pending::<()>().await;
    }
}

async fn swallow(client: &mut TcpStream, shared: &Shared) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(read @ 1..) = client.read(&mut buffer).await {
        add(&shared.dropped_bytes, read);
    }
}

/// Forwards one direction until its sender closes it or an end fails.
async fn pump(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    lane: u64,
    lost: &AtomicBool,
    shared: &Shared,
) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let mut weather = shared.weather.subscribe();
    let read = async move {
        let (mut last, mut chunks) = (Instant::now(), 0);
        let mut buffer = vec![0; CHUNK];
        loop {
            if *weather.borrow_and_update() == Weather::Frozen {
                add(&shared.frozen, 1);
                if weather.wait_for(|weather| *weather != Weather::Frozen).await.is_err() {
                    return;
                }
            }
            let read = tokio::select! {
                biased;
                changed = weather.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                read = from.read(&mut buffer) => read,
            };
            let Ok(read @ 1..) = read else { return };
            let now = *weather.borrow();
            if now == Weather::BlackHole {
                lost.store(true, Ordering::Relaxed);
            }
            if lost.load(Ordering::Relaxed) {
                add(&shared.dropped_bytes, read);
                continue;
            }
            if let Weather::Slow { least, most, seed } = now {
                add(&shared.delayed_chunks, 1);
                let takes = least + most.saturating_sub(least).mul_f64(share(seed, lane, chunks));
                last = last.max(Instant::now() + takes);
            }
            chunks += 1;
            if sender.send((last, buffer[..read].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = receiver.recv().await {
            sleep_until(due).await;
            if lost.load(Ordering::Relaxed) {
                add(&shared.dropped_bytes, bytes.len());
            } else if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        if !lost.load(Ordering::Relaxed) {
            let _ = to.shutdown().await;
        }
    };
    let (read, write) = (pin!(read), pin!(write));
    // A reader's end closes the channel, which ends the writer; a writer's error leaves the reader nobody to read for.
    tokio::join!(read, write);
}

/// A number from 0 to 1 for one chunk of one direction.
fn share(seed: u64, lane: u64, chunk: u64) -> f64 {
    // SplitMix64 (Steele, Lea, Flood 2014).
    let mix = |x: u64| {
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let step = 0x9e37_79b9_7f4a_7c15_u64;
    let of_lane = mix(seed.wrapping_add(lane.wrapping_add(1).wrapping_mul(step)));
    mix(of_lane.wrapping_add(chunk.wrapping_add(1).wrapping_mul(step))) as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    /// An echo behind a proxy.
    async fn echo() -> FaultProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        FaultProxy::start(&address).await.unwrap()
    }

    async fn connect(proxy: &FaultProxy) -> TcpStream {
        TcpStream::connect(proxy.address()).await.unwrap()
    }

    async fn echoes(stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(b"ping").await?;
        let mut back = [0; 4];
        stream.read_exact(&mut back).await?;
        assert_eq!(&back, b"ping");
        Ok(())
    }

    async fn until(what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "never happened: {what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn fair_weather_carries_everything_and_the_end() {
        let proxy = echo().await;
        let mut stream = connect(&proxy).await;
        let sent: Vec<u8> = (0..500_000_u32).map(|n| (n % 251) as u8).collect();
        let (mut from, mut to) = stream.split();
        let mut back = Vec::new();
        let send = async {
            to.write_all(&sent).await.unwrap();
            to.shutdown().await.unwrap();
        };
        tokio::join!(send, async { from.read_to_end(&mut back).await.unwrap() });
        assert_eq!(back, sent);
        assert_eq!(proxy.counts(), Counts { connections: 1, ..Counts::default() });
    }

    #[tokio::test]
    async fn slow_weather_keeps_the_order() {
        let proxy = echo().await;
        let slow = Weather::Slow { least: Duration::ZERO, most: Duration::from_millis(3), seed: 7 };
        proxy.set(slow);
        let mut stream = connect(&proxy).await;
        for _ in 0..20 {
            echoes(&mut stream).await.unwrap();
        }
        stream.write_all(&(0..200).collect::<Vec<u8>>()).await.unwrap();
        let mut back = [0; 200];
        stream.read_exact(&mut back).await.unwrap();
        assert!(back.is_sorted());
        assert!(proxy.counts().delayed_chunks >= 42);
    }

    #[test]
    fn schedules_are_spread_and_depend_on_the_seed_alone() {
        let schedule = |seed, lane| (0..1000).map(|chunk| share(seed, lane, chunk)).collect::<Vec<_>>();
        assert_eq!(schedule(1, 2), schedule(1, 2));
        assert_ne!(schedule(1, 2), schedule(1, 3));
        assert_ne!(schedule(1, 2), schedule(2, 2));
        let mean = schedule(1, 2).iter().sum::<f64>() / 1000.0;
        assert!((0.45..0.55).contains(&mean), "{mean}");
    }

    #[tokio::test]
    async fn a_black_hole_says_nothing_and_what_lost_bytes_stays_dead() {
        let proxy = echo().await;
        let mut before = connect(&proxy).await;
        echoes(&mut before).await.unwrap();
        proxy.set(Weather::BlackHole);
        before.write_all(b"lost").await.unwrap();
        let mut within = connect(&proxy).await;
        within.write_all(b"lost").await.unwrap();
        until("both are lost", || proxy.counts().dropped_bytes == 8).await;
        proxy.set(Weather::Fair);
        let mut after = connect(&proxy).await;
        echoes(&mut after).await.unwrap();
        for stream in [&mut before, &mut within] {
            stream.write_all(b"more").await.unwrap();
            let quiet = stream.try_read(&mut [0; 1]).expect_err("neither data nor an end");
            assert_eq!(quiet.kind(), ErrorKind::WouldBlock);
        }
        until("they stay so", || proxy.counts().dropped_bytes == 16).await;
    }

    #[tokio::test]
    async fn a_reset_is_a_reset_and_spares_what_comes_after() {
        let proxy = echo().await;
        let mut stream = connect(&proxy).await;
        echoes(&mut stream).await.unwrap();
        proxy.reset();
        let error = stream.read(&mut [0; 1]).await.expect_err("no orderly end");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        until("it is counted", || proxy.counts().resets == 1).await;
        echoes(&mut connect(&proxy).await).await.unwrap();
    }

    #[tokio::test]
    async fn a_frozen_connection_loses_nothing() {
        let proxy = echo().await;
        let mut stream = connect(&proxy).await;
        echoes(&mut stream).await.unwrap();
        proxy.set(Weather::Frozen);
        until("both directions stand still", || proxy.counts().frozen == 2).await;
        stream.write_all(b"ping").await.unwrap();
        let quiet = stream.try_read(&mut [0; 1]).expect_err("nothing comes");
        assert_eq!(quiet.kind(), ErrorKind::WouldBlock);
        proxy.set(Weather::Fair);
        let mut back = [0; 4];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"ping");
    }
}
