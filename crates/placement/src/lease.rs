//! The placement lease, which workers grant to one router.
//!
//! Owns both sides: [`Grant`], a worker's promise, and [`Campaign`], a router's election. Always holds:
//!
//! - a worker's promise to one router holds until it runs out, is given back or the worker dies, and the terms it grants
//!   only grow, so a worker obeys one router at a time, and never again one that was followed by another;
//! - a router counts its lease from when it asked, so of routers that know the same workers at most one leads, as long
//!   as their clocks run equally fast and no worker starts again.
//!
//! Routers that know different workers may lead at the same time, and so may two for as long as a lease lasts when a
//! worker that starts again has forgotten the one it promised: to wait that out would leave a cluster without a leader
//! whenever most of its workers are restarted. Each then leads the workers that granted it the lease, and counts only on
//! their holdings, as [`leader`](crate::leader) does. Times count from any fixed origin of the caller's; between processes
//! only durations travel. Knows nothing of orders, messages or liveness.

use std::time::Duration;

/// Number of a term of leading, higher than all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(u64);

impl Term {
    /// The term with this number.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The one after this.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl std::fmt::Display for Term {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A router's request for the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// The term that it leads or wants to lead.
    pub term: Term,
    /// Duration of the lease from now on. Zero gives it back.
    pub ttl: Duration,
}

/// Whether the lease was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The candidate has it.
    Granted,
    /// The candidate does not have it.
    Refused,
}

/// A worker's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Whether the candidate has the lease.
    pub verdict: Verdict,
    /// Its last holder since this worker's start, if any.
    pub holder: Option<String>,
    /// The highest term this worker has granted.
    pub term: Term,
    /// Time for which every other router is refused.
    pub left: Duration,
}

/// A worker's promise: none at its start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grant {
    holder: Option<String>,
    term: Term,
    until: Duration,
}

impl Grant {
    /// Longest lease that is granted.
    pub const LONGEST: Duration = Duration::from_secs(60);

    /// Answers a router's request. It gets the lease for a term above all granted before if no other router has it now, or, if
    /// it has the lease already, for that term or a higher one.
    pub fn ask(&mut self, now: Duration, candidate: &str, ask: Ask) -> Reply {
        let is_holder = self.holder.as_deref() == Some(candidate);
        let renews = is_holder && ask.term >= self.term;
        let takes = now >= self.until && ask.term > self.term;
        let verdict = if renews || takes { Verdict::Granted } else { Verdict::Refused };
        if verdict == Verdict::Granted {
            let until = now.saturating_add(ask.ttl.min(Self::LONGEST));
            // A request that the next one overtook must not shorten the lease; only giving back does.
            let stays = is_holder && ask.term == self.term && !ask.ttl.is_zero();
            self.until = if stays { until.max(self.until) } else { until };
            self.term = ask.term;
            if !is_holder {
                self.holder = Some(candidate.to_owned());
            }
        }
        Reply { verdict, holder: self.holder.clone(), term: self.term, left: self.until.saturating_sub(now) }
    }

    /// Whether to carry out orders of this router and term: those of the lease's last holder, even after it ran out, until another
    /// router gets it.
    #[must_use]
    pub fn obeys(&self, candidate: &str, term: Term) -> bool {
        self.term == term && self.holder.as_deref() == Some(candidate)
    }

    /// The highest term granted.
    #[must_use]
    pub const fn term(&self) -> Term {
        self.term
    }

    /// Whether a router has the lease.
    #[must_use]
    pub fn is_held(&self, now: Duration) -> bool {
        self.holder.is_some() && now < self.until
    }
}

/// Intervals of a campaign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rhythm {
    /// Duration of a lease.
    pub ttl: Duration,
    /// Interval of [`Campaign::tick`], and of renewals.
    pub tick: Duration,
}

impl Default for Rhythm {
    /// Leases of 1.5 s, renewed every 250 ms.
    fn default() -> Self {
        Self { ttl: Duration::from_millis(1500), tick: Duration::from_millis(250) }
    }
}

/// A router's campaign for the lease, and its renewals.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Campaign {
    name: String,
    rhythm: Rhythm,
    /// The highest term seen or used.
    seen: Term,
    /// The requested term.
    term: Term,
    /// The last lead won.
    lead: Option<Lead>,
    stage: Stage,
    /// Number of lost rounds, which varies the next pause.
    lost: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lead {
    term: Term,
    until: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits until this time to ask again.
    Waiting(Duration),
    /// Asking since this time.
    Asking(Duration),
    /// Got too few grants, and gives them back.
    Yielding,
    /// Leads, and renews.
    Leading,
}

impl Campaign {
    /// A router of this name, which must be unique, also among its own restarts: a restarted router does not know the term that it
    /// led, and would be taken for its predecessor.
    #[must_use]
    pub fn new(name: &str, rhythm: Rhythm) -> Self {
        Self {
            name: name.to_owned(),
            rhythm,
            seen: Term(0),
            term: Term(0),
            lead: None,
            stage: Stage::Waiting(Duration::ZERO),
            lost: 0,
        }
    }

