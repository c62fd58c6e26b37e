//! Stop strings, matched in text that comes in pieces.
//!
//! Always holds: emitted text never contains a stop string, and together with the text held back it is all the
//! text so far. The result does not depend on how the text was cut. At most the length of the longest stop
//! string is held back.

/// Result of one more piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopOutcome {
    /// Text that belongs to the answer; may be empty.
    Text(String),
    /// A stop string is complete. The text before it that was not yet handed out; the stop string itself
    /// and what follows it are dropped.
    Stopped(String),
}

/// Finds the first stop string in a text. The one that is complete first counts; of several that are
/// complete at the same character, the longest.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher for `stops`; empty strings stop nothing.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|s| !s.is_empty()).collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece of text. After a stop, everything is dropped.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome::Stopped(String::new());
        }
        self.held.push_str(text);
        if let Some(start) = self.first_stop() {
            self.stopped = true;
            self.held.truncate(start);
            return StopOutcome::Stopped(std::mem::take(&mut self.held));
        }
        let keep = self.stops.iter().map(|stop| partial_match(&self.held, stop)).max().unwrap_or(0);
        let undecided = self.held.split_off(self.held.len() - keep);
        StopOutcome::Text(std::mem::replace(&mut self.held, undecided))
    }

    /// Ends the text and returns the text held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the stop string that is complete first begins.
    fn first_stop(&self) -> Option<usize> {
        let matches = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop)?;
            Some((start + stop.len(), start))
        });
        matches.min().map(|(_, start)| start)
    }
}

/// Length in bytes of the longest end of `text` with which `stop` begins. `stop` itself is not in `text`.
fn partial_match(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    let longest = text.len().min(stop.len() - 1);
    // Both begin at a character's first byte where they agree, so no character is cut.
    (1..=longest).rev().find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, on the whole text at once: the answer, and whether it was stopped.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        for (at, c) in text.char_indices() {
            let seen = &text[..at + c.len_utf8()];
            let longest = stops.iter().filter(|s| !s.is_empty() && seen.ends_with(*s)).map(String::len).max();
            if let Some(length) = longest {
                return (seen[..seen.len() - length].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn run(pieces: &[String], stops: &[String]) -> (String, bool) {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let mut matcher = StopMatcher::new(stops.to_vec());
        let (mut answer, mut stopped) = (String::new(), false);
        for piece in pieces {
            match matcher.push(piece) {
                StopOutcome::Text(text) => {
                    assert!(!stopped, "text after a stop");
                    answer += &text;
                }
                StopOutcome::Stopped(text) => {
                    assert!(!stopped || text.is_empty());
                    answer += &text;
                    stopped = true;
                }
            }
            assert!(matcher.held.len() < longest.max(1), "held back more than a stop string can need");
        }
        answer += &matcher.finish();
        (answer, stopped)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn agrees_with_the_definition_however_the_text_is_cut(
            pieces in prop::collection::vec("[abé😀]{0,5}", 0..12),
            stops in prop::collection::vec("[abé😀]{0,4}", 0..4),
        ) {
            prop_assert_eq!(run(&pieces, &stops), naive(&pieces.concat(), &stops));
        }
    }

    #[test]
    fn a_stop_across_pieces_is_found_and_a_false_start_is_released() {
        let mut matcher = StopMatcher::new(vec!["</end>".into()]);
        assert_eq!(matcher.push("hello </"), StopOutcome::Text("hello ".into()));
        assert_eq!(matcher.push("x> </e"), StopOutcome::Text("</x> ".into()));
        assert_eq!(matcher.push("nd> more"), StopOutcome::Stopped(String::new()));
        assert_eq!(matcher.push("more"), StopOutcome::Stopped(String::new()));
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn without_stops_nothing_is_held_back() {
        let mut matcher = StopMatcher::new(vec![String::new()]);
        assert_eq!(matcher.push("anything"), StopOutcome::Text("anything".into()));
        assert_eq!(matcher.finish(), "");
    }
}
