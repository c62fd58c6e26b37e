//! The inner product of the linears: some rows times some panels, in registers.
//!
//! What must hold: every output element is computed in the canonical order (see the crate's documentation) whatever
//! the tile's shape, so that shapes are chosen for speed alone. It does not know where rows come from nor where
//! results go: [`Rows`] and [`Sink`] do.

use std::ops::Range;

use crate::panels::{BLOCK_K, Block, Panels, Stored};
use crate::simd::Simd;

/// Most rows of a piece of work.
pub(crate) const MAX_ROWS: usize = 64;
/// Blocks of K whose weights are used for all rows before the next are read: 8 KiB of a bf16 panel.
pub(crate) const CHUNK_BLOCKS: usize = 8;
/// [`CHUNK_BLOCKS`] where blocks are decoded first, into a smaller buffer.
pub(crate) const DECODED_BLOCKS: usize = 4;

/// Lookup of input rows.
pub(crate) trait Rows: Copy {
    /// Inputs of row `index`.
    fn row(&self, index: usize) -> &[f32];
}

/// Consecutive rows.
#[derive(Clone, Copy)]
pub(crate) struct Dense<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) k: usize,
}

impl Rows for Dense<'_> {
    #[inline(always)]
    fn row(&self, index: usize) -> &[f32] {
        &self.x[index * self.k..(index + 1) * self.k]
    }
}

/// Rows picked by number.
#[derive(Clone, Copy)]
pub(crate) struct Gathered<'a> {
    pub(crate) from: Dense<'a>,
    pub(crate) rows: &'a [u32],
}

impl Rows for Gathered<'_> {
    #[inline(always)]
    fn row(&self, index: usize) -> &[f32] {
        self.from.row(self.rows[index] as usize)
    }
}

/// Destination of results; `M` matrices are multiplied together.
pub(crate) trait Sink<const M: usize> {
    /// Takes one row's sixteen outputs of panel `panel`, one vector per matrix.
    fn put<S: Simd>(&self, s: S, row: usize, panel: usize, values: [S::V; M]);
}

/// Rows `rows` (at most [`MAX_ROWS`]) times panels `panels` of `M` matrices.
pub(crate) struct Work<'a, B, R, K, const M: usize> {
    pub(crate) weights: [&'a Panels<B>; M],
    pub(crate) x: R,
    pub(crate) sink: K,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
}

impl<'a, B: Stored, R: Rows, K: Sink<M>, const M: usize> Work<'a, B, R, K, M> {
    /// Computes all of it, in tiles that suit the registers: enough accumulators to hide the latency of a multiply-add,
    /// and no more than fit.
    #[inline(always)]
    pub(crate) fn run<S: Simd>(&self, s: S) {
        let mut panel = self.panels.start;
        let end = self.panels.end;
        if S::REGISTERS >= 32 {
            // One row has two accumulators per panel, so four panels are needed to hide the latency.
            if self.rows.len() == 1 {
                if M == 1 {
                    while panel + 4 <= end {
                        self.by_chunks::<S, 1, 4>(s, panel);
                        panel += 4;
                    }
                } else {
                    while panel + 2 <= end {
                        self.by_chunks::<S, 1, 2>(s, panel);
                        panel += 2;
                    }
                }
            }
            if M == 1 {
                while panel + 2 <= end {
                    self.by_chunks::<S, 4, 2>(s, panel);
                    panel += 2;
                }
            }
            while panel < end {
                self.by_chunks::<S, 4, 1>(s, panel);
                panel += 1;
            }
        } else {
            while panel < end {
                self.by_chunks::<S, 2, 1>(s, panel);
                panel += 1;
            }
        }
    }

