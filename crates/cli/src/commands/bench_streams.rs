//! Streams that give the same tokens every time they are run, and how long they stand still.

use std::time::{Duration, Instant};

use muster_model::sampler::RawSampling;

use crate::backend::{Ask, Backend, Manner, Piece};
use crate::failure::Failure;

/// Tokens of every prompt.
const PROMPT: u32 = 16;
/// Tokens of every stream, if the context has room for them.
const OUTPUT: u32 = 400;

/// The tokens of a stream, and its longest pause.
pub(super) type Run = Result<(Vec<u32>, Duration), Failure>;

/// What streams are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams {
    /// Of each of them.
    pub(super) tokens: u32,
    vocabulary: u32,
}

impl Streams {
    pub(super) fn new(context: u32, vocabulary: u32) -> Self {
        Self { tokens: context.saturating_sub(PROMPT).clamp(1, OUTPUT), vocabulary }
    }

    /// Runs stream `n`, telling of each pause before a token; the first has none. Every other stream is sampled, each with
    /// a seed of its own.
    pub(super) fn run<F: FnMut(Duration)>(
        &self,
        n: u32,
        mut backend: Backend,
        mut on_token: F,
    ) -> impl Future<Output = Run> + use<F> {
        let token =
            |i: u32| (n.wrapping_mul(131).wrapping_add(i.wrapping_mul(17)).wrapping_add(7)) % self.vocabulary;
        let (prompt, tokens) = ((0..PROMPT).map(token).collect(), self.tokens);
        let temperature = if n.is_multiple_of(2) { 0.0 } else { 0.8 };
        let manner = Manner {
            sampling: RawSampling { temperature, ..RawSampling::default() },
            seed: Some(n.into()),
            ignore_eos: true,
            ..Manner::default()
        };
        async move {
            let mut pieces = backend.generate(Ask::Tokens(prompt), Some(tokens), &manner).await?;
            let (mut ids, mut longest, mut last) = (Vec::new(), Duration::ZERO, None::<Instant>);
            while let Some(piece) = pieces.next().await? {
                if let Piece::Token { id, .. } = piece {
                    let now = Instant::now();
                    let pause = last.replace(now).map_or(Duration::ZERO, |last| now - last);
                    longest = longest.max(pause);
                    on_token(pause);
                    ids.push(id);
                }
            }
            Ok((ids, longest))
        }
    }
}
