//! Workers that fail in the middle of a micro-batch while others hold the same experts.

use std::time::Duration;

use crate::support::lying::{Lie, LyingWorker, rows};
use crate::support::{
    Gated, HIDDEN, OneRow, TOP_K, TestWorker, all, collect, connect_config, describe, eventually, expert,
    fakes, once, server_config, share, soon,
};
use muster_dispatch_grpc::{Fallback, GrpcDispatch, WorkerState};
use muster_engine::dispatch::{Choices, DispatchError, ExpertDispatch, LayerBatch, Loss, Rows, RowsMut};
use muster_proto::expert::v1;
use muster_proto::expert::v1::shard_error::Code;
use muster_testkit::proxy::{FaultProxy, Weather};
use muster_types::{Combine, Compute, Retry};

fn connect(addresses: &[&str]) -> GrpcDispatch {
    muster_dispatch_grpc::connect(connect_config(addresses, Compute::F32)).expect("the workers fit")
}

/// Two honest workers that hold everything between them, twice: `b` and `c` half each, and `d` all of it.
fn honest() -> [TestWorker; 3] {
    let start = |name, held| TestWorker::start(name, held, Compute::F32);
    [start("b", share(0, 2)), start("c", share(1, 2)), start("d", all())]
}

/// A row, and a worker "a" that holds only its experts, so that "a" is the first choice of equals for all of them.
fn row() -> OneRow {
    OneRow::new(0, &[0, 1, 2])
}

/// What becomes of a row when the first worker to be asked answers like this, and others hold the same.
fn lied_to(lie: Lie) -> (GrpcDispatch, LyingWorker, [TestWorker; 3], Result<Vec<f32>, DispatchError>) {
    let liar = LyingWorker::start(&describe("a", all(), Compute::F32), lie);
    let honest = honest();
    let mut addresses = vec![liar.address.as_str()];
    addresses.extend(honest.iter().map(|worker| worker.address.as_str()));
    let mut dispatch = connect(&addresses);
    let outcome = once(&mut dispatch, &row());
    (dispatch, liar, honest, outcome)
}

#[test]
fn lies_are_found_out_and_others_asked() {
    let lies: [(&str, Lie); 5] = [
        ("not a number", Box::new(|shard| Some(Ok(rows(shard, shard.indices.len(), f32::NAN))))),
        ("infinite", Box::new(|shard| Some(Ok(rows(shard, shard.indices.len(), f32::INFINITY))))),
        ("too few rows", Box::new(|shard| Some(Ok(rows(shard, shard.indices.len() - 1, 0.0))))),
        ("too many rows", Box::new(|shard| Some(Ok(rows(shard, shard.indices.len() + 1, 0.0))))),
        (
            "another shard's id",
            Box::new(|shard| {
                let mut reply = rows(shard, shard.indices.len(), 0.0);
                reply.id = shard.id + 1000;
                Some(Ok(reply))
            }),
        ),
    ];
    for (what, lie) in lies {
        let (mut dispatch, _liar, _honest, outcome) = lied_to(lie);
        assert_eq!(outcome, Ok(row().sum()), "{what}");
        // It is not asked again for now, whatever it says of itself.
        let health = dispatch.transport().health();
        let down = || matches!(health.workers()[0].state, WorkerState::Down { .. });
        eventually("it is caught", || {
            // A busy machine may have taken it for a late one first.
            assert_eq!(once(&mut dispatch, &row()), Ok(row().sum()), "{what}");
            down()
        });
        eventually("its time is over", || health.workers()[0].state == WorkerState::Connected);
        eventually("it is caught again", || {
            assert_eq!(once(&mut dispatch, &row()), Ok(row().sum()), "{what}, a second time");
            down()
        });
    }
}

/// Answers every shard with this error, about the expert with this place in it.
fn refuse(code: Code, at: Option<usize>) -> Lie {
    Box::new(move |shard| {
        let expert = at.and_then(|at| shard.experts.get(at).copied());
        let error = v1::ShardError { code: code.into(), message: "no".into(), expert };
        let body = Some(v1::dispatch_reply::Body::Error(error));
        Some(Ok(v1::DispatchReply { id: shard.id, body, compute_us: 0, queue_us: 0 }))
    })
}