    /// All rows times `C` panels of each matrix, `T` rows at a time. K is cut into chunks so short that the panels'
    /// part of a chunk stays in the innermost cache for all rows; the totals are carried from chunk to chunk.
    #[inline(always)]
    fn by_chunks<S: Simd, const T: usize, const C: usize>(&self, s: S, panel: usize) {
        let stored = panels_at::<B, M, C>(self.weights, panel);
        let blocks = stored[0][0].len();
        let Some(weights) = plain(stored) else {
            self.decoding::<S, T, C>(s, panel, stored);
            return;
        };
        if blocks <= CHUNK_BLOCKS || self.rows.len() <= T {
            self.by_rows::<S, T, C, true>(s, panel, weights, 0, 0..blocks, &mut []);
            return;
        }
        let mut carried = [[[s.splat(0.0); C]; M]; MAX_ROWS];
        for start in (0..blocks).step_by(CHUNK_BLOCKS) {
            let end = blocks.min(start + CHUNK_BLOCKS);
            self.by_rows::<S, T, C, true>(s, panel, weights, 0, start..end, &mut carried);
        }
    }

    /// All rows times `C` panels of each matrix, with a chunk's blocks decoded before they are multiplied.
    #[inline(always)]
    fn decoding<S: Simd, const T: usize, const C: usize>(&self, s: S, panel: usize, stored: [[&[B]; C]; M]) {
        let blocks = stored[0][0].len();
        let mut decoded = Decoded::new();
        let mut carried = [[[s.splat(0.0); C]; M]; MAX_ROWS];
        for start in (0..blocks).step_by(DECODED_BLOCKS) {
            let end = blocks.min(start + DECODED_BLOCKS);
            let weights = decoded.take(s, stored, start..end);
            self.by_rows::<S, T, C, false>(s, panel, weights, start, 0..end - start, &mut carried);
        }
    }

    /// All rows times some blocks of the panels, from and to `carried` (empty: all of K is done at once). The first of
    /// the weights is block `first` of K; `FETCH` prefetches the blocks that follow.
    #[inline(always)]
    fn by_rows<S: Simd, const T: usize, const C: usize, const FETCH: bool>(
        &self,
        s: S,
        panel: usize,
        weights: [[&[B::Block]; C]; M],
        first: usize,
        blocks: Range<usize>,
        carried: &mut [[[S::V; C]; M]],
    ) {
        let mut row = self.rows.start;
        let end = self.rows.end;
        while row + T <= end {
            self.tile::<S, T, C, FETCH>(s, (row, panel), weights, first, blocks.clone(), carried);
            row += T;
        }
        if T > 2 && row + 2 <= end {
            self.tile::<S, 2, C, FETCH>(s, (row, panel), weights, first, blocks.clone(), carried);
            row += 2;
        }
        if row < end {
            self.tile::<S, 1, C, FETCH>(s, (row, panel), weights, first, blocks, carried);
        }
    }

    /// `T` rows times some blocks of `C` panels of each matrix.
    #[inline(always)]
    fn tile<S: Simd, const T: usize, const C: usize, const FETCH: bool>(
        &self,
        s: S,
        (row, panel): (usize, usize),
        weights: [[&[B::Block]; C]; M],
        first: usize,
        blocks: Range<usize>,
        carried: &mut [[[S::V; C]; M]],
    ) {
        let mut rows: [&[f32]; T] = [&[]; T];
        for (r, inputs) in rows.iter_mut().enumerate() {
            *inputs = &self.x.row(row + r)[first * BLOCK_K..];
        }
        let last = first + blocks.end == self.weights[0].per_panel;
        let mut totals = [[[s.splat(0.0); C]; M]; T];
        let carried = carried.get_mut(row - self.rows.start..row - self.rows.start + T);
        if let Some(carried) = &carried {
            totals.copy_from_slice(carried);
        }
        add_products::<S, B::Block, T, C, M, FETCH>(s, &mut totals, weights, rows, blocks);
        if !last {
            carried.expect("K is cut only where totals are carried").copy_from_slice(&totals);
            return;
        }
        for (r, totals) in totals.iter().enumerate() {
            for c in 0..C {
                let mut values = [s.splat(0.0); M];
                for (value, totals) in values.iter_mut().zip(totals) {
                    *value = totals[c];
                }
                self.sink.put(s, row + r, panel + c, values);
            }
        }
    }
}

