//! Delivered tokens of a stream, and the check that a router's next event follows them. Pure.

use std::collections::BTreeMap;

use muster_proto::v1::finished::Reason;
use muster_proto::v1::generate_event::Event as Sent;
use muster_proto::v1::{Finished, Resume, Started, TokenFrame, TokenIds};

/// An event of one choice.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token; its index is the number of tokens of its choice that came before.
    Token(TokenFrame),
    /// The end of a choice, once for each; it has a reason.
    Finished(Finished),
}

/// Tokens and ends of all choices.
#[derive(Debug)]
pub(crate) struct Progress {
    started: Started,
    choices: u32,
    begun: BTreeMap<u32, Choice>,
}

#[derive(Debug, Default)]
struct Choice {
    ids: Vec<u32>,
    /// Its end was delivered.
    finished: bool,
    /// The present stream has sent its end.
    told: bool,
}

impl Progress {
    /// Progress at the start of a stream with this `started`.
    pub(crate) const fn new(started: Started, choices: u32) -> Self {
        Self { started, choices, begun: BTreeMap::new() }
    }

    /// The stream's `started`.
    pub(crate) const fn started(&self) -> &Started {
        &self.started
    }

    /// Number of delivered tokens.
    pub(crate) fn tokens(&self) -> usize {
        self.begun.values().map(|choice| choice.ids.len()).sum()
    }

    /// Whether every choice has had its end.
    pub(crate) fn is_complete(&self) -> bool {
        self.begun.values().filter(|choice| choice.finished).count() == self.choices as usize
    }

    /// The tokens to resume from, for another router.
    pub(crate) fn resume(&self) -> Resume {
        let ids = |choice| self.begun.get(&choice).map_or_else(Vec::new, |choice| choice.ids.clone());
        let choices = (0..self.choices).map(|choice| TokenIds { ids: ids(choice) }).collect();
        let key = &self.started.resume_key;
        Resume { choices, key: (!key.is_empty()).then(|| key.clone()) }
    }

    /// Continues with another stream.
    ///
    /// # Errors
    /// The difference, if it is a stream of another request.
    pub(crate) fn goes_on(&mut self, started: &Started) -> Result<(), String> {
        let facts = |started: &Started| (started.prompt_tokens, started.seed, started.resume_key.clone());
        let (ours, theirs) = (facts(&self.started), facts(started));
        if ours != theirs {
            return Err(format!("it resumes another stream: {theirs:?} instead of {ours:?}"));
        }
        self.begun.values_mut().for_each(|choice| choice.told = false);
        Ok(())
    }

    /// Checks the next event of the present stream. `None` when it was delivered already.
    ///
    /// # Errors
    /// The breach of the protocol.
    pub(crate) fn accept(&mut self, sent: Option<Sent>) -> Result<Option<Event>, String> {
        match sent {
            None => Err("an event without content".into()),
            Some(Sent::Started(_)) => Err("a stream that starts twice".into()),
            Some(Sent::Token(frame)) => self.token(frame).map(Some),
            Some(Sent::Finished(end)) => self.finished(end),
        }
    }

    fn token(&mut self, frame: TokenFrame) -> Result<Event, String> {
        let TokenFrame { choice: at, index, token_id, .. } = frame;
        let choice = self.choice(at)?;
        if choice.finished {
            return Err(format!("choice {at} goes on after its end"));
        }
        if index as usize != choice.ids.len() {
            return Err(format!("choice {at} has token {index} where {} is due", choice.ids.len()));
        }
        choice.ids.push(token_id);
        Ok(Event::Token(frame))
    }

