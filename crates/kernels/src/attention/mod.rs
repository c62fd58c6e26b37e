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
//! - a sink, one more score without a value, is accumulated after all blocks: where it is above `m`, sum and output are
//!   multiplied by `exp(m - sink)` and `m` becomes the sink; then `exp(sink - m)` is added to the sum;
//! - in the end the output is divided by the sum.
//!
//! So whole prefill, chunked prefill, a reused prefix and decode agree to the bit. Values at positions that the row
//! does not attend to are never read, so remains of another sequence cannot matter; nor are the numbers of blocks
//! without a visible position. No memory grows with the context. Where the cache holds the ends of keys as values
//! alone, each pass transposes them into lines of keys, a stretch at a time, for all its queries that see the block;
//! the order of a score is the same.

mod products;

use std::ops::RangeInclusive;

use self::products::{Stretched, add_products};
use muster_types::Reach;

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::kernel::{Kernel, run_on};
use crate::kv::{BLOCK_TOKENS, Element, KvCache, KvSlot, KvValues, Lines, Store};
use crate::math::{exp_lanes, exp_scalar};
use crate::simd::{LANES, Simd, lanes, load_part, store_part, tree_max, tree_sum};

/// Most queries of a pass: they share a block's keys and values while these are in the innermost cache.
const QUERIES_PER_PASS: usize = 32;
/// Queries computed side by side over a block's lines.
const TOGETHER: usize = 4;
/// Lines of values accumulated at a time for these queries, where registers suffice.
const LINES: usize = 4;

/// The positions that a row at `position` attends to.
fn visible(reach: Reach, position: u32) -> RangeInclusive<usize> {
    reach.first_visible(position) as usize..=position as usize
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
    /// Factor on scores, usually `head_dim` to the power of -1/2.
    pub scale: f32,
    /// Positions that a row attends to.
    pub reach: Reach,
    /// Sinks, one per query head: scores that take part in the softmax without a value.
    pub sinks: Option<&'a [f32]>,
}

