//! Runs the prompts of one HTTP request and merges their events into one stream.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use muster_types::{BindingName, Combine};
use tokio_stream::{Stream, StreamMap};

use super::reply::Head;
use crate::model_info::ModelInfo;
use crate::request::{Event, GenerateRequest, RequestError};
use crate::service::{Generation, Service};

/// Starts every prompt, or none.
///
/// # Errors
/// The error of the first prompt that was refused.
pub(super) async fn start(
    service: &Service,
    prefix: &str,
    requests: Vec<GenerateRequest>,
) -> Result<(Head, Merged<Generation>), RequestError> {
    let model = service.model();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let mut head = Head {
        id: String::new(),
        created: now.map_or(0, |now| now.as_secs()),
        model: model.name.clone(),
        system_fingerprint: String::new(),
        prompt_tokens: 0,
        choices: 0,
    };
    let mut events = Merged::new();
    let choices: Vec<u32> = requests.iter().map(|request| request.choices).collect();
    for (generation, choices) in service.generate_all(requests).await?.into_iter().zip(choices) {
        if head.id.is_empty() {
            head.id = format!("{prefix}{}", generation.started.id);
            head.system_fingerprint = system_fingerprint(model, generation.started.binding);
        }
        head.prompt_tokens += u64::from(generation.started.prompt_tokens);
        events.add(head.choices, generation);
        head.choices += choices;
    }
    Ok((head, events))
}

/// Merged events of several prompts, in order of arrival. Choices are numbered across prompts; the first error is the
/// last item. Only the first choice of a prompt reports its cached tokens, because usage counts each prompt once.
pub(super) struct Merged<S> {
    /// Streams by the number of their first choice.
    streams: StreamMap<u32, S>,
}

impl<S> Merged<S> {
    fn new() -> Self {
        Self { streams: StreamMap::new() }
    }

    fn add(&mut self, first_choice: u32, events: S) {
        self.streams.insert(first_choice, events);
    }
}

impl<S: Stream<Item = Result<Event, RequestError>> + Unpin> Stream for Merged<S> {
    type Item = Result<Event, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((first, mut item)) = ready!(Pin::new(&mut self.streams).poll_next(cx)) else {
            return Poll::Ready(None);
        };
        match &mut item {
            Ok(Event::Token(frame)) => frame.choice += first,
            Ok(Event::Finished(finished)) => {
                if finished.choice > 0 {
                    finished.cached_prompt_tokens = 0;
                }
                finished.choice += first;
            }
            // Clearing cancels the other prompts.
            Err(_) => self.streams.clear(),
        }
        Poll::Ready(Some(item))
    }
}

/// Hex digits that distinguish bindings to several numerics classes.
const BINDING_DIGITS: usize = 12;

/// Names everything that decides the bits beside the seed: the model, a combine mode that depends on the placement, and
/// the numerics classes of devices other than CPUs.
fn system_fingerprint(model: &ModelInfo, binding: BindingName) -> String {
    let fingerprint = model.fingerprint.short();
    let combine = match model.combine {
        Combine::Exact => "",
        Combine::Partial => "_partial",
    };
    let mut binding = match binding {
        binding if binding == BindingName::default() => String::new(),
        binding => format!("_{binding}"),
    };
    binding.truncate(1 + BINDING_DIGITS);
    format!("fp_{fingerprint}{combine}{binding}")
}

#[cfg(test)]
mod tests {
    use muster_types::ClassSet;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::request::{FinishReason, Finished};

    fn finished(choice: u32) -> Result<Event, RequestError> {
        let reason = FinishReason::Stop;
        let (output_tokens, cached_prompt_tokens) = (1, 16);
        Ok(Event::Finished(Finished {
            choice,
            reason,
            output_tokens,
            cached_prompt_tokens,
            classes: ClassSet::EMPTY,
            text: String::new(),
        }))
    }

    #[tokio::test]
    async fn choices_are_numbered_through() {
        let mut merged = Merged::new();
        merged.add(0, tokio_stream::iter(vec![finished(0), finished(1)]));
        merged.add(2, tokio_stream::iter(vec![finished(0), finished(1)]));
        let mut seen = Vec::new();
        while let Some(item) = merged.next().await {
            let Ok(Event::Finished(finished)) = item else { panic!("{item:?}") };
            seen.push((finished.choice, finished.cached_prompt_tokens));
        }
        seen.sort_unstable();
        assert_eq!(seen, [(0, 16), (1, 0), (2, 16), (3, 0)], "a prompt's cached tokens count once");
    }

    #[tokio::test]
    async fn an_error_ends_all_prompts() {
        let mut merged = Merged::new();
        merged.add(0, tokio_stream::iter(vec![Err(RequestError::NonFinite)]));
        merged.add(1, tokio_stream::iter(vec![Err(RequestError::NonFinite)]));
        assert_eq!(merged.next().await.unwrap().unwrap_err(), RequestError::NonFinite);
        assert!(merged.next().await.is_none());
    }
}
