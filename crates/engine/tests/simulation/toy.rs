//! A model of whole numbers: attention, gate and experts are pure functions, so that what a sequence becomes depends on
//! its tokens alone, and on every one of them, every key and value, and every (row, expert) pair exactly once. Experts give
//! other outputs on devices of another numerics class.

use muster_types::{ExpertId, ExpertKey, LayerId, NumericsClass, Reach, TokenId};

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

    /// What an expert makes of a row on a device of this class.
    pub(crate) fn output(key: ExpertKey, row: u64, class: NumericsClass) -> u64 {
        let output = mix(mix(row, u64::from(key.layer.get()) + 1000), u64::from(key.expert.get()));
        output ^ class.index() as u64
    }

    /// What an expert's output counts in a row's sum: a small whole number.
    pub(crate) fn weight(expert: ExpertId, row: u64) -> f32 {
        (1 + mix(row, u64::from(expert.get())) % 255) as f32
    }

    /// The weighted sum of a row's experts, each on a device of the class that `class_of` says.
    pub(crate) fn sum(&self, layer: usize, row: u64, class_of: impl Fn(ExpertKey) -> NumericsClass) -> u64 {
        let term = |expert| {
            let key = ExpertKey { layer: self.layer(layer), expert };
            weighted(Self::output(key, row, class_of(key)), Self::weight(expert, row))
        };
        self.choose(layer, row).into_iter().map(term).fold(0, u64::wrapping_add)
    }

    /// All sums that a row may have where each expert is on a device of one of two classes.
    pub(crate) fn sums(&self, layer: usize, row: u64, classes: [NumericsClass; 2]) -> Vec<u64> {
        let chosen = self.choose(layer, row);
        let sum = |choice: usize| {
            let nth = |key: ExpertKey| chosen.iter().position(|&expert| expert == key.expert).unwrap();
            self.sum(layer, row, |key| classes[choice >> nth(key) & 1])
        };
        (0..1 << chosen.len()).map(sum).collect()
    }

    /// A row with its experts' sum.
    pub(crate) fn combine(row: u64, sum: u64) -> u64 {
        mix(row, sum)
    }

    pub(crate) fn token(&self, row: u64) -> TokenId {
        TokenId::new((row % u64::from(self.vocab)) as u32, self.vocab).unwrap()
    }

    /// What a request gives when nothing disturbs it: no batch, no blocks, no workers but of the classes that `class_of` says.
    pub(crate) fn generate(
        &self,
        prompt: &[TokenId],
        max_tokens: u32,
        context: u32,
        class_of: impl Fn(ExpertKey) -> NumericsClass,
    ) -> Vec<TokenId> {
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
                    row = Self::combine(row, self.sum(layer, row, &class_of));
                }
                last = row;
            }
            tokens.push(self.token(last));
        }
        tokens.split_off(prompt.len())
    }
}
