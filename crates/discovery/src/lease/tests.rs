use std::io;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::*;
use crate::fake::{self, Asked, Reply, failure};

/// What the network between one process and the API server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Well,
    /// Requests do not arrive.
    Down,
    /// Requests are carried out, and their answers lost.
    Deaf,
    /// Nothing comes, not even an error.
    Black,
    Denied,
}

/// The one object that the API server keeps.
#[derive(Default)]
struct Store {
    lease: Option<Value>,
    version: u64,
    writes: usize,
}

type Shared = Arc<Mutex<Store>>;

struct Process {
    network: Arc<Mutex<Network>>,
    tenure: Option<Tenure>,
    held: watch::Receiver<Held>,
}

impl Process {
    fn start(store: &Shared, identity: &str) -> Self {
        Self::start_with(store, identity, Network::Well)
    }

    fn start_with(store: &Shared, identity: &str, network: Network) -> Self {
        let network = Arc::new(Mutex::new(network));
        let (between, store) = (network.clone(), store.clone());
        let api = fake::api(move |asked| {
            let (network, store) = (*between.lock().unwrap(), store.clone());
            async move { carried(network, &store, &asked).await }
        });
        let name = "kubernetes:leader".parse().unwrap();
        let tenure = Tenure::start(api, name, identity.to_owned(), LeaseTimes::default());
        let held = tenure.held();
        Self { network, tenure: Some(tenure), held }
    }

    fn is(&self, network: Network) {
        *self.network.lock().unwrap() = network;
    }

    fn holds(&self) -> bool {
        self.held.borrow().is_held()
    }
}

async fn carried(network: Network, store: &Shared, asked: &Asked) -> io::Result<Reply> {
    match network {
        Network::Well => Ok(answer(store, asked)),
        Network::Down => Err(io::ErrorKind::ConnectionRefused.into()),
        Network::Deaf => {
            answer(store, asked);
            std::future::pending().await
        }
        Network::Black => std::future::pending().await,
        Network::Denied => Ok(failure(403, "User \"system:serviceaccount:ns:r\" cannot")),
    }
}

fn answer(store: &Shared, asked: &Asked) -> Reply {
    assert!(asked.path.starts_with("/apis/coordination.k8s.io/v1/namespaces/ns/leases"), "{}", asked.path);
    let mut store = store.lock().unwrap();
    let store = &mut *store;
    match (asked.method.as_str(), &store.lease) {
        ("GET", None) => return failure(404, "not found"),
        ("GET", Some(lease)) => return fake::json(200, lease),
        ("POST", Some(_)) => return failure(409, "already exists"),
        ("PUT", None) => return failure(404, "not found"),
        ("PUT", Some(lease))
            if asked.body["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"] =>
        {
            return failure(409, "the object has been modified");
        }
        _ => {}
    }
    store.version += 1;
    store.writes += 1;
    let mut lease = asked.body.clone();
    lease["metadata"]["resourceVersion"] = json!(store.version.to_string());
    store.lease = Some(lease.clone());
    fake::json(200, &lease)
}

fn holder_in(store: &Shared) -> Option<String> {
    let store = store.lock().unwrap();
    store.lease.as_ref().and_then(|lease| lease["spec"]["holderIdentity"].as_str()).map(str::to_owned)
}

async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

