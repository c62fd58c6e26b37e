//! What leases promise: rule by rule, and on routers that die, stop and lose messages.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const TTL: Duration = Duration::from_millis(1500);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn ask(term: u64) -> Ask {
    Ask { term: Term::new(term), ttl: TTL }
}

fn give_back(term: u64) -> Ask {
    Ask { term: Term::new(term), ttl: Duration::ZERO }
}

/// Asks and says whether it was granted.
fn granted(grant: &mut Grant, now: u64, candidate: &str, ask: Ask) -> bool {
    grant.ask(ms(now), candidate, ask).verdict == Verdict::Granted
}

fn free() -> Grant {
    Grant::default()
}

#[test]
fn a_lease_is_one_routers_until_it_runs_out() {
    let mut grant = free();
    assert!(granted(&mut grant, 0, "a", ask(1)));
    let reply = grant.ask(ms(1499), "b", ask(9));
    let refused =
        Reply { verdict: Verdict::Refused, holder: Some("a".to_owned()), term: Term::new(1), left: ms(1) };
    assert_eq!(reply, refused);
    assert!(granted(&mut grant, 1499, "a", ask(1)));
    assert!(!granted(&mut grant, 2998, "b", ask(9)));
    assert!(granted(&mut grant, 2999, "b", ask(9)));
}

#[test]
fn only_a_higher_term_takes_over() {
    let mut grant = free();
    assert!(granted(&mut grant, 0, "a", ask(5)));
    for term in [0, 4, 5] {
        assert!(!granted(&mut grant, 9000, "b", ask(term)));
    }
    assert!(granted(&mut grant, 9000, "b", ask(6)));
    // An ask of the last leader that was long on its way.
    assert!(!granted(&mut grant, 99_000, "a", ask(5)) && !granted(&mut grant, 99_000, "a", ask(6)));
    // Its own terms only grow, too.
    assert!(granted(&mut grant, 99_000, "b", ask(8)) && !granted(&mut grant, 99_000, "b", ask(7)));
    assert!(!granted(&mut free(), 0, "a", ask(0)), "there is no term before the first");
}

#[test]
fn orders_of_the_holder_and_its_term_alone_are_obeyed() {
    let mut grant = free();
    assert!(!grant.obeys("a", Term::new(0)));
    grant.ask(ms(0), "a", ask(1));
    assert!(
        grant.obeys("a", Term::new(1)) && !grant.obeys("a", Term::new(2)) && !grant.obeys("b", Term::new(1))
    );
    grant.ask(ms(1500), "b", ask(2));
    assert!(!grant.obeys("a", Term::new(1)) && grant.obeys("b", Term::new(2)));
    // The same router in a new term does not obey what it said in an old one.
    grant.ask(ms(1501), "b", ask(4));
    assert!(!grant.obeys("b", Term::new(2)) && grant.obeys("b", Term::new(4)));
}

#[test]
fn what_is_given_back_is_free_and_what_was_overtaken_changes_nothing() {
    let mut grant = free();
    grant.ask(ms(0), "a", ask(3));
    assert!(!granted(&mut grant, 1, "b", give_back(4)));
    grant.ask(ms(1), "a", give_back(2));
    assert!(!granted(&mut grant, 2, "b", ask(4)));
    grant.ask(ms(2), "a", give_back(3));
    assert!(granted(&mut grant, 2, "b", ask(4)));
    // A renewal that is shorter does not cut short what the router may count on.
    grant.ask(ms(3), "b", Ask { term: Term::new(4), ttl: ms(1) });
    assert!(!granted(&mut grant, 1501, "a", ask(5)) && granted(&mut grant, 1502, "a", ask(5)));
}

#[test]
fn no_lease_is_for_ever() {
    let mut grant = free();
    let reply = grant.ask(ms(0), "a", Ask { term: Term::new(1), ttl: Duration::MAX });
    assert_eq!(reply.left, Grant::LONGEST);
    // Times near the end of what can be counted do no harm.
    assert_eq!(free().ask(Duration::MAX, "a", ask(1)).left, Duration::ZERO);
    let mut campaign = Campaign::new("a", Rhythm::default());
    assert!(campaign.tick(Duration::MAX).is_some());
    campaign.replies(Duration::MAX, 0, &[]);
    assert!(!campaign.is_leader(Duration::MAX));
}

/// What a campaign makes of these workers' answers to its next ask, if it has one.
fn round(campaign: &mut Campaign, now: u64, workers: &mut [&mut Grant], known: usize) -> Option<Ask> {
    let asked = campaign.tick(ms(now))?;
    let replies: Vec<_> = workers.iter_mut().map(|w| w.ask(ms(now), &campaign.name, asked)).collect();
    campaign.replies(ms(now), known, &replies);
    Some(asked)
}

