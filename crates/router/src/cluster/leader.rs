//! The placement leader: sees to it that workers hold what they ought to.
//!
//! Every router runs one; of those that share workers, one leads at a time. It keeps nothing but its plan: what workers
//! announce says the rest, so that another router can go on at any moment. Orders are sent again until they are obeyed.
//! The data path neither waits for it nor knows of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_discovery::{Api, Held, LeaseTimes, ObjectName, Tenure};
use muster_dispatch_grpc::client::ConnectedWorker;
use muster_dispatch_grpc::{ClusterHandle, Digests};
use muster_placement::lease::Term;
use muster_placement::{
    ExpertSizes, Goals, Ledger, Loads, Member, Orders, Present, Shape, Stamp, Target, Transition, plan,
    transition,
};
use muster_proto::control::{Assignment, Load};
use muster_proto::convert::RouterName;
use muster_proto::description::Phase;
use muster_types::{ExpertKey, Speed, WorkerId};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::evidence::Evidence;
use super::lead::Lead;
use super::status::LeaderView;

/// Announcements that come close together are answered together.
const GATHER: Duration = Duration::from_millis(5);
/// How often loads are counted, and moves considered.
const REBALANCE: Duration = Duration::from_secs(10);
/// A plan that was not reached after this long is made anew.
const PLAN_AGE: Duration = Duration::from_secs(60);
/// Orders that are not carried out yet are sent again after this long.
const REPEAT: Duration = Duration::from_secs(5);
/// Workers that an expert may be fetched from, in an order.
const PEERS: usize = 3;

/// What a leader needs to know.
pub(crate) struct LeaderConfig {
    pub(crate) name: RouterName,
    pub(crate) shape: Shape,
    pub(crate) sizes: ExpertSizes,
    /// Copies that each expert shall have.
    pub(crate) replicas: NonZeroU32,
    /// What to hold to be let to ask workers for the lead.
    pub(crate) lease: Option<(Api, ObjectName)>,
    /// What the experts' weights must be.
    pub(crate) digests: Digests,
}

/// See the module.
pub(crate) struct Leader {
    cluster: ClusterHandle,
    shape: Shape,
    sizes: ExpertSizes,
    goals: Goals,
    lead: Lead,
    /// To be held to be let to ask workers for the lead.
    lease: Option<(Api, ObjectName)>,
    digests: Digests,
    view: Arc<LeaderView>,
    evidence: Evidence,
    counted: Instant,
    /// What of the announcements counts.
    ledger: Ledger,
    /// By worker: the session that the ledger knows.
    sessions: BTreeMap<WorkerId, u64>,
    /// What is worked towards, as long as this router leads.
    reign: Option<Reign>,
}

/// A time of leading.
struct Reign {
    term: Term,
    /// The workers that the plan was made for.
    members: BTreeMap<WorkerId, Traits>,
    /// `None` until there is a plan.
    target: Option<Target>,
    planned: Instant,
    /// By worker: what it was told last, in which session and when.
    told: HashMap<WorkerId, Told>,
}

/// A worker that takes orders, and what it certainly holds.
struct Subject {
    worker: ConnectedWorker,
    held: BTreeSet<ExpertKey>,
}

impl std::ops::Deref for Subject {
    type Target = ConnectedWorker;

    fn deref(&self) -> &ConnectedWorker {
        &self.worker
    }
}

/// What a plan depends on, of a worker, beside what it holds.
#[derive(Debug, Clone, PartialEq)]
struct Traits {
    session: u64,
    capacity: u64,
    speed: Speed,
    domain: Option<String>,
    is_draining: bool,
}

struct Told {
    session: u64,
    hold: BTreeSet<ExpertKey>,
    at: Instant,
}

impl Leader {
    pub(crate) fn new(cluster: ClusterHandle, config: LeaderConfig, view: Arc<LeaderView>) -> Self {
        let LeaderConfig { name, shape, sizes, replicas, lease, digests } = config;
        let goals = Goals { min_replicas: replicas, ..Goals::default() };
        let (lead, evidence) = (Lead::new(name), Evidence::new(&shape));
        Self {
            cluster,
            shape,
            sizes,
            goals,
            lead,
            lease,
            digests,
            view,
            evidence,
            counted: Instant::now(),
            ledger: Ledger::default(),
            sessions: BTreeMap::new(),
            reign: None,
        }
    }

