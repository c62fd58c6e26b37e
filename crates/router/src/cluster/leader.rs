//! The placement leader of this router: a shell around [`placement::leader`](muster_placement::leader).
//!
//! Owns the calls to workers, the permit to campaign, logs and metrics, and where a worker finds what it is to load; what
//! is decided is the leader's. The data path neither waits for it nor knows of it.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_discovery::{Api, Held, LeaseTimes, ObjectName, Tenure};
use muster_dispatch_grpc::client::{ConnectedWorker, ControlError};
use muster_dispatch_grpc::{ClusterHandle, Digests};
use muster_placement::leader::{self, Answer, Connected, Decision, Order, PlanRequest, Rhythm, Round, Step};
use muster_placement::lease::{Reply, Term, Verdict};
use muster_placement::{ExpertSizes, Goals, Member, Shape, Target};
use muster_proto::control::{Assignment, LeadAnswer, LeadAsk, Load};
use muster_proto::convert::RouterName;
use muster_proto::description::Phase;
use muster_types::ExpertKey;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::status::LeaderView;

/// Workers that an expert may be fetched from, in an order.
const PEERS: usize = 3;
/// Answers that nobody has looked at yet.
const ANSWERS: usize = 4096;

/// What a leader needs to know.
pub(crate) struct LeaderConfig {
    /// One that no other process ever has.
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
    name: RouterName,
    shape: Shape,
    rhythm: Rhythm,
    leader: leader::Leader,
    /// What the leader's times are since.
    origin: Instant,
    /// To be held to be let to ask workers for the lead.
    lease: Option<(Api, ObjectName)>,
    digests: Digests,
    view: Arc<LeaderView>,
    answers: mpsc::Sender<Answered>,
    answered: mpsc::Receiver<Answered>,
}

/// A worker's session, the round in which it was asked, and what came of it.
type Answered = (u64, u64, Option<Answer>);

impl Leader {
    pub(crate) fn new(cluster: ClusterHandle, config: LeaderConfig, view: Arc<LeaderView>) -> Self {
        let LeaderConfig { name, shape, sizes, replicas, lease, digests } = config;
        let goals = Goals { min_replicas: replicas, ..Goals::default() };
        let rhythm = Rhythm::default();
        let leader = leader::Leader::new(name.as_str(), shape.clone(), sizes, goals, rhythm);
        let (answers, answered) = mpsc::channel(ANSWERS);
        let origin = Instant::now();
        Self { cluster, name, shape, rhythm, leader, origin, lease, digests, view, answers, answered }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Leads when it may, until stopped.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let name = self.name.as_str().to_owned();
        let tenure =
            self.lease.take().map(|(api, lease)| Tenure::start(api, lease, name, LeaseTimes::default()));
        // Told from the start: that nobody leads is watched.
        self.view.resigned();
        let mut permit = Permit(tenure.as_ref().map(Tenure::held));
        let mut changes = self.cluster.changes();
        let mut ticks = tokio::time::interval(self.rhythm.lease.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => {
                    self.view.barred(permit.problem());
                    if permit.is_open() {
                        self.campaign().await;
                    }
                }
                () = permit.closed(), if self.leader.reigns().is_some() => {}
                changed = changes.changed(), if self.leader.reigns().is_some() => {
                    if changed.is_err() {
                        break;
                    }
                    tokio::time::sleep(self.rhythm.gather).await;
                    changes.mark_unchanged();
                }
            }
            if !permit.is_open() {
                self.resign().await;
            }
            self.steer(&permit).await;
        }
        self.resign().await;
        self.view.resigned();
        if let Some(tenure) = tenure {
            tenure.release().await;
        }
    }

    /// Asks all workers for the lead, if it is time, and waits for those that answer.
    async fn campaign(&mut self) {
        // Where none counted there was nobody to wait for; who answered since then counts again.
        while let Ok((session, round, answer)) = self.answered.try_recv() {
            self.leader.answered(session, round, answer);
        }
        let workers = self.cluster.workers();
        let round = self.leader.tick(self.now(), &sessions(&workers));
        self.ask(round, workers).await;
    }

    /// Gives the lead up, if this router has it.
    async fn resign(&mut self) {
        let workers = self.cluster.workers();
        let round = self.leader.resign(self.now(), &sessions(&workers));
        self.ask(round, workers).await;
    }

    /// Asks all workers, until the round is over.
    async fn ask(&mut self, round: Option<Round>, workers: Vec<ConnectedWorker>) {
        let Some(Round { number, ask }) = round else { return };
        let Some(term) = NonZeroU64::new(ask.term.get()) else { return };
        let request = LeadAsk { router: self.name.clone(), term, ttl: ask.ttl };
        let patience = self.rhythm.silence;
        for worker in workers {
            let (request, answers) = (request.clone(), self.answers.clone());
            // Outlives this round where the worker is slow: its answer then only shows that it answers.
            tokio::spawn(async move {
                let answer = answer(worker.lead(&request, patience).await);
                // When nobody looks any more, nobody leads.
                let _ = answers.try_send((worker.session, number, answer));
            });
        }
        while let Some(end) = self.leader.round_ends() {
            let left = end.saturating_sub(self.now());
            match tokio::time::timeout(left, self.answered.recv()).await {
                Ok(Some((session, round, answer))) => self.leader.answered(session, round, answer),
                _ => self.leader.close_round(),
            }
        }
    }

    /// Does what the leader decides.
    async fn steer(&mut self, permit: &Permit) {
        let workers = self.cluster.workers();
        let before = self.leader.reigns();
        let mut decision =
            self.leader.step(self.now(), workers.iter().map(connected), self.cluster.binding());
        match self.leader.reigns() {
            Some(term) if before != Some(term) => tracing::info!(%term, "leading the placement"),
            None if before.is_some() => {
                tracing::info!("another router leads the placement, or none");
                self.view.resigned();
            }
            _ => {}
        }
        loop {
            decision = match decision {
                Decision::Wait => return,
                Decision::Count => {
                    let rows = self.count(&workers).await;
                    let decision = self.leader.counted(self.now(), rows);
                    self.view.counted(self.leader.rows().collect());
                    decision
                }
                Decision::Plan(request) => {
                    let plan = plan(request).await;
                    report(self.leader.target(), plan.target());
                    self.leader.planned(self.now(), plan)
                }
                Decision::Order(step) => {
                    if let Some((term, target)) = self.leader.reigns().zip(self.leader.target()) {
                        self.view.leads(term.get(), target.figures.imbalance);
                    }
                    // Planning takes its time.
                    if permit.is_open() {
                        self.order(&workers, step).await;
                    }
                    return;
                }
            }
        }
    }

    /// Whether a worker takes orders.
    fn is_subject(&self, worker: &ConnectedWorker) -> bool {
        self.leader.subjects().get(worker.name()).is_some_and(|subject| subject.session == worker.session)
    }

    /// Rows that workers counted, by session.
    async fn count(&self, workers: &[ConnectedWorker]) -> BTreeMap<u64, Vec<Vec<u64>>> {
        let mut asked = tokio::task::JoinSet::new();
        for worker in workers.iter().filter(|worker| self.is_subject(worker)) {
            let (worker, experts) = (worker.clone(), self.shape.experts().to_vec());
            asked.spawn(async move { (worker.session, worker.count_rows(&experts).await) });
        }
        let mut counts = BTreeMap::new();
        while let Some(answer) = asked.join_next().await {
            if let Ok((session, Ok(rows))) = answer {
                counts.insert(session, rows);
            }
        }
        counts
    }

    async fn order(&mut self, workers: &[ConnectedWorker], step: Step) {
        let Step { transition, send } = step;
        metrics::gauge!("muster_placement_stuck_experts").set(transition.stuck.len() as f64);
        for (worker, key) in transition.forced {
            tracing::warn!(%worker, expert = %key, "a copy goes early, to make room");
        }
        let workers: Vec<&ConnectedWorker> =
            workers.iter().filter(|worker| self.is_subject(worker)).collect();
        let mut sending = tokio::task::JoinSet::new();
        for Order { id, seen, orders } in send {
            let numbers = NonZeroU64::new(id.term.get()).zip(NonZeroU64::new(id.number));
            let worker = workers.iter().find(|worker| worker.session == id.session);
            let (Some((term, operation)), Some(&worker)) = (numbers, worker) else { continue };
            let (peers, load) = sources(&orders.load, worker, &workers, &self.digests);
            let keep = orders.keep.into_iter().collect();
            let router = self.name.clone();
            let assignment = Assignment { router, term, operation, seen, keep, load, peers };
            let worker = worker.clone();
            sending.spawn(async move { (id, worker.assign(&assignment).await) });
        }
        while let Some(sent) = sending.join_next().await {
            match sent {
                Ok((id, Ok(epoch))) => {
                    metrics::counter!("muster_placement_orders_total").increment(1);
                    self.leader.obeyed(self.now(), &id, epoch);
                }
                Ok((id, Err(error))) => {
                    self.leader.failed(&id);
                    tracing::warn!(worker = %id.worker, %error, "a worker did not take its orders");
                }
                // It panicked, which is in the log.
                Err(_) => {}
            }
        }
    }
}