/// Panels `panel..panel + C` of each matrix, grouped by matrix.
#[inline(always)]
pub(crate) fn panels_at<B, const M: usize, const C: usize>(
    matrices: [&Panels<B>; M],
    panel: usize,
) -> [[&[B]; C]; M] {
    let mut weights: [[&[B]; C]; M] = [[&[]; C]; M];
    for (weights, matrix) in weights.iter_mut().zip(matrices) {
        for (c, weights) in weights.iter_mut().enumerate() {
            *weights = matrix.panel(panel + c);
        }
    }
    weights
}

/// The panels' blocks, if they need no decoding.
#[inline(always)]
pub(crate) fn plain<B: Stored, const C: usize, const M: usize>(
    stored: [[&[B]; C]; M],
) -> Option<[[&[B::Block]; C]; M]> {
    let mut weights: [[&[B::Block]; C]; M] = [[&[]; C]; M];
    for m in 0..M {
        for c in 0..C {
            weights[m][c] = B::plain(stored[m][c])?;
        }
    }
    Some(weights)
}

/// Some decoded blocks of some panels.
pub(crate) struct Decoded<B, const C: usize, const M: usize>([[[B; DECODED_BLOCKS]; C]; M]);

impl<B: Block, const C: usize, const M: usize> Decoded<B, C, M> {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self([[[B::ZERO; DECODED_BLOCKS]; C]; M])
    }

    /// Decodes blocks `blocks` of the panels, at most [`DECODED_BLOCKS`].
    #[inline(always)]
    pub(crate) fn take<S: Simd, W: Stored<Block = B>>(
        &mut self,
        s: S,
        stored: [[&[W]; C]; M],
        blocks: Range<usize>,
    ) -> [[&[B]; C]; M] {
        let ahead = Ahead::new(stored, C);
        let mut weights: [[&[B]; C]; M] = [[&[]; C]; M];
        for ((weights, decoded), stored) in weights.iter_mut().zip(&mut self.0).zip(stored) {
            for ((weights, decoded), stored) in weights.iter_mut().zip(decoded).zip(stored) {
                for (to, b) in decoded.iter_mut().zip(blocks.clone()) {
                    ahead.fetch_whole(s, &stored[b], b);
                    stored[b].decode(s, to);
                }
                *weights = decoded;
            }
        }
        weights
    }
}

/// Prefetch distance, in bytes.
const FETCH_AHEAD: usize = 8 << 10;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Prefetches weights further on in the panel or, behind its end, in the panel that is read next. The processor's own
/// prefetching stops at every page and starts anew with every panel.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    blocks: usize,
    /// Bytes from the end of a panel to the start of the panel that is read after it.
    skip: usize,
}

impl Ahead {
    /// A prefetcher for panels of which `together` consecutive ones are read at a time.
    #[inline(always)]
    pub(crate) fn new<B, const C: usize, const M: usize>(weights: [[&[B]; C]; M], together: usize) -> Self {
        let blocks = weights[0][0].len();
        Self { blocks, skip: (together - 1) * blocks * size_of::<B>() }
    }

    /// Prefetches the successor of `block` (number `b`), a sixteenth of it per call.
    #[inline(always)]
    pub(crate) fn fetch<S: Simd, B>(self, s: S, block: &B, b: usize, sixteenth: usize) {
        let part = size_of::<B>() / (BLOCK_K / 2);
        self.fetch_lines(s, block, b, sixteenth * part, part / LINE);
    }

    /// Prefetches the whole successor of `block` (number `b`).
    #[inline(always)]
    pub(crate) fn fetch_whole<S: Simd, B>(self, s: S, block: &B, b: usize) {
        self.fetch_lines(s, block, b, 0, size_of::<B>().div_ceil(LINE));
    }

