//! Workers that hold other weights than the router's checkpoint has: refused by name, whenever it shows.

use muster_dispatch_grpc::{ConnectConfig, ConnectError, Digests, LinkError, Start, WorkerState};
use muster_proto::description::Description;
use muster_proto::expert::v1;
use muster_types::{Compute, WeightDigest};

use crate::support::lying::{LyingWorker, rows};
use crate::support::*;

const OTHER: WeightDigest = WeightDigest::new([0xee; 32]);

/// One that holds everything, and other weights of this expert.
fn damaged(name: &str, at: usize) -> TestWorker {
    let mut description = describe(name, all(), Compute::F32);
    description.digests[at] = OTHER;
    TestWorker::with("127.0.0.1:0", &server_config(), description, fakes(&all(), Compute::F32))
}

/// A refusal of it says all that is needed to find the file.
fn says_all(text: &str, name: &str, at: usize) {
    let (key, ours, theirs) = (all()[at], digest(all()[at]), OTHER);
    let parts = [&format!("worker {name}"), &key.to_string(), &ours.to_string(), &theirs.to_string()];
    for part in parts.into_iter().map(String::as_str).chain(["sha256sum model.safetensors"]) {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_worker_with_other_weights_is_refused_and_the_rest_serves() {
    let workers = [damaged("bad", 5), TestWorker::start("good", all(), Compute::F32)];
    let config = connect_config(&[&workers[0].address, &workers[1].address], Compute::F32);
    let digests = config.digests.clone();
    let mut dispatch = muster_dispatch_grpc::connect(config).expect("the other one has every expert");
    let refusals = digests.refusals();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    says_all(&refusals[0], "bad", 5);
    let states = dispatch.transport().health().workers();
    let WorkerState::Down { reason, .. } = &states[0].state else { panic!("{states:?}") };
    says_all(reason, "bad", 5);
    assert_eq!(states[1].state, WorkerState::Connected);
    let row = OneRow::new(0, &[5]);
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
    assert_eq!(workers[0].server.shards_taken(), 0);
}

#[test]
fn without_another_holder_the_refusal_is_the_reason_why_nothing_starts() {
    let worker = damaged("bad", 3);
    let error =
        muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32)).err().unwrap();
    assert!(matches!(error, ConnectError::MissingExperts { .. }), "{error}");
    says_all(&error.to_string(), "bad", 3);
}

#[test]
fn weights_that_become_others_end_the_link_and_mended_ones_open_it_again() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let config = connect_config(&[&worker.address], Compute::F32);
    let digests = config.digests.clone();
    let dispatch = muster_dispatch_grpc::connect(config).unwrap();
    let health = dispatch.transport().health();
    assert_eq!((health.missing_experts(), digests.refusals().len()), (0, 0));
    let changed = [all()[7], all()[9]];
    worker.ledger.damaged.lock().unwrap().extend(changed);
    worker.server.announce();
    eventually("it is refused", || health.missing_experts() == all().len());
    let text = digests.refusals().concat();
    assert!(text.contains(&changed[0].to_string()) && text.contains("1 more experts differ"), "{text}");
    worker.ledger.damaged.lock().unwrap().clear();
    worker.server.announce();
    eventually("it is used again", || health.missing_experts() == 0);
    assert!(digests.refusals().is_empty());
}

#[test]
fn the_version_before_is_used_unverified_and_a_later_one_has_to_tell() {
    let told = describe("w0", all(), Compute::F32).to_wire();
    let mut silent = told.clone();
    silent.held.iter_mut().for_each(|held| held.digests.clear());
    let answer = || Box::new(|shard: &v1::LayerShard| Some(Ok(rows(shard, 1, 2.0))));
    for (oldest, newest) in [(2, 0), (1, 2)] {
        let older = v1::WorkerDescription {
            protocol_version: oldest,
            newest_protocol_version: newest,
            ..silent.clone()
        };
        let worker = LyingWorker::describing(older, answer());
        let mut dispatch = muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32))
            .expect("one version back");
        let announced = dispatch.transport().health().workers()[0].announced.clone().unwrap();
        assert!(announced.digests.is_empty() && announced.holdings == all());
        assert_eq!(once(&mut dispatch, &OneRow::new(0, &[1])), Ok(vec![2.0; HIDDEN]));
    }
    let worker = LyingWorker::describing(silent, answer());
    let error =
        muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32)).err().unwrap();
    let ConnectError::Worker { source, .. } = &error else { panic!("{error}") };
    assert!(
        matches!(source, LinkError::Handshake(_)) && error.to_string().contains("held.digests"),
        "{error}"
    );
    // What an older one tells is compared all the same.
    let mut wrong = v1::WorkerDescription { protocol_version: 2, newest_protocol_version: 0, ..told };
    wrong.held[0].digests = vec![9; wrong.held[0].digests.len()].into();
    let worker = LyingWorker::describing(wrong, answer());
    let error =
        muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32)).err().unwrap();
    assert!(error.to_string().contains("worker w0 is refused"), "{error}");
}

#[test]
fn nobody_is_connected_before_it_is_known_what_the_weights_must_be() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let (teller, digests) = Digests::pending(all().len());
    let config = ConnectConfig { start: Start::Assigned, ..connect_config(&[], Compute::F32) };
    let dispatch =
        muster_dispatch_grpc::connect(ConnectConfig { digests: digests.clone(), ..config }).unwrap();
    let (health, cluster) = (dispatch.transport().health(), dispatch.transport().cluster());
    let joined = cluster.join(worker.address.parse().unwrap()).unwrap();
    teller.progress(4);
    teller.problem("a file cannot be read".into());
    assert_eq!(
        digests.progress().unwrap(),
        format!("checking weights: 4 of {} experts: a file cannot be read", all().len())
    );
    assert_eq!(worker.server.open_streams(), 0);
    assert_eq!(health.missing_experts(), all().len());
    teller.known(reference());
    assert!(cluster.await_coverage(soon()));
    assert_eq!(digests.progress(), None);
    drop(joined);
}

#[test]
fn what_a_worker_passed_over_is_announced() {
    let description = Description {
        trouble: Some("layer 0 expert 1 from its files".into()),
        ..describe("w0", all(), Compute::F32)
    };
    let worker = TestWorker::with("127.0.0.1:0", &server_config(), description, fakes(&all(), Compute::F32));
    let dispatch = muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32)).unwrap();
    let announced = dispatch.transport().health().workers()[0].announced.clone().unwrap();
    assert_eq!(announced.trouble.as_deref(), Some("layer 0 expert 1 from its files"));
}
