use std::num::NonZero;

use muster_types::{ExpertId, ExpertKey, LayerId, NumericsClass, Speed};

use super::*;
use crate::Orders;
use crate::lease::{Ask, Grant};

const EXPERTS: u32 = 4;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn keys(experts: &[u32]) -> BTreeSet<ExpertKey> {
    let layer = LayerId::new(0, 1).unwrap();
    experts.iter().map(|&e| ExpertKey { layer, expert: ExpertId::new(e, 100).unwrap() }).collect()
}

fn name(number: usize) -> WorkerId {
    WorkerId::new(&format!("w{number}")).unwrap()
}

/// A worker, and whether it is connected and answers.
#[derive(Clone)]
struct Worker {
    session: u64,
    epoch: u64,
    member: Member,
    grant: Grant,
    connected: bool,
    answers: bool,
}

/// A leader and the workers it knows.
struct Cluster {
    leader: Leader,
    now: Duration,
    workers: Vec<Worker>,
}

/// What a step made of things: why a plan was made, if one was, and the orders.
#[derive(Debug, Default)]
struct Done {
    counted: bool,
    cause: Option<Cause>,
    /// `None`: the leader waits.
    send: Option<Vec<Order>>,
}

impl Done {
    /// To whom orders go.
    fn to(&self) -> Vec<String> {
        self.send.iter().flatten().map(|order| order.id.worker.as_str().to_owned()).collect()
    }
}

/// Of experts that nobody held.
fn binding() -> Arc<Binding> {
    Arc::new(Binding::new(Numerics::Exact, &Shape::new(vec![EXPERTS])))
}

impl Cluster {
    /// Workers with room for all experts, that hold these.
    fn new(held: &[&[u32]]) -> Self {
        let shape = Shape::new(vec![EXPERTS]);
        let sizes = ExpertSizes::uniform(&shape, 10).unwrap();
        let goals = Goals { min_replicas: NonZero::<u32>::MIN, ..Goals::default() };
        let leader = Leader::new("r", shape, sizes, goals, Rhythm::default());
        let mut cluster = Self { leader, now: Duration::ZERO, workers: Vec::new() };
        held.iter().for_each(|held| cluster.join(held));
        cluster
    }

    /// One that knows its workers and gave them what orders there are; these are carried out.
    fn settled(held: &[&[u32]]) -> Self {
        let mut cluster = Self::new(held);
        cluster.pass(250);
        for _ in 0..4 {
            let send = cluster.pass(250).send.unwrap_or_default();
            send.iter().for_each(|order| cluster.carry_out(order));
        }
        cluster
    }

    fn join(&mut self, held: &[u32]) {
        let member = Member {
            class: NumericsClass::CpuCanonical,
            capacity: 10 * u64::from(EXPERTS),
            speed: Speed::ONE,
            domain: None,
            draining: false,
            held: keys(held),
        };
        let session = 100 + self.workers.len() as u64;
        let grant = Grant::default();
        self.workers.push(Worker { session, epoch: 1, member, grant, connected: true, answers: true });
    }

    fn announce(&mut self, worker: usize, held: &[u32]) {
        let of = &mut self.workers[worker];
        of.epoch += 1;
        of.member.held = keys(held);
    }

    /// It ends, and is back with nothing on another connection.
    fn restart(&mut self, worker: usize) {
        let of = &mut self.workers[worker];
        (of.session, of.epoch, of.grant) = (of.session + 100, 1, Grant::default());
        of.member.held.clear();
    }

    fn sessions(&self) -> BTreeSet<u64> {
        self.workers.iter().filter(|of| of.connected).map(|of| of.session).collect()
    }

    /// A round of asking, answered by those that answer.
    fn poll(&mut self) {
        let Some(round) = self.leader.tick(self.now, &self.sessions()) else { return };
        self.reply(round);
        self.leader.close_round();
    }

    fn reply(&mut self, Round { number, ask }: Round) {
        for of in self.workers.iter_mut().filter(|of| of.connected && of.answers) {
            let answer = Answer { reply: of.grant.ask(self.now, "r", ask), epoch: Epoch::new(of.epoch) };
            self.leader.answered(of.session, number, Some(answer));
        }
    }

