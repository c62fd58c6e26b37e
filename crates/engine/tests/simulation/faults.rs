//! What goes wrong, when, and how often it did.

use muster_types::ExpertKey;

use crate::world::{Event, MS, QUIET, SECOND, Time, World};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    KillWorker(usize),
    StartWorker(usize),
    StopWorker(usize, Time),
    WakeWorker(usize, u64),
    Lie(usize, Time),
    Drain(usize),
    Break {
        router: usize,
        worker: usize,
        for_: Time,
    },
    Hold {
        router: usize,
        worker: usize,
        for_: Time,
    },
    KillRouter(usize),
    StartRouter(usize),
    StopRouter(usize, Time),
    /// As it has made orders and not sent them.
    StopLeader(Time),
    WakeRouter(usize, u64),
    Hot(ExpertKey),
    Cancel(usize),
    /// The end of all faults.
    Heal,
}

/// How often each thing happened. A run in which something never did shows nothing about it.
#[derive(Debug, Default, Clone)]
pub(crate) struct Counts {
    pub(crate) lost: u64,
    pub(crate) killed_workers: u64,
    pub(crate) stopped_workers: u64,
    pub(crate) lies: u64,
    pub(crate) drained: u64,
    pub(crate) left: u64,
    pub(crate) served_draining: u64,
    pub(crate) broken_links: u64,
    pub(crate) held_links: u64,
    pub(crate) killed_routers: u64,
    pub(crate) stopped_routers: u64,
    pub(crate) stopped_leaders: u64,
    pub(crate) hot: u64,
    pub(crate) cancelled: u64,
    pub(crate) leaders: u64,
    pub(crate) plans: u64,
    pub(crate) stale_orders: u64,
    pub(crate) overtaken_orders: u64,
    pub(crate) overtaken_announcements: u64,
    pub(crate) loaded: u64,
    pub(crate) withdrawn: u64,
    pub(crate) not_held: u64,
    pub(crate) late_replies: u64,
    pub(crate) refused_replies: u64,
    pub(crate) parts_lost: u64,
    pub(crate) stand_ins: u64,
    pub(crate) hedged: u64,
    pub(crate) flights_lost: u64,
    pub(crate) deadlines: u64,
    pub(crate) parked: u64,
    pub(crate) out_of_patience: u64,
    pub(crate) preempted: u64,
    pub(crate) refused: u64,
}

