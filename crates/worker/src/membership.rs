//! Membership with routers: joins each, and joins again whenever a membership ends.
//!
//! A name stands for all routers at its addresses and is resolved again and again: the worker joins each router there,
//! and leaves those whose address the name has lost.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use muster_discovery::Seen;
use muster_dispatch_grpc::{Address, Dialer, JoinError, Membership, join, reached_at};
use muster_types::{Fingerprint, WorkerId};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Source of routers' addresses.
#[derive(Clone)]
pub(crate) enum Routers {
    /// One router's address.
    At(Address),
    /// All routers at the addresses of a name.
    Named {
        /// The name, for logs.
        name: Address,
        seen: watch::Receiver<Seen>,
    },
}

impl Routers {
    /// The routers of an address. Starts resolving, if it is a name.
    pub(crate) fn of(address: &Address) -> Self {
        match address {
            // `localhost` is one address, of the family that answers.
            Address::Tcp { host, port } if host.parse::<IpAddr>().is_err() && host != "localhost" => {
                Self::Named { name: address.clone(), seen: muster_discovery::watch_name(host, *port) }
            }
            address => Self::At(address.clone()),
        }
    }

    /// The current addresses, or why there are none.
    fn now(&self) -> Result<Vec<Address>, String> {
        match self {
            Self::At(address) => Ok(vec![address.clone()]),
            Self::Named { name, seen } => {
                let seen = seen.borrow();
                if seen.workers.is_empty() {
                    let problem = seen
                        .problem
                        .as_ref()
                        .map_or_else(|| "it has no addresses".into(), ToString::to_string);
                    return Err(format!("{name}: {problem}"));
                }
                Ok(seen.workers.keys().copied().map(Address::from).collect())
            }
        }
    }
}

/// Counts a membership while it exists.
struct Known(Arc<AtomicUsize>);

impl Known {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A worker that joins routers.
#[derive(Clone)]
pub(crate) struct Applicant {
    pub(crate) dialer: Dialer,
    pub(crate) worker: WorkerId,
    pub(crate) listen: Address,
    /// Address for others, if it differs from `listen`.
    pub(crate) advertise: Option<Address>,
    /// Fingerprint of its model, if it has one.
    pub(crate) model: Option<Fingerprint>,
    /// Number of memberships.
    pub(crate) known: Arc<AtomicUsize>,
}

impl Applicant {
    async fn ask(&self, router: &Address) -> Result<Membership, JoinError> {
        let me = self.advertise.clone().unwrap_or_else(|| reached_at(&self.listen, router));
        join(&self.dialer, router, &self.worker, &me, self.model).await
    }