    /// The request to all workers now, if any; to be called once every tick. The answers go to [`replies`](Self::replies) before
    /// the next.
    pub fn tick(&mut self, now: Duration) -> Option<Ask> {
        match self.stage {
            Stage::Waiting(until) if now < until => None,
            Stage::Leading if self.is_leader(now) => Some(Ask { term: self.term, ttl: self.rhythm.ttl }),
            Stage::Waiting(_) | Stage::Leading => {
                self.lead = None;
                self.raise();
                self.stage = Stage::Asking(now);
                Some(Ask { term: self.term, ttl: self.rhythm.ttl })
            }
            // Routers in the way yield by now.
            Stage::Asking(since) if now.saturating_sub(since) < self.rhythm.ttl => {
                self.raise();
                Some(Ask { term: self.term, ttl: self.rhythm.ttl })
            }
            Stage::Asking(_) | Stage::Yielding => {
                let pause = self.rhythm.tick.saturating_mul(2).saturating_add(self.pause());
                self.stage = Stage::Waiting(now.saturating_add(pause));
                Some(Ask { term: self.term, ttl: Duration::ZERO })
            }
        }
    }

    /// Takes the answers to the request sent at `sent`, at most one per worker, of `workers_known` workers.
    pub fn replies(&mut self, sent: Duration, workers_known: usize, replies: &[Reply]) {
        let majority = workers_known / 2 + 1;
        let highest = replies.iter().map(|reply| reply.term).max();
        self.seen = self.seen.max(highest.unwrap_or_default());
        let granted = replies.iter().filter(|reply| self.is_mine(reply)).count();
        match self.stage {
            Stage::Asking(_) | Stage::Leading if granted >= majority => {
                let until = sent.saturating_add(self.rhythm.ttl);
                let before = self.lead.filter(|lead| lead.term == self.term).map(|lead| lead.until);
                let until = before.map_or(until, |before| before.max(until));
                self.lead = Some(Lead { term: self.term, until });
                self.stage = Stage::Leading;
            }
            Stage::Asking(_) if granted > 0 => {
                if !self.goes_first(majority, replies) {
                    self.stage = Stage::Yielding;
                }
            }
            Stage::Asking(_) => {
                let free = self.free(majority, replies);
                let pause = self.pause();
                self.stage = Stage::Waiting(sent.saturating_add(free).saturating_add(pause));
            }
            Stage::Leading | Stage::Waiting(_) | Stage::Yielding => {}
        }
        // A worker that granted another router this term or a higher one accepts only a higher one.
        let is_others = |reply: &Reply| reply.verdict == Verdict::Refused && reply.term >= self.term;
        if self.stage == Stage::Leading && (self.seen > self.term || replies.iter().any(is_others)) {
            self.raise();
        }
    }

    /// The term that this router leads in, if it leads.
    #[must_use]
    pub fn leads(&self, now: Duration) -> Option<Term> {
        self.lead.filter(|lead| now < lead.until).map(|lead| lead.term)
    }

    /// Whether this router leads.
    #[must_use]
    pub fn is_leader(&self, now: Duration) -> bool {
        self.leads(now).is_some()
    }

    /// Gives up the lead, so that another router need not wait for the lease to run out. `None` without a lead.
    pub fn resign(&mut self, now: Duration) -> Option<Ask> {
        let leads = self.is_leader(now);
        self.lead = None;
        self.stage = Stage::Waiting(now.saturating_add(self.rhythm.ttl));
        leads.then_some(Ask { term: self.term, ttl: Duration::ZERO })
    }

    fn is_mine(&self, reply: &Reply) -> bool {
        reply.verdict == Verdict::Granted && reply.term == self.term
    }

    /// Whether this router keeps asking when several got grants: the first of them by name does, unless one of them leads.
    fn goes_first(&self, majority: usize, replies: &[Reply]) -> bool {
        let others = || replies.iter().filter(|reply| !self.is_mine(reply) && !reply.left.is_zero());
        let leads = |holder: &String| others().filter(|other| other.holder.as_ref() == Some(holder)).count();
        let goes_before = |holder: &String| *holder < self.name || leads(holder) >= majority;
        !others().filter_map(|other| other.holder.as_ref()).any(goes_before)
    }

    fn raise(&mut self) {
        self.term = self.seen.next();
        self.seen = self.term;
    }

    /// Time until enough leases of others run out for a majority.
    fn free(&self, majority: usize, replies: &[Reply]) -> Duration {
        let mut left: Vec<_> = replies.iter().map(|reply| reply.left).collect();
        left.sort_unstable();
        let enough = left.get(majority - 1).copied().unwrap_or(self.rhythm.tick);
        enough.min(Grant::LONGEST)
    }

    /// A pause of up to a tick, different for every router and round, so that two routers that collide do not collide again.
    fn pause(&mut self) -> Duration {
        self.lost = self.lost.wrapping_add(1);
        // FNV-1a.
        let bytes = self.name.bytes().chain(self.lost.to_le_bytes());
        let hash = bytes
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        self.rhythm.tick.mul_f64((hash >> 40) as f64 / (1_u64 << 24) as f64)
    }
}

#[cfg(test)]
mod tests;