    #[inline(always)]
    fn fetch_lines<S: Simd, B>(self, s: S, block: &B, b: usize, from: usize, lines: usize) {
        let before = FETCH_AHEAD / size_of::<B>();
        let skip = if b + before < self.blocks { 0 } else { self.skip };
        let target = std::ptr::from_ref(block).cast::<u8>().wrapping_add(before * size_of::<B>() + skip);
        for line in 0..lines {
            s.prefetch(target.wrapping_add(from + line * LINE));
        }
    }
}

/// Adds blocks `blocks` of K to the totals of some rows.
#[inline(always)]
fn add_products<S: Simd, B: Block, const T: usize, const C: usize, const M: usize, const FETCH: bool>(
    s: S,
    totals: &mut [[[S::V; C]; M]; T],
    weights: [[&[B]; C]; M],
    rows: [&[f32]; T],
    blocks: Range<usize>,
) {
    let whole = (rows[0].len() / BLOCK_K).min(blocks.end);
    let ahead = Ahead::new(weights, C);
    for b in blocks.start..whole {
        let mut x = [&[0.0; BLOCK_K]; T];
        for r in 0..T {
            x[r] = rows[r][b * BLOCK_K..].first_chunk().expect("rows are of one length");
        }
        add_block::<S, B, T, C, M, FETCH>(s, totals, weights, x, b, ahead);
    }
    if whole < blocks.end {
        let mut last = [[0.0; BLOCK_K]; T];
        let mut x = [&[0.0; BLOCK_K]; T];
        for (r, (last, x)) in last.iter_mut().zip(&mut x).enumerate() {
            let rest = &rows[r][whole * BLOCK_K..];
            last[..rest.len()].copy_from_slice(rest);
            *x = last;
        }
        add_block::<S, B, T, C, M, FETCH>(s, totals, weights, x, whole, ahead);
    }
}

/// Adds block `b` to the totals: even and odd products apart, then their sum.
#[inline(always)]
fn add_block<S: Simd, B: Block, const T: usize, const C: usize, const M: usize, const FETCH: bool>(
    s: S,
    totals: &mut [[[S::V; C]; M]; T],
    weights: [[&[B]; C]; M],
    x: [&[f32; BLOCK_K]; T],
    b: usize,
    ahead: Ahead,
) {
    let zero = s.splat(0.0);
    let mut even = [[[zero; C]; M]; T];
    let mut odd = [[[zero; C]; M]; T];
    let mut blocks = [[&weights[0][0][b]; C]; M];
    for m in 0..M {
        for c in 0..C {
            blocks[m][c] = &weights[m][c][b];
        }
    }
    for pair in 0..BLOCK_K / 2 {
        let mut w = [[(zero, zero); C]; M];
        for m in 0..M {
            for c in 0..C {
                if FETCH {
                    ahead.fetch(s, blocks[m][c], b, pair);
                }
                w[m][c] = blocks[m][c].pair(s, pair);
            }
        }
        for r in 0..T {
            let (low, high) = (s.splat(x[r][2 * pair]), s.splat(x[r][2 * pair + 1]));
            for m in 0..M {
                for c in 0..C {
                    even[r][m][c] = s.fma(low, w[m][c].0, even[r][m][c]);
                    odd[r][m][c] = s.fma(high, w[m][c].1, odd[r][m][c]);
                }
            }
        }
    }
    for r in 0..T {
        for m in 0..M {
            for c in 0..C {
                totals[r][m][c] = s.add(totals[r][m][c], s.add(even[r][m][c], odd[r][m][c]));
            }
        }
    }
}

/// Rows per task: as many as keep its inputs in a core's own cache beside a strip of weights.
pub(crate) fn rows_per_task(k: usize) -> usize {
    (131_072 / k).clamp(16, MAX_ROWS) / 4 * 4
}

/// Panels per task, out of `panels` in all: several tasks per thread, so that threads end together, and whole tiles of
/// four where there are enough.
pub(crate) fn panels_per_task(panels: usize, threads: usize) -> usize {
    let share = panels / (threads * 4);
    match share {
        0..4 if panels >= threads * 4 * 2 => 4,
        0..4 => share.max(1),
        _ => (share / 4 * 4).min(16),
    }
}