impl Counts {
    /// All of them, by name.
    pub(crate) fn all(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("messages lost", self.lost),
            ("workers killed", self.killed_workers),
            ("workers stopped", self.stopped_workers),
            ("lies", self.lies),
            ("workers drained", self.drained),
            ("workers that left", self.left),
            ("shards served while draining", self.served_draining),
            ("links broken", self.broken_links),
            ("links held", self.held_links),
            ("routers killed", self.killed_routers),
            ("routers stopped", self.stopped_routers),
            ("leaders stopped with orders in hand", self.stopped_leaders),
            ("experts become hot", self.hot),
            ("requests cancelled", self.cancelled),
            ("leads won", self.leaders),
            ("plans made", self.plans),
            ("orders of no leader", self.stale_orders),
            ("orders overtaken", self.overtaken_orders),
            ("announcements overtaken", self.overtaken_announcements),
            ("experts loaded", self.loaded),
            ("experts withdrawn", self.withdrawn),
            ("shards for experts just released", self.not_held),
            ("replies too late", self.late_replies),
            ("replies refused", self.refused_replies),
            ("shards lost with a link", self.parts_lost),
            ("stand-ins", self.stand_ins),
            ("hedges", self.hedged),
            ("flights lost", self.flights_lost),
            ("flights past the deadline", self.deadlines),
            ("sequences parked", self.parked),
            ("requests out of patience", self.out_of_patience),
            ("sequences preempted", self.preempted),
        ]
    }

    pub(crate) fn add(&mut self, other: &Self) {
        let Self {
            lost,
            killed_workers,
            stopped_workers,
            lies,
            drained,
            left,
            served_draining,
            broken_links,
            held_links,
            killed_routers,
            stopped_routers,
            stopped_leaders,
            hot,
            cancelled,
            leaders,
            plans,
            stale_orders,
            overtaken_orders,
            overtaken_announcements,
            loaded,
            withdrawn,
            not_held,
            late_replies,
            refused_replies,
            parts_lost,
            stand_ins,
            hedged,
            flights_lost,
            deadlines,
            parked,
            out_of_patience,
            preempted,
            refused,
        } = other;
        self.lost += lost;
        self.killed_workers += killed_workers;
        self.stopped_workers += stopped_workers;
        self.lies += lies;
        self.drained += drained;
        self.left += left;
        self.served_draining += served_draining;
        self.broken_links += broken_links;
        self.held_links += held_links;
        self.killed_routers += killed_routers;
        self.stopped_routers += stopped_routers;
        self.stopped_leaders += stopped_leaders;
        self.hot += hot;
        self.cancelled += cancelled;
        self.leaders += leaders;
        self.plans += plans;
        self.stale_orders += stale_orders;
        self.overtaken_orders += overtaken_orders;
        self.overtaken_announcements += overtaken_announcements;
        self.loaded += loaded;
        self.withdrawn += withdrawn;
        self.not_held += not_held;
        self.late_replies += late_replies;
        self.refused_replies += refused_replies;
        self.parts_lost += parts_lost;
        self.stand_ins += stand_ins;
        self.hedged += hedged;
        self.flights_lost += flights_lost;
        self.deadlines += deadlines;
        self.parked += parked;
        self.out_of_patience += out_of_patience;
        self.preempted += preempted;
        self.refused += refused;
    }
}

/// Draws the faults of a world.
pub(crate) fn schedule(world: &mut World) {
    let (workers, routers) = (world.workers.len(), world.routers.len());
    let keys: Vec<ExpertKey> = world.spec.shape.keys().collect();
    for _ in 0..world.rng.between(2, 16) {
        let at = world.rng.between(100 * MS, QUIET - SECOND);
        let worker = world.rng.below(workers);
        let router = world.rng.below(routers);
        let for_ = world.rng.between(20 * MS, 3 * SECOND);
        let fault = match world.rng.below(14) {
            0 | 1 => Fault::KillWorker(worker),
            2 | 3 => Fault::StopWorker(worker, for_),
            4 => Fault::Lie(worker, for_),
            5 => Fault::Drain(worker),
            6 | 7 => Fault::Break { router, worker, for_ },
            8 => Fault::Hold { router, worker, for_ },
            9 => Fault::KillRouter(router),
            10 => Fault::StopRouter(router, for_),
            11 => Fault::StopLeader(SECOND + for_),
            12 => Fault::Hot(keys[world.rng.below(keys.len())]),
            _ => Fault::Cancel(world.rng.below(world.requests.len())),
        };
        world.at(at, Event::Fault(fault));
    }
    world.at(QUIET, Event::Fault(Fault::Heal));
}

