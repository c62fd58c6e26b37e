//! Causal attention of rows over their own sequences in the paged cache.
//!
//! What must hold: a row's bits depend on its query and on the keys and values up to its position alone. For that,
//! its softmax runs over blocks of sixteen absolute positions in ascending order, whatever the call holds besides:
//!
//! - a score is `scale * q·k`, the product over the head dimension kept in four sums (element `d` in sum `d % 4`,
//!   ascending, fused multiply-add) that are added as `(0 + 1) + (2 + 3)`;
//! - per block, with `m` the greatest score so far, sum and output are multiplied by `exp(m before - m)`, by 1 where
//!   `m` did not rise; the block's `exp(score - m)` are added up by a fixed tree and that to the sum; the values are
//!   added to the output in ascending position by fused multiply-add;
//! - a sink, which is one more score whose value is nothing, is taken in after all blocks: where it is above `m`, sum
//!   and output are multiplied by `exp(m - sink)` and `m` becomes the sink; then `exp(sink - m)` is added to the sum;
//! - in the end the output is divided by the sum.
//!
//! So whole prefill, chunked prefill, a reused prefix and decode agree to the bit. Positions that the row does not see
//! are never read as values, so what another sequence left there cannot matter; of blocks that the row sees nothing of, not
//! even the number is looked at. No memory grows with the context.

use std::ops::RangeInclusive;

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::isa::{Kernel, dispatch};
use crate::kv::{BLOCK_TOKENS, Element, KvCache, KvSlot, Lines, Store};
use crate::math::{exp_lanes, exp_scalar};
use crate::simd::{LANES, Simd, lanes, load_part, store_part, tree_max, tree_sum};

/// Queries that read a block's keys and values while they are in the innermost cache.
const QUERIES_PER_PASS: usize = 32;

/// Which of the positions up to its own a row attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sees {
    /// All of them.
    All,
    /// The last so many, its own included.
    Last(usize),
    /// Those of its own chunk: positions are cut into chunks so long, the first starting at 0.
    Chunk(usize),
}

impl Sees {
    /// The positions that a row at `position` attends to.
    fn visible(self, position: u32) -> RangeInclusive<usize> {
        let last = position as usize;
        let first = match self {
            Self::All => 0,
            Self::Last(window) => (last + 1).saturating_sub(window),
            Self::Chunk(len) => last / len * len,
        };
        first..=last
    }
}

/// The shape of one attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape<'a> {
    /// Query heads; a multiple of `kv_heads`. Query head `h` reads KV head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head's query and key.
    pub head_dim: usize,
    /// Elements of a head's value, and so of its output.
    pub value_dim: usize,
    /// What scores are multiplied by, usually `head_dim` to the power of -1/2.
    pub scale: f32,
    /// Which positions a row attends to.
    pub sees: Sees,
    /// The query heads' sinks: scores that take part in the softmax and whose value is nothing.
    pub sinks: Option<&'a [f32]>,
}

