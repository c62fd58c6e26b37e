//! Against a real API server, the one that `KUBECONFIG` names; without it these tests say that they were skipped.
//!
//! They need an administrator's rights, work in a namespace of their own, and remove it.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Secret, ServiceAccount};
use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};
use kube::api::{DeleteParams, ObjectMeta, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Client, Config};
use muster_discovery::{Api, ApiError, LeaseTimes, Place, Seen, Source, Tenure, secrets, watch};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);

/// A namespace that is removed in the end.
struct Sandbox {
    client: Client,
    namespace: String,
}

impl Sandbox {
    /// `None` without a cluster.
    async fn new(purpose: &str) -> Option<Self> {
        if std::env::var_os("KUBECONFIG").is_none() {
            eprintln!("skipped: KUBECONFIG names no cluster");
            return None;
        }
        let client = Client::try_default().await.expect("the cluster that KUBECONFIG names");
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        let namespace = format!("muster-test-{purpose}-{:x}", nanos & 0xffff_ffff);
        let made = Namespace { metadata: named(&namespace), ..Namespace::default() };
        kube::Api::<Namespace>::all(client.clone()).create(&PostParams::default(), &made).await.unwrap();
        Some(Self { client, namespace })
    }

    fn api<K: kube::Resource<Scope = kube::core::NamespaceResourceScope>>(&self) -> kube::Api<K>
    where
        K::DynamicType: Default,
    {
        kube::Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn object(&self, name: &str) -> String {
        format!("kubernetes:{}/{name}", self.namespace)
    }

    /// A client with the rights of a ServiceAccount.
    async fn account(&self, name: &str) -> Api {
        let account = ServiceAccount { metadata: named(name), ..ServiceAccount::default() };
        let accounts = self.api::<ServiceAccount>();
        accounts.create(&PostParams::default(), &account).await.unwrap();
        let request = TokenRequest {
            spec: Some(TokenRequestSpec { expiration_seconds: Some(3600), ..TokenRequestSpec::default() }),
            ..TokenRequest::default()
        };
        let token = accounts.create_token_request(name, &PostParams::default(), &request).await.unwrap();
        let mut config = Config::infer().await.unwrap();
        config.auth_info = kube::config::AuthInfo {
            token: token.status.unwrap().token.map(Into::into),
            ..kube::config::AuthInfo::default()
        };
        Api::of(Client::try_from(config).unwrap())
    }

    async fn grant(&self, account: &str, group: &str, resource: &str, verbs: &[&str]) {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let role = Role {
            metadata: named(resource),
            rules: Some(vec![PolicyRule {
                api_groups: Some(texts(&[group])),
                resources: Some(texts(&[resource])),
                verbs: texts(verbs),
                ..PolicyRule::default()
            }]),
        };
        let binding = RoleBinding {
            metadata: named(resource),
            role_ref: RoleRef {
                api_group: Some("rbac.authorization.k8s.io".to_owned()),
                kind: "Role".to_owned(),
                name: resource.to_owned(),
            },
            subjects: Some(vec![Subject {
                kind: "ServiceAccount".to_owned(),
                name: account.to_owned(),
                namespace: Some(self.namespace.clone()),
                ..Subject::default()
            }]),
        };
        self.api::<Role>().create(&PostParams::default(), &role).await.unwrap();
        self.api::<RoleBinding>().create(&PostParams::default(), &binding).await.unwrap();
    }

    async fn end(self) {
        let namespaces = kube::Api::<Namespace>::all(self.client);
        drop(namespaces.delete(&self.namespace, &DeleteParams::default()).await.unwrap());
    }
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
}

async fn until(seen: &mut tokio::sync::watch::Receiver<Seen>, what: impl Fn(&Seen) -> bool) -> Seen {
    let waited = tokio::time::timeout(SOON, seen.wait_for(|seen| what(seen))).await;
    match waited.map(|seen| seen.expect("it goes on").clone()) {
        Ok(seen) => seen,
        Err(_) => panic!("not in {SOON:?}; last seen: {:?}", seen.borrow()),
    }
}

/// EndpointSlices of the version that is served, written by hand.
struct Slices {
    api: kube::Api<DynamicObject>,
    resource: ApiResource,
    is_v1: bool,
}

impl Slices {
    async fn of(sandbox: &Sandbox) -> Self {
        let group = kube::discovery::group(&sandbox.client, "discovery.k8s.io").await.unwrap();
        let is_v1 = group.versions().any(|version| version == "v1");
        let version = if is_v1 { "v1" } else { "v1beta1" };
        eprintln!("EndpointSlices are of {version}");
        let kind = GroupVersionKind::gvk("discovery.k8s.io", version, "EndpointSlice");
        let resource = ApiResource::from_gvk_with_plural(&kind, "endpointslices");
        let api = kube::Api::namespaced_with(sandbox.client.clone(), &sandbox.namespace, &resource);
        Self { api, resource, is_v1 }
    }