fn sessions(workers: &[ConnectedWorker]) -> BTreeSet<u64> {
    workers.iter().map(|worker| worker.session).collect()
}

fn connected(worker: &ConnectedWorker) -> Connected {
    let description = &worker.description;
    let member = Member {
        class: description.numerics,
        capacity: description.capacity,
        speed: description.speed,
        domain: worker.domain.clone(),
        draining: description.phase == Phase::Draining,
        held: description.holdings.iter().copied().collect(),
    };
    Connected { name: worker.name().clone(), session: worker.session, epoch: description.epoch, member }
}

fn answer(answer: Result<LeadAnswer, ControlError>) -> Option<Answer> {
    let LeadAnswer { granted, holder, term, left, epoch } = match answer {
        Ok(answer) => answer,
        Err(error) => {
            tracing::debug!(%error, "a worker did not say whom it obeys");
            return None;
        }
    };
    let verdict = if granted { Verdict::Granted } else { Verdict::Refused };
    let holder = holder.map(|holder| holder.as_str().to_owned());
    Some(Answer { reply: Reply { verdict, holder, term: Term::new(term), left }, epoch })
}

/// Makes a plan. Long for a large cluster, hence not on the threads that serve.
async fn plan(request: PlanRequest) -> leader::Plan {
    let request = Arc::new(request);
    let work = request.clone();
    // A panic is in the log.
    tokio::task::spawn_blocking(move || work.plan()).await.unwrap_or_else(|_| request.stay())
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

/// Where a worker finds what it is to load: a few of those that hold each expert, not always the same.
fn sources(
    load: &[ExpertKey],
    to: &ConnectedWorker,
    workers: &[&ConnectedWorker],
    digests: &Digests,
) -> (Vec<String>, Vec<Load>) {
    let others = workers.iter().copied().filter(|worker| worker.session != to.session);
    let others: Vec<&ConnectedWorker> = others.collect();
    let peers = others.iter().map(|worker| worker.address.clone()).collect();
    let load = load
        .iter()
        .enumerate()
        .map(|(nth, &key)| {
            let holds = |(_, worker): &(usize, &&ConnectedWorker)| {
                worker.description.holdings.binary_search(&key).is_ok()
            };
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