    fn connected(&self) -> Vec<Connected> {
        let connected = |(n, of): (usize, &Worker)| {
            let (name, session, epoch) = (name(n), of.session, Epoch::new(of.epoch));
            Connected { name, session, epoch, member: of.member.clone() }
        };
        self.workers.iter().enumerate().filter(|(_, of)| of.connected).map(connected).collect()
    }

    /// Counts, in which every worker says that each of its experts got so many rows.
    fn step_with(&mut self, rows: u64) -> Done {
        let mut done = Done::default();
        let mut decision = self.leader.step(self.now, self.connected(), binding());
        loop {
            decision = match decision {
                Decision::Wait => return done,
                Decision::Count => {
                    done.counted = true;
                    let rows = self.sessions().into_iter().map(|of| (of, vec![vec![rows; EXPERTS as usize]]));
                    self.leader.counted(self.now, rows.collect())
                }
                Decision::Plan(request) => {
                    done.cause = Some(request.cause());
                    self.leader.planned(self.now, request.plan())
                }
                Decision::Order(step) => {
                    done.send = Some(step.send);
                    return done;
                }
            }
        }
    }

    fn step(&mut self) -> Done {
        self.step_with(0)
    }

    /// So much later: a round, and a step.
    fn pass(&mut self, millis: u64) -> Done {
        self.now += ms(millis);
        self.poll();
        self.step()
    }

    /// Time goes by, with rounds and steps every 250 ms and no step at its end.
    fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds * 4 {
            self.pass(250);
        }
    }

    fn obey(&mut self, order: &Order) {
        let number = self.workers.iter().position(|of| of.session == order.id.session).unwrap();
        let epoch = Epoch::new(self.workers[number].epoch);
        self.leader.obeyed(self.now, &order.id, epoch);
    }

    /// A worker does it all, and says so.
    fn carry_out(&mut self, order: &Order) {
        let of = self.workers.iter_mut().find(|of| of.session == order.id.session).unwrap();
        of.epoch += 1;
        of.member.held = order.orders.hold();
        self.obey(order);
    }
}

fn held(cluster: &Cluster, worker: usize) -> BTreeSet<ExpertKey> {
    cluster.leader.subjects()[&name(worker)].member.held.clone()
}

#[test]
fn nothing_is_decided_without_the_lead() {
    let mut cluster = Cluster::new(&[&[0, 1], &[2, 3]]);
    let done = cluster.step();
    assert!(done.send.is_none() && !done.counted);
    assert!(cluster.leader.subjects().is_empty() && cluster.leader.reigns().is_none());
}

#[test]
fn a_new_leader_waits_until_no_more_workers_come() {
    let mut cluster = Cluster::new(&[&[0, 1]]);
    assert!(cluster.pass(0).send.is_none(), "a first look");
    cluster.join(&[2]);
    assert!(cluster.pass(250).send.is_none(), "somebody came");
    cluster.join(&[3]);
    assert!(cluster.pass(250).send.is_none());
    let done = cluster.pass(250);
    assert_eq!((done.counted, done.cause), (true, Some(Cause::First)));
    assert_eq!(done.to(), ["w0", "w1", "w2"]);
}

#[test]
fn a_leader_of_another_term_starts_anew() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    let before = cluster.leader.reigns().unwrap();
    cluster.now += Duration::from_secs(10);
    assert!(cluster.step().send.is_none());
    assert_eq!(cluster.leader.reigns(), None);
    let asked = cluster.pass(250);
    assert!(asked.send.is_none() && cluster.leader.reigns().is_some_and(|term| term > before));
    let done = cluster.pass(250);
    assert_eq!(done.cause, Some(Cause::First));
    assert_eq!(done.to(), ["w0", "w1"], "what was told in another term is told again");
}

#[test]
fn a_term_that_was_raised_while_leading_is_another_lead() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    let before = cluster.leader.reigns().unwrap();
    cluster.join(&[]);
    cluster.workers[2].grant.ask(cluster.now, "other", Ask { term: Term::new(7), ttl: ms(100) });
    cluster.pass(250);
    assert_eq!(cluster.leader.reigns(), Some(before), "it hears of the other term");
    let done = cluster.pass(250);
    assert!(cluster.leader.reigns().is_some_and(|term| term > Term::new(7)) && done.send.is_none());
    let done = cluster.pass(250);
    assert_eq!((done.cause, done.to().len()), (Some(Cause::First), 3), "{done:?}");
}