impl World {
    pub(crate) fn suffer(&mut self, fault: Fault) {
        self.tell(|| format!("{fault:?}"));
        match fault {
            Fault::KillWorker(worker) => {
                if self.workers[worker].process.alive {
                    self.counts.killed_workers += 1;
                    self.kill_worker(worker);
                    let delay = self.rng.between(200 * MS, 5 * SECOND);
                    self.after(delay, Event::Fault(Fault::StartWorker(worker)));
                }
            }
            Fault::StartWorker(worker) => {
                if !self.workers[worker].process.alive {
                    self.start_worker(worker);
                }
            }
            Fault::StopWorker(worker, for_) => {
                let process = &mut self.workers[worker].process;
                if process.alive && !process.stopped {
                    Self::stop(process);
                    let life = process.life;
                    self.counts.stopped_workers += 1;
                    self.after(for_, Event::Fault(Fault::WakeWorker(worker, life)));
                }
            }
            Fault::WakeWorker(worker, life) => {
                let process = &mut self.workers[worker].process;
                if process.life == life && process.stopped {
                    let inbox = process.take_inbox();
                    self.wake(inbox);
                }
            }
            Fault::Lie(worker, for_) => self.workers[worker].lies_until = self.now + for_,
            Fault::Drain(worker) => {
                let known = &self.workers[worker];
                if known.process.alive && !known.process.stopped && !known.draining && self.workers.len() > 1
                {
                    self.counts.drained += 1;
                    self.drain(worker);
                }
            }
            Fault::Break { router, worker, for_ } => {
                self.counts.broken_links += u64::from(self.links[router][worker].up);
                self.links[router][worker].blocked = self.now + for_;
                self.cut(router, worker);
            }
            Fault::Hold { router, worker, for_ } => {
                self.counts.held_links += 1;
                self.links[router][worker].held = self.now + for_;
            }
            Fault::KillRouter(router) => {
                if self.routers[router].process.alive {
                    self.counts.killed_routers += 1;
                    self.kill_router(router);
                    let delay = self.rng.between(200 * MS, 4 * SECOND);
                    self.after(delay, Event::Fault(Fault::StartRouter(router)));
                }
            }
            Fault::StartRouter(router) => {
                if !self.routers[router].process.alive {
                    self.start_router(router);
                }
            }
            Fault::StopRouter(router, for_) => {
                self.counts.stopped_routers += 1;
                self.stop_router(router, for_);
            }
            Fault::StopLeader(for_) => self.stop_leader_for = Some(for_),
            Fault::WakeRouter(router, life) => {
                let now = self.now;
                let known = &mut self.routers[router];
                if known.process.life == life && known.process.stopped {
                    known.woke = now;
                    let inbox = known.process.take_inbox();
                    self.wake(inbox);
                    // What was asked of it meanwhile.
                    self.poke_later(router, MS);
                }
            }
            Fault::Hot(key) => {
                self.counts.hot += 1;
                self.routers.iter_mut().for_each(|router| router.loads.observe(key, 5000));
            }
            Fault::Cancel(request) => self.cancel(request),
            Fault::Heal => self.heal(),
        }
    }

    fn stop_router(&mut self, router: usize, for_: Time) {
        let process = &mut self.routers[router].process;
        if process.alive && !process.stopped {
            Self::stop(process);
            let life = process.life;
            self.after(for_, Event::Fault(Fault::WakeRouter(router, life)));
        }
    }

    /// A leader has made orders; if it is to stand still, it does so now.
    pub(crate) fn stop_before_sending(&mut self, router: usize) {
        if let Some(for_) = self.stop_leader_for.take() {
            self.counts.stopped_leaders += 1;
            self.stop_router(router, for_);
        }
    }

    /// From now on nothing goes wrong any more.
    fn heal(&mut self) {
        self.stop_leader_for = None;
        for worker in 0..self.workers.len() {
            self.workers[worker].lies_until = 0;
            let life = self.workers[worker].process.life;
            self.suffer(Fault::WakeWorker(worker, life));
            // What nobody else has the memory for keeps a worker from leaving; in the end it leaves all the same.
            if self.workers[worker].process.alive && self.workers[worker].draining {
                self.kill_worker(worker);
            }
            self.suffer(Fault::StartWorker(worker));
        }
        for router in 0..self.routers.len() {
            let life = self.routers[router].process.life;
            self.suffer(Fault::WakeRouter(router, life));
            self.suffer(Fault::StartRouter(router));
        }
        for link in self.links.iter_mut().flatten() {
            (link.blocked, link.held) = (0, 0);
        }
        self.note("healed", 0, 0, 0);
    }
}
