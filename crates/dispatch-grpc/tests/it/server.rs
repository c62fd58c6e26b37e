//! The protocol's rules, checked with a client that follows none of them by itself.

use std::num::NonZeroUsize;
use std::time::Duration;

use muster_dispatch_grpc::{Address, BindError, Bound, ServerConfig};
use muster_engine::compute::{ComputeError, ExpertCompute, Segment, SegmentAnswer};
use muster_engine::dispatch::Rows;
use muster_proto::convert::RouterName;
use muster_proto::expert::v1;
use muster_proto::expert::v1::experts_client::ExpertsClient;
use muster_proto::expert::v1::shard_error::Code as Fault;
use muster_proto::handshake::Terms;
use muster_proto::version::{MARKS, OURS};
use muster_testkit::fake;
use muster_types::{Combine, Compute, LayerId, NumericsClass, WeightDType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::support::{
    FINGERPRINT, Gated, HIDDEN, MAX_ROWS, TestWorker, all, describe, eventually, expert, fakes, layer,
    runtime, server_config, share, socket,
};

fn hello() -> v1::Hello {
    let terms = Terms {
        fingerprint: FINGERPRINT,
        hidden: HIDDEN as u32,
        compute: Compute::F32,
        experts: WeightDType::Native,
        numerics: NumericsClass::CpuCanonical,
    };
    terms.to_hello(&RouterName::new("raw").unwrap(), 0, Combine::Exact, terms.numerics)
}

/// One row for expert 1 of layer 0.
fn shard(id: u64) -> v1::LayerShard {
    v1::LayerShard {
        id,
        layer: 0,
        epoch: 1,
        deadline_ms: 20_000,
        rows: 1,
        data: vec![0; HIDDEN * 4].into(),
        experts: vec![1],
        counts: vec![1],
        indices: vec![0],
        weights: vec![],
    }
}

async fn client(worker: &TestWorker) -> ExpertsClient<Channel> {
    ExpertsClient::connect(format!("http://{}", worker.address)).await.unwrap()
}

/// A stream and nothing around it.
struct Raw {
    requests: mpsc::Sender<v1::DispatchRequest>,
    replies: Streaming<v1::DispatchReply>,
}

impl Raw {
    /// Opens a stream with whatever as its first message.
    async fn first(worker: &TestWorker, body: Option<v1::dispatch_request::Body>) -> Result<Self, Status> {
        let (requests, outbound) = mpsc::channel(64);
        requests.send(v1::DispatchRequest { body }).await.unwrap();
        let replies = client(worker).await.dispatch(ReceiverStream::new(outbound)).await?.into_inner();
        Ok(Self { requests, replies })
    }

    async fn open(worker: &TestWorker) -> Self {
        let mut raw = Self::first(worker, Some(v1::dispatch_request::Body::Hello(hello()))).await.unwrap();
        let ack = raw.reply().await;
        assert!(
            matches!(ack.body, Some(v1::dispatch_reply::Body::Ack(ref ack)) if ack.worker_id == "w0"),
            "{ack:?}"
        );
        raw
    }

    async fn send(&self, shard: v1::LayerShard) {
        let body = Some(v1::dispatch_request::Body::Shard(shard));
        self.requests.send(v1::DispatchRequest { body }).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<v1::DispatchReply>, Status> {
        tokio::time::timeout(Duration::from_secs(20), self.replies.message()).await.expect("a reply comes")
    }

    async fn reply(&mut self) -> v1::DispatchReply {
        self.next().await.expect("the stream goes on").expect("the stream goes on")
    }

    /// The next reply must be this fault.
    async fn fault(&mut self) -> (u64, Fault, String) {
        let reply = self.reply().await;
        match reply.body {
            Some(v1::dispatch_reply::Body::Error(error)) => (reply.id, error.code(), error.message),
            other => panic!("{other:?}"),
        }
    }

    /// The next reply must be rows; their values.
    async fn data(&mut self) -> (u64, Vec<f32>) {
        let reply = self.reply().await;
        match reply.body {
            Some(v1::dispatch_reply::Body::Rows(rows)) => {
                let values = rows.data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
                (reply.id, values.collect())
            }
            other => panic!("{other:?}"),
        }
    }

    /// The next reply must be rows.
    async fn rows(&mut self) -> (u64, u32) {
        let reply = self.reply().await;
        match reply.body {
            Some(v1::dispatch_reply::Body::Rows(rows)) => (reply.id, rows.rows),
            other => panic!("{other:?}"),
        }
    }
}

fn plain() -> TestWorker {
    TestWorker::start("w0", all(), Compute::F32)
}

fn with(experts: impl ExpertCompute + 'static, config: &ServerConfig) -> TestWorker {
    TestWorker::with("127.0.0.1:0", config, describe("w0", all(), Compute::F32), experts)
}

#[test]
fn a_stream_opens_with_a_hello_on_the_worker_s_terms() {
    let worker = plain();
    runtime().block_on(async {
        let refused = async |body| Raw::first(&worker, body).await.err().expect("no stream");
        let say = |hello| Some(v1::dispatch_request::Body::Hello(hello));
        for body in [None, Some(v1::dispatch_request::Body::Shard(shard(1)))] {
            assert_eq!(refused(body).await.code(), Code::InvalidArgument);
        }
        let status = refused(say(v1::Hello { router_id: "a\nb".into(), ..hello() })).await;
        assert_eq!(status.code(), Code::InvalidArgument);
        let status = refused(say(v1::Hello { combine: 9, ..hello() })).await;
        assert_eq!(
            (status.code(), status.message()),
            (Code::InvalidArgument, "field combine has the unknown value 9")
        );
        let status =
            refused(say(v1::Hello { protocol_version: 9, newest_protocol_version: 0, ..hello() })).await;
        assert_eq!(status.code(), Code::FailedPrecondition);
        let differs = format!("protocol version differs: ours is {OURS}, the peer's is 9");
        assert_eq!(status.message(), differs);
        let status = refused(say(v1::Hello { fingerprint: vec![1; 32].into(), ..hello() })).await;
        assert_eq!(status.code(), Code::FailedPrecondition);
        let both = [FINGERPRINT.to_string(), "01".repeat(32)];
        assert!(both.iter().all(|value| status.message().contains(value)), "{status:?}");
        Raw::open(&worker).await;
    });
}

#[test]
fn what_is_no_shard_after_hello_ends_the_stream() {
    let worker = plain();
    runtime().block_on(async {
        let again = v1::dispatch_request::Body::Hello(hello());
        let zero = v1::dispatch_request::Body::Shard(shard(0));
        for body in [None, Some(again), Some(zero)] {
            let mut raw = Raw::open(&worker).await;
            raw.requests.send(v1::DispatchRequest { body }).await.unwrap();
            assert_eq!(raw.next().await.unwrap_err().code(), Code::InvalidArgument);
        }
        let mut raw = Raw::open(&worker).await;
        raw.send(shard(5)).await;
        assert_eq!(raw.rows().await, (5, 1));
        raw.send(shard(5)).await;
        assert_eq!(raw.next().await.unwrap_err().message(), "field id: 5 does not come after 5");
    });
}

#[test]
fn a_bad_shard_is_answered_and_the_stream_goes_on() {
    let worker = TestWorker::start("w0", share(0, 2), Compute::F32);
    runtime().block_on(async {
        let mut raw = Raw::open(&worker).await;
        let nan = [f32::NAN.to_le_bytes(); HIDDEN].concat();
        let cases = [
            (Fault::BadRequest, v1::LayerShard::default()),
            (Fault::BadRequest, v1::LayerShard { epoch: 2, ..shard(0) }),
            (Fault::BadRequest, v1::LayerShard { layer: 1, ..shard(0) }),
            (Fault::BadRequest, v1::LayerShard { rows: MAX_ROWS + 1, ..shard(0) }),
            (Fault::BadRequest, v1::LayerShard { data: vec![0; 7].into(), ..shard(0) }),
            (Fault::BadRequest, v1::LayerShard { indices: vec![u32::MAX], ..shard(0) }),
            (Fault::Deadline, v1::LayerShard { deadline_ms: 0, ..shard(0) }),
            (Fault::NonFinite, v1::LayerShard { data: nan.into(), ..shard(0) }),
            (Fault::NotHeld, shard(0)),
        ];
        for (id, (want, bad)) in (1..).zip(cases) {
            raw.send(v1::LayerShard { id, ..bad }).await;
            let (answered, code, message) = raw.fault().await;
            assert_eq!((answered, code), (id, want), "{message}");
        }
        raw.send(v1::LayerShard { experts: vec![2], ..shard(100) }).await;
        assert_eq!(raw.rows().await, (100, 1));
    });
}

#[test]
fn a_message_over_the_limit_ends_its_stream_and_no_other() {
    let worker = plain();
    runtime().block_on(async {
        let mut other = Raw::open(&worker).await;
        let mut raw = Raw::open(&worker).await;
        raw.send(v1::LayerShard { data: vec![0; 1 << 20].into(), ..shard(1) }).await;
        assert_eq!(raw.next().await.unwrap_err().code(), Code::OutOfRange);
        other.send(shard(1)).await;
        assert_eq!(other.rows().await, (1, 1));
    });
}

#[test]
fn a_full_queue_refuses_and_recovers() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let worker = with(experts, &ServerConfig { queue: NonZeroUsize::MIN, ..server_config() });
    runtime().block_on(async {
        let mut raw = Raw::open(&worker).await;
        raw.send(shard(1)).await;
        gate.wait();
        raw.send(shard(2)).await;
        raw.send(shard(3)).await;
        let (id, code, _) = raw.fault().await;
        assert_eq!((id, code), (3, Fault::Overloaded));
        gate.release();
        gate.release();
        assert_eq!(raw.rows().await, (1, 1));
        assert_eq!(raw.rows().await, (2, 1));
        gate.release();
        raw.send(shard(4)).await;
        assert_eq!(raw.rows().await, (4, 1));
    });
}

#[test]
fn a_router_that_goes_away_takes_its_queued_shards_along() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let worker = with(experts, &server_config());
    runtime().block_on(async {
        let mut stays = Raw::open(&worker).await;
        let goes = Raw::open(&worker).await;
        stays.send(shard(1)).await;
        gate.wait();
        for id in 1..=3 {
            goes.send(shard(id)).await;
        }
        // A refused shard is answered once those before it are queued.
        goes.send(v1::LayerShard { rows: 0, ..shard(4) }).await;
        let mut goes = goes;
        assert_eq!(goes.fault().await.0, 4);
        drop(goes);
        stays.send(shard(2)).await;
        let watched = worker.server.clone();
        // The stream's end reaches the worker before the experts are let go on.
        tokio::task::spawn_blocking(move || eventually("one stream is left", || watched.open_streams() == 1))
            .await
            .unwrap();
        gate.release();
        assert_eq!(stays.rows().await, (1, 1));
        gate.wait();
        gate.release();
        assert_eq!(stays.rows().await, (2, 1));
        gate.no_other();
        tokio::time::timeout(Duration::from_secs(20), worker.server.idle()).await.expect("nothing is left");
    });
}