#[test]
fn a_change_of_the_workers_makes_a_new_plan_at_once() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    assert_eq!(cluster.pass(250).cause, None);
    cluster.announce(0, &[0]);
    assert_eq!(cluster.step().cause, None, "what it holds is for the transition");
    cluster.workers[0].member.speed = Speed::new(2.0).unwrap();
    assert_eq!(cluster.step().cause, Some(Cause::Members));
    cluster.workers[0].member.domain = Some("rack".to_owned());
    assert_eq!(cluster.step().cause, Some(Cause::Members));
    cluster.workers[1].member.capacity += 1;
    assert_eq!(cluster.step().cause, Some(Cause::Members));
    cluster.restart(1);
    assert_eq!(cluster.pass(250).cause, Some(Cause::Members));
    cluster.workers[1].connected = false;
    assert_eq!(cluster.step().cause, Some(Cause::Members));
    assert_eq!(cluster.step().cause, None);
}

#[test]
fn a_worker_that_drains_is_emptied_once_others_hold_what_it_held() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    cluster.workers[0].member.draining = true;
    let done = cluster.step();
    assert_eq!((done.cause, done.to()), (Some(Cause::Members), vec!["w1".to_owned()]));
    cluster.carry_out(&done.send.unwrap()[0]);
    let done = cluster.step().send.unwrap();
    assert_eq!((done.len(), &done[0].id.worker, &done[0].orders), (1, &name(0), &Orders::default()));
}

#[test]
fn orders_are_repeated_only_when_they_are_not_carried_out_in_time() {
    let mut cluster = Cluster::new(&[&[0, 1], &[2]]);
    cluster.pass(0);
    let first = cluster.pass(250).send.unwrap();
    assert_eq!(first.len(), 2);
    let (keeps, loads) = if first[0].orders.load.is_empty() { (0, 1) } else { (1, 0) };
    first.iter().for_each(|order| cluster.obey(order));
    let repeat = Rhythm::default().repeat;
    let told = cluster.now;
    while cluster.now + ms(250) <= told + repeat {
        assert!(cluster.pass(250).to().is_empty(), "{:?}", cluster.now);
    }
    let again = cluster.pass(250).send.unwrap();
    assert_eq!(again, [first[loads].clone()], "as they were, to whoever still has something to do");
    // Whether they came is not known: they are repeated, whatever they say.
    let mut cluster = Cluster::new(&[&[0, 1], &[2]]);
    cluster.pass(0);
    let first = cluster.pass(250).send.unwrap();
    cluster.wait(5);
    assert_eq!(cluster.pass(250).send.unwrap(), first);
    // A refusal is known at once, and an answer to other orders means nothing.
    let other = OrderId { number: first[keeps].id.number + 1, ..first[keeps].id.clone() };
    cluster.leader.failed(&other);
    assert!(cluster.pass(250).to().is_empty());
    cluster.leader.failed(&first[keeps].id);
    assert_eq!(cluster.pass(250).send.unwrap(), [first[keeps].clone()]);
}

#[test]
fn what_is_known_to_be_carried_out_is_not_repeated() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2]]);
    for _ in 0..4 * 30 {
        assert!(cluster.pass(250).to().is_empty());
    }
    // Another connection is another worker.
    cluster.workers[0].session += 100;
    assert_eq!(cluster.pass(250).to(), ["w0"]);
}

#[test]
fn a_plan_that_is_not_reached_is_made_anew_when_it_is_old() {
    let mut cluster = Cluster::new(&[&[0, 1], &[2]]);
    cluster.pass(0);
    assert_eq!(cluster.pass(250).cause, Some(Cause::First));
    let planned = cluster.now;
    while cluster.now + ms(250) <= planned + Rhythm::default().plan_age {
        assert_eq!(cluster.pass(250).cause, None);
    }
    assert_eq!(cluster.pass(250).cause, Some(Cause::Age));
    assert_eq!(cluster.pass(250).cause, None, "and is young again");
    let mut cluster = Cluster::settled(&[&[0, 1], &[2]]);
    for _ in 0..4 * 90 {
        assert_eq!(cluster.pass(250).cause, None, "it was reached");
    }
}

