//! Beside the data plane: who leads, what a worker is told to hold, and weights from one worker to another.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use muster_dispatch_grpc::{Address, Dialer, FetchError, Fetcher, Handed, ServerConfig, Start};
use muster_engine::dispatch::ExpertDispatch;
use muster_proto::control::{Assignment, Fetch, LeadAsk, Load};
use muster_proto::convert::RouterName;
use muster_proto::expert::v1;
use muster_proto::expert::v1::weights_client::WeightsClient;
use muster_types::{Compute, Epoch, WeightDType, WeightDigest};

use crate::support::*;

fn ask(router: &str, term: u64, ttl: u64) -> LeadAsk {
    let term = NonZeroU64::new(term).unwrap();
    LeadAsk { router: RouterName::new(router).unwrap(), term, ttl: Duration::from_secs(ttl) }
}

fn order(router: &str, term: u64, operation: u64) -> Assignment {
    Assignment {
        router: RouterName::new(router).unwrap(),
        term: NonZeroU64::new(term).unwrap(),
        operation: NonZeroU64::new(operation).unwrap(),
        seen: Epoch::new(1),
        keep: vec![all()[0]],
        load: vec![Load { key: all()[3], peers: vec![0], digest: Some(digest(all()[3])) }],
        peers: vec!["unix:/x".into()],
    }
}

#[test]
fn a_worker_carries_out_the_leader_s_orders_and_nobody_else_s() {
    let worker = TestWorker::start("w0", all()[..3].to_vec(), Compute::F32);
    let config = connect_config(&[&worker.address], Compute::F32);
    let config = muster_dispatch_grpc::ConnectConfig { start: Start::Assigned, ..config };
    let dispatch = muster_dispatch_grpc::connect(config).unwrap();
    let cluster = dispatch.transport().cluster();
    let health = dispatch.transport().health();
    runtime().block_on(async {
        let known = cluster.workers().remove(0);
        assert_eq!((known.name().as_str(), known.description.holdings.len()), ("w0", 3));
        assert!(known.assign(&order("a", 1, 1)).await.is_err(), "nobody leads");
        assert!(known.lead(&ask("a", 1, 30), Duration::from_secs(5)).await.unwrap().granted);
        let refused = known.lead(&ask("b", 2, 30), Duration::from_secs(5)).await.unwrap();
        assert!(!refused.granted);
        assert_eq!(refused.holder, Some(RouterName::new("a").unwrap()));
        assert!(known.assign(&order("b", 2, 1)).await.is_err());
        let mut changes = cluster.changes();
        changes.mark_unchanged();
        assert_eq!(known.assign(&order("a", 1, 1)).await, Ok(Epoch::new(2)));
        tokio::time::timeout(Duration::from_secs(20), changes.changed()).await.unwrap().unwrap();
    });
    assert_eq!(*worker.ledger.orders.lock().unwrap(), [order("a", 1, 1)]);
    // What it announced after the announcement that an order was decided by stays.
    runtime().block_on(async {
        let known = cluster.workers().remove(0);
        let empty = Assignment { keep: vec![], load: vec![], ..order("a", 1, 2) };
        assert_eq!(known.assign(&empty).await, Ok(Epoch::new(3)));
        let late = Assignment { operation: NonZeroU64::new(3).unwrap(), seen: Epoch::new(2), ..empty };
        assert_eq!(known.assign(&late).await, Ok(Epoch::new(4)));
    });
    assert_eq!(worker.ledger.orders.lock().unwrap()[1].keep, [all()[3]], "announced in epoch 2");
    assert_eq!(worker.ledger.orders.lock().unwrap()[2].keep, []);
    eventually("the router learns what is held", || health.missing_experts() == all().len());
}

