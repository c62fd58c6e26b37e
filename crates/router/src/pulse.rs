//! Whether tokens really come: when the last one did, and a test token when none has for a while.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use muster_model::sampler::RawSampling;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::request::{Eos, Event, GenerateRequest, OverContext, Prompt, Stop};
use crate::service::Service;

/// After so long without a token, one is asked for.
const QUIET: Duration = Duration::from_secs(10);
/// After one that did not come, the next is asked for so much later.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a test token may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether it is time.
const LOOK: Duration = Duration::from_millis(50);

/// When the engine computed its last token.
pub struct Pulse {
    origin: Instant,
    /// Milliseconds since the origin, and one; 0 before the first token.
    last: AtomicU64,
    /// Why the last test token did not come.
    trouble: Mutex<Option<String>>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { origin: Instant::now(), last: AtomicU64::new(0), trouble: Mutex::new(None) }
    }
}

impl Pulse {
    /// A token was computed.
    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now.saturating_add(1), Ordering::Relaxed);
    }

    /// How long ago that was; `None` before the first.
    fn since(&self) -> Option<Duration> {
        let last = self.last.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.origin.elapsed().saturating_sub(Duration::from_millis(last)))
    }

    /// Why tokens do not come, if they do not.
    pub(crate) fn trouble(&self) -> Option<String> {
        if self.since().is_none() {
            return Some("no token was computed yet".into());
        }
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn tried(&self, outcome: Result<(), String>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(reason) = &outcome {
            tracing::warn!(reason, "a test token did not come");
            metrics::counter!("muster_canary_failures_total").increment(1);
        }
        *trouble = outcome.err();
    }
}

/// Asks for a token and takes note of what comes of it.
pub(crate) async fn take(service: &Service, pulse: &Pulse) {
    let outcome = match tokio::time::timeout(PATIENCE, token(service)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("none within {PATIENCE:?}")),
    };
    pulse.tried(outcome);
}

/// Asks for a token whenever none came for a while and `may` says that one can; until `stop`.
pub(crate) async fn keep(
    service: Service,
    pulse: Arc<Pulse>,
    may: impl Fn() -> bool + Send,
    stop: CancellationToken,
) {
    let mut next = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let since = pulse.since();
        // Any token is as good as one that was asked for.
        if since.is_some_and(|since| since < AGAIN) && pulse.trouble().is_some() {
            pulse.tried(Ok(()));
        }
        if since.is_some_and(|since| since < QUIET) || Instant::now() < next || !may() {
            continue;
        }
        take(&service, &pulse).await;
        next = Instant::now() + AGAIN;
    }
}

/// One token after one token.
async fn token(service: &Service) -> Result<(), String> {
    let request = GenerateRequest {
        model: None,
        prompt: Prompt::Tokens(vec![0]),
        max_tokens: Some(1),
        over_context: OverContext::Refused,
        sampling: RawSampling { temperature: 0.0, ..RawSampling::default() },
        seed: Some(0),
        stop: Stop { strings: Vec::new(), token_ids: Vec::new(), eos: Eos::Ignored },
        top_logprobs: None,
        choices: 1,
        resume: None,
    };
    let mut events = service.generate(request).await.map_err(|error| error.to_string())?;
    while let Some(event) = events.next().await {
        if let Event::Finished(_) = event.map_err(|error| error.to_string())? {
            return Ok(());
        }
    }
    Err("it broke off".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    /// Keeps the pulse of a service, with time to come round at least once.
    async fn kept(service: Service, pulse: &Arc<Pulse>, until: impl Fn(&Pulse) -> bool) {
        let stop = CancellationToken::new();
        let keeping = tokio::spawn(keep(service, pulse.clone(), || true, stop.clone()));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !until(pulse) {
            assert!(Instant::now() < deadline, "never came");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
        keeping.await.unwrap();
    }

    #[tokio::test]
    async fn it_is_told_whether_tokens_come() {
        let pulse = Arc::new(Pulse::default());
        assert_eq!(pulse.trouble().as_deref(), Some("no token was computed yet"));
        let beating = pulse.clone();
        let service = fake::service(move |choice| {
            beating.beat();
            fake::echo(choice);
        });
        kept(service, &pulse, |pulse| pulse.trouble().is_none()).await;
        assert!(pulse.since().is_some());
    }

    #[tokio::test]
    async fn a_token_that_does_not_come_is_told_until_one_does() {
        let pulse = Arc::new(Pulse::default());
        pulse.beat();
        pulse.tried(Err("as a test".into()));
        assert_eq!(pulse.trouble().as_deref(), Some("as a test"));
        kept(fake::service(fake::break_off), &pulse, |pulse| pulse.trouble().is_none()).await;
        // The last token is long ago, and the next breaks off.
        let pulse = Arc::new(Pulse { origin: Instant::now() - Duration::from_secs(60), ..Pulse::default() });
        pulse.last.store(1, Ordering::Relaxed);
        kept(fake::service(fake::break_off), &pulse, |pulse| pulse.trouble().is_some()).await;
    }
}