#[test]
fn loads_are_counted_now_and_then_and_moves_made_from_a_settled_cluster_alone() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    let (mut counts, mut plans) = (0, 0);
    for n in 0..4 * 60_u64 {
        cluster.now += ms(250);
        cluster.poll();
        let done = cluster.step_with(1000 * n);
        counts += u32::from(done.counted);
        plans += u32::from(done.cause == Some(Cause::Loads));
        assert!(done.cause.is_none_or(|cause| cause == Cause::Loads && done.counted));
    }
    assert_eq!((counts, plans), (6, 6));
    assert!(cluster.leader.rows().all(|(_, rows)| rows > 0));
    // Few counts say little.
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    cluster.now += Duration::from_secs(20);
    cluster.poll();
    cluster.step();
    cluster.poll();
    cluster.step();
    assert!(cluster.leader.reigns().is_some());
    assert!((0..4 * 30).all(|_| cluster.pass(250).cause.is_none_or(|cause| cause == Cause::First)));
    // While something is on its way, counts are no reason.
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    cluster.announce(0, &[0]);
    for n in 0..4 * 30_u64 {
        cluster.now += ms(250);
        cluster.poll();
        assert_eq!(cluster.step_with(1000 * n).cause, None);
    }
}

#[test]
fn what_a_lost_session_held_counts_no_more() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    // It is back before anybody noticed, and has not granted anything.
    cluster.restart(0);
    let done = cluster.step();
    assert!(!cluster.leader.subjects().contains_key(&name(0)));
    let loads = &done.send.unwrap()[0];
    assert_eq!((&loads.id.worker, keys(&[0, 1])), (&name(1), loads.orders.load.iter().copied().collect()));
    // Epochs of its other life would be higher.
    cluster.pass(250);
    assert_eq!(held(&cluster, 0), keys(&[]));
}

#[test]
fn what_was_ordered_of_a_lost_session_may_still_come_and_its_receipt_says_nothing() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    cluster.announce(1, &[0, 1, 2, 3]);
    cluster.workers[0].member.draining = true;
    let send = cluster.step().send.unwrap();
    let away = send.iter().find(|order| order.id.worker == name(0)).unwrap();
    cluster.restart(0);
    cluster.workers[0].member.draining = false;
    cluster.announce(0, &[0, 1]);
    cluster.pass(250);
    assert_eq!(held(&cluster, 0), keys(&[]), "it may carry that out any moment");
    cluster.leader.obeyed(cluster.now, &away.id, Epoch::new(1));
    cluster.step();
    assert_eq!(held(&cluster, 0), keys(&[]), "epochs of another life say nothing");
}

#[test]
fn copies_that_are_ordered_away_count_no_more() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    cluster.announce(1, &[0, 1, 2, 3]);
    cluster.workers[0].member.draining = true;
    let send = cluster.step().send.unwrap();
    assert!(send.iter().any(|order| order.id.worker == name(0) && order.orders == Orders::default()));
    cluster.step();
    assert_eq!((held(&cluster, 0), cluster.workers[0].member.held.len()), (keys(&[]), 2));
}

#[test]
fn orders_do_not_go_to_workers_that_do_not_answer() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3], &[]]);
    cluster.workers[1].answers = false;
    let since = cluster.now + ms(250);
    while cluster.now + ms(250) < since + Rhythm::default().silence {
        assert_eq!(cluster.pass(250).cause, None, "it may only be slow");
    }
    let done = cluster.pass(250);
    assert_eq!(done.cause, Some(Cause::Members));
    assert!(!cluster.leader.subjects().contains_key(&name(1)));
    let hold = &cluster.leader.target().unwrap().hold;
    let all: BTreeSet<_> = hold.values().flatten().copied().collect();
    assert_eq!((hold.len(), all), (2, keys(&[0, 1, 2, 3])), "others load what it held");
    assert!(!done.to().contains(&"w1".to_owned()));
    // One late answer, to whichever round, and it counts again.
    cluster.workers[1].answers = true;
    cluster.reply(Round { number: 1, ask: Ask { term: Term::default(), ttl: Duration::ZERO } });
    assert_eq!(cluster.step().cause, Some(Cause::Members));
    assert_eq!(held(&cluster, 1), keys(&[2, 3]));
}

