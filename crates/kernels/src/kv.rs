//! Keys and values of past tokens, in blocks of sixteen positions.
//!
//! What must hold: a block holds, for every layer and KV head, the keys transposed (`[head_dim][16]`, so that sixteen
//! scores are sixteen lanes) and then the values (`[16][value_dim]`, each padded to whole lines of sixteen); where
//! values are the ends of keys, they are held once, as values, and only the elements before them as keys. Nothing is
//! resident before it is written. Of a block table, only entries of positions that are written or attended to are read.
//! It does not know which layers of a model share a table, which sequence owns a block, nor whether a position was
//! written: block tables and positions come from the caller, who has checked them.

use std::fmt;

use muster_types::Compute;

use crate::convert::f32_to_bf16;
use crate::error::KernelError;
use crate::memory::{Buffer, Zeroed};
use crate::simd::{LANES, Simd};

/// Positions of a block.
pub const BLOCK_TOKENS: usize = 16;

const _: () = assert!(BLOCK_TOKENS == LANES, "a block's positions are the lanes of a vector");

/// Source of a head's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvValues {
    /// Beside the keys.
    Apart,
    /// The last `value_dim` elements of a key are its value.
    EndOfKey,
}

/// Contents of a cache per position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that share block tables, and so a block.
    pub layers: usize,
    /// Key-value heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head's key.
    pub head_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Source of the values.
    pub values: KvValues,
}

impl KvShape {
    /// Lines of sixteen elements for the keys of a block and head, without the elements that are values.
    fn key_lines(self) -> usize {
        match self.values {
            KvValues::Apart => self.head_dim,
            KvValues::EndOfKey => self.head_dim.saturating_sub(self.value_dim),
        }
    }

    /// Lines for the values of a block and head.
    fn value_lines(self) -> usize {
        BLOCK_TOKENS * self.value_dim.div_ceil(LANES)
    }

    /// Lines of a block; `None` if they cannot be counted.
    fn lines(self) -> Option<usize> {
        let head =
            self.key_lines().checked_add(self.value_dim.checked_add(LANES)?.checked_mul(BLOCK_TOKENS)?)?;
        self.layers.checked_mul(self.kv_heads)?.checked_mul(head)?;
        Some(self.layers * self.kv_heads * (self.key_lines() + self.value_lines()))
    }
}

/// A row's position in its sequence, and the blocks that hold the sequence.
#[derive(Debug, Clone, Copy)]
pub struct KvSlot<'a> {
    /// The token's position, counted from 0.
    pub position: u32,
    /// The sequence's block table: `blocks[p / 16]` holds position `p`, for every `p` that the row attends to. Other
    /// entries are not read.
    pub blocks: &'a [u32],
}

impl KvSlot<'_> {
    /// The cache's number of the block that holds position `index * 16` and the next fifteen.
    #[inline(always)]
    pub(crate) fn block(&self, index: usize) -> usize {
        self.blocks[index] as usize
    }
}

/// An element of a cache.
pub(crate) trait Element: Zeroed + Send + Sync {
    fn of(value: f32) -> Self;
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V;
}

impl Element for f32 {
    fn of(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V {
        s.load(from)
    }
}

impl Element for u16 {
    fn of(value: f32) -> Self {
        f32_to_bf16(value)
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V {
        s.load_bf16(from)
    }
}

/// The lines of a cache with elements `E`.
pub(crate) struct Lines<E> {
    lines: Buffer<[E; LANES]>,
    shape: KvShape,
}

impl<E: Element> Lines<E> {
    fn new(shape: KvShape, blocks: usize) -> Result<Self, KernelError> {
        let lines = shape.lines().and_then(|lines| lines.checked_mul(blocks));
        let lines = lines.ok_or(KernelError::TooLarge { field: "kv cache" })?;
        Ok(Self { lines: Buffer::zeroed("kv cache", lines)?, shape })
    }

    /// The first line of a block's part for one layer and head.
    #[inline(always)]
    fn start(&self, block: usize, layer: usize, head: usize) -> usize {
        let KvShape { layers, kv_heads, .. } = self.shape;
        ((block * layers + layer) * kv_heads + head) * (self.shape.key_lines() + self.shape.value_lines())
    }