/// What fake experts of layer 0 make of `row`, expert after expert.
fn outputs(row: &[f32], experts: &[u32]) -> Vec<f32> {
    let one = |&number: &u32| fake::output(Compute::F32, layer(0), expert(number), row);
    experts.iter().flat_map(one).collect()
}

/// One row for several experts of layer 0.
fn row_for(id: u64, row: &[f32], experts: &[u32]) -> v1::LayerShard {
    v1::LayerShard {
        data: row.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into(),
        experts: experts.to_vec(),
        counts: vec![1; experts.len()],
        indices: vec![0; experts.len()],
        ..shard(id)
    }
}

#[test]
fn shards_of_one_layer_that_wait_together_are_one_call_and_answered_apart() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let worker = with(experts, &server_config());
    runtime().block_on(async {
        let mut one = Raw::open(&worker).await;
        let mut other = Raw::open(&worker).await;
        one.send(shard(1)).await;
        gate.wait();
        let (x, y) = (vec![0.5; HIDDEN], vec![-3.0; HIDDEN]);
        one.send(row_for(2, &x, &[1, 3, 6])).await;
        one.send(v1::LayerShard { layer: 2, ..shard(3) }).await;
        // A refused shard is answered once those before it are queued.
        one.send(v1::LayerShard { rows: 0, ..shard(4) }).await;
        assert_eq!(one.fault().await.0, 4);
        other.send(row_for(1, &y, &[0, 3])).await;
        other.send(v1::LayerShard { rows: 0, ..shard(2) }).await;
        assert_eq!(other.fault().await.0, 2);
        gate.release();
        assert_eq!(one.rows().await, (1, 1));
        gate.wait();
        gate.release();
        assert_eq!(one.data().await, (2, outputs(&x, &[1, 3, 6])));
        assert_eq!(other.data().await, (1, outputs(&y, &[0, 3])));
        gate.wait();
        gate.no_other();
        gate.release();
        assert_eq!(one.rows().await, (3, 1), "the other layer had a call of its own");
    });
}

