//! What goes wrong, when, and how often it did.

use muster_types::ExpertKey;

use crate::world::{Event, MS, QUIET, SECOND, Time, World};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

macro_rules! counts {
    ($($field:ident: $name:literal,)*) => {
        /// How often each thing happened. A run in which something never did shows nothing about it.
        #[derive(Debug, Default, Clone)]
        pub(crate) struct Counts {
            $(pub(crate) $field: u64,)*
        }

        impl Counts {
            /// All of them, by name.
            pub(crate) fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$(($name, self.$field)),*]
            }

            pub(crate) fn add(&mut self, other: &Self) {
                $(self.$field += other.$field;)*
            }
        }
    };
}

counts! {
    lost: "messages lost",
    killed_workers: "workers killed",
    stopped_workers: "workers stopped",
    lies: "lies",
    drained: "workers drained",
    left: "workers that left",
    served_draining: "shards served while draining",
    broken_links: "links broken",
    held_links: "links held",
    killed_routers: "routers killed",
    stopped_routers: "routers stopped",
    stopped_leaders: "leaders stopped with orders in hand",
    hot: "experts become hot",
    cancelled: "requests cancelled",
    leaders: "leads won",
    plans: "plans made",
    load_plans: "plans made as loads were counted",
    aged_plans: "plans made as the last was not reached",
    forced: "copies given up early, to make room",
    stuck: "experts stuck for want of memory",
    repeated_orders: "orders repeated",
    stale_orders: "orders of no leader",
    overtaken_orders: "orders overtaken",
    overtaken_announcements: "announcements overtaken",
    loaded: "experts loaded",
    failed_loads: "experts that could not be loaded",
    withdrawn: "experts withdrawn",
    not_held: "shards for experts just released",
    late_replies: "replies too late",
    refused_replies: "replies refused",
    parts_lost: "shards lost with a link",
    stand_ins: "stand-ins",
    hedged: "hedges",
    flights_lost: "flights with rows lost",
    doubts: "workers in doubt",
    given_up: "workers given up for silence",
    banned_for_faults: "workers banned for nothing but faults",
    believed: "claims that nobody contradicted",
    deadlines: "flights past the deadline",
    parked: "sequences parked",
    out_of_patience: "requests out of patience",
    preempted: "sequences preempted",
    rebound: "requests ended as experts changed class",
    discarded: "steps of no use as experts changed class",
    mixed: "rows made by two classes where any will do",
    bound_apart: "steps with experts of both classes, each bound to one",
    forgotten: "sequences that gave up blocks as they went on",
}

/// Draws the faults of a world.
pub(crate) fn schedule(world: &mut World) {
    let (workers, routers) = (world.workers.len(), world.routers.len());
    let keys: Vec<ExpertKey> = world.spec.shape.keys().collect();
    let mut last = None;
    for _ in 0..world.rng.between(2, 16) {
        // What follows on a fault meets what is on its way because of that.
        let close = last.filter(|_| world.rng.chance(50)).map(|last| last + world.rng.between(0, SECOND));
        let at = close.unwrap_or_else(|| world.rng.between(100 * MS, QUIET - SECOND)).min(QUIET - SECOND);
        last = Some(at);
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
                self.workers.iter_mut().for_each(|worker| worker.count(key, 5000));
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
