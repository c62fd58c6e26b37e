//! Workers that die, lie, stall, drain and come back.

use std::time::{Duration, Instant};

use crate::support::lying::{Lie, LyingWorker, rows};
use crate::support::{
    Gated, HIDDEN, OneRow, TestWorker, all, collect, connect_config, describe, eventually, fakes, once,
    server_config, socket,
};
use muster_dispatch_grpc::{GrpcDispatch, WorkerState};
use muster_engine::dispatch::{DispatchError, ExpertDispatch, Loss, RowsMut};
use muster_proto::expert::v1;
use muster_proto::expert::v1::shard_error::Code;
use muster_types::{Compute, Retry, WorkerId};

fn connect(address: &str) -> GrpcDispatch {
    muster_dispatch_grpc::connect(connect_config(&[address], Compute::F32)).expect("the worker fits")
}

fn worker() -> WorkerId {
    WorkerId::new("w0").unwrap()
}

#[test]
fn a_killed_worker_fails_what_it_had_and_is_used_again_when_it_is_back() {
    let address = socket();
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let first = TestWorker::with(&address, &server_config(), describe("w0", all(), Compute::F32), experts);
    let mut dispatch = connect(&address);
    let health = dispatch.transport().health();
    let row = OneRow::new(0, &[1, 2]);
    let ticket = dispatch.submit(&row.batch()).unwrap();
    gate.wait();
    first.kill();
    match collect(&mut dispatch, ticket) {
        Err(DispatchError::WorkerLost { worker: lost, .. }) => assert_eq!(lost, worker()),
        other => panic!("{other:?}"),
    }
    let no_owner = DispatchError::NoOwner { layer: row.layer, expert: crate::support::expert(1) };
    assert_eq!(dispatch.submit(&row.batch()), Err(no_owner), "nobody is left to ask");
    eventually("all of its experts are missing", || health.missing() == all());
    assert!(matches!(health.workers()[0].state, WorkerState::Down { .. }));

    let experts = fakes(&all(), Compute::F32);
    let _second = TestWorker::with(&address, &server_config(), describe("w0", all(), Compute::F32), experts);
    eventually("the worker is connected again", || health.missing_experts() == 0);
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
}

#[test]
fn rows_go_to_a_replica_when_a_worker_is_gone_or_drains() {
    let mut workers: Vec<TestWorker> =
        ["a", "b", "c"].iter().map(|name| TestWorker::start(name, all(), Compute::F32)).collect();
    let addresses: Vec<&str> = workers.iter().map(|w| w.address.as_str()).collect();
    let mut dispatch = muster_dispatch_grpc::connect(connect_config(&addresses, Compute::F32)).unwrap();
    let health = dispatch.transport().health();
    let row = OneRow::new(2, &[0, 1, 3]);
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));

    workers.remove(0).kill();
    eventually("the loss is noticed", || matches!(health.workers()[0].state, WorkerState::Down { .. }));
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));

    workers[0].server.drain();
    eventually("the drain is noticed", || health.workers()[1].state == WorkerState::Draining);
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
    assert_eq!(health.missing(), []);

    workers[1].server.drain();
    eventually("the last drains", || health.workers()[2].state == WorkerState::Draining);
    assert_eq!(health.missing(), [], "it serves what nobody else holds");
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));

    // The first of the two is about to stop: what it refuses goes to the other.
    workers[0].server.refuse();
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));

    workers[1].ledger.held.lock().unwrap().clear();
    workers[1].server.announce();
    workers.remove(0).kill();
    eventually("nobody is left", || health.missing() == all());
    assert!(matches!(dispatch.submit(&row.batch()), Err(DispatchError::NoOwner { .. })));
}

#[test]
fn a_draining_worker_finishes_what_it_has() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let description = describe("w0", all(), Compute::F32);
    let mut only = TestWorker::with("127.0.0.1:0", &server_config(), description, experts);
    let mut dispatch = connect(&only.address);
    let health = dispatch.transport().health();
    let row = OneRow::new(0, &[5]);
    let ticket = dispatch.submit(&row.batch()).unwrap();
    gate.wait();
    only.server.drain();
    eventually("the drain is noticed", || health.workers()[0].state == WorkerState::Draining);
    gate.release();
    assert_eq!(collect(&mut dispatch, ticket), Ok(row.sum()));
    crate::support::runtime().block_on(only.server.idle());
    assert!(only.join_compute(), "the compute thread ends when the server is closed");
    eventually("streams end", || matches!(health.workers()[0].state, WorkerState::Down { .. }));
}