impl AttentionShape<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Attention of rows at their positions: `q` is `[rows, heads * head_dim]`, `out` `[rows, heads * value_dim]`. The keys
/// and values of the positions that a row sees (its own included) are in the cache. Later positions are not read, so
/// all rows of a chunk may have been written before.
///
/// # Panics
/// If the shape does not fit the cache, its heads are no multiple of its KV heads, there is not
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
    if let Some(sinks) = shape.sinks {
        assert_eq!(sinks.len(), shape.heads, "shape: there must be one sink per head");
    }
    let width = shape.heads * shape.head_dim;
    assert_eq!(q.len(), rows.len() * width, "q: its length must be rows * heads * head_dim");
    let width = shape.heads * shape.value_dim;
    assert_eq!(out.len(), rows.len() * width, "out: its length must be rows * heads * value_dim");
    // The first visible position is at most the row's, so it fits u32.
    kv.check(layer, rows, |position| shape.reach.first_visible(position));
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
    let positions: usize = rows.iter().map(|row| visible(shape.reach, row.position).count()).sum();
    let work = positions.saturating_mul(shape.heads * (shape.head_dim + shape.value_dim));
    let (threads, group) = (cpu.threads_for(work), shape.group());
    // A task takes several rows, since rows of a chunk share their sequence's blocks and all heads share them, but
    // never so many that a thread idles.
    let share = rows.len() * shape.kv_heads / (threads * 4);
    let per_task = share.clamp(1, (QUERIES_PER_PASS / group).max(1));
    let tiles = rows.len().div_ceil(per_task);
    let share = (rows.len() * shape.heads).div_ceil(threads).next_multiple_of(TOGETHER);
    let heads = share.clamp(TOGETHER, QUERIES_PER_PASS).min(group);
    let parts = group.div_ceil(heads);
    let out = Disjoint::new(out);
    // Rows change fastest, so that a KV head's blocks stay in cache.
    cpu.run(tiles * shape.kv_heads * parts, work, &|task| {
        let (part, first_row) = (task / tiles, task % tiles * per_task);
        let (kv_head, first) = (part / parts, part % parts * heads);
        let rows = &rows[first_row..rows.len().min(first_row + per_task)];
        let (first_head, heads) = (kv_head * group + first, heads.min(group - first));
        run_on(
            cpu.isa(),
            Pass { shape, layer, kv_head, first_row, rows, first_head, heads, cache, q, out: &out },
        );
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

/// Visible part of a block: the block's number in the cache, and its first and last visible position.
#[derive(Clone, Copy, PartialEq)]
struct View {
    block: usize,
    first: usize,
    last: usize,
}

/// A query, where its output goes, and its softmax so far.
struct Query<'a> {
    q: &'a [f32],
    /// Accumulated output.
    out: &'a mut [f32],
    blocks: &'a [u32],
    /// First and last visible position.
    first: usize,
    last: usize,
    /// Visible part of the current block.
    view: Option<View>,
    /// Weights of that block's values, and the factor on the output of the blocks before.
    weights: [f32; LANES],
    factor: f32,
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
            let visible = visible(self.shape.reach, self.rows[row].position);
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
        let mut stretched = match self.cache.values() {
            KvValues::Apart => None,
            KvValues::EndOfKey => Some(Stretched::new(s)),
        };
        for index in first..=last {
            for query in queries.iter_mut() {
                query.view = query.view_of(index);
            }
            let block = |query: &Query<'_>| query.view.map(|view| view.block);
            let mut rest = &mut *queries;
            while let Some(of_first) = rest.first().map(block) {
                let same = rest.iter().take_while(|query| block(query) == of_first).count();
                let (now, later) = rest.split_at_mut(same);
                rest = later;
                if let Some(block) = of_first {
                    self.add_block(s, now, block, stretched.as_mut());
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
    /// Accumulates a block into the softmax and output of queries, all of which see part of it.
    #[inline(always)]
    fn add_block<S: Simd>(
        &self,
        s: S,
        queries: &mut [Query<'_>],
        block: usize,
        stretched: Option<&mut Stretched<S::V>>,
    ) {
        let (keys, values) = self.cache.head(block, self.layer, self.kv_head);
        let scale = self.shape.scale;
        if let Some(stretched) = stretched {
            stretched.multiply(s, queries, keys, values);
            for (query, sums) in queries.iter_mut().zip(&stretched.sums) {
                query.take(s, sums, scale);
            }
        } else {
            let (fours, ones) = queries.as_chunks_mut::<TOGETHER>();
            for queries in fours {
                take_products(s, queries, keys, scale);
            }
            for query in ones.as_chunks_mut::<1>().0 {
                take_products(s, query, keys, scale);
            }
        }
        let mut rest = queries;
        while let Some(view) = rest.first().and_then(|query| query.view) {
            let same = rest.iter().take_while(|query| query.view == Some(view)).count();
            let (now, later) = rest.split_at_mut(same);
            rest = later;
            self.add_values(s, now, values, view);
        }
    }

    /// Adds a block's values to the output of queries that have the same view of it.
    #[inline(always)]
    fn add_values<S: Simd>(&self, s: S, queries: &mut [Query<'_>], values: &[[E; LANES]], view: View) {
        let (whole, lines) = (self.shape.value_dim / LANES, self.shape.value_dim.div_ceil(LANES));
        let values = &values[view.first * lines..(view.last + 1) * lines];
        let (fours, ones) = queries.as_chunks_mut::<TOGETHER>();
        let mut part = 0;
        while part < lines {
            let several = S::REGISTERS >= 2 * TOGETHER * LINES && part + LINES <= whole;
            for queries in fours.iter_mut() {
                if several {
                    add_lines::<S, E, TOGETHER, LINES>(s, queries, values, lines, part, view.first);
                } else {
                    add_lines::<S, E, TOGETHER, 1>(s, queries, values, lines, part, view.first);
                }
            }
            for query in ones.as_chunks_mut::<1>().0 {
                if several {
                    add_lines::<S, E, 1, LINES>(s, query, values, lines, part, view.first);
                } else {
                    add_lines::<S, E, 1, 1>(s, query, values, lines, part, view.first);
                }
            }
            part += if several { LINES } else { 1 };
        }
    }
}

/// Accumulates values into the output of `Q` queries: `P` of each value's `lines` lines, from line `part` on. The first
/// value has weight number `first`. With `P` above 1, all lines must be whole.
#[inline(always)]
fn add_lines<S: Simd, E: Element, const Q: usize, const P: usize>(
    s: S,
    queries: &mut [Query<'_>; Q],
    values: &[[E; LANES]],
    lines: usize,
    part: usize,
    first: usize,
) {
    let mut totals = [[s.splat(0.0); P]; Q];
    for i in 0..Q {
        let factor = s.splat(queries[i].factor);
        let out = &queries[i].out[part * LANES..];
        if P == 1 {
            totals[i][0] = s.mul(load_part(s, &out[..LANES.min(out.len())]), factor);
        } else {
            let out: &[[f32; LANES]; P] = out.as_chunks().0.first_chunk().expect("the lines are whole");
            for p in 0..P {
                totals[i][p] = s.mul(s.load(&out[p]), factor);
            }
        }
    }
    for (row, lane) in values.chunks_exact(lines).zip(first..LANES) {
        let row: &[[E; LANES]; P] = row[part..].first_chunk().expect("the lines are within a value");
        let mut value = [s.splat(0.0); P];
        for p in 0..P {
            value[p] = E::load(s, &row[p]);
        }
        for i in 0..Q {
            let weight = s.splat(queries[i].weights[lane]);
            for p in 0..P {
                totals[i][p] = s.fma(weight, value[p], totals[i][p]);
            }
        }
    }
    for i in 0..Q {
        let out = &mut queries[i].out[part * LANES..];
        if P == 1 {
            let len = LANES.min(out.len());
            store_part(s, totals[i][0], &mut out[..len]);
        } else {
            let out: &mut [[f32; LANES]; P] = out.as_chunks_mut().0.first_chunk_mut().expect("as above");
            for p in 0..P {
                s.store(totals[i][p], &mut out[p]);
            }
        }
    }
}

impl Query<'_> {
    fn none() -> Self {
        Self {
            q: &[],
            out: &mut [],
            blocks: &[],
            first: 0,
            last: 0,
            view: None,
            weights: [0.0; LANES],
            factor: 1.0,
            max: f32::NEG_INFINITY,
            sum: 0.0,
        }
    }

    /// Visible part of the block with positions `16 * index` to `16 * index + 15`; `None` if the query sees none of it.
    #[inline(always)]
    fn view_of(&self, index: usize) -> Option<View> {
        let start = index * BLOCK_TOKENS;
        if self.last < start || self.first >= start + BLOCK_TOKENS {
            return None;
        }
        let (first, last) = (self.first.saturating_sub(start), (self.last - start).min(BLOCK_TOKENS - 1));
        Some(View { block: self.blocks[index] as usize, first, last })
    }

    /// Accumulates the visible scores of a block into the softmax; `sums` are those of the products with its sixteen
    /// keys.
    #[inline(always)]
    fn take<S: Simd>(&mut self, s: S, sums: &[S::V; 4], scale: f32) {
        let product = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
        let mut scores = lanes(s, s.mul(product, s.splat(scale)));
        if let Some(view) = self.view {
            scores[..view.first].fill(f32::NEG_INFINITY);
            scores[view.last + 1..].fill(f32::NEG_INFINITY);
        }
        let top = tree_max(scores);
        self.factor = 1.0;
        if top > self.max {
            // From negative infinity, before the first block, the factor is 0 and multiplies zeros.
            self.factor = exp_scalar(self.max - top);
            self.max = top;
        }
        self.weights = lanes(s, exp_lanes(s, s.sub(s.load(&scores), s.splat(self.max))));
        self.sum = self.sum * self.factor + tree_sum(self.weights);
    }

    /// Accumulates a sink, a score without a value.
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

/// Accumulates the scores of sixteen keys into the softmax of `Q` queries.
#[inline(always)]
fn take_products<S: Simd, E: Element, const Q: usize>(
    s: S,
    queries: &mut [Query<'_>; Q],
    keys: &[[E; LANES]],
    scale: f32,
) {
    let mut sums = [[s.splat(0.0); 4]; Q];
    add_products(s, queries, 0, keys, &mut sums);
    for i in 0..Q {
        queries[i].take(s, &sums[i], scale);
    }
}
