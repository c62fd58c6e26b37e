//! Output of a choice: decodes tokens to text, and ends it at stop strings and stop ids.
//!
//! Always holds: the same tokens in the same order give the same pieces, on any router, so a stream that broke off
//! elsewhere is continued here by replaying its tokens. Knows nothing of logits, sampling or channels.

use muster_text::{Detokenizer, StopMatcher, StopOutcome, Tokenizer};
use muster_types::TokenId;

use crate::request::FinishReason;

/// The text of one choice, up to the tokens taken so far.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
    stop_ids: Vec<TokenId>,
}

/// Effect of a token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Text that became certain; may be empty.
    Text(String),
    /// A stop string is complete; the held-back text before it.
    Stopped(String),
    /// A stop id: it ends the output and has no text.
    StopId,
}

/// The end of a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    /// Text held back until now.
    pub(crate) text: String,
}

/// Tokens that cannot be the beginning of an output: the token at this index ends it, yet others follow.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct GoesOnAfterEnd(pub(crate) usize);

impl Output {
    /// State before the first token. The text continues `tail`, or stands by itself when `tail` is empty. Without a
    /// tokenizer there is no text.
    pub(crate) fn new(
        tokenizer: Option<&Tokenizer>,
        tail: &[u32],
        stop_strings: Vec<String>,
        stop_ids: Vec<TokenId>,
    ) -> Self {
        let detokenizer = tokenizer.map(|tokenizer| tokenizer.detokenizer(tail));
        Self { detokenizer, stops: StopMatcher::new(stop_strings), stop_ids }
    }

    /// Takes the next token.
    pub(crate) fn take(&mut self, token: TokenId) -> Taken {
        if self.stop_ids.contains(&token) {
            return Taken::StopId;
        }
        let delta = self.detokenizer.as_mut().map_or_else(String::new, |d| d.push(token.get()));
        match self.stops.push(&delta) {
            StopOutcome::Text(text) => Taken::Text(text),
            StopOutcome::Stopped(text) => Taken::Stopped(text),
        }
    }

    /// Ends the output for `reason`, or for a stop string that the held-back text completes.
    pub(crate) fn end(&mut self, reason: FinishReason) -> End {
        let rest = self.detokenizer.as_mut().map_or_else(String::new, Detokenizer::finish);
        match self.stops.push(&rest) {
            StopOutcome::Stopped(text) => End { reason: FinishReason::Stop, text },
            StopOutcome::Text(text) => End { reason, text: text + &self.stops.finish() },
        }
    }

    /// Replays tokens whose text was sent already. `Some` when they reach the end of the output, at the latest after
    /// `max_tokens`.
    ///
    /// # Errors
    /// When tokens follow one that ends the output. The caller has checked that `had` has at most `max_tokens`.
    pub(crate) fn replay(&mut self, had: &[TokenId], max_tokens: u32) -> Result<Option<End>, GoesOnAfterEnd> {
        for (index, &token) in had.iter().enumerate() {
            let end = match self.take(token) {
                Taken::Text(_) => continue,
                Taken::Stopped(_) => End { reason: FinishReason::Stop, text: String::new() },
                Taken::StopId => self.end(FinishReason::Stop),
            };
            let is_last = index + 1 == had.len();
            return if is_last { Ok(Some(end)) } else { Err(GoesOnAfterEnd(index)) };
        }
        let is_full = had.len() >= max_tokens as usize;
        Ok(is_full.then(|| self.end(FinishReason::Length)))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use muster_text::{Special, TokenizerFiles};

    use super::*;

    fn tokenizer() -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo/tokenizer.json");
        let json = std::fs::read(path).unwrap();
        Tokenizer::from_files(&TokenizerFiles::alone(&json), 4096).unwrap()
    }

    fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
        let ids = tokenizer.encode(text, Special::Omit).unwrap();
        ids.into_iter().map(|id| TokenId::new(id, 4096).unwrap()).collect()
    }

    /// Pieces of the whole output, the last for its end.
    fn pieces(mut output: Output, tokens: &[TokenId]) -> Vec<Taken> {
        let mut pieces = Vec::new();
        for &token in tokens {
            pieces.push(output.take(token));
            if !matches!(pieces.last(), Some(Taken::Text(_))) {
                return pieces;
            }
        }
        pieces.push(Taken::Text(output.end(FinishReason::Length).text));
        pieces
    }

    fn goes_on_from_every_cut(text: &str, stops: &[&str]) -> Vec<Taken> {
        let tokenizer = tokenizer();
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let output = Output::new(Some(&tokenizer), &[], stops, Vec::new());
        let tokens = encode(&tokenizer, text);
        let whole = pieces(output.clone(), &tokens);
        let most = u32::try_from(tokens.len()).unwrap() + 1;
        for cut in 0..whole.len() - 1 {
            let mut resumed = output.clone();
            assert_eq!(resumed.replay(&tokens[..cut], most), Ok(None));
            assert_eq!(pieces(resumed, &tokens[cut..]), whole[cut..], "{text:?} cut at {cut}");
        }
        whole
    }

    #[test]
    fn characters_split_over_tokens_come_out_once() {
        let text = "naïve 漢字 and 🦀🦀, ok";
        let whole = goes_on_from_every_cut(text, &[]);
        assert!(whole.len() > text.chars().count() / 2);
        let incomplete = whole.iter().filter(|piece| **piece == Taken::Text(String::new())).count();
        assert!(incomplete > 4, "no character was split over tokens: {whole:?}");
        let joined = whole.iter().map(|piece| match piece {
            Taken::Text(text) | Taken::Stopped(text) => text.as_str(),
            Taken::StopId => "",
        });
        assert_eq!(joined.collect::<String>(), text);
    }

    #[test]
    fn a_stop_string_may_straddle_the_cut() {
        let whole = goes_on_from_every_cut("It was a big smile and more", &["big smile", "bigger"]);
        assert!(matches!(whole.last(), Some(Taken::Stopped(_))), "{whole:?}");
        // A false start of the stop string is held back before the cut and sent after it.
        let whole = goes_on_from_every_cut("It was a big small thing", &["big smile"]);
        assert!(matches!(whole.last(), Some(Taken::Text(_))), "{whole:?}");
        let whole = goes_on_from_every_cut("one 🦀 two", &["🦀 tw"]);
        assert!(matches!(whole.last(), Some(Taken::Stopped(_))), "{whole:?}");
    }

    #[test]
    fn tokens_that_reach_the_end_say_how_it_ended() {
        let tokenizer = tokenizer();
        let tokens = encode(&tokenizer, "It was a big smile");
        let count = u32::try_from(tokens.len()).unwrap();
        let output = |stops: &[&str], stop_ids: &[TokenId]| {
            let stops = stops.iter().map(ToString::to_string).collect();
            Output::new(Some(&tokenizer), &[], stops, stop_ids.to_vec())
        };
        let end = |reason, text: &str| Ok(Some(End { reason, text: text.into() }));
        assert_eq!(output(&[], &[]).replay(&tokens, count), end(FinishReason::Length, ""));
        assert_eq!(output(&[" smiles"], &[]).replay(&tokens, count), end(FinishReason::Length, " smile"));
        assert_eq!(output(&[], &[]).replay(&tokens, count + 1), Ok(None));
        assert_eq!(output(&[" smile"], &[]).replay(&tokens, count), end(FinishReason::Stop, ""));
        let last = *tokens.last().unwrap();
        assert_eq!(output(&[], &[last]).replay(&tokens, count + 9), end(FinishReason::Stop, ""));
        let held = output(&[" big smile"], &[last]).replay(&tokens, count);
        assert_eq!(held, end(FinishReason::Stop, " big"));
    }

    #[test]
    fn nothing_follows_an_end() {
        let tokenizer = tokenizer();
        let tokens = encode(&tokenizer, "It was a big smile");
        let mut output = Output::new(Some(&tokenizer), &[], Vec::new(), vec![tokens[1]]);
        assert_eq!(output.replay(&tokens, 100), Err(GoesOnAfterEnd(1)));
        let mut output = Output::new(Some(&tokenizer), &[], vec![" was".into()], Vec::new());
        assert_eq!(output.replay(&tokens, 100), Err(GoesOnAfterEnd(1)));
    }
}
