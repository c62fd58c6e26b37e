//! The world: time, messages, who is alive, and what is known to be true of all of it at once.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::time::Duration;

use muster_engine::delivery::Hop;
use muster_engine::dispatch::Ticket;
use muster_engine::reach::LayerGroups;
use muster_engine::scheduler::{PrefixCache, SchedulerConfig};
use muster_placement::leader::{OrderId, Rhythm};
use muster_placement::lease::{Ask, Reply};
use muster_placement::{ExpertSizes, Orders, Shape, split};
use muster_types::{Combine, Epoch, ExpertKey, Fault, Numerics, NumericsClass, Reach, TokenId};

use crate::faults::{self, Counts};
use crate::rng::{Rng, mix};
use crate::router::Router;
use crate::toy::Toy;
use crate::wire::ToyRows;
use crate::worker::Worker;

/// Microseconds since the beginning.
pub(crate) type Time = u64;

pub(crate) const MS: Time = 1000;
pub(crate) const SECOND: Time = 1000 * MS;

/// Faults come until then; afterwards everything heals.
pub(crate) const QUIET: Time = 12 * SECOND;
/// By then all must be well again.
pub(crate) const END: Time = QUIET + 60 * SECOND;

/// How long a sequence waits for its experts.
pub(crate) const EXPERT_TIMEOUT: Time = 2 * SECOND;
/// Between tries to connect.
pub(crate) const RETRY: Time = 100 * MS;

/// From a router to a worker.
#[derive(Debug, Clone)]
pub(crate) enum ToWorker {
    Shard(Shard),
    Ask { round: u64, ask: Ask },
    Orders(Order),
}

/// Rows for a worker.
#[derive(Debug, Clone)]
pub(crate) struct Shard {
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) rows: Vec<u64>,
    /// Which of the rows each output is of, and whose it is, in the order of the reply.
    pub(crate) pairs: Vec<(u32, ExpertKey)>,
    /// Of each output, where the worker is to add them up.
    pub(crate) weights: Vec<f32>,
}

#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) id: OrderId,
    pub(crate) seen: Epoch,
    pub(crate) orders: Orders,
    /// For whatever is taken away: whose copies the leader counted on, and when. Only for checks.
    pub(crate) relied: BTreeMap<ExpertKey, Relied>,
}

#[derive(Debug, Clone)]
pub(crate) struct Relied {
    pub(crate) at: Time,
    /// Workers and their lives.
    pub(crate) on: Vec<(usize, u64)>,
}

/// From a worker to a router.
#[derive(Debug, Clone)]
pub(crate) enum ToRouter {
    Announce { epoch: u64, held: BTreeSet<ExpertKey>, draining: bool },
    Answer { id: u64, outcome: Result<ToyRows, Fault> },
    Granted { round: u64, reply: Reply, epoch: u64 },
    Obeyed { id: OrderId, epoch: Option<u64> },
}

#[derive(Debug, Clone)]
pub(crate) enum Event {
    ToWorker {
        router: usize,
        worker: usize,
        session: u64,
        message: ToWorker,
    },
    ToRouter {
        router: usize,
        worker: usize,
        session: u64,
        message: ToRouter,
    },
    /// A router notices that a session is over.
    Broken {
        router: usize,
        worker: usize,
        session: u64,
    },
    /// A router tries to connect.
    Connect {
        router: usize,
        worker: usize,
        life: u64,
    },
    WorkerTimer {
        worker: usize,
        life: u64,
        timer: WorkerTimer,
    },
    RouterTimer {
        router: usize,
        life: u64,
        timer: RouterTimer,
    },
    Client {
        request: usize,
    },
    Fault(faults::Fault),
}

#[derive(Debug, Clone)]
pub(crate) enum WorkerTimer {
    Computed { router: usize, session: u64, message: ToRouter },
    Loaded { load: u64 },
    Released { key: ExpertKey, at: Time },
}

#[derive(Debug, Clone)]
pub(crate) enum RouterTimer {
    Poke,
    Attended {
        step: u64,
        lane: usize,
    },
    Due {
        ticket: Ticket,
        lane: usize,
    },
    /// Another fleet is built.
    Fleet,
    /// A worker in doubt was to give a sign of life by now.
    Silence {
        hop: Hop,
    },
    Tick,
    CloseRound,
    Stirred,
    Send {
        orders: Vec<(usize, Order)>,
    },
}

