//! Events as OpenAI's server-sent events.
//!
//! [`Chunks`] is pure: the chunks of each event. [`Sse`] frames them and their end: `[DONE]` after the last chunk, or
//! an `{"error": …}` without `[DONE]` after a failure.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::response::sse;
use tokio_stream::Stream;

use super::super::error::ApiError;
use super::common::StreamUsage;
use super::reply::{Count, Dialect, Envelope, Head, Part, to_json};
use crate::request::{Event, Finished, RequestError, TokenFrame};

const DONE: &str = "[DONE]";

/// Writes the chunks of one answer.
pub(crate) struct Chunks<D> {
    head: Head,
    usage: StreamUsage,
    count: Count,
    /// Characters sent so far, by choice.
    characters: Vec<usize>,
    dialect: PhantomData<fn() -> D>,
}

impl<D: Dialect> Chunks<D> {
    pub(crate) fn new(head: Head, usage: StreamUsage) -> Self {
        let characters = vec![0; head.choices as usize];
        Self { head, usage, count: Count::default(), characters, dialect: PhantomData }
    }

    /// Chunks before the first event.
    pub(crate) fn open(&self) -> Vec<String> {
        let choices = if D::OPENING { self.head.choices } else { 0 };
        (0..choices).map(|choice| self.chunk(choice, Part::Opening, None)).collect()
    }

    /// Chunks of one event; none if it brought no text.
    pub(crate) fn event(&mut self, event: Event) -> Vec<String> {
        match event {
            Event::Token(frame) => self.token(frame).into_iter().collect(),
            Event::Finished(finished) => self.finished(&finished),
        }
    }

    /// Chunks after the last event.
    pub(crate) fn close(&self) -> Vec<String> {
        let mut last = Vec::new();
        if self.usage == StreamUsage::Included {
            let usage = self.count.usage(&self.head);
            let none: &[D::Delta<'_>] = &[];
            last.push(to_json(&Envelope::new(&self.head, D::CHUNK, none, Some(Some(usage)))));
        }
        last.push(DONE.to_owned());
        last
    }

    fn token(&mut self, frame: TokenFrame) -> Option<String> {
        let characters = self.characters.get_mut(frame.choice as usize)?;
        let offset = *characters;
        *characters += frame.text.chars().count();
        let logprobs = frame.logprobs.map(|token| {
            let mut one = D::Logprobs::default();
            D::push(&mut one, token, offset);
            one
        });
        if frame.text.is_empty() && logprobs.is_none() {
            return None;
        }
        Some(self.chunk(frame.choice, Part::Text(&frame.text), logprobs.as_ref()))
    }

    fn finished(&mut self, finished: &Finished) -> Vec<String> {
        self.count.add(finished);
        let mut chunks = Vec::new();
        if !finished.text.is_empty() {
            chunks.push(self.chunk(finished.choice, Part::Text(&finished.text), None));
        }
        chunks.push(self.chunk(finished.choice, Part::End(finished.reason), None));
        chunks
    }

    fn chunk(&self, choice: u32, part: Part<'_>, logprobs: Option<&D::Logprobs>) -> String {
        let usage = (self.usage == StreamUsage::Included).then_some(None);
        let choices = [D::delta(choice, part, logprobs)];
        to_json(&Envelope::new(&self.head, D::CHUNK, &choices, usage))
    }
}

/// The body of a streamed answer.
pub(crate) struct Sse<D, S> {
    /// `None` after the end, so that the request's resources are released at once.
    events: Option<S>,
    chunks: Chunks<D>,
    ready: VecDeque<String>,
}

impl<D: Dialect, S> Sse<D, S> {
    pub(crate) fn new(events: S, chunks: Chunks<D>) -> Self {
        let ready = chunks.open().into();
        Self { events: Some(events), chunks, ready }
    }
}

impl<D, S> Stream for Sse<D, S>
where
    D: Dialect,
    S: Stream<Item = Result<Event, RequestError>> + Unpin,
{
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(data) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(sse::Event::default().data(data))));
            }
            let Some(events) = &mut this.events else { return Poll::Ready(None) };
            match ready!(Pin::new(events).poll_next(cx)) {
                Some(Ok(event)) => this.ready.extend(this.chunks.event(event)),
                Some(Err(error)) => {
                    this.events = None;
                    this.ready.push_back(to_json(&ApiError::from(error).envelope()));
                }
                None => {
                    this.events = None;
                    this.ready.extend(this.chunks.close());
                }
            }
        }
    }
}