/// Marks these output rows of every shard and answers the others like this.
fn mark(marked: Vec<u32>, value: f32) -> Lie {
    Box::new(move |shard| {
        let mut reply = rows(shard, shard.indices.len(), value);
        if let Some(v1::dispatch_reply::Body::Rows(rows)) = &mut reply.body {
            rows.not_finite = marked.iter().copied().filter(|&row| row < rows.rows).collect();
        }
        Some(Ok(reply))
    })
}

#[test]
fn refusals_send_rows_elsewhere_whatever_they_say() {
    let codes = [
        Code::NotHeld,
        Code::Draining,
        Code::Overloaded,
        Code::Internal,
        Code::Deadline,
        Code::BadRequest,
        Code::NonFinite,
    ];
    for code in codes {
        for expert in [None, Some(0), Some(2)] {
            let (dispatch, _liar, _honest, outcome) = lied_to(refuse(code, expert));
            assert_eq!(outcome, Ok(row().sum()), "{code:?} of {expert:?}");
            let is_final = matches!(code, Code::BadRequest | Code::NonFinite);
            let first = &dispatch.transport().health().workers()[0];
            // What it said of the rows themselves, others have contradicted.
            assert_eq!(first.banned > Duration::ZERO, is_final, "{code:?} of {expert:?}: {first:?}");
        }
    }
}

#[test]
fn a_mark_that_another_worker_contradicts_is_a_lie() {
    let (dispatch, _liar, _honest, outcome) = lied_to(mark(vec![0, 1, 2], 0.0));
    assert_eq!(outcome, Ok(row().sum()));
    assert!(dispatch.transport().health().workers()[0].banned > Duration::ZERO);
}

#[test]
fn two_workers_that_agree_are_believed_for_the_rows_they_name() {
    // Of the two rows of a shard each marks the output of the second; what it says of the first counts.
    let liars =
        ["a", "b"].map(|name| LyingWorker::start(&describe(name, all(), Compute::F32), mark(vec![1], 3.0)));
    let mut dispatch = connect(&[&liars[0].address, &liars[1].address]);
    let x = [0.5; 2 * HIDDEN];
    let choices = Choices::new(1, vec![expert(2); 2], vec![1.0; 2]).unwrap();
    let layer = crate::support::layer(0);
    let rows = Rows::of_f32(&x, HIDDEN).unwrap();
    let ticket = dispatch.submit(&LayerBatch { layer, lane: 0, rows, choices: &choices });
    let mut out = [0.0; 2 * HIDDEN];
    let lost = dispatch.collect(ticket.unwrap(), soon(), RowsMut::of_f32(&mut out)).unwrap();
    // The first one's second row went alone to the other, where it was the first, and not marked.
    assert_eq!((lost, out), (vec![], [3.0; 2 * HIDDEN]));
    assert!(dispatch.transport().health().workers().iter().any(|worker| worker.banned > Duration::ZERO));

    let liars = ["a", "b"].map(|name| {
        let lie: Lie = Box::new(|shard| {
            // The last row of a shard, whichever it is.
            let last = shard.indices.len() as u32 - 1;
            mark(vec![last], 3.0)(shard)
        });
        LyingWorker::start(&describe(name, all(), Compute::F32), lie)
    });
    let mut dispatch = connect(&[&liars[0].address, &liars[1].address]);
    let rows = Rows::of_f32(&x, HIDDEN).unwrap();
    let ticket = dispatch.submit(&LayerBatch { layer, lane: 0, rows, choices: &choices });
    let lost = dispatch.collect(ticket.unwrap(), soon(), RowsMut::of_f32(&mut out)).unwrap();
    let error = DispatchError::NonFinite { layer, expert: expert(2) };
    assert_eq!(lost, [Loss { rows: vec![1], error }]);
    assert_eq!(out[..HIDDEN], [3.0; HIDDEN]);
    assert!(dispatch.transport().health().workers().iter().all(|worker| worker.banned == Duration::ZERO));

    for code in [Code::BadRequest, Code::NonFinite] {
        let liars = ["a", "b"]
            .map(|name| LyingWorker::start(&describe(name, all(), Compute::F32), refuse(code, Some(0))));
        let mut dispatch = connect(&[&liars[0].address, &liars[1].address]);
        let error = once(&mut dispatch, &row()).expect_err("they agree");
        assert_eq!(error.retry(), Retry::Never, "{code:?}: {error}");
    }
}