impl AttentionShape<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Attention of rows at their positions: `q` is `[rows, heads * head_dim]`, `out` `[rows, heads * value_dim]`. The keys
/// and values of the positions that a row sees (its own included) are in the cache. Positions that follow are not looked
/// at, so all rows of a chunk may have been written before.
///
/// # Panics
/// If the shape does not fit the cache, a row sees 0 positions, its heads are no multiple of its KV heads, there is not
/// one sink per head, or `layer`, `q`, `rows` or `out` do not fit.
pub fn attention(
    cpu: &Cpu,
    shape: &AttentionShape<'_>,
    layer: usize,
    q: &[f32],
    rows: &[KvSlot<'_>],
    kv: &KvCache,
    out: &mut [f32],
) {
    let cache = kv.shape();
    assert_eq!(shape.head_dim, cache.head_dim, "shape: head_dim must be the cache's");
    assert_eq!(shape.value_dim, cache.value_dim, "shape: value_dim must be the cache's");
    assert_eq!(shape.kv_heads, cache.kv_heads, "shape: kv_heads must be the cache's");
    assert!(
        shape.heads > 0 && shape.heads.is_multiple_of(shape.kv_heads),
        "shape: heads must divide by kv_heads"
    );
    assert!(
        !matches!(shape.sees, Sees::Last(0) | Sees::Chunk(0)),
        "shape: a row must see at least its own position"
    );
    if let Some(sinks) = shape.sinks {
        assert_eq!(sinks.len(), shape.heads, "shape: there must be one sink per head");
    }
    let width = shape.heads * shape.head_dim;
    assert_eq!(q.len(), rows.len() * width, "q: its length must be rows * heads * head_dim");
    let width = shape.heads * shape.value_dim;
    assert_eq!(out.len(), rows.len() * width, "out: its length must be rows * heads * value_dim");
    // No more than the position, which has 32 bits.
    kv.check(layer, rows, |position| *shape.sees.visible(position).start() as u32);
    match &kv.store {
        Store::F32(lines) => run(cpu, shape, layer, q, rows, lines, out),
        Store::Bf16(lines) => run(cpu, shape, layer, q, rows, lines, out),
    }
}

fn run<E: Element>(
    cpu: &Cpu,
    shape: &AttentionShape<'_>,
    layer: usize,
    q: &[f32],
    rows: &[KvSlot<'_>],
    cache: &Lines<E>,
    out: &mut [f32],
) {
    let positions: usize = rows.iter().map(|row| shape.sees.visible(row.position).count()).sum();
    let work = positions.saturating_mul(shape.heads * (shape.head_dim + shape.value_dim));
    // Rows of a chunk share their sequence's blocks, so some go together, but never so many that a thread idles.
    let share = rows.len() * shape.kv_heads / (cpu.threads_for(work) * 4);
    let per_task = share.clamp(1, (QUERIES_PER_PASS / shape.group()).max(1));
    let tiles = rows.len().div_ceil(per_task);
    let out = Disjoint::new(out);
    // Rows change fastest, so that a KV head's blocks stay in cache.
    cpu.run(tiles * shape.kv_heads, work, &|task| {
        let (kv_head, first_row) = (task / tiles, task % tiles * per_task);
        let rows = &rows[first_row..rows.len().min(first_row + per_task)];
        for first in (0..shape.group()).step_by(QUERIES_PER_PASS) {
            let heads = QUERIES_PER_PASS.min(shape.group() - first);
            let first_head = kv_head * shape.group() + first;
            dispatch(
                cpu.isa(),
                Pass { shape, layer, kv_head, first_row, rows, first_head, heads, cache, q, out: &out },
            );
        }
    });
}

/// Some query heads of some rows, at most [`QUERIES_PER_PASS`] queries in all, that share a KV head.
struct Pass<'a, E> {
    shape: &'a AttentionShape<'a>,
    layer: usize,
    kv_head: usize,
    first_row: usize,
    rows: &'a [KvSlot<'a>],
    first_head: usize,
    heads: usize,
    cache: &'a Lines<E>,
    q: &'a [f32],
    out: &'a Disjoint<'a, f32>,
}

/// What a row sees of a block: the block's number in the cache, and its first and last visible position.
#[derive(Clone, Copy, PartialEq)]
struct View {
    block: usize,
    first: usize,
    last: usize,
}

/// A query, where its output goes, and its softmax so far.
struct Query<'a> {
    q: &'a [f32],
    /// Where the output is added up.
    out: &'a mut [f32],
    blocks: &'a [u32],
    /// First and last visible position.
    first: usize,
    last: usize,
    max: f32,
    sum: f32,
}

impl<E: Element> Kernel for Pass<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut queries: [Query<'_>; QUERIES_PER_PASS] = std::array::from_fn(|_| Query::none());
        let queries = &mut queries[..self.rows.len() * self.heads];
        let (mut first, mut last) = (usize::MAX, 0);
        for (row, queries) in queries.chunks_exact_mut(self.heads).enumerate() {
            let visible = self.shape.sees.visible(self.rows[row].position);
            first = first.min(visible.start() / BLOCK_TOKENS);
            last = last.max(visible.end() / BLOCK_TOKENS);
            for (head, query) in queries.iter_mut().enumerate() {
                let head = (self.first_row + row) * self.shape.heads + self.first_head + head;
                let place = head * self.shape.head_dim;
                query.q = &self.q[place..place + self.shape.head_dim];
                // SAFETY: no two queries, of this pass or another, have the same row and head.
                query.out = unsafe { self.out.piece(head * self.shape.value_dim, self.shape.value_dim) };
                query.out.fill(0.0);
                query.blocks = self.rows[row].blocks;
                (query.first, query.last) = (*visible.start(), *visible.end());
            }
        }
        for index in first..=last {
            let mut rest = &mut *queries;
            while let Some(view) = rest.first().map(|query| query.view(index)) {
                let four = rest.len() >= 4 && rest[1..4].iter().all(|query| query.view(index) == view);
                let (now, later) = rest.split_at_mut(if four { 4 } else { 1 });
                rest = later;
                let Some(view) = view else { continue };
                if let Some(now) = now.first_chunk_mut::<4>() {
                    self.add_block(s, now, view);
                } else if let Some(now) = now.first_chunk_mut::<1>() {
                    self.add_block(s, now, view);
                }
            }
        }
        for (index, query) in queries.iter_mut().enumerate() {
            if let Some(sinks) = self.shape.sinks {
                query.take_sink(sinks[self.first_head + index % self.heads]);
            }
            for value in query.out.iter_mut() {
                *value /= query.sum;
            }
        }
    }
}

