//! Whether this router leads: asks the workers, and remembers which of them answer.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use muster_dispatch_grpc::client::{ConnectedWorker, ControlError};
use muster_placement::lease::{Ask, Campaign, Reply, Rhythm, Term, Verdict};
use muster_proto::control::{LeadAnswer, LeadAsk};
use muster_proto::convert::RouterName;
use muster_types::Epoch;
use tokio::sync::mpsc;

/// How long workers may take to answer before the round goes on without them.
const PATIENCE: Duration = Duration::from_millis(400);
/// A worker that says nothing for so long does not count.
const SILENCE: Duration = Duration::from_millis(1200);

/// See the module.
pub(crate) struct Lead {
    name: RouterName,
    campaign: Campaign,
    origin: Instant,
    /// By session: the highest term that the worker granted, and its epoch then.
    grants: HashMap<u64, (Term, Epoch)>,
    /// By session: since when the worker was asked and did not answer.
    silent: HashMap<u64, Instant>,
    round: u64,
    answers: mpsc::Sender<Answered>,
    answered: mpsc::Receiver<Answered>,
}

/// A worker's session, the round in which it was asked, and what came of it.
type Answered = (u64, u64, Result<LeadAnswer, ControlError>);

/// Answers that nobody has looked at yet.
const ANSWERS: usize = 4096;

impl Lead {
    /// Of a router with a name that no other process ever has.
    pub(crate) fn new(name: RouterName) -> Self {
        let campaign = Campaign::new(name.as_str(), Rhythm::default());
        let (answers, answered) = mpsc::channel(ANSWERS);
        let (origin, silent) = (Instant::now(), HashMap::new());
        Self { name, campaign, origin, grants: HashMap::new(), silent, round: 0, answers, answered }
    }

    /// How often [`Self::campaign`] is to be called.
    pub(crate) fn tick() -> Duration {
        Rhythm::default().tick
    }

    pub(crate) const fn name(&self) -> &RouterName {
        &self.name
    }

    /// The term this router leads, if it does.
    pub(crate) fn term(&self) -> Option<Term> {
        self.campaign.leads(self.origin.elapsed())
    }

    /// The highest term that a worker granted, and its epoch then.
    pub(crate) fn grant(&self, session: u64) -> Option<(Term, Epoch)> {
        self.grants.get(&session).copied()
    }

    /// Whether a worker answers, for all that is known.
    pub(crate) fn answers(&self, worker: &ConnectedWorker) -> bool {
        self.silent.get(&worker.session).is_none_or(|since| since.elapsed() < SILENCE)
    }

    /// Asks all workers for the lead, if it is time, and waits for those that answer.
    pub(crate) async fn campaign(&mut self, workers: &[ConnectedWorker]) {
        let is_there = |session: u64| workers.iter().any(|worker| worker.session == session);
        self.silent.retain(|session, _| is_there(*session));
        self.grants.retain(|session, _| is_there(*session));
        // Where none counted there was nobody to wait for; who answered since then counts again.
        while let Ok((session, _, answer)) = self.answered.try_recv() {
            self.note(session, &answer);
        }
        let sent = self.origin.elapsed();
        if let Some(ask) = self.campaign.tick(sent) {
            let known = workers.iter().filter(|worker| self.answers(worker)).count();
            let replies = self.ask(ask, workers, known).await;
            self.campaign.replies(sent, known, &replies);
        }
    }

    /// Gives the lead up, so that another router has it at once.
    pub(crate) async fn resign(&mut self, workers: &[ConnectedWorker]) {
        if let Some(ask) = self.campaign.resign(self.origin.elapsed()) {
            self.ask(ask, workers, workers.len()).await;
        }
    }

    /// The answers to an ask, until those that are known to answer have or patience ends.
    async fn ask(&mut self, ask: Ask, workers: &[ConnectedWorker], known: usize) -> Vec<Reply> {
        let Some(term) = NonZeroU64::new(ask.term.get()) else { return Vec::new() };
        let request = LeadAsk { router: self.name.clone(), term, ttl: ask.ttl };
        self.round += 1;
        let round = self.round;
        for worker in workers {
            self.silent.entry(worker.session).or_insert_with(Instant::now);
            let (worker, request, answers) = (worker.clone(), request.clone(), self.answers.clone());
            // Outlives this round where the worker is slow: its answer then only shows that it answers.
            tokio::spawn(async move {
                let answer = worker.lead(&request, SILENCE).await;
                // When nobody looks any more, nobody leads.
                let _ = answers.try_send((worker.session, round, answer));
            });
        }
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut replies = Vec::new();
        let mut failed = 0;
        while replies.len() + failed < known
            && let Ok(Some((session, of, answer))) =
                tokio::time::timeout_at(deadline, self.answered.recv()).await
        {
            self.note(session, &answer);
            match answer {
                Ok(answer) if of == round => replies.push(reply(answer)),
                Err(_) if of == round => failed += 1,
                _ => {}
            }
        }
        replies
    }

    /// Takes in what a worker answered, in whichever round it was asked.
    fn note(&mut self, session: u64, answer: &Result<LeadAnswer, ControlError>) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(%error, "a worker did not say whom it obeys");
                return;
            }
        };
        self.silent.remove(&session);
        if answer.granted {
            let grant = self.grants.entry(session).or_insert((Term::new(0), answer.epoch));
            if grant.0 < Term::new(answer.term) {
                *grant = (Term::new(answer.term), answer.epoch);
            }
        }
    }
}

fn reply(answer: LeadAnswer) -> Reply {
    Reply {
        verdict: if answer.granted { Verdict::Granted } else { Verdict::Refused },
        holder: answer.holder.map(|holder| holder.as_str().to_owned()),
        term: Term::new(answer.term),
        left: answer.left,
    }
}