#[test]
fn a_stream_that_breaks_with_rows_on_it_costs_nothing() {
    let (mut dispatch, _liar, _honest, outcome) = lied_to(Box::new(|_| None));
    assert_eq!(outcome, Ok(row().sum()));
    assert_eq!(once(&mut dispatch, &row()), Ok(row().sum()));
}

#[test]
fn a_worker_killed_with_rows_in_it_is_stood_in_for() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let first =
        TestWorker::with("127.0.0.1:0", &server_config(), describe("a", all(), Compute::F32), experts);
    let honest = honest();
    let mut addresses = vec![first.address.as_str()];
    addresses.extend(honest.iter().map(|worker| worker.address.as_str()));
    let mut dispatch = connect(&addresses);
    let ticket = dispatch.submit(&row().batch()).unwrap();
    gate.wait();
    first.kill();
    assert_eq!(collect(&mut dispatch, ticket), Ok(row().sum()));
}

#[test]
fn a_late_worker_is_stood_in_for_and_asked_last_until_it_answers() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let slow = TestWorker::with("127.0.0.1:0", &server_config(), describe("a", all(), Compute::F32), experts);
    let quick = TestWorker::start("b", all(), Compute::F32);
    let mut dispatch = connect(&[&slow.address, &quick.address]);
    let stats = dispatch.transport().stats();
    let row = OneRow::new(0, &[3]);
    let ticket = dispatch.submit(&row.batch()).unwrap();
    gate.wait();
    assert_eq!(collect(&mut dispatch, ticket), Ok(row.sum()), "the other one answered");
    assert_eq!(stats.snapshot().late_replies, 0);
    for _ in 0..5 {
        assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
    }
    gate.no_other();
    gate.release();
    eventually("the late reply is dropped", || {
        dispatch.catch_up();
        stats.snapshot().late_replies == 1
    });
    let ticket = dispatch.submit(&row.batch()).unwrap();
    gate.wait();
    gate.release();
    assert_eq!(collect(&mut dispatch, ticket), Ok(row.sum()), "it is asked first again");
}

#[test]
fn who_has_answered_is_not_late_because_another_is() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let slow = TestWorker::with("127.0.0.1:0", &server_config(), describe("a", all(), Compute::F32), experts);
    let quick = TestWorker::start("b", all(), Compute::F32);
    let mut dispatch = connect(&[&slow.address, &quick.address]);
    let stats = dispatch.transport().stats();
    let both = OneRow::new(0, &[0, 1]);
    let ticket = dispatch.submit(&both.batch()).unwrap();
    gate.wait();
    assert_eq!(collect(&mut dispatch, ticket), Ok(both.sum()), "the other one answered for both");
    gate.release();
    eventually("the late reply is dropped", || {
        dispatch.catch_up();
        stats.snapshot().late_replies == 1
    });
    // Had the slow one been asked for the quick one's rows, it would have those first.
    let row = OneRow::new(2, &[3]);
    let ticket = dispatch.submit(&row.batch()).unwrap();
    gate.wait();
    gate.release();
    assert_eq!(collect(&mut dispatch, ticket), Ok(row.sum()));
    gate.no_other();
}

#[test]
fn the_one_that_is_late_may_still_be_the_first_to_answer() {
    let gated = |name| {
        let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
        let description = describe(name, all(), Compute::F32);
        (TestWorker::with("127.0.0.1:0", &server_config(), description, experts), gate)
    };
    let ((a, first), (b, second)) = (gated("a"), gated("b"));
    let mut dispatch = connect(&[&a.address, &b.address]);
    let row = OneRow::new(0, &[3]);
    let ticket = dispatch.submit(&row.batch()).unwrap();
    first.wait();
    let released = std::thread::spawn(move || {
        // The stand-in is there: now the first one answers after all.
        second.wait();
        first.release();
        second
    });
    assert_eq!(collect(&mut dispatch, ticket), Ok(row.sum()));
    let second = released.join().unwrap();
    second.release();
    let stats = dispatch.transport().stats();
    eventually("the stand-in's reply is dropped", || {
        dispatch.catch_up();
        stats.snapshot().late_replies == 1
    });
}