#[test]
fn a_shard_that_fails_does_not_fail_those_computed_with_it() {
    let held = share(0, 2);
    let (experts, gate) = Gated::new(fakes(&held, Compute::F32));
    let worker = with(experts, &server_config());
    runtime().block_on(async {
        let mut one = Raw::open(&worker).await;
        let mut other = Raw::open(&worker).await;
        one.send(row_for(1, &[0.5; HIDDEN], &[0])).await;
        gate.wait();
        let nan = [f32::NAN; HIDDEN];
        one.send(row_for(2, &nan, &[0])).await;
        one.send(row_for(3, &[2.0; HIDDEN], &[1])).await;
        one.send(v1::LayerShard { rows: 0, ..shard(4) }).await;
        assert_eq!(one.fault().await.0, 4);
        other.send(row_for(1, &[0.25; HIDDEN], &[2, 4])).await;
        other.send(v1::LayerShard { rows: 0, ..shard(2) }).await;
        assert_eq!(other.fault().await.0, 2);
        // Together, then each of the two that have rows alone.
        (0..4).for_each(|_| gate.release());
        assert_eq!(one.rows().await, (1, 1));
        assert_eq!(one.fault().await.1, Fault::NonFinite);
        assert_eq!(one.fault().await.1, Fault::NotHeld);
        assert_eq!(other.data().await, (1, outputs(&[0.25; HIDDEN], &[2, 4])));
    });
}