    async fn put(&self, name: &str, service: &str, ip: &str, node: &str, ready: bool) {
        let mut endpoint = json!({"addresses": [ip], "conditions": {"ready": ready}});
        if self.is_v1 {
            endpoint["nodeName"] = json!(node);
            endpoint["zone"] = json!("z1");
        } else {
            endpoint["topology"] =
                json!({"kubernetes.io/hostname": node, "topology.kubernetes.io/zone": "z1"});
        }
        let mut slice = DynamicObject::new(name, &self.resource).data(json!({
            "addressType": "IPv4", "endpoints": [endpoint],
            "ports": [{"name": "admin", "port": 9090, "protocol": "TCP"}, {"name": "grpc", "port": 7070, "protocol": "TCP"}],
        }));
        slice.metadata.labels =
            Some(BTreeMap::from([("kubernetes.io/service-name".to_owned(), service.to_owned())]));
        match self.api.get_opt(name).await.unwrap() {
            None => drop(self.api.create(&PostParams::default(), &slice).await.unwrap()),
            Some(old) => {
                slice.metadata.resource_version = old.metadata.resource_version;
                drop(self.api.replace(name, &PostParams::default(), &slice).await.unwrap());
            }
        }
    }

    /// One with nothing in it, as the controller writes them for the other address family.
    async fn put_empty(&self, name: &str, service: &str) {
        let mut slice = DynamicObject::new(name, &self.resource)
            .data(json!({"addressType": "IPv6", "endpoints": [], "ports": null}));
        slice.metadata.labels =
            Some(BTreeMap::from([("kubernetes.io/service-name".to_owned(), service.to_owned())]));
        self.api.create(&PostParams::default(), &slice).await.unwrap();
    }
}

fn places(seen: &Seen) -> Vec<(String, Option<String>)> {
    let place = |(address, place): (&SocketAddr, &Place)| (address.to_string(), place.domain());
    seen.workers.iter().map(place).collect()
}

#[tokio::test]
async fn endpoints_are_seen_as_they_change() {
    let Some(sandbox) = Sandbox::new("slices").await else { return };
    let slices = Slices::of(&sandbox).await;
    slices.put("a", "workers", "10.9.0.1", "n1", true).await;
    slices.put("other", "others", "10.9.9.9", "n1", true).await;
    slices.put_empty("a6", "workers").await;
    let source: Source = sandbox.object("workers").parse().unwrap();
    let mut seen = watch(&source, &Api::of(sandbox.client.clone()));
    let first = until(&mut seen, |seen| seen.problem.is_none()).await;
    assert_eq!(places(&first), [("10.9.0.1:7070".to_owned(), Some("z1/n1".to_owned()))]);
    let begun = Instant::now();
    slices.put("b", "workers", "10.9.0.2", "n2", false).await;
    let both = until(&mut seen, |seen| seen.workers.len() == 2).await;
    eprintln!("a new endpoint was seen after {:?}", begun.elapsed());
    assert_eq!(places(&both)[1], ("10.9.0.2:7070".to_owned(), Some("z1/n2".to_owned())));
    slices.put("b", "workers", "10.9.0.3", "n2", true).await;
    until(&mut seen, |seen| places(seen).iter().any(|(address, _)| address == "10.9.0.3:7070")).await;
    drop(slices.api.delete("a", &DeleteParams::default()).await.unwrap());
    let left = until(&mut seen, |seen| seen.workers.len() == 1).await;
    assert_eq!(left.problem, None);
    // Longer than one watch lasts.
    tokio::time::sleep(Duration::from_secs(45)).await;
    slices.put("c", "workers", "10.9.0.4", "n1", true).await;
    until(&mut seen, |seen| seen.workers.len() == 2).await;
    sandbox.end().await;
}

#[tokio::test]
async fn an_account_without_rights_is_told_what_it_needs_and_goes_on_when_it_has_it() {
    let Some(sandbox) = Sandbox::new("rbac").await else { return };
    let slices = Slices::of(&sandbox).await;
    slices.put("a", "workers", "10.9.0.1", "n1", true).await;
    let api = sandbox.account("router").await;
    let source: Source = sandbox.object("workers").parse().unwrap();
    let mut seen = watch(&source, &api);
    let account = format!("ServiceAccount {}/router may not use endpointslices", sandbox.namespace);
    let denied =
        until(&mut seen, |seen| seen.problem.as_ref().is_some_and(|text| text.contains(&account))).await;
    assert!(denied.problem.unwrap().contains("the verbs list and watch"));
    let lease = sandbox.object("leader").parse().unwrap();
    let tenure = Tenure::start(api.clone(), lease, "r/1".to_owned(), LeaseTimes::default());
    let mut held = tenure.held();
    let is_denied = |held: &muster_discovery::Held| {
        held.problem.as_ref().is_some_and(|text| text.contains("may not use leases"))
    };
    drop(tokio::time::timeout(SOON, held.wait_for(is_denied)).await.expect("in time").unwrap());
    let refused = secrets::read(&api, Some(&sandbox.namespace), "x").await.unwrap_err();
    assert!(matches!(&refused, ApiError::Denied { resource: "secrets", .. }), "{refused}");

    sandbox.grant("router", "discovery.k8s.io", "endpointslices", &["list", "watch"]).await;
    let begun = Instant::now();
    let mended = until(&mut seen, |seen| seen.problem.is_none()).await;
    eprintln!("endpoints after the grant: {:?}", begun.elapsed());
    assert_eq!(mended.workers.len(), 1);
    sandbox.grant("router", "coordination.k8s.io", "leases", &["get", "create", "update"]).await;
    drop(tokio::time::timeout(SOON, held.wait_for(|held| held.is_held())).await.expect("in time").unwrap());
    tenure.release().await;
    sandbox.end().await;
}

/// One process that wants the Lease.
struct Rival {
    tenure: Option<Tenure>,
    held: tokio::sync::watch::Receiver<muster_discovery::Held>,
}

impl Rival {
    fn start(sandbox: &Sandbox, name: String) -> Self {
        let lease = sandbox.object("leader").parse().unwrap();
        let tenure = Tenure::start(Api::of(sandbox.client.clone()), lease, name, LeaseTimes::default());
        let held = tenure.held();
        Self { tenure: Some(tenure), held }
    }