impl<E: Element> Pass<'_, E> {
    /// Takes a block into the softmax of `Q` queries that have the same view of it.
    #[inline(always)]
    fn add_block<S: Simd, const Q: usize>(&self, s: S, queries: &mut [Query<'_>; Q], view: View) {
        let (keys, values) = self.cache.head(view.block, self.layer, self.kv_head);
        let products = products::<S, E, Q>(s, queries, keys);
        let mut weights = [[0.0; LANES]; Q];
        let mut factors = [1.0; Q];
        for i in 0..Q {
            let mut scores = lanes(s, s.mul(products[i], s.splat(self.shape.scale)));
            scores[..view.first].fill(f32::NEG_INFINITY);
            scores[view.last + 1..].fill(f32::NEG_INFINITY);
            (weights[i], factors[i]) = queries[i].take(s, &scores);
        }
        let lines = self.shape.value_dim.div_ceil(LANES);
        for part in 0..lines {
            let from = part * LANES;
            let to = self.shape.value_dim.min(from + LANES);
            let mut totals = [s.splat(0.0); Q];
            for i in 0..Q {
                let total = load_part(s, &queries[i].out[from..to]);
                totals[i] = s.mul(total, s.splat(factors[i]));
            }
            for lane in view.first..=view.last {
                let value = E::load(s, &values[lane * lines + part]);
                for i in 0..Q {
                    totals[i] = s.fma(s.splat(weights[i][lane]), value, totals[i]);
                }
            }
            for i in 0..Q {
                store_part(s, totals[i], &mut queries[i].out[from..to]);
            }
        }
    }
}

impl Query<'_> {
    fn none() -> Self {
        Self { q: &[], out: &mut [], blocks: &[], first: 0, last: 0, max: f32::NEG_INFINITY, sum: 0.0 }
    }

    /// What the query sees of the block that holds positions `16 * index` to `16 * index + 15`.
    #[inline(always)]
    fn view(&self, index: usize) -> Option<View> {
        let start = index * BLOCK_TOKENS;
        if self.last < start || self.first >= start + BLOCK_TOKENS {
            return None;
        }
        let (first, last) = (self.first.saturating_sub(start), (self.last - start).min(BLOCK_TOKENS - 1));
        Some(View { block: self.blocks[index] as usize, first, last })
    }

    /// Takes a block's scores, negative infinity where the query sees nothing. Returns the weights of the block's
    /// values and the factor for what was added up before.
    #[inline(always)]
    fn take<S: Simd>(&mut self, s: S, scores: &[f32; LANES]) -> ([f32; LANES], f32) {
        let top = tree_max(*scores);
        let mut factor = 1.0;
        if top > self.max {
            // From negative infinity, before the first block, the factor is 0 and multiplies zeros.
            factor = exp_scalar(self.max - top);
            self.max = top;
        }
        let weights = lanes(s, exp_lanes(s, s.sub(s.load(scores), s.splat(self.max))));
        self.sum = self.sum * factor + tree_sum(weights);
        (weights, factor)
    }

    /// Takes in a score that has no value.
    #[inline(always)]
    fn take_sink(&mut self, sink: f32) {
        if sink > self.max {
            let factor = exp_scalar(self.max - sink);
            self.max = sink;
            self.sum *= factor;
            for value in self.out.iter_mut() {
                *value *= factor;
            }
        }
        self.sum += exp_scalar(sink - self.max);
    }
}

/// `Q` queries times sixteen keys.
#[inline(always)]
fn products<S: Simd, E: Element, const Q: usize>(
    s: S,
    queries: &[Query<'_>; Q],
    keys: &[[E; LANES]],
) -> [S::V; Q] {
    let mut sums = [[s.splat(0.0); 4]; Q];
    let whole = keys.len() / 4 * 4;
    for start in (0..whole).step_by(4) {
        let keys: &[[E; LANES]; 4] = keys[start..].first_chunk().expect("four keys are left");
        let mut part = [&[0.0; 4]; Q];
        for i in 0..Q {
            part[i] = queries[i].q[start..].first_chunk().expect("queries are as long as keys");
        }
        for d in 0..4 {
            let key = E::load(s, &keys[d]);
            for i in 0..Q {
                sums[i][d] = s.fma(s.splat(part[i][d]), key, sums[i][d]);
            }
        }
    }
    for d in 0..3 {
        if whole + d < keys.len() {
            let key = E::load(s, &keys[whole + d]);
            for i in 0..Q {
                sums[i][d] = s.fma(s.splat(queries[i].q[whole + d]), key, sums[i][d]);
            }
        }
    }
    let mut out = [s.splat(0.0); Q];
    for i in 0..Q {
        out[i] = s.add(s.add(sums[i][0], sums[i][1]), s.add(sums[i][2], sums[i][3]));
    }
    out
}