#[test]
fn only_a_stream_that_combines_partially_carries_weights() {
    let worker = plain();
    runtime().block_on(async {
        let hello = v1::Hello { combine: v1::CombineMode::Partial.into(), ..hello() };
        let mut partial = Raw::first(&worker, Some(v1::dispatch_request::Body::Hello(hello))).await.unwrap();
        partial.reply().await;
        let mut exact = Raw::open(&worker).await;
        let row = [1.5; HIDDEN];
        let weighted =
            |id, weights: &[f32]| v1::LayerShard { weights: weights.to_vec(), ..row_for(id, &row, &[1, 3]) };
        for (id, bad) in [(1, vec![]), (2, vec![1.0]), (3, vec![1.0, f32::NAN])] {
            partial.send(weighted(id, &bad)).await;
            assert_eq!(partial.fault().await.1, Fault::BadRequest);
        }
        exact.send(weighted(1, &[1.0, 1.0])).await;
        assert_eq!(exact.fault().await.1, Fault::BadRequest);

        partial.send(weighted(4, &[0.5, -2.0])).await;
        let (first, second) = (outputs(&row, &[1]), outputs(&row, &[3]));
        let sum = first.iter().zip(&second).map(|(a, b)| 0.5 * a + -2.0 * b).collect();
        assert_eq!(partial.data().await, (4, sum));
        partial.send(weighted(5, &[f32::MAX, f32::MAX])).await;
        let reply = partial.reply().await;
        let Some(v1::dispatch_reply::Body::Rows(rows)) = reply.body else { panic!("{reply:?}") };
        assert_eq!((rows.rows, &rows.not_finite[..]), (1, &[0][..]), "the weighted sum is not finite");
    });
}

#[test]
fn a_shard_whose_deadline_passes_in_the_queue_is_not_computed() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let worker = with(experts, &server_config());
    runtime().block_on(async {
        let mut raw = Raw::open(&worker).await;
        raw.send(shard(1)).await;
        gate.wait();
        raw.send(v1::LayerShard { deadline_ms: 1, ..shard(2) }).await;
        // A refused shard is answered once those before it are queued.
        raw.send(v1::LayerShard { rows: 0, ..shard(3) }).await;
        assert_eq!(raw.fault().await.0, 3);
        // Not waiting for anything but the deadline itself.
        tokio::time::sleep(Duration::from_millis(2)).await;
        gate.release();
        assert_eq!(raw.rows().await, (1, 1));
        let (id, code, message) = raw.fault().await;
        assert_eq!((id, code), (2, Fault::Deadline), "{message}");
        gate.no_other();
    });
}

/// Experts that fail in the way the layer's number says.
struct Failing;