/// A process: alive or not, running or not.
#[derive(Debug, Default)]
pub(crate) struct Process {
    pub(crate) alive: bool,
    /// How often it was started.
    pub(crate) life: u64,
    pub(crate) stopped: bool,
    /// What came while it stood still.
    pub(crate) inbox: Vec<Event>,
}

/// The way between a router and a worker.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    pub(crate) up: bool,
    pub(crate) session: u64,
    /// No connection is to be had until then.
    pub(crate) blocked: Time,
    /// Nothing gets through until then, and nothing is lost.
    pub(crate) held: Time,
}

/// A client's request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) max_tokens: u32,
    /// What it gives when nothing disturbs it, with what experts were bound to when it was taken in. Of another value where they
    /// are bound to nothing, but of that length.
    pub(crate) expected: Vec<TokenId>,
    /// The router that has it, and that router's life.
    pub(crate) at: Option<(usize, u64)>,
    pub(crate) ended: bool,
}

/// What does not change during a run.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) toy: Toy,
    /// Layers that share tables of KV blocks.
    pub(crate) groups: LayerGroups,
    pub(crate) shape: Shape,
    pub(crate) sizes: ExpertSizes,
    pub(crate) min_replicas: NonZero<u32>,
    pub(crate) rhythm: Rhythm,
    pub(crate) scheduler: SchedulerConfig,
    /// Whether steps travel in two lanes.
    pub(crate) two_lanes: bool,
    /// How long a worker keeps what it announced to hold no more.
    pub(crate) grace: Time,
    /// How long attention takes.
    pub(crate) attention: Time,
    /// How long building a fleet takes.
    pub(crate) building: Time,
    /// Where outputs are added up.
    pub(crate) combine: Combine,
    /// Whether experts are bound to classes.
    pub(crate) numerics: Numerics,
    /// Those that workers are of.
    pub(crate) classes: [NumericsClass; 2],
    /// Whether a worker that starts holds its share at once.
    pub(crate) starts_with_share: bool,
}

/// The events of a run, for comparison and to read.
#[derive(Debug)]
pub(crate) struct Trace {
    pub(crate) hash: u64,
    print: bool,
}

pub(crate) struct World {
    pub(crate) now: Time,
    sequence: u64,
    queue: BTreeMap<(Time, u64), Event>,
    pub(crate) rng: Rng,
    pub(crate) spec: Spec,
    pub(crate) workers: Vec<Worker>,
    pub(crate) routers: Vec<Router>,
    /// By router and worker.
    pub(crate) links: Vec<Vec<Link>>,
    pub(crate) requests: Vec<Request>,
    pub(crate) counts: Counts,
    pub(crate) trace: Trace,
    /// What was announced, by worker, life and epoch.
    pub(crate) announced: BTreeMap<(usize, u64, u64), BTreeSet<ExpertKey>>,
    /// When a worker last died that held this.
    pub(crate) died_with: BTreeMap<ExpertKey, Time>,
    /// The next leader that has made orders stands still for so long.
    pub(crate) stop_leader_for: Option<Time>,
}

/// What a layer sees.
fn reach(rng: &mut Rng) -> Reach {
    let size = NonZero::new(1 + rng.below(9) as u32).unwrap();
    match rng.below(4) {
        0 | 1 => Reach::All,
        2 => Reach::Last(size),
        _ => Reach::Chunk(size),
    }
}