    fn holds(&self) -> bool {
        self.tenure.is_some() && self.held.borrow().is_held()
    }
}

/// Who holds it at last, and when; at most one does at any moment.
async fn holder(rivals: &[Rival]) -> (usize, Duration) {
    let begun = Instant::now();
    loop {
        let holders: Vec<_> = (0..rivals.len()).filter(|&n| rivals[n].held.borrow().is_held()).collect();
        assert!(holders.len() <= 1, "{holders:?} hold it at once");
        if let Some(&holder) = holders.first().filter(|&&holder| rivals[holder].holds()) {
            return (holder, begun.elapsed());
        }
        assert!(begun.elapsed() < SOON, "nobody holds it");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn one_of_three_holds_the_lease_whoever_is_killed() {
    let Some(sandbox) = Sandbox::new("lease").await else { return };
    let mut rivals: Vec<_> = (0..3).map(|n| Rival::start(&sandbox, format!("r{n}/0"))).collect();
    let (mut now, first) = holder(&rivals).await;
    eprintln!("first held after {first:?}");
    for round in 1..=3 {
        // Killed: nothing is given back, and what it knew stays until it runs out.
        drop(rivals[now].tenure.take());
        let (next, after) = holder(&rivals).await;
        eprintln!("taken over from a killed one after {after:?}");
        assert_ne!(next, now);
        rivals[now] = Rival::start(&sandbox, format!("r{now}/{round}"));
        now = next;
    }
    rivals[now].tenure.take().unwrap().release().await;
    let (next, after) = holder(&rivals).await;
    eprintln!("taken over from one that gave it back after {after:?}");
    assert_ne!(next, now);
    let lease = sandbox.api::<Lease>().get("leader").await.unwrap().spec.unwrap();
    assert!(lease.holder_identity.unwrap().starts_with(&format!("r{next}/")));
    assert_eq!(lease.lease_transitions, Some(5));
    for rival in &mut rivals {
        if let Some(tenure) = rival.tenure.take() {
            tenure.release().await;
        }
    }
    sandbox.end().await;
}

#[tokio::test]
async fn secrets_are_written_read_and_replaced() {
    let Some(sandbox) = Sandbox::new("secrets").await else { return };
    let api = Api::of(sandbox.client.clone());
    let (namespace, name) = (Some(sandbox.namespace.as_str()), "demo-router");
    assert_eq!(secrets::read(&api, namespace, name).await.unwrap(), None);
    let entries = |tag: &str, keys: &[&str]| -> BTreeMap<String, Vec<u8>> {
        keys.iter().map(|&key| (key.to_owned(), format!("{tag} {key}\n").into_bytes())).collect()
    };
    let first = entries("one", &["tls.crt", "tls.key", "ca.crt"]);
    secrets::write(&api, namespace, name, &first).await.unwrap();
    assert_eq!(secrets::read(&api, namespace, name).await.unwrap(), Some(first));
    let second = entries("two", &["tls.crt", "tls.key"]);
    secrets::write(&api, namespace, name, &second).await.unwrap();
    assert_eq!(secrets::read(&api, namespace, name).await.unwrap(), Some(second));
    let kept = sandbox.api::<Secret>().get(name).await.unwrap();
    assert_eq!(kept.type_.as_deref(), Some("kubernetes.io/tls"));
    // What is no certificate's Secret is left alone.
    let other = Secret { metadata: named("other"), ..Secret::default() };
    sandbox.api::<Secret>().create(&PostParams::default(), &other).await.unwrap();
    let error =
        secrets::write(&api, namespace, "other", &entries("x", &["tls.crt", "tls.key"])).await.unwrap_err();
    assert!(error.to_string().contains("of type Opaque, not kubernetes.io/tls"), "{error}");
    // As the API server demands of the type.
    let error = secrets::write(&api, namespace, "bare", &entries("x", &["tls.crt"])).await.unwrap_err();
    assert!(matches!(&error, ApiError::Status { code: 422, .. }), "{error}");
    sandbox.end().await;
}