impl ExpertCompute for Failing {
    fn answer(
        &mut self,
        layer: LayerId,
        _: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError> {
        assert!(segments.iter().all(|segment| !segment.groups.is_empty()), "no call without experts");
        match layer.get() {
            0 => Ok(vec![SegmentAnswer { data: vec![0; HIDDEN * 4], not_finite: vec![0] }]),
            2 => Ok(vec![SegmentAnswer::default()]),
            _ => panic!("an expert gives up"),
        }
    }
}

#[test]
fn experts_that_fail_are_answered_for_even_when_they_panic() {
    let mut worker = with(Failing, &server_config());
    runtime().block_on(async {
        // To a router that knows no marks.
        let old = v1::Hello { protocol_version: MARKS - 1, newest_protocol_version: MARKS - 1, ..hello() };
        let mut earlier = Raw::first(&worker, Some(v1::dispatch_request::Body::Hello(old))).await.unwrap();
        earlier.reply().await;
        earlier.send(shard(1)).await;
        let reply = earlier.reply().await;
        let Some(v1::dispatch_reply::Body::Error(error)) = reply.body else { panic!("{reply:?}") };
        assert_eq!((error.code(), error.expert), (Fault::NonFinite, Some(1)));

        let mut raw = Raw::open(&worker).await;
        raw.send(shard(1)).await;
        let reply = raw.reply().await;
        let Some(v1::dispatch_reply::Body::Rows(rows)) = reply.body else { panic!("{reply:?}") };
        let zeros = [0; HIDDEN * 4];
        assert_eq!((rows.rows, &rows.not_finite[..], &rows.data[..]), (1, &[0][..], &zeros[..]));
        raw.send(v1::LayerShard { layer: 2, ..shard(2) }).await;
        let (id, code, message) = raw.fault().await;
        assert_eq!((id, code, message.as_str()), (2, Fault::Internal, "experts gave 0 bytes instead of 64"));
        for id in [3, 4] {
            raw.send(v1::LayerShard { layer: 3, ..shard(id) }).await;
            let (answered, code, _) = raw.fault().await;
            assert_eq!((answered, code), (id, Fault::Internal));
        }
    });
    assert!(!worker.join_compute(), "the compute thread panicked");
}

#[test]
fn draining_is_announced_and_serves_on_until_it_refuses() {
    let worker = plain();
    runtime().block_on(async {
        let mut client = client(&worker).await;
        let mut watch = client.watch(v1::DescribeRequest {}).await.unwrap().into_inner();
        let before = watch.message().await.unwrap().unwrap();
        assert_eq!((before.draining, before.epoch), (false, 1));
        let mut raw = Raw::open(&worker).await;
        worker.server.drain();
        worker.server.drain();
        let after = watch.message().await.unwrap().unwrap();
        assert_eq!((after.draining, after.epoch), (true, 2));
        raw.send(shard(1)).await;
        let answer = raw.next().await.unwrap().unwrap();
        assert!(matches!(answer.body, Some(v1::dispatch_reply::Body::Rows(_))), "{answer:?}");
        worker.server.refuse();
        raw.send(shard(2)).await;
        let (id, code, _) = raw.fault().await;
        assert_eq!((id, code), (2, Fault::Draining));
        assert_eq!(client.describe(v1::DescribeRequest {}).await.unwrap().into_inner(), after);
        worker.server.close();
        assert_eq!(raw.next().await.unwrap_err().code(), Code::Unavailable);
        assert_eq!(watch.message().await.unwrap(), None);
    });
}

#[test]
fn streams_are_bounded() {
    let config = ServerConfig { streams: NonZeroUsize::new(2).unwrap(), ..server_config() };
    let worker = with(fakes(&all(), Compute::F32), &config);
    runtime().block_on(async {
        let first = Raw::open(&worker).await;
        let _second = Raw::open(&worker).await;
        let third = Raw::first(&worker, Some(v1::dispatch_request::Body::Hello(hello()))).await;
        assert_eq!(third.err().unwrap().code(), Code::ResourceExhausted);
        let watch = client(&worker).await.watch(v1::DescribeRequest {}).await;
        assert_eq!(watch.err().unwrap().code(), Code::ResourceExhausted);
        drop(first);
        let watched = worker.server.clone();
        tokio::task::spawn_blocking(move || eventually("the place is free", || watched.open_streams() == 1))
            .await
            .unwrap();
        Raw::open(&worker).await;
    });
}

#[test]
fn an_address_in_use_is_named_and_a_socket_left_behind_is_replaced() {
    let taken = plain();
    let unix = socket();
    let serving = TestWorker::with(
        &unix,
        &server_config(),
        describe("w0", all(), Compute::F32),
        fakes(&all(), Compute::F32),
    );
    let path = unix.strip_prefix("unix:").unwrap().to_owned();
    runtime().block_on(async {
        for address in [&taken.address, &unix] {
            let error = Bound::bind(&address.parse::<Address>().unwrap()).await.err().unwrap();
            assert!(matches!(error, BindError::InUse { .. }), "{error}");
            assert!(error.to_string().contains(address), "{error}");
        }
    });
    drop(serving);
    // The last thread that drives the network takes it down.
    eventually("the socket's file goes with its server", || !std::fs::exists(&path).unwrap());
    runtime().block_on(async {
        // Left behind, as by a process that was killed.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let bound = Bound::bind(&unix.parse::<Address>().unwrap()).await.expect("nobody serves it");
        drop(bound);
        std::fs::write(&path, "precious").unwrap();
        let error = Bound::bind(&unix.parse::<Address>().unwrap()).await.err().unwrap();
        assert!(matches!(error, BindError::NotASocket(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();
    });
}