    /// Leads when it may, until stopped.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let name = self.lead.name().as_str().to_owned();
        let tenure =
            self.lease.take().map(|(api, lease)| Tenure::start(api, lease, name, LeaseTimes::default()));
        // Told from the start: that nobody leads is watched.
        self.view.resigned();
        let mut permit = Permit(tenure.as_ref().map(Tenure::held));
        let mut changes = self.cluster.changes();
        let mut ticks = tokio::time::interval(Lead::tick());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => {
                    let workers = self.cluster.workers();
                    self.view.barred(permit.problem());
                    if permit.is_open() {
                        self.lead.campaign(&workers).await;
                    } else if self.lead.term().is_some() {
                        self.lead.resign(&workers).await;
                    }
                }
                () = permit.closed(), if self.reign.is_some() => {
                    let workers = self.cluster.workers();
                    self.lead.resign(&workers).await;
                }
                changed = changes.changed(), if self.reign.is_some() => {
                    if changed.is_err() {
                        break;
                    }
                    tokio::time::sleep(GATHER).await;
                    changes.mark_unchanged();
                }
            }
            self.steer(&permit).await;
        }
        let workers = self.cluster.workers();
        self.lead.resign(&workers).await;
        self.view.resigned();
        if let Some(tenure) = tenure {
            tenure.release().await;
        }
    }

    /// Gives orders, if this router leads.
    async fn steer(&mut self, permit: &Permit) {
        let Some(term) = self.lead.term().filter(|_| permit.is_open()) else {
            if self.reign.take().is_some() {
                tracing::info!("another router leads the placement, or none");
                self.view.resigned();
            }
            return;
        };
        let workers = self.accounted(term);
        let members: BTreeMap<WorkerId, Traits> =
            workers.iter().map(|worker| (worker.name().clone(), traits(worker))).collect();
        let reign = match &mut self.reign {
            Some(reign) if reign.term == term => reign,
            reign => {
                tracing::info!(%term, "leading the placement");
                reign.insert(Reign::new(term, members.clone()))
            }
        };
        let changed = std::mem::replace(&mut reign.members, members) != reign.members;
        if reign.target.is_none() && changed {
            // Workers come one by one to a new leader: none is to load what the next one holds.
            return;
        }
        let aged = reign.planned.elapsed() > PLAN_AGE;
        let is_first = reign.target.is_none();
        let mut step = self.transition(&workers);
        // The first count is what later ones are compared with.
        let due = is_first || self.counted.elapsed() >= REBALANCE;
        if due {
            self.count(&workers).await;
        }
        let target = self.reign.as_ref().and_then(|reign| reign.target.as_ref());
        let is_settled = target.is_some_and(|target| step.is_settled(&target.hold));
        if is_first || changed || (aged && !is_settled) || (due && is_settled && self.evidence.is_enough()) {
            let target = self.plan(&workers).await;
            if let Some(reign) = &mut self.reign {
                report(reign.target.as_ref(), &target);
                (reign.target, reign.planned) = (Some(target), Instant::now());
            }
            step = self.transition(&workers);
        }
        let target = self.reign.as_ref().and_then(|reign| reign.target.as_ref());
        self.view.leads(term.get(), target.map_or(0.0, |target| target.figures.imbalance));
        // Planning takes its time.
        if permit.is_open() {
            self.order(&workers, step).await;
        }
    }

    /// The workers that answer and that this router may give orders to, as far as what they announce counts.
    fn accounted(&mut self, term: Term) -> Vec<Subject> {
        let workers: Vec<_> =
            self.cluster.workers().into_iter().filter(|worker| self.lead.answers(worker)).collect();
        self.ledger.lead(term);
        let now: BTreeMap<WorkerId, u64> =
            workers.iter().map(|worker| (worker.name().clone(), worker.session)).collect();
        for (worker, session) in &self.sessions {
            if now.get(worker) != Some(session) {
                self.ledger.lost(worker);
            }
        }
        self.sessions = now;
        let mut subjects = Vec::new();
        for worker in workers {
            let (name, description) = (worker.name().clone(), &worker.description);
            if let Some((term, epoch)) = self.lead.grant(worker.session) {
                self.ledger.granted(&name, term, epoch);
            }
            let held = description.holdings.iter().copied().collect();
            self.ledger.announced(&name, description.epoch, &held);
            subjects.extend(self.ledger.held(&name).map(|held| Subject { worker, held }));
        }
        subjects
    }

    /// Who ought to hold what. Long for a large cluster, hence not on the threads that serve.
    async fn plan(&self, workers: &[Subject]) -> Target {
        let (shape, sizes, goals) = (self.shape.clone(), self.sizes.clone(), self.goals);
        // Few counts say little; then experts are taken to be asked alike.
        let loads =
            if self.evidence.is_enough() { self.evidence.loads().clone() } else { Loads::new(&shape) };
        let members: BTreeMap<WorkerId, Member> =
            workers.iter().map(|worker| (worker.name().clone(), member(worker))).collect();
        let planned = members.clone();
        let work = tokio::task::spawn_blocking(move || plan(&shape, &sizes, &planned, &loads, &goals));
        match work.await {
            Ok(target) => target,
            // It panicked, which is in the log: everything stays where it is.
            Err(_) => Target {
                hold: members.into_iter().map(|(name, member)| (name, member.held)).collect(),
                figures: muster_placement::Figures {
                    imbalance: 1.0,
                    layer_imbalance: 1.0,
                    first_bytes: 0,
                    moved_bytes: 0,
                    uncovered: Vec::new(),
                    under_replicated: Vec::new(),
                },
            },
        }
    }

    fn transition(&self, workers: &[Subject]) -> Transition {
        let present =
            |worker: &Subject| Present { capacity: worker.description.capacity, held: worker.held.clone() };
        let present = workers.iter().map(|worker| (worker.name().clone(), present(worker))).collect();
        let nothing = BTreeMap::new();
        let target = self.reign.as_ref().and_then(|reign| reign.target.as_ref());
        let target = target.map_or(&nothing, |target| &target.hold);
        transition(&self.sizes, &present, target, self.evidence.loads(), self.goals.min_replicas)
    }

    async fn count(&mut self, workers: &[Subject]) {
        let mut asked = tokio::task::JoinSet::new();
        for worker in workers {
            let (worker, experts) = (worker.worker.clone(), self.shape.experts().to_vec());
            asked.spawn(async move { (worker.session, worker.count_rows(&experts).await) });
        }
        let mut counts = HashMap::new();
        while let Some(answer) = asked.join_next().await {
            if let Ok((session, Ok(rows))) = answer {
                counts.insert(session, rows);
            }
        }
        self.evidence.observe(self.counted.elapsed(), counts);
        self.counted = Instant::now();
        let rows = workers.iter().map(|worker| (worker.session, self.evidence.rows_of(worker.session)));
        self.view.counted(rows.collect());
    }

    /// Tells each worker what it does not know yet.
    async fn order(&mut self, workers: &[Subject], step: Transition) {
        let Some(reign) = &mut self.reign else { return };
        let Transition { orders, forced, stuck } = step;
        metrics::gauge!("muster_placement_stuck_experts").set(stuck.len() as f64);
        for (worker, key) in forced {
            tracing::warn!(%worker, expert = %key, "a copy goes early, to make room");
        }
        let mut sending = tokio::task::JoinSet::new();
        for worker in workers {
            let Some(orders) = orders.get(worker.name()) else { continue };
            let Orders { keep, load } = orders;
            let hold: BTreeSet<ExpertKey> = keep.iter().chain(load).copied().collect();
            let known = reign.told.get(worker.name()).is_some_and(|told| {
                let again = !load.is_empty() && told.at.elapsed() > REPEAT;
                told.session == worker.session && told.hold == hold && !again
            });
            if known {
                continue;
            }
            let Stamp { number, seen } = self.ledger.order(worker.name(), orders);
            let Some((term, operation)) = NonZeroU64::new(reign.term.get()).zip(NonZeroU64::new(number))
            else {
                continue;
            };
            let (peers, load) = sources(load, worker, workers, &self.digests);
            let assignment = Assignment {
                router: self.lead.name().clone(),
                term,
                operation,
                seen,
                keep: keep.iter().copied().collect(),
                load,
                peers,
            };
            let worker = worker.worker.clone();
            sending.spawn(async move {
                let outcome = worker.assign(&assignment).await;
                (worker, hold, number, outcome)
            });
        }
        while let Some(sent) = sending.join_next().await {
            let Ok((worker, hold, number, outcome)) = sent else { continue };
            match outcome {
                Ok(epoch) => {
                    metrics::counter!("muster_placement_orders_total").increment(1);
                    self.ledger.obeyed(worker.name(), reign.term, number, epoch);
                    let told = Told { session: worker.session, hold, at: Instant::now() };
                    reign.told.insert(worker.name().clone(), told);
                }
                Err(error) => {
                    reign.told.remove(worker.name());
                    tracing::warn!(worker = %worker.name(), %error, "a worker did not take its orders");
                }
            }
        }
    }
}

