//! A model of whole numbers: attention, gate and experts are pure functions, so that what a sequence becomes depends on
//! its tokens alone, and on every one of them, every key and value, and every (row, expert) pair exactly once.

use muster_types::Reach;
use muster_types::{ExpertId, LayerId, TokenId};

use crate::rng::mix;
use crate::wire::weighted;

#[derive(Debug, Clone)]
pub(crate) struct Toy {
    /// Routed experts of each layer.
    pub(crate) experts: Vec<u32>,
    /// What each layer sees.
    pub(crate) reaches: Vec<Reach>,
    /// Experts per row.
    pub(crate) k: usize,
    pub(crate) vocab: u32,
    pub(crate) salt: u64,
}

impl Toy {
    pub(crate) fn layers(&self) -> usize {
        self.experts.len()
    }

    pub(crate) fn layer(&self, number: usize) -> LayerId {
        LayerId::new(number as u32, self.experts.len() as u32).unwrap()
    }

    pub(crate) fn embed(&self, token: TokenId) -> u64 {
        mix(self.salt, u64::from(token.get()))
    }

    /// What a position leaves in the cache of a layer.
    pub(crate) fn entry(layer: usize, row: u64) -> u64 {
        mix(row, layer as u64 + 1)
    }

    /// A row after it attended to the entries that it sees, up to its own.
    pub(crate) fn attend(row: u64, entries: impl Iterator<Item = u64>) -> u64 {
        entries.fold(row, mix)
    }

    /// The experts of a row, ascending.
    pub(crate) fn choose(&self, layer: usize, row: u64) -> Vec<ExpertId> {
        let mut chosen: Vec<u32> = Vec::with_capacity(self.k);
        let mut draw = mix(row, 77);
        while chosen.len() < self.k {
            draw = mix(draw, layer as u64);
            // The smaller of two: some are asked for more than others.
            let count = u64::from(self.experts[layer]);
            let expert = (draw % count).min((draw >> 32) % count) as u32;
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        chosen.sort_unstable();
        chosen.into_iter().map(|expert| ExpertId::new(expert, self.experts[layer]).unwrap()).collect()
    }

    /// What an expert makes of a row.
    pub(crate) fn output(layer: usize, expert: ExpertId, row: u64) -> u64 {
        mix(mix(row, layer as u64 + 1000), u64::from(expert.get()))
    }

    /// What an expert's output counts in a row's sum: a small whole number.
    pub(crate) fn weight(expert: ExpertId, row: u64) -> f32 {
        (1 + mix(row, u64::from(expert.get())) % 255) as f32
    }

    /// The weighted sum of a row's experts.
    pub(crate) fn sum(&self, layer: usize, row: u64) -> u64 {
        let term = |expert| weighted(Self::output(layer, expert, row), Self::weight(expert, row));
        self.choose(layer, row).into_iter().map(term).fold(0, u64::wrapping_add)
    }

    /// A row with its experts' sum.
    pub(crate) fn combine(row: u64, sum: u64) -> u64 {
        mix(row, sum)
    }

    pub(crate) fn token(&self, row: u64) -> TokenId {
        TokenId::new((row % u64::from(self.vocab)) as u32, self.vocab).unwrap()
    }

    /// What a request gives when nothing disturbs it: no batch, no blocks, no workers.
    pub(crate) fn generate(&self, prompt: &[TokenId], max_tokens: u32, context: u32) -> Vec<TokenId> {
        let mut tokens = prompt.to_vec();
        let mut cache = vec![Vec::new(); self.layers()];
        let limit = (prompt.len() + max_tokens as usize).min(context as usize);
        while tokens.len() < limit {
            let mut last = 0;
            for &token in &tokens[cache[0].len()..] {
                let mut row = self.embed(token);
                for (layer, entries) in cache.iter_mut().enumerate() {
                    entries.push(Self::entry(layer, row));
                    let seen = self.reaches[layer].first_visible(entries.len() as u32 - 1);
                    row = Self::attend(row, entries[seen as usize..].iter().copied());
                    row = Self::combine(row, self.sum(layer, row));
                }
                last = row;
            }
            tokens.push(self.token(last));
        }
        tokens.split_off(prompt.len())
    }
}