#[test]
fn a_majority_of_the_workers_it_knows_makes_a_leader() {
    for (answering, known, leads) in [(0, 0, false), (0, 1, false), (1, 1, true), (1, 2, false), (2, 3, true)]
    {
        let mut workers = vec![free(); answering];
        let mut campaign = Campaign::new("a", Rhythm::default());
        round(&mut campaign, 0, &mut workers.iter_mut().collect::<Vec<_>>(), known);
        assert_eq!(campaign.is_leader(ms(1)), leads, "{answering} of {known}");
    }
}

#[test]
fn a_lead_ends_when_nobody_renews_it() {
    let (mut one, mut other) = (free(), free());
    let mut campaign = Campaign::new("a", Rhythm::default());
    round(&mut campaign, 0, &mut [&mut one, &mut other], 2);
    round(&mut campaign, 250, &mut [&mut one, &mut other], 2);
    let term = campaign.leads(ms(250)).unwrap();
    // Counted from when it asked, so before any worker's promise ends.
    round(&mut campaign, 500, &mut [&mut one], 2);
    assert_eq!(campaign.leads(ms(1749)), Some(term));
    assert_eq!(campaign.leads(ms(1750)), None);
    round(&mut campaign, 1750, &mut [&mut one, &mut other], 2);
    assert!(campaign.leads(ms(1750)).unwrap() > term, "a new lead is another term");
}

#[test]
fn a_leader_raises_its_term_for_a_worker_that_somebody_else_had() {
    let mut workers = [free(), free(), free()];
    let [one, other, third] = &mut workers;
    let mut campaign = Campaign::new("a", Rhythm::default());
    round(&mut campaign, 0, &mut [one, other], 3);
    let first = campaign.leads(ms(0)).unwrap();
    third.ask(ms(1), "b", ask(first.get() + 5));
    third.ask(ms(2), "b", give_back(first.get() + 5));
    round(&mut campaign, 250, &mut [one, other, third], 3);
    assert_eq!(campaign.leads(ms(250)), Some(first));
    round(&mut campaign, 500, &mut [one, other, third], 3);
    let term = campaign.leads(ms(500)).unwrap();
    assert!([one, other, third].iter().all(|worker| worker.obeys("a", term)));
}

#[test]
fn a_leader_raises_its_term_for_a_worker_that_granted_the_same_term_to_another() {
    let (mut one, mut other, mut third) = (free(), free(), free());
    // Two of three have forgotten the router that led in term 1.
    assert!(granted(&mut third, 0, "b", ask(1)));
    let mut campaign = Campaign::new("a", Rhythm::default());
    round(&mut campaign, 60_000, &mut [&mut one, &mut other], 3);
    assert_eq!(campaign.leads(ms(60_000)), Some(Term::new(1)));
    assert!(granted(&mut third, 60_000, "b", ask(1)));
    for now in [60_250, 60_500, 62_000, 62_250] {
        round(&mut campaign, now, &mut [&mut one, &mut other, &mut third], 3);
    }
    assert_eq!(campaign.leads(ms(62_250)), Some(third.term()));
    assert!(third.obeys("a", third.term()));
}

#[test]
fn who_resigns_leaves_the_lead_to_others_at_once() {
    let mut worker = free();
    let mut campaign = Campaign::new("a", Rhythm::default());
    assert_eq!(campaign.resign(ms(0)), None);
    let mut campaign = Campaign::new("a", Rhythm::default());
    round(&mut campaign, 0, &mut [&mut worker], 1);
    let asked = campaign.resign(ms(10)).unwrap();
    worker.ask(ms(10), "a", asked);
    assert!(!campaign.is_leader(ms(10)));
    let mut other = Campaign::new("b", Rhythm::default());
    round(&mut other, 11, &mut [&mut worker], 1);
    // The first round told it the term that was reached.
    for tick in 1..5 {
        round(&mut other, 11 + tick * 250, &mut [&mut worker], 1);
    }
    assert!(other.is_leader(ms(1100)));
}

/// Routers and workers with messages between them.
struct World {
    now: u64,
    campaigns: Vec<Option<Campaign>>,
    workers: Vec<Grant>,
    /// By router: when it ticks first.
    phases: Vec<u64>,
    /// By router: what it asked last, when, and what came back so far.
    rounds: Vec<(Ask, u64, Vec<Reply>)>,
    /// By the time of their arrival: asks (router, worker, ask), and answers to the ask of that time.
    asks: BTreeMap<(u64, u64), (usize, usize, Ask)>,
    answers: BTreeMap<(u64, u64), (usize, u64, Reply)>,
    sent: u64,
    /// Routers that stand still.
    stopped: Vec<bool>,
    /// Drawn from for delays.
    state: u64,
    /// Messages of a thousand that are lost.
    lossy: u64,
}