/// Lets time pass in small steps, in each of which at most one of them holds the Lease. Gives who did at the end.
async fn watched(processes: &[Process], seconds: f64) -> Option<usize> {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    loop {
        let holders: Vec<_> = (0..processes.len()).filter(|&n| processes[n].holds()).collect();
        assert!(holders.len() <= 1, "{holders:?} hold it at once");
        if Instant::now() >= end {
            return holders.first().copied();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_of_several_has_it_and_keeps_it() {
    let store = Shared::default();
    let processes = ["a", "b", "c"].map(|name| Process::start(&store, name));
    let first = watched(&processes, 5.0).await.expect("somebody has it");
    assert_eq!(watched(&processes, 120.0).await, Some(first));
    assert!(processes[first].held.borrow().problem.is_none());
    let lease = store.lock().unwrap().lease.clone().unwrap();
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 6);
    assert_eq!(lease["spec"]["leaseTransitions"], 1);
    for process in &processes {
        assert_eq!(process.held.borrow().holder, holder_in(&store));
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_given_back_is_had_by_another_at_once() {
    let store = Shared::default();
    let mut processes = vec![Process::start(&store, "a")];
    assert_eq!(watched(&processes, 1.0).await, Some(0));
    processes.push(Process::start(&store, "b"));
    assert_eq!(watched(&processes, 1.0).await, Some(0));
    processes[0].tenure.take().unwrap().release().await;
    assert!(!processes[0].holds());
    assert_eq!(holder_in(&store).as_deref(), Some(""));
    assert_eq!(watched(&processes, 2.5).await, Some(1));
}

#[tokio::test(start_paused = true)]
async fn who_cannot_renew_lets_go_before_another_has_it() {
    for network in [Network::Down, Network::Deaf, Network::Black, Network::Denied] {
        let store = Shared::default();
        let mut processes = vec![Process::start(&store, "a")];
        assert_eq!(watched(&processes, 3.0).await, Some(0));
        processes.push(Process::start(&store, "b"));
        watched(&processes, 3.0).await;
        processes[0].is(network);
        assert_eq!(watched(&processes, 25.0).await, Some(1), "{network:?}");
        assert!(processes[0].held.borrow().problem.is_some(), "{network:?}");
        processes[0].is(Network::Well);
        assert_eq!(watched(&processes, 20.0).await, Some(1));
        assert!(processes[0].held.borrow().problem.is_none(), "{network:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_stood_still_does_not_hold_it_when_it_goes_on() {
    let store = Shared::default();
    let a = Process::start(&store, "a");
    pass(1.0).await;
    assert!(a.holds());
    // As if its threads were stopped: its task is gone, and what it knew stays.
    let stopped = a.held.borrow().clone();
    drop(a);
    let b = [Process::start(&store, "b")];
    assert_eq!(watched(&b, 20.0).await, Some(0));
    assert!(!stopped.is_held());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_lost_does_no_harm() {
    let store = Shared::default();
    let a = [Process::start_with(&store, "a", Network::Deaf)];
    assert_eq!(watched(&a, 3.0).await, None);
    // The request was carried out, then its answer lost.
    a[0].is(Network::Well);
    assert_eq!(watched(&a, 5.0).await, Some(0));
    assert_eq!(holder_in(&store).as_deref(), Some("a"));
}

#[tokio::test(start_paused = true)]
async fn the_time_counts_from_before_the_request_was_sent() {
    let store = Shared::default();
    let slow = {
        let store = store.clone();
        fake::api(move |asked| {
            let store = store.clone();
            async move {
                let reply = answer(&store, &asked);
                // Carried out at once, and answered late.
                tokio::time::sleep(Duration::from_millis(1500)).await;
                Ok(reply)
            }
        })
    };
    let name = "kubernetes:leader".parse().unwrap();
    let tenure = Tenure::start(slow, name, "a".to_owned(), LeaseTimes::default());
    let mut held = tenure.held();
    let begun = Instant::now();
    let waiting = tokio::time::timeout(Duration::from_secs(60), held.wait_for(Held::is_held));
    drop(waiting.await.expect("in time").unwrap());
    // A read and a write of 1.5 s each; the write was sent after the first of them.
    let sent = begun + Duration::from_millis(1500);
    let until = held.borrow().until().unwrap();
    let slack = Duration::from_millis(10);
    assert!(until >= sent + LeaseTimes::default().hold && until <= sent + LeaseTimes::default().hold + slack);
}

#[tokio::test(start_paused = true)]
async fn another_s_clock_and_words_are_not_believed() {
    for (renewed, promised, wait) in [
        // Long ago, by its clock; in the future; never.
        (json!("2001-01-01T00:00:00.000000Z"), json!(10), 10.0),
        (json!("2201-01-01T00:00:00.000000Z"), json!(10), 10.0),
        (Value::Null, json!(10), 10.0),
        // It promises nothing, or too much.
        (Value::Null, Value::Null, 6.0),
        (Value::Null, json!(-5), 6.0),
        (Value::Null, json!(2_000_000_000), LONGEST.as_secs_f64()),
    ] {
        let store = Shared::default();
        *store.lock().unwrap() = Store {
            lease: Some(json!({
                "metadata": {"name": "leader", "namespace": "ns", "resourceVersion": "1"},
                "spec": {"holderIdentity": "other", "renewTime": renewed, "leaseDurationSeconds": promised},
            })),
            version: 1,
            writes: 0,
        };
        let a = [Process::start(&store, "a")];
        assert_eq!(watched(&a, wait - 1.0).await, None);
        assert_eq!(watched(&a, 5.0).await, Some(0));
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_somebody_gave_away_or_removed_is_let_go_of() {
    let store = Shared::default();
    let a = [Process::start(&store, "a")];
    assert_eq!(watched(&a, 1.0).await, Some(0));
    {
        let mut store = store.lock().unwrap();
        store.version += 1;
        let version = json!(store.version.to_string());
        let lease = store.lease.as_mut().unwrap();
        lease["spec"]["holderIdentity"] = json!("somebody");
        lease["metadata"]["resourceVersion"] = version;
    }
    assert_eq!(watched(&a, 4.0).await, None);
    assert_eq!(watched(&a, 15.0).await, Some(0));
    store.lock().unwrap().lease = None;
    assert_eq!(watched(&a, 5.0).await, Some(0));
    assert_eq!(holder_in(&store).as_deref(), Some("a"));
}

#[tokio::test(start_paused = true)]
async fn an_empty_lease_can_be_had_at_once() {
    let store = Shared::default();
    store.lock().unwrap().lease =
        Some(json!({"metadata": {"name": "leader", "resourceVersion": "0"}, "spec": {}}));
    let a = [Process::start(&store, "a")];
    assert_eq!(watched(&a, 0.1).await, Some(0));
    assert_eq!(store.lock().unwrap().writes, 1);
}

#[tokio::test(start_paused = true)]
async fn whatever_the_network_does_at_most_one_holds_it() {
    // Simulated minutes of faults, each process with its own.
    for seed in 0..40u64 {
        let store = Shared::default();
        let processes = ["a", "b", "c"].map(|name| Process::start(&store, name));
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..20 {
            let process = &processes[random(3) as usize];
            process.is(match random(6) {
                0 => Network::Down,
                1 => Network::Deaf,
                2 => Network::Black,
                3 => Network::Denied,
                _ => Network::Well,
            });
            watched(&processes, random(9000) as f64 / 1000.0).await;
        }
        for process in &processes {
            process.is(Network::Well);
        }
        assert!(watched(&processes, 25.0).await.is_some());
    }
}