impl World {
    /// The world of this seed, with nothing in it done yet.
    pub(crate) fn new(seed: u64, print: bool) -> Self {
        let mut rng = Rng::new(mix(seed, 1));
        let layers = 1 + rng.below(3);
        let k = 1 + rng.below(3);
        let experts: Vec<u32> = (0..layers).map(|_| k as u32 + rng.between(1, 8) as u32).collect();
        let reaches: Vec<Reach> = (0..layers).map(|_| reach(&mut rng)).collect();
        let groups = LayerGroups::of(reaches.iter().copied());
        let toy = Toy { experts: experts.clone(), reaches, k, vocab: 40, salt: rng.next() };
        let shape = Shape::new(experts);
        let bytes: Vec<u64> = (0..layers).map(|_| rng.between(5, 16)).collect();
        let numerics = if rng.chance(20) { Numerics::Any } else { Numerics::Exact };
        let cpu = NumericsClass::CpuCanonical;
        let classes = if rng.chance(50) { [cpu, NumericsClass::CudaMma] } else { [cpu; 2] };
        let mut largest = bytes.iter().copied().max().unwrap();
        let mut sizes = ExpertSizes::new(&shape, bytes).unwrap();
        if classes[1] != cpu {
            let bytes: Vec<u64> = (0..layers).map(|_| rng.between(5, 16)).collect();
            largest = largest.max(bytes.iter().copied().max().unwrap());
            sizes = sizes.with(&shape, classes[1], bytes).unwrap();
        }
        let count = 1 + rng.below(6);
        let routers = 1 + rng.below(2);
        let max_running = 1 + rng.below(6);
        let scheduler = SchedulerConfig {
            block_tokens: NonZero::new(1 + rng.below(5) as u32).unwrap(),
            groups: groups.reaches().to_vec(),
            blocks: (24 + rng.below(40) as u32) * groups.reaches().len() as u32,
            context: 24,
            max_running,
            max_waiting: 64,
            step_tokens: max_running as u32 + rng.below(16) as u32,
            prefill_chunk: 1 + rng.below(12) as u32,
            prefix_cache: if rng.chance(70) { PrefixCache::On } else { PrefixCache::Off },
        };
        // Things fail here for about as long as it is between two counts, and less than a plan's age.
        let mut rhythm = Rhythm::default();
        if rng.chance(50) {
            (rhythm.rebalance, rhythm.plan_age) = (Duration::from_secs(1), Duration::from_secs(4));
        }
        let spec = Spec {
            rhythm,
            toy,
            groups,
            min_replicas: NonZero::new(1 + rng.below(3) as u32).unwrap(),
            scheduler,
            two_lanes: rng.chance(50),
            grace: rng.between(MS, 100 * MS),
            attention: rng.between(MS, 8 * MS),
            building: if rng.chance(50) { 0 } else { rng.between(MS, 50 * MS) },
            combine: if rng.chance(30) { Combine::Partial } else { Combine::Exact },
            starts_with_share: rng.chance(50),
            numerics,
            classes,
            shape,
            sizes,
        };
        let mut world = Self {
            now: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            rng,
            workers: Vec::new(),
            routers: Vec::new(),
            links: vec![vec![Link::default(); count]; routers],
            requests: Vec::new(),
            counts: Counts::default(),
            trace: Trace { hash: seed, print },
            announced: BTreeMap::new(),
            died_with: BTreeMap::new(),
            stop_leader_for: None,
            spec,
        };
        world.populate(count, routers, largest);
        world
    }

    fn populate(&mut self, workers: usize, routers: usize, largest: u64) {
        // Together they have room for all experts and a few more.
        let (sizes, classes) = (&self.spec.sizes, self.spec.classes);
        let bytes =
            |key: ExpertKey| classes.map(|class| sizes.get(class, key.layer)).into_iter().max().unwrap();
        let all = NonZero::new(workers as u32).unwrap();
        let share = |of: u32| split(&self.spec.shape, all, of).unwrap().into_iter().map(bytes).sum();
        let even = self.spec.shape.keys().map(bytes).sum::<u64>() / workers as u64 + largest;
        let least = (0..all.get()).map(share).fold(even, u64::max);
        for number in 0..workers {
            let capacity = least + self.rng.between(0, least + 3 * largest) + self.rng.between(0, largest);
            let speed = self.rng.between(1, 9);
            let domain = self.rng.chance(60).then(|| format!("rack-{}", self.rng.below(3)));
            let load = self.rng.between(20 * MS, 200 * MS);
            let class = self.spec.classes[self.rng.below(2)];
            self.workers.push(Worker::new(number, class, capacity, speed, domain, load));
        }
        self.routers = (0..routers).map(|number| Router::new(number, &self.spec, workers, 0)).collect();
        for worker in 0..workers {
            self.start_worker(worker);
        }
        for router in 0..routers {
            self.start_router(router);
        }
        for _ in 0..self.rng.between(15, 40) {
            let at = self.rng.between(0, QUIET);
            self.add_request(at);
        }
        faults::schedule(self);
    }

    fn add_request(&mut self, at: Time) {
        let toy = self.spec.toy.clone();
        let length = 1 + self.rng.below(14);
        // There are two beginnings, so that prefixes are shared.
        let family = self.rng.next() % 2;
        let common = self.rng.below(12);
        let number = self.requests.len() as u64;
        let word = |position: usize| {
            let owner = if position < common { family } else { 10 + number };
            toy.token(mix(owner, position as u64))
        };
        let prompt: Vec<TokenId> = (0..length).map(word).collect();
        let max_tokens = 1 + self.rng.below(16) as u32;
        let request = self.requests.len();
        self.requests.push(Request { prompt, max_tokens, expected: Vec::new(), at: None, ended: false });
        self.at(at, Event::Client { request });
    }