impl World {
    fn new(phases: &[u64], workers: usize, seed: u64) -> Self {
        let campaign = |n| Some(Campaign::new(&format!("router-{n}"), Rhythm::default()));
        Self {
            now: 0,
            campaigns: (0..phases.len()).map(campaign).collect(),
            workers: vec![free(); workers],
            phases: phases.to_vec(),
            rounds: vec![(ask(0), 0, Vec::new()); phases.len()],
            asks: BTreeMap::new(),
            answers: BTreeMap::new(),
            sent: 0,
            stopped: vec![false; phases.len()],
            state: seed,
            lossy: 0,
        }
    }

    /// SplitMix64.
    fn draw(&mut self, below: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }

    /// When a message that is sent now arrives, if it does.
    fn arrival(&mut self) -> Option<(u64, u64)> {
        self.sent += 1;
        let delay = 1 + self.draw(20);
        (self.draw(1000) >= self.lossy).then_some((self.now + delay, self.sent))
    }

    fn leaders(&self) -> Vec<usize> {
        let leads = |n: &usize| self.campaigns[*n].as_ref().is_some_and(|c| c.is_leader(ms(self.now)));
        (0..self.campaigns.len()).filter(leads).collect()
    }

    /// One millisecond.
    fn step(&mut self) {
        self.now += 1;
        while let Some(entry) = self.asks.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (router, worker, ask) = entry.remove();
            let reply = self.workers[worker].ask(ms(self.now), &format!("router-{router}"), ask);
            let sent = self.rounds[router].1;
            if let Some(at) = self.arrival().filter(|_| self.rounds[router].0 == ask) {
                self.answers.insert(at, (router, sent, reply));
            }
        }
        while let Some(entry) = self.answers.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (router, sent, reply) = entry.remove();
            if self.rounds[router].1 == sent {
                self.rounds[router].2.push(reply);
            }
        }
        for router in 0..self.campaigns.len() {
            // Answers are looked at 50 ms after they were asked for.
            let phase = (self.now + 250 - self.phases[router]) % 250;
            if self.stopped[router] || (phase != 0 && phase != 50) {
                continue;
            }
            let Some(campaign) = &mut self.campaigns[router] else { continue };
            if phase == 50 {
                let (_, sent, replies) = &mut self.rounds[router];
                let known = self.workers.len();
                if !replies.is_empty() {
                    campaign.replies(ms(*sent), known, &std::mem::take(replies));
                }
            } else if let Some(ask) = campaign.tick(ms(self.now)) {
                self.rounds[router] = (ask, self.now, Vec::new());
                for worker in 0..self.workers.len() {
                    if let Some(at) = self.arrival() {
                        self.asks.insert(at, (router, worker, ask));
                    }
                }
            }
        }
        // A router that stands still may think so, but does nothing; what it does later is of an old term.
        let leaders = self.leaders();
        assert!(leaders.len() <= 1, "{leaders:?} lead at {}", self.now);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.max(1000)))]

    #[test]
    fn one_leads_and_another_takes_over_within_three_seconds(
        phases in prop::collection::vec(0_u64..250, 2..5),
        workers in 1_usize..8,
        seed in any::<u64>(),
        stops in prop::collection::vec((0_u64..3000, any::<bool>()), 1..4),
    ) {
        let mut world = World::new(&phases, workers, seed);
        for _ in 0..3000 {
            world.step();
        }
        prop_assert_eq!(world.leaders().len(), 1);
        for (wait, dies) in stops {
            (0..wait).for_each(|_| world.step());
            let [leader] = world.leaders()[..] else { panic!("no leader at {}", world.now) };
            let old = world.campaigns[leader].as_ref().and_then(|c| c.leads(ms(world.now))).unwrap();
            world.stopped[leader] = true;
            if dies {
                let restarted = Campaign::new(&format!("router-{leader}"), Rhythm::default());
                world.campaigns[leader] = Some(restarted);
            }
            (0..3000).for_each(|_| world.step());
            let now = ms(world.now);
            let [next] = world.leaders()[..] else { panic!("nobody took over until {}", world.now) };
            prop_assert!(next != leader);
            let term = world.campaigns[next].as_ref().and_then(|c| c.leads(now)).unwrap();
            prop_assert!(term > old);
            let name = format!("router-{leader}");
            let obeying = world.workers.iter().filter(|worker| worker.obeys(&name, old)).count();
            prop_assert!(obeying * 2 < workers.max(2), "{obeying} still obey");
            world.stopped[leader] = false;
        }
    }

    #[test]
    fn lost_messages_never_make_two_leaders(
        phases in prop::collection::vec(0_u64..250, 2..5),
        workers in 1_usize..8,
        seed in any::<u64>(),
        lossy in 0_u64..800,
    ) {
        let mut world = World::new(&phases, workers, seed);
        world.lossy = lossy;
        (0..10_000).for_each(|_| world.step());
        // Once no more are lost, somebody leads.
        world.lossy = 0;
        (0..4000).for_each(|_| world.step());
        prop_assert_eq!(world.leaders().len(), 1);
    }
}