    /// Membership with the first of these routers that accepts it. Retries until one does, and logs each new reason.
    ///
    /// # Errors
    /// When a router refuses it, which means a wrong configuration.
    pub(crate) async fn first(
        &self,
        routers: &[Routers],
        waiting: impl Fn(&str),
    ) -> Result<Membership, JoinError> {
        let (mut pause, mut said) = (FIRST_PAUSE, String::new());
        loop {
            let mut reasons = Vec::new();
            for routers in routers {
                match routers.now() {
                    Err(reason) => reasons.push(reason),
                    Ok(addresses) => {
                        for router in addresses {
                            match self.ask(&router).await {
                                Err(error @ (JoinError::Unreachable { .. } | JoinError::Other { .. })) => {
                                    reasons.push(error.to_string());
                                }
                                outcome => return outcome,
                            }
                        }
                    }
                }
            }
            let reason = reasons.join("; ");
            if reason != said {
                tracing::info!(reason, "waiting for a router");
                waiting(&reason);
                said = reason;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Keeps the memberships with all routers, for as long as it is polled.
    pub(crate) async fn stay_with(self, routers: Routers) {
        match routers {
            Routers::At(router) => self.stay(router).await,
            Routers::Named { name, seen } => self.follow(&name, seen).await,
        }
    }

    async fn follow(self, name: &Address, mut seen: watch::Receiver<Seen>) {
        // All tasks end with this future.
        let mut tasks = JoinSet::new();
        let mut members: BTreeMap<SocketAddr, AbortHandle> = BTreeMap::new();
        loop {
            let now: BTreeSet<SocketAddr> = seen.borrow_and_update().workers.keys().copied().collect();
            members.retain(|router, membership| {
                let stays = now.contains(router);
                if !stays {
                    tracing::info!(%name, %router, "the name no longer has this router; letting go");
                    membership.abort();
                }
                stays
            });
            for router in now {
                members.entry(router).or_insert_with(|| tasks.spawn(self.clone().stay(router.into())));
            }
            while tasks.try_join_next().is_some() {}
            if seen.changed().await.is_err() {
                // The resolver panicked, and the log has the panic.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Keeps the membership with one router, for as long as it is polled.
    async fn stay(self, router: Address) {
        let mut pause = FIRST_PAUSE;
        let mut complained = false;
        loop {
            match self.ask(&router).await {
                Ok(membership) => {
                    tracing::info!(%router, "joined");
                    (pause, complained) = (FIRST_PAUSE, false);
                    let known = Known::new(&self.known);
                    membership.ended().await;
                    drop(known);
                    tracing::info!(%router, "the router let go");
                }
                Err(error) if complained => tracing::debug!(%error, "not joined"),
                Err(error) => {
                    tracing::warn!(%error, "not joined; asking again");
                    complained = true;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use muster_discovery::Place;

    use super::*;

    /// A silent listener, and its number of connections.
    async fn listener() -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, calls) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let count = calls.clone();
        tokio::spawn(async move {
            while listener.accept().await.is_ok() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        (address, calls)
    }

    async fn called(calls: &AtomicUsize, times: usize) {
        let enough = calls.load(Ordering::SeqCst) + times;
        tokio::time::timeout(Duration::from_secs(60), async {
            while calls.load(Ordering::SeqCst) < enough {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("it is called");
    }

    #[tokio::test]
    async fn it_is_known_to_those_that_a_name_has_and_to_no_others() {
        let ((a, calls_a), (b, calls_b)) = (listener().await, listener().await);
        let seen = |routers: &[SocketAddr]| Seen {
            workers: routers.iter().map(|router| (*router, Place::default())).collect(),
            problem: None,
        };
        let (sender, receiver) = watch::channel(seen(&[a]));
        let applicant = Applicant {
            dialer: Dialer::default(),
            worker: WorkerId::new("w").unwrap(),
            listen: "127.0.0.1:1".parse().unwrap(),
            advertise: None,
            model: None,
            known: Arc::default(),
        };
        let routers = Routers::Named { name: "routers:1".parse().unwrap(), seen: receiver };
        assert_eq!(routers.now().unwrap(), [Address::from(a)]);
        let staying = tokio::spawn(applicant.stay_with(routers.clone()));
        called(&calls_a, 2).await;
        assert_eq!(calls_b.load(Ordering::SeqCst), 0);
        sender.send(seen(&[a, b])).unwrap();
        called(&calls_b, 1).await;
        called(&calls_a, 1).await;
        sender.send(seen(&[b])).unwrap();
        called(&calls_b, 1).await;
        let before = calls_a.load(Ordering::SeqCst);
        called(&calls_b, 3).await;
        assert_eq!(calls_a.load(Ordering::SeqCst), before, "it is still asked");
        // An aborted future leaves no task, and the resolver still works.
        staying.abort();
        assert!(staying.await.unwrap_err().is_cancelled());
        assert_eq!(routers.now().unwrap(), [Address::from(b)]);
    }

    #[tokio::test]
    async fn names_stand_for_all_their_addresses_and_addresses_for_themselves() {
        let is_name = |text: &str| matches!(Routers::of(&text.parse().unwrap()), Routers::Named { .. });
        for name in ["demo-routers:50051", "routers.ns.svc.cluster.local:1"] {
            assert!(is_name(name), "{name}");
        }
        for address in ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/x.sock"] {
            assert!(!is_name(address), "{address}");
        }
    }
}
