//! Events gathered into one answer.

use super::reply::{Count, Dialect, Envelope, Head, to_json};
use crate::request::{Event, FinishReason};

/// An answer under construction.
pub(crate) struct Whole<D: Dialect> {
    head: Head,
    choices: Vec<Gathered<D>>,
    count: Count,
}

struct Gathered<D: Dialect> {
    text: String,
    characters: usize,
    tokens: usize,
    logprobs: Option<D::Logprobs>,
    reason: Option<FinishReason>,
}

impl<D: Dialect> Whole<D> {
    pub(crate) fn new(head: Head) -> Self {
        let empty =
            |_| Gathered { text: String::new(), characters: 0, tokens: 0, logprobs: None, reason: None };
        let choices = (0..head.choices).map(empty).collect();
        Self { head, choices, count: Count::default() }
    }

    /// Adds the next event. Events of unknown choices are ignored.
    pub(crate) fn event(&mut self, event: Event) {
        let choice = match &event {
            Event::Token(frame) => frame.choice,
            Event::Finished(finished) => finished.choice,
        };
        let Some(choice) = self.choices.get_mut(choice as usize) else { return };
        match event {
            Event::Token(frame) => {
                choice.tokens += 1;
                if let Some(token) = frame.logprobs {
                    D::push(choice.logprobs.get_or_insert_default(), token, choice.characters);
                }
                choice.characters += frame.text.chars().count();
                choice.text.push_str(&frame.text);
            }
            Event::Finished(finished) => {
                choice.text.push_str(&finished.text);
                choice.reason = Some(finished.reason);
                self.count.add(&finished);
            }
        }
    }

    /// Estimated bytes of the JSON.
    pub(crate) fn size(&self) -> usize {
        /// Estimate for a token with log-probabilities: its entry and some alternatives.
        const ENTRY: usize = 400;
        let size = |choice: &Gathered<D>| {
            choice.text.len() + if choice.logprobs.is_some() { ENTRY * choice.tokens } else { 0 }
        };
        self.choices.iter().map(size).sum()
    }

    /// The answer as JSON.
    pub(crate) fn into_json(self) -> String {
        let choices: Vec<_> = (0..)
            .zip(&self.choices)
            .map(|(index, choice)| D::choice(index, &choice.text, choice.logprobs.as_ref(), choice.reason))
            .collect();
        let usage = self.count.usage(&self.head);
        to_json(&Envelope::new(&self.head, D::WHOLE, &choices, Some(Some(usage))))
    }
}
