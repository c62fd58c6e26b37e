//! The placement leader of this router: a shell around [`placement::leader`](muster_placement::leader).
//!
//! Owns the calls to workers, the permit to campaign, logs and metrics, and the sources that orders name for each
//! expert. Decisions are made in `placement::leader`. The data path neither waits for it nor knows of it.

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

/// Most workers that an order names as sources of an expert, in order of preference.
const PEERS: usize = 3;
/// Capacity of the channel for answers.
const ANSWERS: usize = 4096;

/// Settings of a leader.
pub(crate) struct LeaderConfig {
    /// Unique among all router processes.
    pub(crate) name: RouterName,
    pub(crate) shape: Shape,
    pub(crate) sizes: ExpertSizes,
    /// Wanted replicas of each expert.
    pub(crate) replicas: NonZeroU32,
    /// Lease that this router must hold before it campaigns; `None`: no condition.
    pub(crate) lease: Option<(Api, ObjectName)>,
    /// Expected digests of the experts' weights.
    pub(crate) digests: Digests,
}

/// Shell of the leader: network, clock and logs.
pub(crate) struct Leader {
    cluster: ClusterHandle,
    name: RouterName,
    shape: Shape,
    rhythm: Rhythm,
    leader: leader::Leader,
    /// Origin of the leader's times.
    origin: Instant,
    /// Lease that this router must hold before it campaigns; `None`: no condition.
    lease: Option<(Api, ObjectName)>,
    digests: Digests,
    view: Arc<LeaderView>,
    answers: mpsc::Sender<Answered>,
    answered: mpsc::Receiver<Answered>,
}

/// Answer of a worker: its session, the round, and the outcome (`None`: no answer).
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

    /// Campaigns and leads while permitted, until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let name = self.name.as_str().to_owned();
        let tenure =
            self.lease.take().map(|(api, lease)| Tenure::start(api, lease, name, LeaseTimes::default()));
        // Set from the start, because the absence of a leader is monitored.
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

    /// Asks all workers for the lead when a campaign is due, and waits for responsive ones.
    async fn campaign(&mut self) {
        // Late answers, which no round waited for: their workers count again.
        while let Ok((session, round, answer)) = self.answered.try_recv() {
            self.leader.answered(session, round, answer);
        }
        let workers = self.cluster.workers();
        let round = self.leader.tick(self.now(), &sessions(&workers));
        self.ask(round, workers).await;
    }

    /// Resigns the lead, if this router has it.
    async fn resign(&mut self) {
        let workers = self.cluster.workers();
        let round = self.leader.resign(self.now(), &sessions(&workers));
        self.ask(round, workers).await;
    }

    /// Asks all workers and collects answers until the round ends.
    async fn ask(&mut self, round: Option<Round>, workers: Vec<ConnectedWorker>) {
        let Some(Round { number, ask }) = round else { return };
        let Some(term) = NonZeroU64::new(ask.term.get()) else { return };
        let request = LeadAsk { router: self.name.clone(), term, ttl: ask.ttl };
        let patience = self.rhythm.silence;
        for worker in workers {
            let (request, answers) = (request.clone(), self.answers.clone());
            // A slow worker's answer may come after the round; it then only shows that the worker responds.
            tokio::spawn(async move {
                let answer = answer(worker.lead(&request, patience).await);
                // A full or closed channel means that no leader reads it.
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

    /// Carries out the leader's decisions.
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
                    // The permit may have closed while the plan was made.
                    if permit.is_open() {
                        self.order(&workers, step).await;
                    }
                    return;
                }
            }
        }
    }

    /// Whether a worker takes orders from this router.
    fn is_subject(&self, worker: &ConnectedWorker) -> bool {
        self.leader.subjects().get(worker.name()).is_some_and(|subject| subject.session == worker.session)
    }

    /// Rows counted by each worker, by session.
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
                // The task panicked, which is in the log.
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

/// Makes a plan on a blocking thread: a large cluster takes long.
async fn plan(request: PlanRequest) -> leader::Plan {
    let request = Arc::new(request);
    let work = request.clone();
    // A panic is in the log.
    tokio::task::spawn_blocking(move || work.plan()).await.unwrap_or_else(|_| request.stay())
}

/// Permission to campaign: always, or while a Lease is held.
struct Permit(Option<watch::Receiver<Held>>);

impl Permit {
    fn is_open(&self) -> bool {
        self.0.as_ref().is_none_or(|held| held.borrow().is_held())
    }

    fn problem(&self) -> Option<String> {
        self.0.as_ref().and_then(|held| held.borrow().problem.clone())
    }

    /// Resolves when the permit is closed.
    async fn closed(&mut self) {
        let Some(held) = &mut self.0 else { return std::future::pending().await };
        loop {
            let until = match held.borrow_and_update().until() {
                Some(until) if tokio::time::Instant::now() < until => until,
                _ => return,
            };
            // If the Lease's task ends, the last grant still holds until it expires.
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

/// Sources of each expert that a worker is to load: up to [`PEERS`] of its holders, rotated to spread the load.
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

/// Logs a new plan.
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