    /// Source of the values.
    #[inline(always)]
    pub(crate) fn values(&self) -> KvValues {
        self.shape.values
    }

    /// Keys (one line of sixteen positions per element that is not a value's) and values (sixteen positions, each of
    /// whole lines).
    #[inline(always)]
    pub(crate) fn head(&self, block: usize, layer: usize, head: usize) -> (&[[E; LANES]], &[[E; LANES]]) {
        let start = self.start(block, layer, head);
        self.lines[start..start + self.shape.key_lines() + self.shape.value_lines()]
            .split_at(self.shape.key_lines())
    }

    fn write(&mut self, layer: usize, rows: &[KvSlot<'_>], k: &[f32], v: &[f32]) {
        let KvShape { kv_heads, head_dim, value_dim, values, .. } = self.shape;
        for (index, k) in k.chunks_exact(head_dim).enumerate() {
            let (k, v) = match values {
                KvValues::Apart => (k, &v[index * value_dim..][..value_dim]),
                KvValues::EndOfKey => k.split_at(head_dim - value_dim),
            };
            let (row, head) = (&rows[index / kv_heads], index % kv_heads);
            let position = row.position as usize;
            let lane = position % BLOCK_TOKENS;
            let start = self.start(row.block(position / BLOCK_TOKENS), layer, head);
            let (keys, values) = self.lines[start..].split_at_mut(self.shape.key_lines());
            for (line, value) in keys.iter_mut().zip(k) {
                line[lane] = E::of(*value);
            }
            let per_value = value_dim.div_ceil(LANES);
            for (line, part) in values[lane * per_value..].iter_mut().zip(v.chunks(LANES)) {
                for (to, value) in line.iter_mut().zip(part) {
                    *to = E::of(*value);
                }
            }
        }
    }
}

pub(crate) enum Store {
    F32(Lines<f32>),
    Bf16(Lines<u16>),
}

/// A paged cache of keys and values.
pub struct KvCache {
    shape: KvShape,
    blocks: usize,
    pub(crate) store: Store,
}

impl KvCache {
    /// A cache of `blocks` blocks. Keys and values are rounded when they are written, if `compute` rounds. Memory
    /// becomes resident as blocks are used.
    ///
    /// # Errors
    /// [`KernelError::Size`] if a size is zero or above what u32 counts, or where values are longer than the keys whose
    /// ends they are; [`KernelError::TooLarge`] or [`KernelError::OutOfMemory`] if `blocks` blocks do not fit into
    /// memory.
    pub fn new(shape: KvShape, blocks: usize, compute: Compute) -> Result<Self, KernelError> {
        let KvShape { layers, kv_heads, head_dim, value_dim, values } = shape;
        for (field, value) in [
            ("layers", layers),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
            ("value_dim", value_dim),
            ("blocks", blocks),
        ] {
            // Block numbers are u32.
            if value == 0 || u32::try_from(value).is_err() {
                return Err(KernelError::Size { field, value, rule: "at least 1 and below 2^32" });
            }
        }
        if values == KvValues::EndOfKey && value_dim > head_dim {
            let rule = "at most head_dim where values are the ends of keys";
            return Err(KernelError::Size { field: "value_dim", value: value_dim, rule });
        }
        let store = match compute {
            Compute::F32 => Store::F32(Lines::new(shape, blocks)?),
            Compute::Bf16 | Compute::Bf16Pairs => Store::Bf16(Lines::new(shape, blocks)?),
        };
        Ok(Self { shape, blocks, store })
    }

    /// Blocks of the cache; block numbers are below it.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Shape of the cache per position.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes of all blocks, resident or not.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::F32(lines) => lines.lines.bytes(),
            Store::Bf16(lines) => lines.lines.bytes(),
        }
    }

    /// Bytes of one block of a cache of this shape, `usize::MAX` if that overflows: the divisor of a memory budget.
    #[must_use]
    pub fn bytes_per_block(shape: KvShape, compute: Compute) -> usize {
        let line = match compute {
            Compute::F32 => size_of::<[f32; LANES]>(),
            Compute::Bf16 | Compute::Bf16Pairs => size_of::<[u16; LANES]>(),
        };
        shape.lines().and_then(|lines| lines.checked_mul(line)).unwrap_or(usize::MAX)
    }