/// Whether this router may ask for the lead: always, or as long as it holds a Lease.
struct Permit(Option<watch::Receiver<Held>>);

impl Permit {
    fn is_open(&self) -> bool {
        self.0.as_ref().is_none_or(|held| held.borrow().is_held())
    }

    fn problem(&self) -> Option<String> {
        self.0.as_ref().and_then(|held| held.borrow().problem.clone())
    }

    /// Resolves when it is closed.
    async fn closed(&mut self) {
        let Some(held) = &mut self.0 else { return std::future::pending().await };
        loop {
            let until = match held.borrow_and_update().until() {
                Some(until) if tokio::time::Instant::now() < until => until,
                _ => return,
            };
            // An end of its task is not an end of what was granted.
            let changed = async {
                if held.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = changed => {}
            }
        }
    }
}

impl Reign {
    fn new(term: Term, members: BTreeMap<WorkerId, Traits>) -> Self {
        // As if they had just come, so that the first look at them is not the last.
        let members = members.into_iter().map(|(name, of)| (name, Traits { session: 0, ..of })).collect();
        Self { term, members, target: None, planned: Instant::now(), told: HashMap::new() }
    }
}

fn traits(worker: &Subject) -> Traits {
    let description = &worker.description;
    Traits {
        session: worker.session,
        capacity: description.capacity,
        speed: description.speed,
        domain: worker.domain.clone(),
        is_draining: description.phase == Phase::Draining,
    }
}

