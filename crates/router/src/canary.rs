//! Test tokens: generates one token after a quiet period and records the outcome in the pulse.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_model::sampler::RawSampling;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::pulse::Pulse;
use crate::request::{Eos, Event, GenerateRequest, OverContext, Prompt, Stop};
use crate::service::Service;

/// Time without a token after which a test token is generated.
const QUIET: Duration = Duration::from_secs(10);
/// Pause after a failed test token.
const AGAIN: Duration = Duration::from_secs(1);
/// Deadline of a test token.
const PATIENCE: Duration = Duration::from_secs(5);
/// Polling interval of the loop.
const LOOK: Duration = Duration::from_millis(50);

/// Generates a test token and records its outcome.
pub(crate) async fn take(service: &Service, pulse: &Pulse) {
    let outcome = match tokio::time::timeout(PATIENCE, token(service)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("none within {PATIENCE:?}")),
    };
    pulse.tried(outcome);
}

/// Generates a test token whenever none came for [`QUIET`] and `may` allows one; until `stop`.
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
        // A client's token proves as much as a test token.
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

/// Generates one token from a prompt of one token.
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

    /// Keeps the pulse of a service until `until` holds, with time for at least one round.
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
        // The last token is old, and the next request fails.
        let pulse = Arc::new(Pulse::beaten(Duration::from_secs(60)));
        kept(fake::service(fake::break_off), &pulse, |pulse| pulse.trouble().is_some()).await;
    }
}