    /// Puts an event into the queue.
    pub(crate) fn at(&mut self, time: Time, event: Event) {
        self.sequence += 1;
        self.queue.insert((time.max(self.now), self.sequence), event);
    }

    pub(crate) fn after(&mut self, delay: Time, event: Event) {
        self.at(self.now + delay, event);
    }

    /// Takes note of something that happened.
    pub(crate) fn note(&mut self, what: &str, a: usize, b: u64, c: u64) {
        let name = what.bytes().fold(0, |hash, byte| mix(hash, u64::from(byte)));
        let event = mix(mix(name, self.now), mix(a as u64, mix(b, c)));
        self.trace.hash = mix(self.trace.hash, event);
        if self.trace.print {
            println!("{:>12} {what} {a} {b} {c}", self.now);
        }
    }

    /// A detail for whoever reads the trace.
    pub(crate) fn tell(&self, detail: impl FnOnce() -> String) {
        if self.trace.print {
            println!("{:>12}   {}", self.now, detail());
        }
    }

    // Messages.

    /// How long a message takes: mostly little, sometimes long enough for others to overtake it.
    fn delay(&mut self) -> Time {
        let jitter = self.rng.between(50, 1500);
        if self.rng.chance(2) { jitter + self.rng.between(5 * MS, 80 * MS) } else { jitter }
    }

    /// Orders and announcements may take longer: whoever sends or reads them has other things to do.
    fn control_delay(&mut self) -> Time {
        let delay = self.delay();
        if self.rng.chance(25) { delay + self.rng.between(5 * MS, SECOND) } else { delay }
    }

    fn arrival(&mut self, router: usize, worker: usize, delay: Time) -> Time {
        self.now.max(self.links[router][worker].held) + delay
    }

    /// Sends on the session that the router knows; lost when that is over.
    pub(crate) fn send_to_worker(&mut self, router: usize, worker: usize, session: u64, message: ToWorker) {
        let link = &self.links[router][worker];
        if link.up && link.session == session {
            let is_control = matches!(message, ToWorker::Orders(_));
            let delay = if is_control { self.control_delay() } else { self.delay() };
            let at = self.arrival(router, worker, delay);
            self.at(at, Event::ToWorker { router, worker, session, message });
        } else {
            self.counts.lost += 1;
        }
    }

    pub(crate) fn send_to_router(&mut self, router: usize, worker: usize, session: u64, message: ToRouter) {
        let link = &self.links[router][worker];
        if link.up && link.session == session {
            let is_control = matches!(message, ToRouter::Announce { .. } | ToRouter::Obeyed { .. });
            let delay = if is_control { self.control_delay() } else { self.delay() };
            let at = self.arrival(router, worker, delay);
            self.at(at, Event::ToRouter { router, worker, session, message });
        } else {
            self.counts.lost += 1;
        }
    }

    /// Ends the session of a link. What is on its way is lost, and the router notices soon.
    pub(crate) fn cut(&mut self, router: usize, worker: usize) {
        let link = &mut self.links[router][worker];
        if link.up {
            link.up = false;
            let session = link.session;
            let delay = self.rng.between(100, 10 * MS);
            self.after(delay, Event::Broken { router, worker, session });
        }
    }

    fn connect(&mut self, router: usize, worker: usize) {
        let reachable = self.workers[worker].process.alive && !self.workers[worker].process.stopped;
        let link = &mut self.links[router][worker];
        if link.up {
            return;
        }
        if !reachable || self.now < link.blocked || !self.routers[router].may_connect(worker, self.now) {
            let life = self.routers[router].process.life;
            self.after(RETRY, Event::Connect { router, worker, life });
            return;
        }
        link.up = true;
        link.session += 1;
        let session = link.session;
        self.note("connected", router, worker as u64, session);
        let life = self.workers[worker].process.life;
        self.routers[router].connected(worker, session, life);
        self.announce_to(router, worker);
    }

    // The loop.

    fn process(&mut self, event: &Event) -> Option<&mut Process> {
        match *event {
            Event::ToWorker { worker, .. } | Event::WorkerTimer { worker, .. } => {
                Some(&mut self.workers[worker].process)
            }
            Event::ToRouter { router, .. }
            | Event::RouterTimer { router, .. }
            | Event::Broken { router, .. }
            | Event::Connect { router, .. } => Some(&mut self.routers[router].process),
            Event::Client { .. } | Event::Fault(_) => None,
        }
    }