#[test]
fn whoever_holds_the_experts_may_take_its_time() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let mut dispatch =
        muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32)).unwrap();
    let known = dispatch.transport().cluster().workers().remove(0);
    let (runtime, patience) = (runtime(), Duration::from_secs(5));
    assert!(runtime.block_on(known.lead(&ask("a", 1, 60), patience)).unwrap().granted);

    let (ledger, row) = (worker.ledger.clone(), OneRow::new(2, &[0, 1, 3]));
    let asked = |times| eventually("it is asked", || ledger.asked.load(Ordering::SeqCst) == times);
    let counted = || runtime.block_on(known.count_rows(shape().experts())).map(|rows| rows[2][0]);

    // Something was loaded, and is to be announced.
    let slow = ledger.held.lock().unwrap();
    let server = worker.server.clone();
    let announcing = std::thread::spawn(move || server.announce());
    asked(1);
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
    assert_eq!(counted(), Ok(1));
    assert!(runtime.block_on(known.lead(&ask("a", 1, 60), patience)).unwrap().granted);
    assert!(!announcing.is_finished());
    drop(slow);
    announcing.join().unwrap();

    // An order is to be carried out.
    let slow = ledger.held.lock().unwrap();
    let order = Assignment { keep: all(), load: vec![], ..order("a", 1, 1) };
    let (told, first) = (known.clone(), order.clone());
    let telling = runtime.spawn(async move { told.assign(&first).await });
    asked(2);
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
    assert_eq!(counted(), Ok(2));
    assert_eq!(*ledger.orders.lock().unwrap(), []);
    drop(slow);
    // Whether its caller still waited for it or not, it is carried out, and before the one after it.
    drop(runtime.block_on(telling));
    let second = Assignment { operation: NonZeroU64::new(2).unwrap(), ..order.clone() };
    eventually("the next order is carried out", || runtime.block_on(known.assign(&second)).is_ok());
    assert_eq!(ledger.orders.lock().unwrap()[..2], [order, second]);
}

#[test]
fn rows_are_counted_where_they_are_computed() {
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let mut dispatch =
        muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32)).unwrap();
    for experts in [&[0, 1, 3][..], &[1], &[1, 2]] {
        let row = OneRow::new(2, experts);
        assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
    }
    let cluster = dispatch.transport().cluster();
    let known = cluster.workers().remove(0);
    let rows = runtime().block_on(known.count_rows(shape().experts())).unwrap();
    assert_eq!(rows, [vec![0; 8], vec![], vec![1, 3, 1, 1], vec![0; 8]]);
    assert!(runtime().block_on(known.count_rows(&[8, 0, 5, 8])).is_err(), "another model");
}

#[test]
fn a_worker_that_joins_is_used_and_forgotten_when_it_is_gone() {
    let config =
        muster_dispatch_grpc::ConnectConfig { start: Start::Assigned, ..connect_config(&[], Compute::F32) };
    let mut dispatch = muster_dispatch_grpc::connect(config).expect("nobody is waited for");
    let (cluster, health) = (dispatch.transport().cluster(), dispatch.transport().health());
    let row = OneRow::new(0, &[5]);
    assert!(dispatch.submit(&row.batch()).is_err());

    let worker = TestWorker::start("w0", all(), Compute::F32);
    let address: Address = worker.address.parse().unwrap();
    let (first, second) = (cluster.join(address.clone()).unwrap(), cluster.join(address.clone()).unwrap());
    assert!(cluster.await_coverage(soon()));
    // Where it is may be told later, and is not forgotten by one who does not know.
    assert_eq!(health.workers()[0].domain, None);
    drop(cluster.join_in(address.clone(), Some("zone/node".to_owned())).unwrap());
    drop(cluster.join(address).unwrap());
    assert_eq!(health.workers()[0].domain.as_deref(), Some("zone/node"));
    assert_eq!(cluster.workers()[0].domain.as_deref(), Some("zone/node"));
    assert_eq!(once(&mut dispatch, &row), Ok(row.sum()));
    // Twice the same worker is one worker.
    assert_eq!(health.workers().len(), 1);

    drop(first);
    worker.kill();
    eventually("it is missed", || health.missing_experts() > 0);
    assert_eq!(health.workers().len(), 1, "somebody says that it is there");
    drop(second);
    eventually("it is forgotten", || health.workers().is_empty());
}

fn some_expert() -> [Bytes; 6] {
    let part = |of: u8, len: usize| Bytes::from((0..len).map(|at| of ^ at as u8).collect::<Vec<u8>>());
    [part(1, 6000), part(2, 6000), part(3, 6000), part(4, 8), part(5, 8), Bytes::new()]
}

