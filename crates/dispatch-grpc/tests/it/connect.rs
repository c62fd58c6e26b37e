//! Workers that are not there, not ours, or not enough: each refused by name, with what to do about it.

use std::io::Write;
use std::net::TcpListener;
use std::time::Duration;

use crate::support::lying::LyingWorker;
use crate::support::{
    MAX_ROWS, OneRow, TestWorker, all, connect_config, describe, fakes, server_config, share, socket, soon,
};
use muster_dispatch_grpc::{ConnectConfig, ConnectError, LinkError, Start, WorkerState};
use muster_engine::dispatch::{DispatchError, ExpertDispatch, RowsMut};
use muster_proto::expert::v1;
use muster_proto::version::OURS;
use muster_types::{Compute, Fingerprint, WeightDType};

fn error(config: ConnectConfig) -> ConnectError {
    muster_dispatch_grpc::connect(config).err().expect("the cluster must be refused")
}

fn link_error(config: ConnectConfig) -> (String, LinkError) {
    match error(config) {
        ConnectError::Worker { address, source } => (address, source),
        other => panic!("{other}"),
    }
}

/// An address nobody listens on.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[test]
fn a_configuration_that_cannot_work_is_refused_at_once() {
    let with = |workers: &[&str]| connect_config(workers, Compute::F32);
    assert!(matches!(error(with(&[])), ConnectError::MissingExperts { .. }));
    assert!(matches!(error(with(&["nonsense"])), ConnectError::Address(_)));
    assert!(matches!(error(with(&["h:1", "h:1"])), ConnectError::DuplicateAddress(_)));
    let unnamed = ConnectConfig { router_id: "a\nb".into(), ..with(&["h:1"]) };
    assert!(matches!(error(unnamed), ConnectError::RouterId(_)));
    for (what, config) in [
        ("hidden", ConnectConfig { hidden: 0, ..with(&["h:1"]) }),
        ("top_k", ConnectConfig { top_k: 0, ..with(&["h:1"]) }),
        ("max_rows", ConnectConfig { max_rows: 0, ..with(&["h:1"]) }),
    ] {
        assert!(error(config).to_string().starts_with(what));
    }
}

#[test]
fn a_worker_that_is_not_there_is_named() {
    for address in [free_address(), socket()] {
        let config = connect_config(&[&address], Compute::F32);
        let config = ConnectConfig { connect_timeout: Duration::from_millis(120), ..config };
        let text = error(config).to_string();
        assert!(text.contains(&address) && text.contains("cannot be reached"), "{text}");
        assert!(text.contains("check that the worker runs"), "{text}");
    }
}

#[test]
fn another_model_is_refused_with_both_fingerprints() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let config = connect_config(&[&worker.address], Compute::F32);
    let text = error(ConnectConfig { fingerprint: Fingerprint::new([0xcd; 32]), ..config }).to_string();
    assert!(text.contains(&worker.address), "{text}");
    assert!(text.contains(&"cd".repeat(32)) && text.contains(&"ab".repeat(32)), "{text}");
    assert!(text.contains("same model directory"), "{text}");
}

#[test]
fn another_compute_mode_is_refused_with_both_values() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let text = error(connect_config(&[&worker.address], Compute::Bf16)).to_string();
    assert!(text.contains("compute mode differs: ours is bf16, the peer's is f32"), "{text}");
}

#[test]
fn another_expert_dtype_is_refused_with_both_values() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let config = connect_config(&[&worker.address], Compute::F32);
    let text = error(ConnectConfig { experts: WeightDType::Q4, ..config }).to_string();
    assert!(text.contains("expert dtype differs: ours is q4, the peer's is native"), "{text}");
    assert!(text.contains("same --expert-dtype"), "{text}");
}

