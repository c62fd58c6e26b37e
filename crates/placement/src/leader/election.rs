//! Election: rounds of requests to all workers for the lead, and their answers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use muster_types::Epoch;

use super::Rhythm;
use crate::lease::{Ask, Campaign, Reply, Term, Verdict};

/// A request to all connected workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Number, which its answers carry.
    pub number: u64,
    /// The request.
    pub ask: Ask,
}

/// A worker's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its verdict.
    pub reply: Reply,
    /// Epoch of its holdings at the answer.
    pub epoch: Epoch,
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Election {
    campaign: Campaign,
    patience: Duration,
    silence: Duration,
    /// Rounds so far.
    rounds: u64,
    open: Option<Open>,
    /// By session: the highest term that the worker granted, and its epoch then.
    grants: BTreeMap<u64, (Term, Epoch)>,
    /// By session: time since which the worker was asked and has not answered.
    silent: BTreeMap<u64, Duration>,
}

/// A round whose answers still count.
#[derive(Debug, Clone)]
struct Open {
    number: u64,
    sent: Duration,
    /// Number of workers asked, of which a majority is needed.
    known: usize,
    failed: usize,
    replies: Vec<Reply>,
}

impl Election {
    pub(super) fn new(name: &str, rhythm: &Rhythm) -> Self {
        let Rhythm { lease, patience, silence, .. } = *rhythm;
        Self {
            campaign: Campaign::new(name, lease),
            patience,
            silence,
            rounds: 0,
            open: None,
            grants: BTreeMap::new(),
            silent: BTreeMap::new(),
        }
    }

    pub(super) fn leads(&self, now: Duration) -> Option<Term> {
        self.campaign.leads(now)
    }

    /// The highest term that a worker granted, and its epoch then.
    pub(super) fn grant(&self, session: u64) -> Option<(Term, Epoch)> {
        self.grants.get(&session).copied()
    }

    /// Whether a worker counts as answering.
    pub(super) fn answers(&self, now: Duration, session: u64) -> bool {
        self.silent.get(&session).is_none_or(|since| now.saturating_sub(*since) < self.silence)
    }

    pub(super) fn tick(&mut self, now: Duration, sessions: &BTreeSet<u64>) -> Option<Round> {
        self.close();
        self.silent.retain(|session, _| sessions.contains(session));
        self.grants.retain(|session, _| sessions.contains(session));
        let ask = self.campaign.tick(now)?;
        let known = sessions.iter().filter(|session| self.answers(now, **session)).count();
        Some(self.ask(now, ask, sessions, known))
    }

    pub(super) fn resign(&mut self, now: Duration, sessions: &BTreeSet<u64>) -> Option<Round> {
        self.close();
        self.leads(now)?;
        let ask = self.campaign.resign(now)?;
        Some(self.ask(now, ask, sessions, sessions.len()))
    }

    fn ask(&mut self, now: Duration, ask: Ask, sessions: &BTreeSet<u64>, known: usize) -> Round {
        for session in sessions {
            self.silent.entry(*session).or_insert(now);
        }
        self.rounds += 1;
        let number = self.rounds;
        let open = Open { number, sent: now, known, failed: 0, replies: Vec::new() };
        self.open = Some(open);
        self.close_if_answered();
        Round { number, ask }
    }

    /// Deadline of the open round's answers.
    pub(super) fn round_ends(&self) -> Option<Duration> {
        self.open.as_ref().map(|open| open.sent.saturating_add(self.patience))
    }

    pub(super) fn answered(&mut self, session: u64, round: u64, answer: Option<Answer>) {
        if let Some(Answer { reply, epoch }) = &answer {
            self.silent.remove(&session);
            if reply.verdict == Verdict::Granted {
                let grant = self.grants.entry(session).or_insert((Term::default(), *epoch));
                if grant.0 < reply.term {
                    *grant = (reply.term, *epoch);
                }
            }
        }
        // An answer to an older round only shows that the worker is alive.
        let Some(open) = self.open.as_mut().filter(|open| open.number == round) else { return };
        match answer {
            Some(answer) => open.replies.push(answer.reply),
            None => open.failed += 1,
        }
        self.close_if_answered();
    }

    fn close_if_answered(&mut self) {
        if self.open.as_ref().is_some_and(|open| open.replies.len() + open.failed >= open.known) {
            self.close();
        }
    }

    pub(super) fn close(&mut self) {
        if let Some(Open { sent, known, replies, .. }) = self.open.take() {
            self.campaign.replies(sent, known, &replies);
        }
    }
}