#[test]
fn a_late_reply_is_dropped_and_counted() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let description = describe("w0", all(), Compute::F32);
    let slow = TestWorker::with("127.0.0.1:0", &server_config(), description, experts);
    let mut dispatch = connect(&slow.address);
    let (early, late) = (OneRow::new(0, &[1]), OneRow::new(3, &[2]));
    let ticket = dispatch.submit(&early.batch()).unwrap();
    gate.wait();
    let mut out = vec![0.0; HIDDEN];
    let deadline = Instant::now() + Duration::from_millis(5);
    let outcome = dispatch.collect(ticket, deadline, RowsMut::of_f32(&mut out));
    let error = DispatchError::Deadline { layer: early.layer };
    assert_eq!(outcome, Ok(vec![Loss { rows: vec![0], error }]));
    assert!(Instant::now() >= deadline);

    let ticket = dispatch.submit(&late.batch()).unwrap();
    gate.release();
    gate.release();
    assert_eq!(collect(&mut dispatch, ticket), Ok(late.sum()), "the late reply is not taken for this one");
    let stats = dispatch.transport().stats().snapshot();
    assert_eq!((stats.late_replies, stats.samples.len()), (1, 1));
    let sample = stats.samples[0];
    assert_eq!((sample.layer, sample.rows), (late.layer, 1));
    assert!(sample.away <= sample.round_trip && sample.compute <= sample.round_trip, "{sample:?}");
    assert!(sample.overhead() >= sample.combine, "{sample:?}");
}

/// What becomes of a row when the worker answers like this.
fn lied_to(lie: Lie) -> (GrpcDispatch, LyingWorker, DispatchError) {
    let liar = LyingWorker::start(&describe("w0", all(), Compute::F32), lie);
    let mut dispatch = connect(&liar.address);
    let error = once(&mut dispatch, &OneRow::new(0, &[1, 2])).expect_err("a lie is not believed");
    (dispatch, liar, error)
}

