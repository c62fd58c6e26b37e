//! The dispatch conformance kit over real sockets.

use crate::support::{
    HIDDEN, TOP_K, TestWorker, all, connect_config, describe, fakes, server_config, shape, share, socket,
};
use muster_dispatch_grpc::{ConnectConfig, Fallback, GrpcDispatch, Start};
use muster_engine::dispatch::{
    Choices, DispatchError, ExpertDispatch, LayerBatch, Loss, Rows, RowsMut, Ticket,
};
use muster_testkit::conformance::{self, Harness, Model, Sums};
use muster_testkit::fake;
use muster_types::{Combine, Compute, ExpertId, ExpertKey};

/// A dispatch together with the workers it needs.
struct Cluster {
    dispatch: GrpcDispatch,
    _workers: Vec<TestWorker>,
}

impl ExpertDispatch for Cluster {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        self.dispatch.submit(batch)
    }

    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: std::time::Instant,
        out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        self.dispatch.collect(ticket, deadline, out)
    }

    fn cancel(&mut self, ticket: Ticket) {
        self.dispatch.cancel(ticket);
    }

    fn close(&mut self) {
        self.dispatch.close();
    }
}

fn harness(workers: Vec<TestWorker>, compute: Compute) -> Harness<Cluster> {
    let addresses: Vec<&str> = workers.iter().map(|worker| worker.address.as_str()).collect();
    let dispatch = muster_dispatch_grpc::connect(connect_config(&addresses, compute)).expect("workers fit");
    let oracle = Box::new(move |layer, expert, row: &[f32]| fake::output(compute, layer, expert, row));
    let experts = shape().experts().to_vec();
    let model = Model { hidden: HIDDEN, top_k: TOP_K as usize, compute, experts, oracle, sums: Sums::Exact };
    Harness { dispatch: Cluster { dispatch, _workers: workers }, model }
}

fn partial(count: u32, compute: Compute) -> Harness<Cluster> {
    let workers = shares(count, compute);
    let addresses: Vec<&str> = workers.iter().map(|worker| worker.address.as_str()).collect();
    let config = ConnectConfig { combine: Combine::Partial, ..connect_config(&addresses, compute) };
    let dispatch = muster_dispatch_grpc::connect(config).expect("workers fit");
    let oracle = Box::new(move |layer, expert, row: &[f32]| fake::output(compute, layer, expert, row));
    let owner = move |layer, expert| {
        let holds = |n: &u32| share(*n, count).contains(&ExpertKey { layer, expert });
        (0..count).find(holds).expect("every expert is held") as usize
    };
    let (experts, sums) = (shape().experts().to_vec(), Sums::Partial(Box::new(owner)));
    let model = Model { hidden: HIDDEN, top_k: TOP_K as usize, compute, experts, oracle, sums };
    Harness { dispatch: Cluster { dispatch, _workers: workers }, model }
}

fn shares(count: u32, compute: Compute) -> Vec<TestWorker> {
    (0..count).map(|n| TestWorker::start(&format!("w{n}"), share(n, count), compute)).collect()
}

/// With experts in the router's own process beside these workers.
fn with_fallback(workers: Vec<TestWorker>, compute: Compute) -> Harness<Cluster> {
    let addresses: Vec<&str> = workers.iter().map(|worker| worker.address.as_str()).collect();
    let config = ConnectConfig { start: Start::Assigned, ..connect_config(&addresses, compute) };
    let fallback = Fallback { experts: Box::new(fakes(&all(), compute)) };
    let dispatch = muster_dispatch_grpc::connect_with(config, Some(fallback)).expect("workers fit");
    let held: usize = shape()
        .keys()
        .filter(|key| workers.iter().any(|w| w.ledger.held.lock().unwrap().contains(key)))
        .count();
    assert_eq!(
        dispatch.transport().health().missing_experts(),
        all().len() - held,
        "the router's own do not count"
    );
    assert_eq!(dispatch.transport().health().workers().len(), workers.len());
    let oracle = Box::new(move |layer, expert, row: &[f32]| fake::output(compute, layer, expert, row));
    let experts = shape().experts().to_vec();
    let model = Model { hidden: HIDDEN, top_k: TOP_K as usize, compute, experts, oracle, sums: Sums::Exact };
    Harness { dispatch: Cluster { dispatch, _workers: workers }, model }
}

#[test]
fn the_router_s_own_experts_stand_in_for_workers_that_are_not_there() {
    for compute in [Compute::F32, Compute::Bf16] {
        conformance::run(|| with_fallback(Vec::new(), compute));
        conformance::run(|| with_fallback(vec![TestWorker::start("w0", share(0, 2), compute)], compute));
    }
}

#[test]
fn three_workers_over_tcp_in_bf16() {
    conformance::run(|| harness(shares(3, Compute::Bf16), Compute::Bf16));
}

#[test]
fn two_workers_over_tcp_in_f32() {
    conformance::run(|| harness(shares(2, Compute::F32), Compute::F32));
}

#[test]
fn workers_that_add_up_themselves_in_bf16() {
    conformance::run(|| partial(3, Compute::Bf16));
}

#[test]
fn workers_that_add_up_themselves_in_f32() {
    conformance::run(|| partial(2, Compute::F32));
}

#[test]
fn one_worker_over_a_unix_socket() {
    conformance::run(|| {
        let (held, compute) = (all(), Compute::F32);
        let experts = fakes(&held, compute);
        let worker = TestWorker::with(&socket(), &server_config(), describe("w0", held, compute), experts);
        harness(vec![worker], compute)
    });
}

#[test]
fn every_expert_on_two_workers() {
    conformance::run(|| {
        let workers = ["a", "b"].map(|name| TestWorker::start(name, all(), Compute::Bf16));
        harness(workers.into(), Compute::Bf16)
    });
}

#[test]
fn the_placement_does_not_change_a_bit() {
    let rows: Vec<u16> = (0..4 * HIDDEN as u16).map(|n| 0x3f00 + n).collect();
    let experts: Vec<ExpertId> = [0, 3, 7, 1, 2, 3, 0, 1, 7, 4, 5, 6].map(crate::support::expert).to_vec();
    let weights = (1..=12).map(|n| n as f32 / 7.0).collect();
    let choices = Choices::new(3, experts, weights).unwrap();
    let mut seen: Option<Vec<u32>> = None;
    for count in [1, 2, 5, 20] {
        let Harness { mut dispatch, .. } = harness(shares(count, Compute::Bf16), Compute::Bf16);
        let batch = LayerBatch {
            layer: crate::support::layer(3),
            lane: 1,
            rows: Rows::of_bf16(&rows, HIDDEN).unwrap(),
            choices: &choices,
        };
        let ticket = dispatch.submit(&batch).unwrap();
        let mut out = vec![0.0f32; rows.len()];
        dispatch.collect(ticket, crate::support::soon(), RowsMut::of_f32(&mut out)).unwrap();
        let bits: Vec<u32> = out.into_iter().map(f32::to_bits).collect();
        assert_eq!(*seen.get_or_insert_with(|| bits.clone()), bits, "{count} workers");
    }
}
