//! Queries times the keys of a block.
//!
//! What must hold: element `d` of a key is in sum `d % 4`, in ascending order, whether it is read from keys or from
//! values. It does not know what the sums are for.

use super::{QUERIES_PER_PASS, Query, TOGETHER};
use crate::kv::{BLOCK_TOKENS, Element};
use crate::simd::{LANES, Simd};

/// Key elements transposed from values at a time: few enough to leave room for queries and values in the innermost
/// cache.
const STRETCH: usize = 128;

/// Buffers of a pass where values are the ends of keys.
pub(super) struct Stretched<V> {
    /// A stretch of sixteen keys.
    keys: [[f32; LANES]; STRETCH],
    /// The sums of each query's products.
    pub(super) sums: [[V; 4]; QUERIES_PER_PASS],
}

impl<V: Copy> Stretched<V> {
    #[inline(always)]
    pub(super) fn new<S: Simd<V = V>>(s: S) -> Self {
        Self { keys: [[0.0; LANES]; STRETCH], sums: [[s.splat(0.0); 4]; QUERIES_PER_PASS] }
    }

    /// Multiplies queries by sixteen keys whose last elements are `values`.
    #[inline(always)]
    pub(super) fn multiply<S: Simd<V = V>, E: Element>(
        &mut self,
        s: S,
        queries: &[Query<'_>],
        keys: &[[E; LANES]],
        values: &[[E; LANES]],
    ) {
        let sums = &mut self.sums[..queries.len()];
        sums.fill([s.splat(0.0); 4]);
        add_all_products(s, queries, 0, keys, sums);
        // Aligns the sums: the first element of a stretch belongs to sum `keys.len() % 4`.
        let turn = keys.len() % 4;
        if turn > 0 {
            sums.iter_mut().for_each(|sums| sums.rotate_left(turn));
        }
        let (head_dim, lines) =
            (queries.first().map_or(0, |query| query.q.len()), values.len() / BLOCK_TOKENS);
        for (first, from) in (0..lines).step_by(STRETCH / LANES).zip((keys.len()..).step_by(STRETCH)) {
            for (part, to) in (first..lines).zip(self.keys.as_chunks_mut::<LANES>().0) {
                let mut tile = [s.splat(0.0); LANES];
                for (lane, row) in tile.iter_mut().enumerate() {
                    *row = E::load(s, &values[lane * lines + part]);
                }
                for (to, row) in to.iter_mut().zip(s.transpose(tile)) {
                    s.store(row, to);
                }
            }
            let keys = &self.keys[..STRETCH.min(head_dim - from)];
            add_all_products(s, queries, from, keys, sums);
        }
        if turn > 0 {
            sums.iter_mut().for_each(|sums| sums.rotate_right(turn));
        }
    }
}

/// [`add_products`] for any number of queries.
#[inline(always)]
fn add_all_products<S: Simd, E: Element>(
    s: S,
    queries: &[Query<'_>],
    from: usize,
    keys: &[[E; LANES]],
    sums: &mut [[S::V; 4]],
) {
    let (fours, ones) = queries.as_chunks::<TOGETHER>();
    let (sums_of_fours, sums_of_ones) = sums.as_chunks_mut::<TOGETHER>();
    for (queries, sums) in fours.iter().zip(sums_of_fours) {
        add_products(s, queries, from, keys, sums);
    }
    for (query, sums) in ones.as_chunks::<1>().0.iter().zip(sums_of_ones.as_chunks_mut::<1>().0) {
        add_products(s, query, from, keys, sums);
    }
}

/// Adds the products of `Q` queries, from element `from` on, with lines of sixteen keys: that of line `d` to sum `d %
/// 4`.
#[inline(always)]
pub(super) fn add_products<S: Simd, E: Element, const Q: usize>(
    s: S,
    queries: &[Query<'_>; Q],
    from: usize,
    keys: &[[E; LANES]],
    to: &mut [[S::V; 4]; Q],
) {
    let mut sums = *to;
    let mut q: [&[f32]; Q] = [&[]; Q];
    for i in 0..Q {
        q[i] = &queries[i].q[from..from + keys.len()];
    }
    let whole = keys.len() / 4 * 4;
    for start in (0..whole).step_by(4) {
        let keys: &[[E; LANES]; 4] = keys[start..].first_chunk().expect("four keys are left");
        let mut part = [&[0.0; 4]; Q];
        for i in 0..Q {
            part[i] = q[i][start..].first_chunk().expect("as many as keys");
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
                sums[i][d] = s.fma(s.splat(q[i][whole + d]), key, sums[i][d]);
            }
        }
    }
    *to = sums;
}
