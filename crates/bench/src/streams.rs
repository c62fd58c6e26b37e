//! Reproducible streams, and their pauses.

use std::time::{Duration, Instant};

use crate::{About, BenchError, Request, Target, Tokens};

/// Tokens of every prompt.
const PROMPT: u32 = 16;
/// Tokens of every stream, if the context has room.
const OUTPUT: u32 = 400;

/// Tokens of a stream, and its longest pause.
pub type Run = Result<(Vec<u32>, Duration), BenchError>;

/// Parameters of streams.
#[derive(Debug, Clone, Copy)]
pub struct Streams {
    /// Tokens of each stream.
    pub tokens: u32,
    vocabulary: u32,
}

impl Streams {
    /// Streams as long as the model's context allows, up to `OUTPUT`.
    #[must_use]
    pub fn of(about: &About) -> Self {
        let tokens = about.context.saturating_sub(PROMPT).clamp(1, OUTPUT);
        Self { tokens, vocabulary: about.vocabulary }
    }

    /// Runs stream `n` and reports the pause before each token, zero before the first. Every other stream is sampled,
    /// each with a seed of its own.
    pub fn run<T: Target, F: FnMut(Duration)>(
        &self,
        n: u32,
        mut target: T,
        mut on_token: F,
    ) -> impl Future<Output = Run> + use<T, F> {
        let token =
            |i: u32| (n.wrapping_mul(131).wrapping_add(i.wrapping_mul(17)).wrapping_add(7)) % self.vocabulary;
        let request = Request {
            prompt: (0..PROMPT).map(token).collect(),
            tokens: self.tokens,
            temperature: if n.is_multiple_of(2) { 0.0 } else { 0.8 },
            seed: Some(n.into()),
        };
        async move {
            let mut tokens = target.generate(request).await?;
            let (mut ids, mut longest, mut last) = (Vec::new(), Duration::ZERO, None::<Instant>);
            while let Some(id) = tokens.next().await? {
                let now = Instant::now();
                let pause = last.replace(now).map_or(Duration::ZERO, |last| now - last);
                longest = longest.max(pause);
                on_token(pause);
                ids.push(id);
            }
            Ok((ids, longest))
        }
    }
}
