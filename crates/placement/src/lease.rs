//! Who leads: a lease that workers grant.
//!
//! Owns both sides: [`Grant`], what a worker has promised, and [`Campaign`], a router's way to the lead. Always holds:
//!
//! - a worker's promise to one router holds until it runs out, is given back or the worker dies, and the terms it grants
//!   only grow, so a worker obeys one router at a time, and never again one that was followed by another;
//! - a router counts its lease from when it asked, so of routers that know the same workers at most one leads, as long
//!   as their clocks run equally fast and no worker starts again.
//!
//! Routers that know different workers may lead at the same time, and so may two for as long as a lease lasts when a
//! worker that starts again has forgotten the one it promised: to wait that out would leave a cluster without a leader
//! whenever most of its workers are restarted. Each then leads those that granted it the lease, and counts on what these
//! hold alone, as [`leader`](crate::leader) does. Times are since any origin that the caller keeps to; between processes only
//! spans travel. Knows nothing of orders, messages or who is alive.

use std::time::Duration;

/// The number of a lead. A router that takes over has a higher one than all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(u64);

impl Term {
    /// The one with this number.
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

/// What a router asks all workers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// The term it leads or wants to lead.
    pub term: Term,
    /// How long the lease shall last from now on. Zero gives it back.
    pub ttl: Duration,
}

/// Whether the lease was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is the candidate's.
    Granted,
    /// It is not.
    Refused,
}

/// A worker's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Whether the candidate has the lease.
    pub verdict: Verdict,
    /// Who had it last; nobody since this worker started if none.
    pub holder: Option<String>,
    /// The highest term this worker has granted.
    pub term: Term,
    /// How long it will refuse everybody but the holder.
    pub left: Duration,
}

/// What a worker has promised since it started: nothing at first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grant {
    holder: Option<String>,
    term: Term,
    until: Duration,
}

impl Grant {
    /// Longest lease that is granted, whatever is asked.
    pub const LONGEST: Duration = Duration::from_secs(60);

    /// A router asks. It gets the lease if nobody else has it now, for a term above all granted before, or if it has it
    /// already, for that term or a higher one.
    pub fn ask(&mut self, now: Duration, candidate: &str, ask: Ask) -> Reply {
        let is_holder = self.holder.as_deref() == Some(candidate);
        let renews = is_holder && ask.term >= self.term;
        let takes = now >= self.until && ask.term > self.term;
        let verdict = if renews || takes { Verdict::Granted } else { Verdict::Refused };
        if verdict == Verdict::Granted {
            let until = now.saturating_add(ask.ttl.min(Self::LONGEST));
            // An ask that was overtaken by the next one must not shorten it; only giving back does.
            let stays = is_holder && ask.term == self.term && !ask.ttl.is_zero();
            self.until = if stays { until.max(self.until) } else { until };
            self.term = ask.term;
            if !is_holder {
                self.holder = Some(candidate.to_owned());
            }
        }
        Reply { verdict, holder: self.holder.clone(), term: self.term, left: self.until.saturating_sub(now) }
    }

    /// Whether orders of this router and term are to be carried out: those of the last holder of the lease, also when
    /// it has run out, until somebody else has it.
    #[must_use]
    pub fn obeys(&self, candidate: &str, term: Term) -> bool {
        self.term == term && self.holder.as_deref() == Some(candidate)
    }

    /// The highest term granted.
    #[must_use]
    pub const fn term(&self) -> Term {
        self.term
    }

    /// Whether somebody has the lease.
    #[must_use]
    pub fn is_held(&self, now: Duration) -> bool {
        self.holder.is_some() && now < self.until
    }
}

/// How a router campaigns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rhythm {
    /// How long a lease lasts.
    pub ttl: Duration,
    /// How often [`Campaign::tick`] is called, and a lease renewed.
    pub tick: Duration,
}

impl Default for Rhythm {
    /// Leases of 1.5 s, renewed every 250 ms.
    fn default() -> Self {
        Self { ttl: Duration::from_millis(1500), tick: Duration::from_millis(250) }
    }
}

/// A router's way to the lead, and staying there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Campaign {
    name: String,
    rhythm: Rhythm,
    /// The highest term that was heard of or used.
    seen: Term,
    /// The term that is asked for.
    term: Term,
    /// The lead that was won last.
    lead: Option<Lead>,
    stage: Stage,
    /// Rounds that were lost, to make the next pause another one.
    lost: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lead {
    term: Term,
    until: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Asks again then.
    Waiting(Duration),
    /// Asks since then.
    Asking(Duration),
    /// Got the lease of too few, and gives it back.
    Yielding,
    /// Renews.
    Leading,
}

impl Campaign {
    /// A router of this name, which no other may have, nor this one in an earlier life: one that was started again cannot
    /// know the term it led, and would be taken for the one that did.
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

    /// What to ask of all workers now, if anything; to be called once every tick. The answers go to
    /// [`replies`](Self::replies) before the next.
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
            // Whoever is in the way is to yield by now.
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

    /// What workers answered to the ask that was sent at `sent`, each at most once, of so many that are known.
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
        // A worker that granted somebody else a higher term meanwhile only takes one above it.
        if self.stage == Stage::Leading && self.seen > self.term {
            self.raise();
        }
    }

    /// The term this router leads, if it does.
    #[must_use]
    pub fn leads(&self, now: Duration) -> Option<Term> {
        self.lead.filter(|lead| now < lead.until).map(|lead| lead.term)
    }

    /// Whether this router leads.
    #[must_use]
    pub fn is_leader(&self, now: Duration) -> bool {
        self.leads(now).is_some()
    }

    /// Gives the lead up, so that another router need not wait for the lease to run out. None when there is none.
    pub fn resign(&mut self, now: Duration) -> Option<Ask> {
        let leads = self.is_leader(now);
        self.lead = None;
        self.stage = Stage::Waiting(now.saturating_add(self.rhythm.ttl));
        leads.then_some(Ask { term: self.term, ttl: Duration::ZERO })
    }

    fn is_mine(&self, reply: &Reply) -> bool {
        reply.verdict == Verdict::Granted && reply.term == self.term
    }

    /// Whether of routers that share the workers between them this is the one that asks on. It is the first by name of
    /// those that were granted something, unless one of them leads.
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

    /// When enough of the leases of others will have run out for a majority.
    fn free(&self, majority: usize, replies: &[Reply]) -> Duration {
        let mut left: Vec<_> = replies.iter().map(|reply| reply.left).collect();
        left.sort_unstable();
        let enough = left.get(majority - 1).copied().unwrap_or(self.rhythm.tick);
        enough.min(Grant::LONGEST)
    }

    /// Up to a tick, another for every router and every round, so that two that ask at the same time do not do it again.
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