fn member(worker: &Subject) -> Member {
    let Traits { capacity, speed, domain, is_draining, .. } = traits(worker);
    let held = worker.held.clone();
    Member { capacity, speed, domain, draining: is_draining, held }
}

/// Where a worker finds what it is to load: a few of those that hold each expert, not always the same.
fn sources(
    load: &[ExpertKey],
    to: &Subject,
    workers: &[Subject],
    digests: &Digests,
) -> (Vec<String>, Vec<Load>) {
    let others: Vec<&Subject> = workers.iter().filter(|worker| worker.session != to.session).collect();
    let peers = others.iter().map(|worker| worker.address.clone()).collect();
    let load = load
        .iter()
        .enumerate()
        .map(|(nth, &key)| {
            let holds =
                |(_, worker): &(usize, &&Subject)| worker.description.holdings.binary_search(&key).is_ok();
            let mut holders: Vec<u32> =
                others.iter().enumerate().filter(holds).map(|(at, _)| at as u32).collect();
            let turn = nth % holders.len().max(1);
            holders.rotate_left(turn);
            holders.truncate(PEERS);
            Load { key, peers: holders, digest: digests.expected(key) }
        })
        .collect();
    (peers, load)
}

/// Tells people of a new plan.
fn report(before: Option<&Target>, now: &Target) {
    let figures = &now.figures;
    metrics::gauge!("muster_placement_imbalance").set(figures.imbalance);
    metrics::gauge!("muster_placement_uncovered_experts").set(figures.uncovered.len() as f64);
    metrics::gauge!("muster_placement_under_replicated_experts").set(figures.under_replicated.len() as f64);
    if before.is_some_and(|before| before.hold == now.hold) {
        return;
    }
    metrics::counter!("muster_placement_plans_total").increment(1);
    metrics::counter!("muster_placement_bytes_planned_total")
        .increment(figures.first_bytes.saturating_add(figures.moved_bytes));
    tracing::info!(
        imbalance = figures.imbalance,
        first_bytes = figures.first_bytes,
        moved_bytes = figures.moved_bytes,
        uncovered = figures.uncovered.len(),
        under_replicated = figures.under_replicated.len(),
        "a new placement"
    );
    if let Some(first) = figures.uncovered.first() {
        let count = figures.uncovered.len();
        tracing::error!(count, %first, "no worker has memory for some experts; add workers or raise their --memory");
    }
}
