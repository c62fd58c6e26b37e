//! The part of a Kubernetes API server that routers use: EndpointSlices of one Service, and one Lease, over plain HTTP.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// An API server. Its threads end with the process.
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    address: String,
    directory: TempDir,
}

#[derive(Default)]
struct State {
    version: u64,
    slices: Vec<Value>,
    /// Changes of slices, in the order of versions.
    events: Vec<(u64, Value)>,
    lease: Option<Value>,
    denies: bool,
}

impl ApiServer {
    /// An API server without objects.
    ///
    /// # Panics
    /// When it cannot listen.
    #[must_use]
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound").to_string();
        let state = Arc::new(Mutex::new(State { version: 1, ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = shared.clone();
                // Errors of clients that are gone are ignored.
                std::thread::spawn(move || drop(serve(stream, &state)));
            }
        });
        Self { state, address, directory: tempfile::tempdir().expect("a temporary directory") }
    }

    /// A kubeconfig file for this server.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        let path = self.directory.path().join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {"token": "test"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "ns"}}],
        });
        std::fs::write(&path, config.to_string()).expect("the file can be written");
        Path::new(&path).to_owned()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics")
    }

    /// Sets whether all requests are forbidden.
    pub fn denies(&self, denies: bool) {
        self.state().denies = denies;
    }

    /// Adds a worker's pod.
    ///
    /// # Panics
    /// When the address is invalid.
    pub fn add(&self, address: &str, node: &str) {
        let (ip, port) = address.rsplit_once(':').expect("ip:port");
        let port: u16 = port.parse().expect("a port");
        let slice = json!({
            "metadata": {"name": format!("workers-{port}")}, "addressType": "IPv4",
            "endpoints": [{"addresses": [ip], "nodeName": node, "zone": "zone", "conditions": {"ready": false}}],
            "ports": [{"name": "grpc", "port": port, "protocol": "TCP"}],
        });
        self.state().change("ADDED", slice);
    }

    /// Removes a worker's pod.
    ///
    /// # Panics
    /// When there is none at that address.
    pub fn remove(&self, address: &str) {
        let (_, port) = address.rsplit_once(':').expect("ip:port");
        let name = format!("workers-{port}");
        let mut state = self.state();
        let at = state.slices.iter().position(|slice| slice["metadata"]["name"] == name.as_str());
        let slice = state.slices.remove(at.expect("it is there"));
        state.change("DELETED", slice);
    }

    /// Holder of the Lease.
    #[must_use]
    pub fn holder(&self) -> Option<String> {
        let state = self.state();
        let holder = state.lease.as_ref()?["spec"]["holderIdentity"].as_str()?;
        (!holder.is_empty()).then(|| holder.to_owned())
    }

    /// Sets the holder of the Lease; `""` for none.
    pub fn give(&self, holder: &str) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version.to_string();
        if let Some(lease) = &mut state.lease {
            lease["spec"]["holderIdentity"] = json!(holder);
            lease["metadata"]["resourceVersion"] = json!(version);
        }
    }
}

impl State {
    fn change(&mut self, kind: &str, mut slice: Value) {
        self.version += 1;
        slice["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if kind == "ADDED" {
            self.slices.push(slice.clone());
        }
        self.events.push((self.version, json!({"type": kind, "object": slice})));
    }

    fn answer(&mut self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let failure = |code: u16, message: &str| {
            (
                code,
                json!({"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": ""}),
            )
        };
        if path == "/apis/discovery.k8s.io" {
            let version = json!({"groupVersion": "discovery.k8s.io/v1", "version": "v1"});
            let name = "discovery.k8s.io";
            return (
                200,
                json!({"kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": [version]}),
            );
        }
        if self.denies {
            return failure(403, "User \"system:serviceaccount:ns:router\" cannot do that");
        }
        if path.ends_with("/endpointslices") {
            let metadata = json!({"resourceVersion": self.version.to_string()});
            return (200, json!({"kind": "EndpointSliceList", "metadata": metadata, "items": self.slices}));
        }
        match (method, &self.lease) {
            ("GET", Some(lease)) => return (200, lease.clone()),
            ("GET" | "PUT", None) => return failure(404, "not found"),
            ("POST", Some(_)) => return failure(409, "it exists"),
            ("PUT", Some(lease))
                if lease["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] =>
            {
                return failure(409, "it was modified");
            }
            _ => {}
        }
        self.version += 1;
        let mut lease = body;
        lease["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.lease = Some(lease.clone());
        (200, lease)
    }
}

/// One request of a connection.
fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        match header.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().unwrap_or(0);
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (code, reply) = state.lock().expect("nobody panics").answer(&method, &path, body);
    if code == 200 && query.contains("watch=true") {
        return watch(stream, state, &query);
    }
    let reply = reply.to_string();
    let mut text = String::new();
    let _ = write!(text, "HTTP/1.1 {code} x\r\nContent-Type: application/json\r\nConnection: close\r\n");
    let _ = write!(text, "Content-Length: {}\r\n\r\n{reply}", reply.len());
    (&stream).write_all(text.as_bytes())
}

/// Streams changes after a version, until the client is gone or its time is up.
fn watch(mut stream: TcpStream, state: &Mutex<State>, query: &str) -> std::io::Result<()> {
    let number = |name: &str| {
        let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
    };
    let (mut from, end) = (number("resourceVersion"), Duration::from_secs(number("timeoutSeconds")));
    stream.write_all(b"HTTP/1.1 200 x\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")?;
    let begun = Instant::now();
    while begun.elapsed() < end {
        let (events, denies) = {
            let state = state.lock().expect("nobody panics");
            let later = state.events.iter().filter(|(version, _)| *version > from).cloned();
            (later.collect::<Vec<_>>(), state.denies)
        };
        for (version, event) in events {
            from = version;
            stream.write_all(format!("{event}\n").as_bytes())?;
        }
        if denies {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