#[test]
fn a_sole_holder_whose_network_is_gone_is_found_by_its_silence() {
    let runtime = crate::support::runtime();
    let worker = TestWorker::start("a", all(), Compute::F32);
    let proxy = runtime.block_on(FaultProxy::start(&worker.address)).unwrap();
    let mut dispatch = connect(&[&proxy.address()]);
    assert_eq!(once(&mut dispatch, &row()), Ok(row().sum()));
    proxy.set(Weather::BlackHole);
    match once(&mut dispatch, &row()) {
        Err(DispatchError::WorkerLost { reason, .. }) => {
            // Not by keepalive, which takes far longer.
            assert!(reason.contains("sign of life"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert!(proxy.counts().dropped_bytes > 0);
    proxy.set(Weather::Fair);
    let health = dispatch.transport().health();
    eventually("it is there again", || health.workers()[0].state == WorkerState::Connected);
    assert_eq!(once(&mut dispatch, &row()), Ok(row().sum()));
}

#[test]
fn a_sole_holder_that_computes_for_long_is_left_alone() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let slow = TestWorker::with("127.0.0.1:0", &server_config(), describe("a", all(), Compute::F32), experts);
    let runtime = crate::support::runtime();
    let proxy = runtime.block_on(FaultProxy::start(&slow.address)).unwrap();
    let mut dispatch = connect(&[&proxy.address()]);
    let row = row();
    let ticket = dispatch.submit(&row.batch()).unwrap();
    gate.wait();
    let released = std::thread::spawn(move || {
        // Longer than the time for a sign of life.
        std::thread::sleep(Duration::from_millis(1500));
        gate.release();
    });
    assert_eq!(collect(&mut dispatch, ticket), Ok(row.sum()));
    released.join().unwrap();
    assert_eq!(proxy.counts().connections, 1, "it was not connected anew");
}

#[test]
fn an_owner_that_comes_while_rows_wait_is_asked() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let stuck =
        TestWorker::with("127.0.0.1:0", &server_config(), describe("a", all(), Compute::F32), experts);
    // An address where nobody listens yet.
    let place = crate::support::socket();
    let mut config = connect_config(&[&stuck.address, &place], Compute::F32);
    config.start = muster_dispatch_grpc::Start::Degraded;
    config.connect_timeout = Duration::from_millis(200);
    let mut dispatch = muster_dispatch_grpc::connect(config).unwrap();
    let ticket = dispatch.submit(&row().batch()).unwrap();
    gate.wait();
    let coming = std::thread::spawn(move || {
        let experts = fakes(&all(), Compute::F32);
        TestWorker::with(&place, &server_config(), describe("b", all(), Compute::F32), experts)
    });
    assert_eq!(collect(&mut dispatch, ticket), Ok(row().sum()), "the stuck one never answered");
    drop(coming.join().unwrap());
}

#[test]
fn a_dead_replica_of_a_dead_worker_ends_in_an_error_that_invites_another_try() {
    let dies: fn() -> Lie = || Box::new(|_| None);
    let liars = ["a", "b"].map(|name| LyingWorker::start(&describe(name, all(), Compute::F32), dies()));
    let mut dispatch = connect(&[&liars[0].address, &liars[1].address]);
    let error = once(&mut dispatch, &row()).expect_err("nobody answers");
    assert!(matches!(error, DispatchError::WorkerLost { .. } | DispatchError::NoOwner { .. }), "{error:?}");
}

/// Many rows over all experts, with workers that fail shard after shard: sums are those of honest workers, to the bit.
#[test]
fn rows_of_a_large_batch_are_each_counted_once_whoever_fails() {
    const ROWS: usize = 40;
    let experts: Vec<u32> = (0..ROWS as u32)
        .flat_map(|row| {
            let mut picked = [row % 8, (row * 3 + 1) % 8, (row * 5 + 3) % 8];
            if picked[1] == picked[0] {
                picked[1] = (picked[0] + 1) % 8;
            }
            while picked[2] == picked[0] || picked[2] == picked[1] {
                picked[2] = (picked[2] + 1) % 8;
            }
            picked.sort_unstable();
            picked
        })
        .collect();
    let weights: Vec<f32> = (0..experts.len()).map(|at| 0.125 + at as f32 / 64.0).collect();
    let choices =
        Choices::new(TOP_K as usize, experts.iter().map(|&e| expert(e)).collect(), weights).unwrap();
    let x: Vec<f32> = (0..ROWS * HIDDEN).map(|at| (at as f32 * 0.37).sin()).collect();
    let batch = LayerBatch {
        layer: crate::support::layer(3),
        lane: 1,
        rows: Rows::of_f32(&x, HIDDEN).unwrap(),
        choices: &choices,
    };
    let run = |dispatch: &mut GrpcDispatch| {
        let ticket = dispatch.submit(&batch).unwrap();
        let mut out = vec![0.0; ROWS * HIDDEN];
        assert_eq!(dispatch.collect(ticket, soon(), RowsMut::of_f32(&mut out)), Ok(vec![]));
        out
    };
    for combine in [Combine::Exact, Combine::Partial] {
        let all_honest = honest();
        let addresses: Vec<&str> = all_honest.iter().map(|worker| worker.address.as_str()).collect();
        let connect = |addresses: &[&str]| {
            let mut config = connect_config(addresses, Compute::F32);
            config.combine = combine;
            muster_dispatch_grpc::connect(config).unwrap()
        };
        let want = run(&mut connect(&addresses));
        let lies: [Lie; 2] =
            [Box::new(|_| None), Box::new(|shard| Some(Ok(rows(shard, shard.indices.len(), f32::NAN))))];
        let liars: Vec<LyingWorker> = ["x", "y"]
            .iter()
            .zip(lies)
            .map(|(name, lie)| LyingWorker::start(&describe(name, all(), Compute::F32), lie))
            .collect();
        let mut with_liars: Vec<&str> = liars.iter().map(|liar| liar.address.as_str()).collect();
        with_liars.extend(&addresses);
        let got = run(&mut connect(&with_liars));
        match combine {
            Combine::Exact => assert_eq!(got, want),
            // Other workers add up other experts first.
            Combine::Partial => {
                let apart = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-3, "{apart}");
            }
        }
    }
}

#[test]
fn what_dies_with_its_rows_is_computed_here_where_that_is_allowed() {
    let (experts, gate) = Gated::new(fakes(&all(), Compute::F32));
    let description = describe("w0", all(), Compute::F32);
    let only = TestWorker::with("127.0.0.1:0", &server_config(), description, experts);
    let fallback = Fallback { experts: Box::new(fakes(&all(), Compute::F32)) };
    let config = connect_config(&[&only.address], Compute::F32);
    let mut dispatch = muster_dispatch_grpc::connect_with(config, Some(fallback)).unwrap();
    let row = OneRow::new(0, &[1, 5]);
    let ticket = dispatch.submit(&row.batch()).unwrap();
    gate.wait();
    drop(gate);
    only.kill();
    assert_eq!(collect(&mut dispatch, ticket), Ok(row.sum()));
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
}

/// A worker whose address moved while the router still takes its old connection for good.
#[test]
fn a_worker_that_comes_back_at_another_address_is_taken_as_soon_as_the_old_one_is_found_dead() {
    let runtime = crate::support::runtime();
    let before = TestWorker::start("a", all(), Compute::F32);
    let proxy = runtime.block_on(FaultProxy::start(&before.address)).unwrap();
    let mut dispatch = connect(&[&proxy.address()]);
    assert_eq!(once(&mut dispatch, &row()), Ok(row().sum()));
    let (cluster, health) = (dispatch.transport().cluster(), dispatch.transport().health());
    // While the old one is alive, it stays.
    let now = TestWorker::start("a", all(), Compute::F32);
    let _joined = cluster.join(now.address.parse().unwrap()).unwrap();
    eventually("the newcomer is told whose name it has", || match &health.workers()[1].state {
        WorkerState::Down { reason, .. } => reason.contains("as the worker at"),
        other => panic!("{other:?}"),
    });
    assert_eq!(health.workers()[0].state, WorkerState::Connected);
    // A machine that is gone says nothing, not even that it is.
    proxy.set(Weather::BlackHole);
    eventually("the one that is alive has the name", || health.workers()[1].state == WorkerState::Connected);
    let WorkerState::Down { reason, .. } = &health.workers()[0].state else { panic!("both are connected") };
    assert!(reason.contains("sign of life"), "found by its silence, not by keepalive: {reason}");
    eventually("its experts can be reached", || once(&mut dispatch, &row()) == Ok(row().sum()));
}