#[test]
fn another_hidden_size_is_refused_by_the_worker() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let config = connect_config(&[&worker.address], Compute::F32);
    let (_, source) = link_error(ConnectConfig { hidden: 32, ..config });
    match source {
        LinkError::Refused(reason) => {
            assert!(reason.contains("hidden size differs: ours is 16, the peer's is 32"), "{reason}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn another_version_is_refused_before_anything_else_is_read() {
    let description = v1::WorkerDescription { protocol_version: 9, ..Default::default() };
    let worker = LyingWorker::describing(description, Box::new(|_| None));
    let text = error(connect_config(&[&worker.address], Compute::F32)).to_string();
    let differs = format!("protocol version differs: ours is {OURS}, the peer's is 9");
    assert!(text.contains(&differs), "{text}");
    assert!(text.contains("at most one apart"), "{text}");
}

#[test]
fn a_worker_that_announces_what_the_model_lacks_is_refused() {
    let mut description = describe("w0", all(), Compute::F32).to_wire();
    description.held[0].experts.push(8);
    let worker = LyingWorker::describing(description, Box::new(|_| None));
    let text = error(connect_config(&[&worker.address], Compute::F32)).to_string();
    assert!(text.contains("held: expert 8 is out of range"), "{text}");
}

#[test]
fn a_worker_that_takes_too_few_rows_is_refused() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let config = connect_config(&[&worker.address], Compute::F32);
    let (_, source) = link_error(ConnectConfig { max_rows: MAX_ROWS + 1, ..config });
    assert_eq!(source, LinkError::MaxRows { ours: MAX_ROWS + 1, theirs: MAX_ROWS });
}

#[test]
fn another_program_at_the_address_is_recognised() {
    // One that speaks HTTP/1, and one that speaks gRPC but not ours.
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let plain_address = plain.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut stream in plain.incoming().flatten() {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            // Keeps it open: closing with unread bytes would reset it before the answer is read.
            std::mem::forget(stream);
        }
    });
    let runtime = crate::support::runtime();
    let other = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let other_address = other.local_addr().unwrap().to_string();
    let routes = tonic::service::Routes::default();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(other);
    runtime.spawn(tonic::transport::Server::builder().add_routes(routes).serve_with_incoming(incoming));

    let (named, source) = link_error(connect_config(&[&plain_address], Compute::F32));
    assert_eq!(named, plain_address);
    assert!(matches!(source, LinkError::Other(_)), "{source:?}");
    assert!(source.to_string().contains("speaks HTTP/1.1 and not gRPC"), "{source}");
    let (named, source) = link_error(connect_config(&[&other_address], Compute::F32));
    assert_eq!(named, other_address);
    assert!(matches!(source, LinkError::NotAWorker(_)), "{source:?}");
}

#[test]
fn two_workers_of_one_name_are_refused() {
    let workers =
        [TestWorker::start("twin", all(), Compute::F32), TestWorker::start("twin", all(), Compute::F32)];
    let (_, source) = link_error(connect_config(&[&workers[0].address, &workers[1].address], Compute::F32));
    assert!(matches!(&source, LinkError::SameName { worker, .. } if worker == "twin"), "{source}");
}

#[test]
fn missing_experts_are_named() {
    let worker = TestWorker::start("w0", share(0, 20), Compute::F32);
    let text = error(connect_config(&[&worker.address], Compute::F32)).to_string();
    assert!(text.contains("layer 0 expert 1, ") && text.contains("and 15 more"), "{text}");
}

#[test]
fn a_degraded_start_serves_what_is_there_and_says_what_is_not() {
    let worker = TestWorker::start("w0", share(0, 2), Compute::F32);
    let absent = free_address();
    let config = ConnectConfig {
        start: Start::Degraded,
        connect_timeout: Duration::from_millis(500),
        ..connect_config(&[&worker.address, &absent], Compute::F32)
    };
    let mut dispatch = muster_dispatch_grpc::connect(config).expect("degraded is allowed");
    let health = dispatch.transport().health();
    assert_eq!(health.missing(), share(1, 2));
    assert_eq!(health.missing_experts(), 10);
    let workers = health.workers();
    let held = |at: usize| workers[at].announced.as_ref().map(|d| d.holdings.len());
    assert_eq!((&workers[0].state, held(0)), (&WorkerState::Connected, Some(10)));
    assert_eq!((workers[1].address.as_str(), held(1)), (absent.as_str(), None));
    assert!(matches!(workers[1].state, WorkerState::Down { .. }));

    let there = OneRow::new(0, &[0, 2]);
    let ticket = dispatch.submit(&there.batch()).unwrap();
    let mut out = vec![0.0; there.row.len()];
    dispatch.collect(ticket, soon(), RowsMut::of_f32(&mut out)).unwrap();
    assert_eq!(out, there.sum());
    let absent = OneRow::new(0, &[0, 1]);
    let (layer, expert) = (absent.layer, crate::support::expert(1));
    assert_eq!(dispatch.submit(&absent.batch()), Err(DispatchError::NoOwner { layer, expert }));
}

#[test]
fn a_worker_that_comes_late_is_waited_for() {
    let address = socket();
    let config = connect_config(&[&address], Compute::F32);
    let connecting = std::thread::spawn(move || muster_dispatch_grpc::connect(config));
    let experts = fakes(&all(), Compute::F32);
    let description = describe("late", all(), Compute::F32);
    let _worker = TestWorker::with(&address, &server_config(), description, experts);
    let dispatch = connecting.join().unwrap().expect("the worker came in time");
    assert_eq!(dispatch.transport().health().missing(), []);
}