fn bad_reply(lie: Lie) -> String {
    match lied_to(lie).2 {
        DispatchError::BadReply { worker: liar, reason } if liar == worker() => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn lies_about_rows_are_bad_replies() {
    assert_eq!(bad_reply(Box::new(|shard| Some(Ok(rows(shard, 1, 0.0))))), "1 rows instead of 2");
    assert_eq!(bad_reply(Box::new(|shard| Some(Ok(rows(shard, 3, 0.0))))), "3 rows instead of 2");
    for value in [f32::NAN, f32::INFINITY] {
        let reason = bad_reply(Box::new(move |shard| Some(Ok(rows(shard, 2, value)))));
        assert_eq!(reason, "row 0 has a value that is not finite");
    }
    let reason = bad_reply(Box::new(|shard| {
        let mut reply = rows(shard, 2, 0.0);
        if let Some(v1::dispatch_reply::Body::Rows(rows)) = &mut reply.body {
            rows.data.truncate(HIDDEN * 8 - 1);
        }
        Some(Ok(reply))
    }));
    assert!(reason.starts_with("payload is 127 bytes"), "{reason}");
}

#[test]
fn lies_about_ids_end_the_link() {
    let with_id = |change: fn(u64) -> u64| -> Lie {
        Box::new(move |shard| {
            let mut reply = rows(shard, 2, 0.0);
            reply.id = change(shard.id);
            Some(Ok(reply))
        })
    };
    assert_eq!(bad_reply(with_id(|id| id + 1)), "it answered shard 2, which was never sent");
    assert_eq!(bad_reply(with_id(|_| 0)), "field id is missing");
    let (dispatch, _liar, _) = lied_to(with_id(|_| u64::MAX));
    let health = dispatch.transport().health();
    eventually("the liar is tried again", || health.workers()[0].state == WorkerState::Connected);
}

#[test]
fn an_answer_without_content_or_a_second_ack_ends_the_link() {
    let reason =
        bad_reply(Box::new(|shard| Some(Ok(v1::DispatchReply { body: None, ..rows(shard, 2, 0.0) }))));
    assert_eq!(reason, "field body is missing");
    let reason = bad_reply(Box::new(|shard| {
        let ack = v1::HelloAck { worker_id: "w0".into(), epoch: 1 };
        let body = Some(v1::dispatch_reply::Body::Ack(ack));
        Some(Ok(v1::DispatchReply { id: 0, body, ..rows(shard, 2, 0.0) }))
    }));
    assert_eq!(reason, "it acknowledged a stream twice");
}

#[test]
fn a_reply_over_the_limit_ends_the_link() {
    let reason = bad_reply(Box::new(|shard| Some(Ok(rows(shard, 64 << 10, 0.0)))));
    assert!(reason.contains("message length too large"), "{reason}");
}

#[test]
fn a_stream_that_ends_loses_the_shard() {
    let ends: [Lie; 2] =
        [Box::new(|_| None), Box::new(|_| Some(Err(tonic::Status::unavailable("going\naway"))))];
    for lie in ends {
        match lied_to(lie).2 {
            DispatchError::WorkerLost { reason, .. } => assert!(!reason.contains('\n'), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_second_answer_to_one_shard_ends_the_link() {
    let liar = LyingWorker::start(
        &describe("w0", all(), Compute::F32),
        // The second shard is answered as the first one, which had its answer.
        Box::new(|shard| {
            let mut reply = rows(shard, 1, 1.0);
            if shard.id == 2 {
                reply.id = 1;
            }
            Some(Ok(reply))
        }),
    );
    let mut dispatch = connect(&liar.address);
    let row = OneRow::new(0, &[4]);
    assert_eq!(once(&mut dispatch, &row), Ok(vec![1.0; HIDDEN]));
    match once(&mut dispatch, &row) {
        Err(DispatchError::BadReply { reason, .. }) => assert_eq!(reason, "it answered shard 1 twice"),
        other => panic!("{other:?}"),
    }
    let health = dispatch.transport().health();
    assert!(health.workers()[0].banned > Duration::ZERO);
}

#[test]
fn a_worker_that_only_errs_is_left_alone() {
    let errs: Lie = Box::new(|shard| {
        let error = v1::ShardError { code: Code::Internal.into(), message: "no".into(), expert: None };
        let body = Some(v1::dispatch_reply::Body::Error(error));
        Some(Ok(v1::DispatchReply { id: shard.id, body, compute_us: 0, queue_us: 0 }))
    });
    let liar = LyingWorker::start(&describe("w0", all(), Compute::F32), errs);
    let mut dispatch = connect(&liar.address);
    let row = OneRow::new(0, &[4]);
    for _ in 0..15 {
        assert!(matches!(once(&mut dispatch, &row), Err(DispatchError::Refused { .. })));
    }
    let health = dispatch.transport().health();
    assert_eq!(health.workers()[0].state, WorkerState::Connected, "some errors are no reason");
    assert!(once(&mut dispatch, &row).is_err());
    eventually("it is left alone", || health.workers()[0].banned > Duration::ZERO);
    let WorkerState::Down { reason, .. } = &health.workers()[0].state else { panic!("it is connected") };
    assert_eq!(reason, "16 errors in a row; the last: no");
}

#[test]
fn a_worker_that_closes_each_time_is_left_alone_for_longer_and_longer() {
    let liar = LyingWorker::start(&describe("w0", all(), Compute::F32), Box::new(|_| None));
    let mut dispatch = connect(&liar.address);
    let (health, row) = (dispatch.transport().health(), OneRow::new(0, &[4]));
    let mut longest = Duration::ZERO;
    eventually("it is left alone", || {
        if health.workers()[0].state == WorkerState::Connected {
            assert!(once(&mut dispatch, &row).is_err());
        }
        longest = longest.max(health.workers()[0].banned);
        longest > Duration::from_secs(1)
    });
}

#[test]
fn refusals_say_whether_trying_again_helps() {
    let refuse = |code: Code, expert: Option<u32>| -> Lie {
        Box::new(move |shard| {
            let error = v1::ShardError { code: code.into(), message: "no".into(), expert };
            let body = Some(v1::dispatch_reply::Body::Error(error));
            Some(Ok(v1::DispatchReply { id: shard.id, body, compute_us: 0, queue_us: 0 }))
        })
    };
    let refused = |retry| DispatchError::Refused { worker: worker(), reason: "no".into(), retry };
    let layer = crate::support::layer(0);
    let cases = [
        (Code::NotHeld, Some(1), refused(Retry::Elsewhere)),
        (Code::Draining, None, refused(Retry::Elsewhere)),
        (Code::Overloaded, None, refused(Retry::Later)),
        (Code::BadRequest, None, refused(Retry::Never)),
        (Code::Internal, None, refused(Retry::Elsewhere)),
        (Code::Deadline, None, DispatchError::Deadline { layer }),
        (Code::NonFinite, Some(2), DispatchError::NonFinite { layer, expert: crate::support::expert(2) }),
        // Nobody asked for expert 7; what is said of it cannot be passed on as if it had been.
        (Code::NonFinite, Some(7), refused(Retry::Never)),
        (Code::NonFinite, None, refused(Retry::Never)),
    ];
    for (code, expert, want) in cases {
        assert_eq!(lied_to(refuse(code, expert)).2, want, "{code:?}");
    }
}