    /// Writes keys and values of rows to their places in `layer`. `k` is `[rows, kv_heads * head_dim]`, `v`
    /// `[rows, kv_heads * value_dim]`, or empty where values are the ends of keys.
    ///
    /// # Panics
    /// If `layer`, a block number or a slice's length does not fit the cache, or a table has no entry for its row.
    pub fn write(&mut self, layer: usize, rows: &[KvSlot<'_>], k: &[f32], v: &[f32]) {
        self.check(layer, rows, |position| position);
        let heads = rows.len() * self.shape.kv_heads;
        assert_eq!(k.len(), heads * self.shape.head_dim, "k: its length must be rows * kv_heads * head_dim");
        match self.shape.values {
            KvValues::Apart => {
                let len = heads * self.shape.value_dim;
                assert_eq!(v.len(), len, "v: its length must be rows * kv_heads * value_dim");
            }
            KvValues::EndOfKey => assert_eq!(v.len(), 0, "v: values are the ends of keys"),
        }
        match &mut self.store {
            Store::F32(lines) => lines.write(layer, rows, k, v),
            Store::Bf16(lines) => lines.write(layer, rows, k, v),
        }
    }

    /// Asserts that `layer`, and of every row the positions from `first(position)` to its own, lie in the cache.
    pub(crate) fn check(&self, layer: usize, rows: &[KvSlot<'_>], first: impl Fn(u32) -> u32) {
        assert!(
            layer < self.shape.layers,
            "layer: {layer} is outside a cache of {} layers",
            self.shape.layers
        );
        for row in rows {
            let needed = row.position as usize / BLOCK_TOKENS + 1;
            let has = row.blocks.len();
            assert!(
                needed <= has,
                "rows: position {} needs {needed} blocks, its table has {has}",
                row.position
            );
            for &block in &row.blocks[first(row.position) as usize / BLOCK_TOKENS..needed] {
                assert!(
                    (block as usize) < self.blocks,
                    "rows: block {block} is outside a cache of {}",
                    self.blocks
                );
            }
        }
    }
}

impl fmt::Debug for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvCache")
            .field("shape", &self.shape)
            .field("blocks", &self.blocks)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape =
        KvShape { layers: 2, kv_heads: 3, head_dim: 20, value_dim: 20, values: KvValues::Apart };

    #[test]
    fn rows_land_in_their_block_and_lane_and_nowhere_else() {
        let mut cache = KvCache::new(SHAPE, 4, Compute::F32).unwrap();
        let k: Vec<f32> = (1..=60_u8).map(f32::from).collect();
        let v: Vec<f32> = k.iter().map(|k| -k).collect();
        cache.write(1, &[KvSlot { position: 21, blocks: &[0, 2] }], &k, &v);
        let Store::F32(lines) = &cache.store else { panic!("f32 expected") };
        for block in 0..4 {
            for layer in 0..2 {
                for head in 0..3 {
                    let (keys, values) = lines.head(block, layer, head);
                    let here = (block, layer) == (2, 1);
                    for (d, line) in keys.iter().enumerate() {
                        for (lane, &found) in line.iter().enumerate() {
                            assert_eq!(found, if here && lane == 5 { k[head * 20 + d] } else { 0.0 });
                        }
                    }
                    for (place, &found) in values.as_flattened().iter().enumerate() {
                        let (lane, d) = (place / 32, place % 32);
                        assert_eq!(found, if here && lane == 5 && d < 20 { v[head * 20 + d] } else { 0.0 });
                    }
                }
            }
        }
    }

    #[test]
    fn values_that_end_keys_are_held_once() {
        let shape = KvShape { head_dim: 23, value_dim: 18, values: KvValues::EndOfKey, ..SHAPE };
        let mut cache = KvCache::new(shape, 4, Compute::F32).unwrap();
        let k: Vec<f32> = (1..=69_u8).map(f32::from).collect();
        cache.write(1, &[KvSlot { position: 21, blocks: &[0, 2] }], &k, &[]);
        // Sixteen keys of 5 and values padded to 32.
        assert_eq!(cache.bytes(), 4 * 2 * 3 * 16 * (5 + 32) * 4);
        let Store::F32(lines) = &cache.store else { panic!("f32 expected") };
        for (head, k) in k.chunks(23).enumerate() {
            let (keys, values) = lines.head(2, 1, head);
            assert!(keys.iter().map(|line| line[5]).eq(k[..5].iter().copied()));
            assert_eq!(values.as_flattened()[5 * 32..][..18], k[5..]);
        }
        let written = lines.lines.iter().flatten().filter(|value| **value != 0.0).count();
        assert_eq!(written, k.len());
    }

    #[test]
    #[should_panic(expected = "v: values are the ends of keys")]
    fn values_beside_the_keys_that_they_end_are_refused() {
        let shape = KvShape { values: KvValues::EndOfKey, ..SHAPE };
        let mut cache = KvCache::new(shape, 4, Compute::F32).unwrap();
        cache.write(0, &[KvSlot { position: 0, blocks: &[0] }], &[0.0; 60], &[0.0; 60]);
    }

    #[test]
    fn bf16_caches_round_and_take_half_the_bytes() {
        let mut cache = KvCache::new(SHAPE, 4, Compute::Bf16).unwrap();
        let x = vec![1.003_f32; 60];
        cache.write(0, &[KvSlot { position: 0, blocks: &[3] }], &x, &x);
        let Store::Bf16(lines) = &cache.store else { panic!("bf16 expected") };
        assert_eq!(lines.head(3, 0, 2).0[19][0], 0x3f80);
        // 2 layers, 3 heads, sixteen keys of 20 and values padded to 32, 2 bytes each.
        assert_eq!(KvCache::bytes_per_block(SHAPE, Compute::Bf16), 2 * 3 * 16 * (20 + 32) * 2);
        assert_eq!(cache.bytes(), 4 * KvCache::bytes_per_block(SHAPE, Compute::Bf16));
        assert_eq!(cache.bytes() * 2, KvCache::new(SHAPE, 4, Compute::F32).unwrap().bytes());
    }

    #[test]
    fn unusable_sizes_are_named() {
        let message = |shape, blocks| KvCache::new(shape, blocks, Compute::F32).unwrap_err().to_string();
        let none = message(KvShape { head_dim: 0, ..SHAPE }, 1);
        assert_eq!(none, "head_dim is 0: it must be at least 1 and below 2^32");
        assert_eq!(message(SHAPE, 0), "blocks is 0: it must be at least 1 and below 2^32");
        let ends = KvShape { value_dim: 21, values: KvValues::EndOfKey, ..SHAPE };
        assert_eq!(
            message(ends, 1),
            "value_dim is 21: it must be at most head_dim where values are the ends of keys"
        );
        let most = u32::MAX as usize;
        let many = KvShape { layers: most, kv_heads: most, head_dim: 512, value_dim: 512, ..SHAPE };
        assert!(message(many, 7).contains("more bytes than an address can count"));
        assert_eq!(KvCache::bytes_per_block(many, Compute::F32), usize::MAX);
    }

    #[test]
    #[should_panic(expected = "rows: position 32 needs 3 blocks, its table has 2")]
    fn a_short_table_is_refused() {
        let mut cache = KvCache::new(SHAPE, 4, Compute::F32).unwrap();
        cache.write(0, &[KvSlot { position: 32, blocks: &[0, 1] }], &[0.0; 60], &[0.0; 60]);
    }

    #[test]
    fn entries_before_the_row_are_not_looked_at_to_write_it() {
        let mut cache = KvCache::new(SHAPE, 4, Compute::F32).unwrap();
        let slot = KvSlot { position: 33, blocks: &[u32::MAX, u32::MAX, 1] };
        cache.write(0, &[slot], &[2.0; 60], &[2.0; 60]);
        let Store::F32(lines) = &cache.store else { panic!("f32 expected") };
        assert_eq!(lines.head(1, 0, 0).0[0][1], 2.0);
    }

    #[test]
    #[should_panic(expected = "rows: block 4 is outside a cache of 4")]
    fn a_foreign_block_is_refused() {
        let mut cache = KvCache::new(SHAPE, 4, Compute::F32).unwrap();
        cache.write(0, &[KvSlot { position: 0, blocks: &[4] }], &[0.0; 60], &[0.0; 60]);
    }
}