#[test]
fn a_worker_that_did_not_grant_the_term_takes_no_orders() {
    let mut cluster = Cluster::new(&[&[0], &[1], &[2, 3]]);
    cluster.workers[2].grant.ask(Duration::ZERO, "other", Ask { term: Term::new(7), ttl: ms(60_000) });
    cluster.pass(0);
    for _ in 0..8 {
        let done = cluster.pass(250);
        assert!(!done.to().contains(&"w2".to_owned()));
    }
    assert_eq!(cluster.leader.subjects().len(), 2);
}

#[test]
fn the_answers_of_a_round_are_waited_for_as_long_as_anybody_may_answer() {
    let mut cluster = Cluster::new(&[&[0], &[1], &[2]]);
    let sessions = cluster.sessions();
    let Round { number, ask } = cluster.leader.tick(ms(0), &sessions).unwrap();
    assert_eq!(cluster.leader.round_ends(), Some(Rhythm::default().patience));
    let mut answer = |worker: usize, leader: &mut Leader, round| {
        let reply = cluster.workers[worker].grant.ask(ms(1), "r", ask);
        let answer = Answer { reply, epoch: Epoch::new(1) };
        leader.answered(cluster.workers[worker].session, round, Some(answer));
    };
    let leader = &mut cluster.leader;
    answer(0, leader, number);
    answer(1, leader, number - 1);
    assert!(leader.round_ends().is_some() && leader.leads(ms(1)).is_none());
    answer(1, leader, number);
    assert!(leader.leads(ms(1)).is_none(), "a majority, but somebody is still waited for");
    leader.answered(102, number, None);
    assert!(leader.round_ends().is_none() && leader.leads(ms(1)).is_some());
    // With nobody there is nothing to wait for.
    let mut cluster = Cluster::new(&[]);
    assert!(cluster.leader.tick(ms(0), &BTreeSet::new()).is_some());
    assert_eq!(cluster.leader.round_ends(), None);
}

#[test]
fn silent_workers_are_not_counted_among_those_of_which_a_majority_is_needed() {
    let mut cluster = Cluster::new(&[&[0], &[1], &[2]]);
    cluster.workers[1].answers = false;
    cluster.workers[2].answers = false;
    cluster.poll();
    assert!(cluster.leader.leads(cluster.now).is_none());
    cluster.wait(8);
    assert!(cluster.leader.leads(cluster.now).is_some(), "of one that answers");
}

#[test]
fn who_resigns_gives_back_what_was_granted_and_leads_no_more() {
    let mut cluster = Cluster::settled(&[&[0, 1], &[2, 3]]);
    let sessions = cluster.sessions();
    let round = cluster.leader.resign(cluster.now, &sessions).unwrap();
    assert_eq!(round.ask.ttl, Duration::ZERO);
    cluster.reply(round);
    assert_eq!(cluster.leader.round_ends(), None);
    assert!(cluster.workers.iter().all(|of| !of.grant.is_held(cluster.now)));
    assert!(cluster.step().send.is_none() && cluster.leader.reigns().is_none());
    assert!(cluster.leader.resign(cluster.now, &sessions).is_none(), "there is nothing more to give");
}

#[test]
fn a_plan_that_took_longer_than_the_lease_is_still_of_use() {
    let mut cluster = Cluster::new(&[&[0, 1], &[2]]);
    cluster.pass(0);
    assert!(matches!(cluster.leader.step(cluster.now, cluster.connected(), binding()), Decision::Count));
    let Decision::Plan(request) = cluster.leader.counted(cluster.now, BTreeMap::new()) else { panic!() };
    let stay = request.stay();
    assert_eq!(stay.target().hold[&name(0)], keys(&[0, 1]));
    // Meanwhile another is asked for, which is the one that counts.
    cluster.leader.step(cluster.now, cluster.connected(), binding());
    let Decision::Plan(other) = cluster.leader.counted(cluster.now, BTreeMap::new()) else { panic!() };
    assert_eq!(cluster.leader.planned(cluster.now, request.plan()), Decision::Wait);
    cluster.now += Duration::from_secs(20);
    assert!(cluster.leader.leads(cluster.now).is_none());
    let Decision::Order(step) = cluster.leader.planned(cluster.now, other.plan()) else { panic!() };
    assert_eq!(step.send.len(), 2);
}
