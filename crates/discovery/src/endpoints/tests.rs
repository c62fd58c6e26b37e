use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::fake::{self, Asked, Reply, api, failure, status};

type Events = mpsc::Sender<io::Result<Value>>;

/// What an API server does with the requests of one path.
#[derive(Clone)]
enum Mood {
    Well,
    Fails(u16, &'static str),
    Unreachable,
    Silent,
}

struct Server {
    versions: Vec<&'static str>,
    lists: Mood,
    watches: Mood,
    slices: Vec<Value>,
    /// What was asked: paths and queries of lists and watches.
    asked: VecDeque<String>,
    /// Of the watch that is open.
    events: Option<Events>,
}

type Shared = Arc<Mutex<Server>>;

fn start(slices: Vec<Value>) -> (Shared, watch::Receiver<Seen>) {
    start_with(&["v1"], slices, Mood::Well)
}

fn start_with(versions: &[&'static str], slices: Vec<Value>, lists: Mood) -> (Shared, watch::Receiver<Seen>) {
    let server = Arc::new(Mutex::new(Server {
        versions: versions.to_vec(),
        lists,
        watches: Mood::Well,
        slices,
        asked: VecDeque::new(),
        events: None,
    }));
    let shared = server.clone();
    let api = api(move |asked| answer(shared.clone(), asked));
    let service = "kubernetes:workers".parse().unwrap();
    (server, watch(api, service))
}

async fn answer(server: Shared, asked: Asked) -> io::Result<Reply> {
    let (mood, reply) = {
        let mut server = server.lock().unwrap();
        if asked.path == "/apis/discovery.k8s.io" {
            let versions: Vec<_> = server
                .versions
                .iter()
                .map(|version| json!({"groupVersion": format!("discovery.k8s.io/{version}"), "version": version}))
                .collect();
            let group = json!({"kind": "APIGroup", "apiVersion": "v1", "name": GROUP, "versions": versions});
            return Ok(fake::json(200, &group));
        }
        let is_watch = asked.query.contains("watch=true");
        server.asked.push_back(format!("{}?{}", asked.path, asked.query));
        if is_watch {
            let (events, lines) = mpsc::channel(16);
            server.events = Some(events);
            (server.watches.clone(), fake::lines(lines))
        } else {
            let list = json!({
                "kind": "EndpointSliceList", "metadata": {"resourceVersion": "100"}, "items": server.slices,
            });
            (server.lists.clone(), fake::json(200, &list))
        }
    };
    match mood {
        Mood::Well => Ok(reply),
        Mood::Fails(code, message) => Ok(failure(code, message)),
        Mood::Unreachable => Err(io::ErrorKind::ConnectionRefused.into()),
        Mood::Silent => std::future::pending().await,
    }
}

fn slice(name: &str, ips: &[&str]) -> Value {
    let endpoints: Vec<_> = ips.iter().map(|ip| json!({"addresses": [ip]})).collect();
    json!({
        "metadata": {"name": name, "resourceVersion": "101"}, "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "grpc", "port": 7, "protocol": "TCP"}],
    })
}

fn ips(seen: &watch::Receiver<Seen>) -> Vec<String> {
    seen.borrow().workers.keys().map(|address| address.ip().to_string()).collect()
}

/// Until what is seen is like that; paused time passes meanwhile.
async fn until(seen: &mut watch::Receiver<Seen>, what: impl Fn(&Seen) -> bool) {
    let waiting = seen.wait_for(|seen| what(seen));
    drop(timeout(Duration::from_secs(3600), waiting).await.expect("in time").expect("it goes on"));
}

fn is_well(seen: &Seen) -> bool {
    seen.problem.is_none()
}

/// The watch that is open.
async fn events(server: &Shared) -> Events {
    loop {
        let events = server.lock().unwrap().events.clone();
        match events.filter(|events| !events.is_closed()) {
            Some(events) => return events,
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

fn event(kind: &str, slice: &Value) -> io::Result<Value> {
    Ok(json!({"type": kind, "object": slice}))
}

#[tokio::test(start_paused = true)]
async fn what_changes_is_seen() {
    let (server, mut seen) = start(vec![slice("a", &["10.0.0.1"])]);
    until(&mut seen, is_well).await;
    assert_eq!(ips(&seen), ["10.0.0.1"]);
    let events = events(&server).await;
    events.send(event("ADDED", &slice("b", &["10.0.0.2"]))).await.unwrap();
    until(&mut seen, |seen| seen.workers.len() == 2).await;
    events.send(event("MODIFIED", &slice("b", &["10.0.0.3"]))).await.unwrap();
    until(&mut seen, |seen| seen.workers.keys().any(|worker| worker.ip().to_string() == "10.0.0.3")).await;
    events.send(event("DELETED", &slice("a", &["10.0.0.1"]))).await.unwrap();
    until(&mut seen, |seen| seen.workers.len() == 1).await;
    assert_eq!(ips(&seen), ["10.0.0.3"]);
    let asked = server.lock().unwrap().asked.pop_front().unwrap();
    assert!(asked.starts_with("/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices?"), "{asked}");
    assert!(asked.contains("service-name%3Dworkers"), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn the_best_version_that_is_served_is_watched() {
    for (served, used) in [(&["v1beta1"][..], "v1beta1"), (&["v1beta1", "v1"], "v1"), (&["v2", "v1"], "v1")] {
        let (server, mut seen) = start_with(served, vec![slice("a", &["10.0.0.1"])], Mood::Well);
        until(&mut seen, is_well).await;
        drop(events(&server).await);
        let server = server.lock().unwrap();
        assert_eq!(server.asked.len(), 2);
        assert!(server.asked.iter().all(|asked| asked.contains(&format!("/{used}/"))), "{:?}", server.asked);
    }
    let (_server, mut seen) = start_with(&["v2"], Vec::new(), Mood::Well);
    until(&mut seen, |seen| seen.problem.as_ref().is_some_and(|problem| problem.contains("serves no"))).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_reaches_its_end_goes_on_from_where_it_was() {
    let (server, mut seen) = start(vec![slice("a", &["10.0.0.1"])]);
    until(&mut seen, is_well).await;
    let first = events(&server).await;
    let mark = json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": {"resourceVersion": "555"}});
    first.send(event("BOOKMARK", &mark)).await.unwrap();
    server.lock().unwrap().events = None;
    drop(first);
    let second = events(&server).await;
    let asked = server.lock().unwrap().asked.clone();
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert!(
        asked[1].contains("resourceVersion=100") && asked[2].contains("resourceVersion=555"),
        "{asked:?}"
    );
    second.send(event("ADDED", &slice("b", &["10.0.0.2"]))).await.unwrap();
    until(&mut seen, |seen| seen.workers.len() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn after_gone_a_break_and_nonsense_it_is_listed_again() {
    let breaks: [fn() -> io::Result<Value>; 4] = [
        || Ok(json!({"type": "ERROR", "object": status(410, "too old resource version")})),
        || Err(io::ErrorKind::ConnectionReset.into()),
        || Ok(json!({"type": "ADDED", "object": {"metadata": {}}})),
        || Ok(json!("nonsense")),
    ];
    for event in breaks {
        let (server, mut seen) = start(vec![slice("a", &["10.0.0.1"])]);
        until(&mut seen, is_well).await;
        let open = events(&server).await;
        server.lock().unwrap().slices = vec![slice("b", &["10.0.0.2"])];
        open.send(event()).await.unwrap();
        until(&mut seen, |seen| seen.workers.keys().any(|worker| worker.ip().to_string() == "10.0.0.2"))
            .await;
        assert_eq!((ips(&seen), seen.borrow().problem.clone()), (vec!["10.0.0.2".to_owned()], None));
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_dead_is_noticed() {
    let (server, mut seen) = start(vec![slice("a", &["10.0.0.1"])]);
    until(&mut seen, is_well).await;
    // Kept open, and nothing comes.
    let _dead = events(&server).await;
    server.lock().unwrap().slices = vec![slice("b", &["10.0.0.2"])];
    until(&mut seen, |seen| seen.workers.keys().any(|worker| worker.ip().to_string() == "10.0.0.2")).await;
}

#[tokio::test(start_paused = true)]
async fn denied_at_first_and_mended_later() {
    let message = "endpointslices is forbidden: User \"system:serviceaccount:ns:router\" cannot list";
    let (server, mut seen) = start_with(&["v1"], vec![slice("a", &["10.0.0.1"])], Mood::Fails(403, message));
    until(&mut seen, |seen| {
        seen.problem.as_ref().is_some_and(|problem| {
            problem.contains("ServiceAccount ns/router may not use endpointslices in namespace ns")
                && problem.contains("list and watch")
        })
    })
    .await;
    server.lock().unwrap().lists = Mood::Well;
    until(&mut seen, is_well).await;
    assert_eq!(ips(&seen), ["10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_later_what_was_seen_stays() {
    let moods = [
        (Mood::Fails(403, "no"), "may not use"),
        (Mood::Fails(401, "who"), "does not accept"),
        (Mood::Fails(500, "etcd is gone"), "answers 500: etcd is gone"),
        (Mood::Unreachable, "cannot be reached"),
        (Mood::Silent, "no answer within"),
    ];
    for (mood, problem) in moods {
        let (server, mut seen) = start(vec![slice("a", &["10.0.0.1"])]);
        until(&mut seen, is_well).await;
        drop(events(&server).await);
        {
            let mut server = server.lock().unwrap();
            (server.lists, server.watches) = (mood.clone(), mood);
            server.events = None;
        }
        until(&mut seen, |seen| seen.problem.as_ref().is_some_and(|text| text.contains(problem))).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(ips(&seen), ["10.0.0.1"]);
        {
            let mut server = server.lock().unwrap();
            (server.lists, server.watches) = (Mood::Well, Mood::Well);
            server.slices = vec![slice("b", &["10.0.0.2"])];
        }
        until(&mut seen, is_well).await;
        assert_eq!(ips(&seen), ["10.0.0.2"]);
    }
}

#[tokio::test(start_paused = true)]
async fn who_may_list_but_not_watch_is_told_so_and_sees_what_is_listed() {
    let (server, mut seen) = start(vec![slice("a", &["10.0.0.1"])]);
    server.lock().unwrap().watches = Mood::Fails(403, "no");
    until(&mut seen, |seen| seen.problem.as_ref().is_some_and(|text| text.contains("list and watch"))).await;
    server.lock().unwrap().slices = vec![slice("b", &["10.0.0.2"])];
    seen.mark_unchanged();
    seen.changed().await.unwrap();
    // Not back and forth between well and denied.
    assert!(seen.borrow().problem.is_some());
    assert_eq!(ips(&seen), ["10.0.0.2"]);
}

#[tokio::test(start_paused = true)]
async fn no_more_slices_are_kept_than_may_be() {
    let (server, mut seen) = start(Vec::new());
    until(&mut seen, is_well).await;
    let events = events(&server).await;
    for n in 0..MOST_SLICES + 10 {
        events
            .send(event("ADDED", &slice(&format!("s{n}"), &[&format!("10.0.{}.{}", n >> 8, n & 255)])))
            .await
            .unwrap();
    }
    until(&mut seen, |seen| seen.problem.as_ref().is_some_and(|text| text.contains("left out"))).await;
    assert!(seen.borrow().workers.len() <= MOST_SLICES);
}

#[tokio::test(start_paused = true)]
async fn it_ends_when_nobody_listens() {
    let (server, mut seen) = start(Vec::new());
    until(&mut seen, is_well).await;
    let events = events(&server).await;
    drop(seen);
    events.closed().await;
}