#[test]
fn weights_are_fetched_whole_or_not_at_all() {
    let config = ServerConfig { fetch_rate: NonZeroUsize::new(1 << 20).unwrap(), ..server_config() };
    let description = describe("w0", all(), Compute::F32);
    let experts = fakes(&all(), Compute::F32);
    let worker = TestWorker::with("127.0.0.1:0", &config, description, experts);
    let expert = some_expert();
    let packed = expert.concat();
    let theirs = WeightDigest::of([&packed[..]]);
    let hand = |digest| Handed { packed: expert.clone(), digest: Some(digest) };
    worker.ledger.experts.lock().unwrap().insert(all()[2], hand(theirs));
    let address: Address = worker.address.parse().unwrap();
    let fetch = Fetch {
        fingerprint: FINGERPRINT,
        compute: Compute::F32,
        experts: WeightDType::Native,
        key: all()[2],
    };
    runtime().block_on(async {
        let mut fetcher = Fetcher::new(Dialer::default());
        for expected in [None, Some(theirs)] {
            let fetched = fetcher.fetch(&address, &fetch, packed.len(), expected).await;
            assert_eq!(fetched, Ok((packed.clone(), theirs)));
        }
        let ours = WeightDigest::new([1; 32]);
        let outcome = fetcher.fetch(&address, &fetch, packed.len(), Some(ours)).await;
        assert_eq!(outcome, Err(FetchError::Others { ours, theirs }), "it has not what it must be");
        for wrong in [packed.len() - 1, packed.len() + 1, 0] {
            let outcome = fetcher.fetch(&address, &fetch, wrong, None).await;
            assert!(matches!(outcome, Err(FetchError::Damaged(_))), "{outcome:?}");
        }
        let refused = |fetch: Fetch| {
            let address = address.clone();
            async move {
                match Fetcher::new(Dialer::default()).fetch(&address, &fetch, 1, None).await {
                    Err(FetchError::Refused(reason)) => reason,
                    other => panic!("{other:?}"),
                }
            }
        };
        assert!(refused(Fetch { key: all()[1], ..fetch.clone() }).await.contains("not held"));
        assert!(refused(Fetch { compute: Compute::Bf16, ..fetch.clone() }).await.contains("compute mode"));
        assert!(refused(Fetch { experts: WeightDType::Q4, ..fetch.clone() }).await.contains("dtype"));
        let other = muster_types::Fingerprint::new([1; 32]);
        assert!(refused(Fetch { fingerprint: other, ..fetch.clone() }).await.contains("model"));
        let nobody: Address = "127.0.0.1:1".parse().unwrap();
        assert!(matches!(fetcher.fetch(&nobody, &fetch, 1, None).await, Err(FetchError::Refused(_))));
        // What changed since it was loaded is not handed on, whoever asks.
        worker.ledger.experts.lock().unwrap().insert(all()[2], hand(ours));
        let outcome = fetcher.fetch(&address, &fetch, packed.len(), None).await;
        let Err(FetchError::Refused(reason)) = &outcome else { panic!("{outcome:?}") };
        for part in [&theirs.to_string(), &ours.to_string(), "layer"] {
            assert!(reason.contains(part), "{part} in {reason}");
        }
    });
}

#[test]
fn the_version_before_fetches_with_the_digest_that_it_knows() {
    let description = describe("w0", all(), Compute::F32);
    let worker = TestWorker::with("127.0.0.1:0", &server_config(), description, fakes(&all(), Compute::F32));
    let expert = some_expert();
    let packed = expert.concat();
    let digest = Some(WeightDigest::of([&packed[..]]));
    worker.ledger.experts.lock().unwrap().insert(all()[2], Handed { packed: expert, digest });
    let fetch = Fetch {
        fingerprint: FINGERPRINT,
        compute: Compute::F32,
        experts: WeightDType::Native,
        key: all()[2],
    };
    runtime().block_on(async {
        let url = format!("http://{}", worker.address);
        let mut client = WeightsClient::connect(url).await.unwrap();
        for (newest, sealed) in [(2, (32, 0)), (3, (0, 32))] {
            let request = v1::FetchRequest { newest_protocol_version: newest, ..fetch.to_wire() };
            let mut parts = client.fetch(request).await.unwrap().into_inner();
            let mut last = v1::FetchReply::default();
            while let Some(part) = parts.message().await.unwrap() {
                last = part;
            }
            assert_eq!((last.digest.len(), last.weight_digest.len()), sealed, "up to version {newest}");
        }
    });
}