    /// Handles the next event.
    pub(crate) fn step(&mut self) {
        let ((time, _), event) = self.queue.pop_first().expect("there is always a next tick");
        self.now = time;
        if let Some(process) = self.process(&event)
            && process.stopped
        {
            process.inbox.push(event);
            return;
        }
        match event {
            Event::ToWorker { router, worker, session, message } => {
                let link = &self.links[router][worker];
                if !link.up || link.session != session {
                    self.counts.lost += 1;
                } else if self.workers[worker].process.alive {
                    self.at_worker(router, worker, session, message);
                }
            }
            Event::ToRouter { router, worker, session, message } => {
                let link = &self.links[router][worker];
                if !link.up || link.session != session {
                    self.counts.lost += 1;
                } else {
                    self.at_router(router, worker, message);
                }
            }
            Event::Broken { router, worker, session } => self.broken(router, worker, session),
            Event::Connect { router, worker, life } => {
                if self.routers[router].process.alive && self.routers[router].process.life == life {
                    self.connect(router, worker);
                }
            }
            Event::WorkerTimer { worker, life, timer } => {
                let process = &self.workers[worker].process;
                if process.alive && process.life == life {
                    self.worker_timer(worker, timer);
                }
            }
            Event::RouterTimer { router, life, timer } => {
                let process = &self.routers[router].process;
                if process.alive && process.life == life {
                    self.router_timer(router, timer);
                }
            }
            Event::Client { request } => self.client(request),
            Event::Fault(fault) => self.suffer(fault),
        }
    }

    /// A process stands still from now on.
    pub(crate) fn stop(process: &mut Process) {
        process.stopped = true;
    }

    /// It goes on, with all that came meanwhile.
    pub(crate) fn wake(&mut self, inbox: Vec<Event>) {
        for event in inbox {
            self.at(self.now, event);
        }
    }

    // Clients.

    /// A client sends its request to a router that is alive, or tries again later.
    fn client(&mut self, request: usize) {
        if self.requests[request].ended {
            return;
        }
        let routers = self.routers.len();
        let first = self.rng.below(routers);
        let alive = (0..routers).map(|n| (first + n) % routers).find(|&r| self.routers[r].process.alive);
        let taken = alive.is_some_and(|router| self.admit(router, request));
        if !taken {
            self.after(100 * MS, Event::Client { request });
        }
    }

    /// A router is gone; its clients notice.
    pub(crate) fn lose_requests(&mut self, router: usize, life: u64) {
        for request in 0..self.requests.len() {
            if self.requests[request].at == Some((router, life)) {
                self.requests[request].at = None;
                let delay = self.rng.between(MS, 100 * MS);
                self.after(delay, Event::Client { request });
            }
        }
    }

    /// A request ended with these tokens.
    pub(crate) fn end(&mut self, request: usize, tokens: &[TokenId]) {
        let known = &mut self.requests[request];
        assert!(!known.ended, "no-lost-request: request {request} ended twice");
        assert_eq!(tokens.len(), known.expected.len(), "same-output: request {request}");
        if self.spec.numerics == Numerics::Exact {
            assert_eq!(tokens, known.expected, "same-output: request {request}");
        }
        known.ended = true;
        known.at = None;
        self.note("ended", request, tokens.len() as u64, 0);
    }

    // The truth.

    /// Whether a worker that lives has announced this and not withdrawn it.
    pub(crate) fn is_held(&self, key: ExpertKey) -> bool {
        self.workers.iter().any(|worker| worker.process.alive && worker.holds(key))
    }

    /// Everything that must be so once faults have stopped.
    pub(crate) fn is_well(&self) -> bool {
        self.now > QUIET
            && self.requests.iter().all(|request| request.ended)
            && self.spec.shape.keys().all(|key| self.is_held(key))
            && self.routers.iter().all(Router::is_at_rest)
    }
}

impl Process {
    pub(crate) fn take_inbox(&mut self) -> Vec<Event> {
        self.stopped = false;
        std::mem::take(&mut self.inbox)
    }

    /// A new life, with nothing of the old one.
    pub(crate) fn start(&mut self) -> u64 {
        *self = Self { alive: true, life: self.life + 1, ..Self::default() };
        self.life
    }

    pub(crate) fn die(&mut self) {
        self.alive = false;
        self.stopped = false;
        self.inbox.clear();
    }
}