    fn finished(&mut self, end: Finished) -> Result<Option<Event>, String> {
        let at = end.choice;
        if end.reason() == Reason::Unspecified {
            return Err(format!("choice {at} ends without a reason"));
        }
        let choice = self.choice(at)?;
        if std::mem::replace(&mut choice.told, true) {
            return Err(format!("choice {at} ends twice"));
        }
        // A stop id counts, but has no frame.
        if (end.output_tokens as usize).checked_sub(choice.ids.len()).is_none_or(|more| more > 1) {
            let (told, came) = (end.output_tokens, choice.ids.len());
            return Err(format!("choice {at} ends after {told} tokens where {came} came"));
        }
        let is_news = !std::mem::replace(&mut choice.finished, true);
        Ok(is_news.then_some(Event::Finished(end)))
    }

    fn choice(&mut self, at: u32) -> Result<&mut Choice, String> {
        if at >= self.choices {
            return Err(format!("choice {at} of {}", self.choices));
        }
        Ok(self.begun.entry(at).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(choices: u32) -> Progress {
        Progress::new(started(7), choices)
    }

    fn started(seed: u64) -> Started {
        Started { seed, prompt_tokens: 3, resume_key: "k".into(), ..Started::default() }
    }

    fn token(choice: u32, index: u32) -> Option<Sent> {
        Some(Sent::Token(TokenFrame {
            choice,
            index,
            token_id: 10 * choice + index,
            ..TokenFrame::default()
        }))
    }

    fn end(choice: u32, output_tokens: u32) -> Option<Sent> {
        let reason = Reason::Length.into();
        Some(Sent::Finished(Finished { choice, reason, output_tokens, ..Finished::default() }))
    }

    #[test]
    fn a_stream_in_order_is_accepted_and_completes() {
        let mut progress = progress(2);
        for sent in [token(1, 0), token(0, 0), token(1, 1), end(1, 2), token(0, 1)] {
            assert!(progress.accept(sent).unwrap().is_some());
        }
        assert!(!progress.is_complete());
        // The stop id has no frame.
        assert!(matches!(progress.accept(end(0, 3)), Ok(Some(Event::Finished(_)))));
        assert!(progress.is_complete());
        assert_eq!(progress.tokens(), 4);
    }

    #[test]
    fn what_breaks_the_order_is_no_event() {
        let check = |sents: &[Option<Sent>], words: &str| {
            let mut progress = progress(2);
            let (last, before) = sents.split_last().unwrap();
            for sent in before {
                progress.accept(sent.clone()).unwrap();
            }
            let error = progress.accept(last.clone()).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        check(&[token(0, 1)], "token 1 where 0 is due");
        check(&[token(0, 0), token(0, 0)], "token 0 where 1 is due");
        check(&[token(2, 0)], "choice 2 of 2");
        check(&[end(0, 0), token(0, 0)], "after its end");
        check(&[end(0, 0), end(0, 0)], "ends twice");
        check(&[token(0, 0), end(0, 0)], "after 0 tokens where 1 came");
        check(&[end(0, 2)], "after 2 tokens where 0 came");
        check(&[Some(Sent::Finished(Finished::default()))], "without a reason");
        check(&[Some(Sent::Started(started(7)))], "starts twice");
        check(&[None], "without content");
    }

    #[test]
    fn a_resumed_stream_tells_no_end_again() {
        let mut progress = progress(3);
        for sent in [token(0, 0), token(1, 0), end(1, 1)] {
            progress.accept(sent).unwrap();
        }
        let resume = progress.resume();
        let ids: Vec<&[u32]> = resume.choices.iter().map(|choice| &choice.ids[..]).collect();
        assert_eq!(ids, [&[0][..], &[10], &[]]);
        assert_eq!(resume.key.as_deref(), Some("k"));
        progress.goes_on(&started(7)).unwrap();
        assert_eq!(progress.accept(end(1, 1)), Ok(None));
        assert!(progress.accept(end(1, 1)).unwrap_err().contains("ends twice"));
        assert!(progress.accept(token(1, 1)).unwrap_err().contains("after its end"));
        assert!(progress.accept(token(0, 1)).unwrap().is_some());
        assert!(progress.goes_on(&started(8)).unwrap_err().contains("another stream"));
    }
}
