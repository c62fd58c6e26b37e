//! Attention against its order written out (to the bit) and against plain softmax in f64 (within a tolerance).

mod common;

use std::ops::Range;

use common::{Numbers, assert_same, cpu, cpus, to_bf16_values, tree_sum};
use std::num::NonZero;

use muster_kernels::{AttentionShape, Cpu, Isa, KvCache, KvShape, KvSlot, KvValues, attention, math};
use muster_types::{Compute, Reach};
use proptest::prelude::*;

const LAYER: usize = 1;

const ONE_NUMBER: KvShape =
    KvShape { layers: 1, kv_heads: 1, head_dim: 1, value_dim: 1, values: KvValues::Apart };

/// A sequence with all its queries, keys and values, and the blocks that it owns.
struct Sequence {
    shape: AttentionShape<'static>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    blocks: Vec<u32>,
}

impl Sequence {
    fn new(numbers: &mut Numbers, shape: AttentionShape<'static>, len: usize, blocks: Vec<u32>) -> Self {
        assert!(blocks.len() * 16 >= len);
        let mut rows = |width: usize| to_bf16_values(&numbers.vec(len * width));
        let AttentionShape { heads, kv_heads, head_dim, value_dim, .. } = shape;
        let (q, k, v) = (rows(heads * head_dim), rows(kv_heads * head_dim), rows(kv_heads * value_dim));
        Self { shape, q, k, v, blocks }
    }

    /// A sequence whose values are the ends of its keys.
    fn ending_in_values(
        numbers: &mut Numbers,
        shape: AttentionShape<'static>,
        len: usize,
        blocks: Vec<u32>,
    ) -> Self {
        let mut sequence = Self::new(numbers, shape, len, blocks);
        let keys = sequence.k.chunks_exact(shape.head_dim);
        sequence.v = keys.flat_map(|key| &key[shape.head_dim - shape.value_dim..]).copied().collect();
        sequence
    }

    fn len(&self) -> usize {
        self.k.len() / self.kv_width()
    }

    /// Width of an output row.
    fn width(&self) -> usize {
        self.shape.heads * self.shape.value_dim
    }

    fn kv_width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    fn slots(&self, rows: Range<usize>) -> Vec<KvSlot<'_>> {
        rows.map(|position| KvSlot { position: position as u32, blocks: &self.blocks }).collect()
    }

    fn write(&self, kv: &mut KvCache, rows: Range<usize>) {
        let part = |width: usize| rows.start * width..rows.end * width;
        let (k, v) =
            (&self.k[part(self.kv_width())], &self.v[part(self.shape.kv_heads * self.shape.value_dim)]);
        let v = if kv.shape().values == KvValues::Apart { v } else { &[] };
        kv.write(LAYER, &self.slots(rows), k, v);
    }

    fn attend(&self, cpu: &Cpu, kv: &KvCache, rows: Range<usize>) -> Vec<f32> {
        let width = self.shape.heads * self.shape.head_dim;
        let q = &self.q[rows.start * width..rows.end * width];
        let mut out = vec![f32::NAN; rows.len() * self.width()];
        attention(cpu, &self.shape, LAYER, q, &self.slots(rows), kv, &mut out);
        out
    }

    /// Query of (position, head), and keys or values of a position for it.
    fn query(&self, position: usize, head: usize) -> &[f32] {
        &self.q[(position * self.shape.heads + head) * self.shape.head_dim..][..self.shape.head_dim]
    }

    fn of_head<'a>(&self, from: &'a [f32], position: usize, head: usize) -> &'a [f32] {
        let head = head / (self.shape.heads / self.shape.kv_heads);
        let width = from.len() / self.len() / self.shape.kv_heads;
        &from[(position * self.shape.kv_heads + head) * width..][..width]
    }

    fn first_visible(&self, position: usize) -> usize {
        match self.shape.reach {
            Reach::All => 0,
            Reach::Last(window) => {
                let window = window.get() as usize;
                (0..=position).find(|at| at + window > position).expect("it sees itself")
            }
            Reach::Chunk(len) => {
                let len = len.get() as usize;
                (0..=position).find(|at| at / len == position / len).expect("as above")
            }
        }
    }

    fn sink(&self, head: usize) -> Option<f32> {
        self.shape.sinks.map(|sinks| sinks[head])
    }

    /// One query in the kernel's order, one number at a time.
    fn in_order(&self, position: usize, head: usize) -> Vec<f32> {
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0_f32);
        let mut out = vec![0.0_f32; self.shape.value_dim];
        let first = self.first_visible(position);
        for block in first / 16..=position / 16 {
            let mut scores = [f32::NEG_INFINITY; 16];
            for (lane, score) in scores.iter_mut().enumerate() {
                let at = block * 16 + lane;
                if (first..=position).contains(&at) {
                    let mut parts = [0.0_f32; 4];
                    let pair = self.query(position, head).iter().zip(self.of_head(&self.k, at, head));
                    for (d, (q, k)) in pair.enumerate() {
                        parts[d % 4] = q.mul_add(*k, parts[d % 4]);
                    }
                    *score = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * self.shape.scale;
                }
            }
            let top = scores.iter().copied().fold(max, f32::max);
            let factor = if top > max { math::exp(max - top) } else { 1.0 };
            max = top;
            let weights = scores.map(|score| math::exp(score - max));
            sum = sum * factor + tree_sum(weights);
            for (d, out) in out.iter_mut().enumerate() {
                *out *= factor;
                for (lane, weight) in weights.iter().enumerate() {
                    let at = block * 16 + lane;
                    if (first..=position).contains(&at) {
                        *out = weight.mul_add(self.of_head(&self.v, at, head)[d], *out);
                    }
                }
            }
        }
        if let Some(sink) = self.sink(head) {
            let top = max.max(sink);
            if sink > max {
                let factor = math::exp(max - top);
                sum *= factor;
                out.iter_mut().for_each(|out| *out *= factor);
            }
            sum += math::exp(sink - top);
        }
        out.iter().map(|value| value / sum).collect()
    }

    /// One query by the definition, in f64.
    fn exact(&self, position: usize, head: usize) -> Vec<f64> {
        let scores: Vec<f64> = (self.first_visible(position)..=position)
            .map(|at| {
                let pair = self.query(position, head).iter().zip(self.of_head(&self.k, at, head));
                pair.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(self.shape.scale)
            })
            .collect();
        let sink = self.sink(head).map(f64::from);
        let max = scores.iter().copied().chain(sink).fold(f64::MIN, f64::max);
        let sum: f64 = scores.iter().copied().chain(sink).map(|score| (score - max).exp()).sum();
        let mut out = vec![0.0; self.shape.value_dim];
        for (score, at) in scores.iter().zip(self.first_visible(position)..) {
            for (out, value) in out.iter_mut().zip(self.of_head(&self.v, at, head)) {
                *out += (score - max).exp() / sum * f64::from(*value);
            }
        }
        out
    }
}

/// A cache whose every element is NaN or infinite until written, like remains of a former owner.
fn poisoned(shape: &AttentionShape<'_>, blocks: usize, compute: Compute) -> KvCache {
    poisoned_with(KvValues::Apart, shape, blocks, compute)
}

fn poisoned_with(values: KvValues, shape: &AttentionShape<'_>, blocks: usize, compute: Compute) -> KvCache {
    let &AttentionShape { kv_heads, head_dim, value_dim, .. } = shape;
    let kv_shape = KvShape { layers: 2, kv_heads, head_dim, value_dim, values };
    let mut kv = KvCache::new(kv_shape, blocks, compute).expect("the shape fits");
    let table: Vec<u32> = (0..blocks as u32).collect();
    for layer in 0..2 {
        for position in 0..blocks as u32 * 16 {
            let bad = if position % 2 == 0 { f32::NAN } else { f32::INFINITY };
            let apart = usize::from(values == KvValues::Apart);
            let (k, v) = (vec![bad; kv_heads * head_dim], vec![bad; apart * kv_heads * value_dim]);
            kv.write(layer, &[KvSlot { position, blocks: &table }], &k, &v);
        }
    }
    kv
}

fn last(positions: u32) -> Reach {
    Reach::Last(NonZero::new(positions).expect("a row sees itself"))
}

fn chunk(positions: u32) -> Reach {
    Reach::Chunk(NonZero::new(positions).expect("a row sees itself"))
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, reach: Reach) -> AttentionShape<'static> {
    let scale = 1.0 / (head_dim as f32).sqrt() * 4.0;
    AttentionShape { heads, kv_heads, head_dim, value_dim: head_dim, scale, reach, sinks: None }
}

/// Sinks far below, among and far above the scores, and infinitely far below.
const SINKS: [f32; 8] = [0.0, -30.0, 2.5, -1.25, 40.0, f32::NEG_INFINITY, 7.0, 1e30];

fn shapes() -> Vec<AttentionShape<'static>> {
    let plain = vec![
        shape(4, 4, 16, Reach::All),
        shape(8, 2, 64, Reach::All),
        shape(6, 2, 20, last(5)),
        shape(3, 1, 7, last(16)),
        shape(5, 5, 33, last(40)),
        shape(40, 1, 8, Reach::All),
        shape(4, 1, 16, chunk(1)),
        shape(6, 2, 20, chunk(7)),
        shape(2, 2, 8, chunk(16)),
        shape(3, 1, 33, chunk(40)),
        shape(8, 2, 12, chunk(1000)),
    ];
    let narrow = [
        AttentionShape { value_dim: 20, ..shape(6, 1, 36, Reach::All) },
        AttentionShape { value_dim: 36, ..shape(4, 2, 20, last(9)) },
    ];
    let with_sinks = plain.clone().into_iter().filter(|shape| shape.heads <= SINKS.len());
    let with_sinks = with_sinks.map(|shape| AttentionShape { sinks: Some(&SINKS[..shape.heads]), ..shape });
    let with_sinks: Vec<_> = with_sinks.collect();
    [plain, with_sinks, narrow.into()].concat()
}

#[test]
fn every_instruction_set_follows_the_stated_order() {
    let mut numbers = Numbers(21);
    for shape in shapes() {
        for compute in [Compute::F32, Compute::Bf16] {
            let sequence = Sequence::new(&mut numbers, shape, 53, vec![4, 1, 6, 0]);
            let mut kv = poisoned(&shape, 7, compute);
            sequence.write(&mut kv, 0..53);
            let want: Vec<f32> = (0..53)
                .flat_map(|position| (0..shape.heads).map(move |head| (position, head)))
                .flat_map(|(position, head)| sequence.in_order(position, head))
                .collect();
            for cpu in cpus() {
                let found = sequence.attend(&cpu, &kv, 0..53);
                assert_same(&found, &want, &format!("{} {shape:?} {compute:?}", cpu.isa()));
            }
        }
    }
}

/// Shapes of attention whose values are the ends of keys: whole stretches and parts of them, keys that are nothing but
/// a value, starts within a group of four and within a line, passes of fewer heads than there are.
fn ending_in_values() -> Vec<AttentionShape<'static>> {
    let widths = [(576, 512), (192, 128), (36, 20), (37, 33), (150, 129), (143, 141), (20, 20), (7, 1)];
    let reaches = [Reach::All, last(9), chunk(7), chunk(40), last(16)];
    let heads = [(16, 1), (6, 1), (4, 2), (40, 1), (3, 1), (8, 1), (7, 1), (5, 5)];
    let shapes = widths.into_iter().zip(heads).enumerate().map(|(index, ((head_dim, value_dim), heads))| {
        let plain = shape(heads.0, heads.1, head_dim, reaches[index % reaches.len()]);
        AttentionShape { value_dim, ..plain }
    });
    let shapes: Vec<_> = shapes.collect();
    let with_sinks = shapes.clone().into_iter().filter(|shape| shape.heads <= SINKS.len()).enumerate();
    let with_sinks = with_sinks.map(|(index, shape)| AttentionShape {
        sinks: Some(&SINKS[..shape.heads]),
        reach: reaches[index % reaches.len()],
        ..shape
    });
    let with_sinks: Vec<_> = with_sinks.collect();
    [shapes, with_sinks].concat()
}

#[test]
fn values_held_as_the_ends_of_keys_give_the_bits_of_values_apart() {
    let mut numbers = Numbers(27);
    for shape in ending_in_values() {
        for compute in [Compute::F32, Compute::Bf16] {
            let first = Sequence::ending_in_values(&mut numbers, shape, 53, vec![4, 1, 6, 0]);
            let other = Sequence::ending_in_values(&mut numbers, shape, 40, vec![5, 2, 3]);
            let [apart, ends] = [KvValues::Apart, KvValues::EndOfKey].map(|values| {
                let mut kv = poisoned_with(values, &shape, 7, compute);
                first.write(&mut kv, 0..53);
                other.write(&mut kv, 0..40);
                kv
            });
            assert!(ends.bytes() < apart.bytes());
            let in_order: Vec<f32> = (0..53)
                .flat_map(|position| (0..shape.heads).map(move |head| (position, head)))
                .flat_map(|(position, head)| first.in_order(position, head))
                .collect();
            for cpu in cpus() {
                let name = format!("{} {shape:?} {compute:?}", cpu.isa());
                assert_same(&first.attend(&cpu, &ends, 0..53), &in_order, &name);
                // Rows of two sequences in one call, some of which see a block that is behind the window of others.
                for parts in [
                    [(&first, 52..53), (&other, 39..40), (&first, 3..5)],
                    [(&other, 0..40), (&first, 17..18), (&first, 30..53)],
                ] {
                    let want = attend_together(&cpu, &apart, &parts);
                    assert_same(&attend_together(&cpu, &ends, &parts), &want, &name);
                }
            }
        }
    }
}

#[test]
fn threads_do_not_show_where_heads_are_shared_out() {
    let mut numbers = Numbers(28);
    for heads in [5, 16, 70] {
        let shape = AttentionShape { value_dim: 128, ..shape(heads, 1, 144, Reach::All) };
        let sequence = Sequence::ending_in_values(&mut numbers, shape, 100, (0..7).collect());
        for values in [KvValues::Apart, KvValues::EndOfKey] {
            let mut kv = poisoned_with(values, &shape, 7, Compute::Bf16);
            sequence.write(&mut kv, 0..100);
            let [alone, two, seven] =
                [1, 2, 7].map(|threads| sequence.attend(&cpu(threads, Isa::detect()), &kv, 97..100));
            assert_same(&two, &alone, "two threads");
            assert_same(&seven, &alone, "seven threads");
            let want = (97..100).flat_map(|position| (0..heads).map(move |head| (position, head)));
            let want: Vec<f32> =
                want.flat_map(|(position, head)| sequence.in_order(position, head)).collect();
            assert_same(&alone, &want, "one thread");
        }
    }
}

#[test]
fn results_are_close_to_softmax_in_f64() {
    let mut numbers = Numbers(22);
    for shape in shapes() {
        let sequence = Sequence::new(&mut numbers, shape, 200, (0..13).rev().collect());
        let mut kv = poisoned(&shape, 13, Compute::F32);
        sequence.write(&mut kv, 0..200);
        let found = sequence.attend(&cpu(1, Isa::detect()), &kv, 0..200);
        for (index, found) in found.chunks(shape.value_dim).enumerate() {
            for (found, exact) in found.iter().zip(sequence.exact(index / shape.heads, index % shape.heads)) {
                assert!((f64::from(*found) - exact).abs() < 3e-6, "{shape:?} {index}: {found} {exact}");
            }
        }
    }
}

#[test]
fn threads_do_not_show() {
    let mut numbers = Numbers(23);
    let shape = AttentionShape { sinks: Some(&SINKS), ..shape(8, 2, 64, Reach::All) };
    let sequence = Sequence::new(&mut numbers, shape, 100, (0..7).collect());
    let mut kv = poisoned(&shape, 7, Compute::Bf16);
    sequence.write(&mut kv, 0..100);
    let [alone, two, four] =
        [1, 2, 4].map(|threads| sequence.attend(&cpu(threads, Isa::detect()), &kv, 0..100));
    assert_same(&two, &alone, "two threads");
    assert_same(&four, &alone, "four threads");
    assert!(muster_kernels::all_finite(&alone));
}

#[test]
fn nothing_outside_the_window_is_read() {
    let mut numbers = Numbers(24);
    for shape in shapes().into_iter().filter(|shape| shape.reach != Reach::All) {
        let sequence = Sequence::new(&mut numbers, shape, 60, vec![0, 3, 2, 1]);
        for position in [17, 30, 59] {
            let mut kv = poisoned(&shape, 4, Compute::F32);
            sequence.write(&mut kv, sequence.first_visible(position)..position + 1);
            let want: Vec<f32> =
                (0..shape.heads).flat_map(|head| sequence.in_order(position, head)).collect();
            for cpu in cpus() {
                assert_same(&sequence.attend(&cpu, &kv, position..position + 1), &want, "window");
            }
        }
    }
}

#[test]
fn blocks_that_no_row_sees_may_be_gone() {
    let mut numbers = Numbers(25);
    let mut shapes_with_gone_blocks = 0;
    for shape in shapes() {
        let mut sequence = Sequence::new(&mut numbers, shape, 60, vec![0, 3, 2, 1]);
        let mut kv = poisoned(&shape, 4, Compute::F32);
        sequence.write(&mut kv, 0..60);
        let whole = sequence.attend(&cpu(1, Isa::detect()), &kv, 0..60);
        for position in [17, 30, 48, 59] {
            let gone = sequence.first_visible(position) / 16;
            sequence.blocks[..gone].fill(u32::MAX);
            for cpu in cpus() {
                let row = sequence.attend(&cpu, &kv, position..60);
                assert_same(&row, &whole[position * sequence.width()..], "without what is out of sight");
            }
        }
        shapes_with_gone_blocks += usize::from(sequence.blocks[0] == u32::MAX);
    }
    assert!(shapes_with_gone_blocks > 1);
}

#[test]
#[should_panic(expected = "rows: block 4294967295 is outside a cache of 4")]
fn a_block_that_a_row_sees_must_be_there() {
    let shape = shape(2, 1, 16, last(20));
    let mut sequence = Sequence::new(&mut Numbers(26), shape, 60, vec![0, 3, 2, 1]);
    let mut kv = poisoned(&shape, 4, Compute::F32);
    sequence.write(&mut kv, 0..60);
    // Position 50 attends to positions from 31 on.
    sequence.blocks[1] = u32::MAX;
    sequence.attend(&cpu(1, Isa::detect()), &kv, 50..51);
}

/// Rows of several sequences in one call.
fn attend_together(cpu: &Cpu, kv: &KvCache, parts: &[(&Sequence, Range<usize>)]) -> Vec<f32> {
    let (mut q, mut slots) = (Vec::new(), Vec::new());
    for (sequence, rows) in parts {
        let width = sequence.shape.heads * sequence.shape.head_dim;
        q.extend_from_slice(&sequence.q[rows.start * width..rows.end * width]);
        slots.extend(sequence.slots(rows.clone()));
    }
    let mut out = vec![f32::NAN; slots.len() * parts[0].0.width()];
    attention(cpu, &parts[0].0.shape, LAYER, &q, &slots, kv, &mut out);
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whole prefill, chunked prefill and decode beside another sequence agree to the bit.
    #[test]
    fn chunks_batches_and_owners_do_not_show(
        which in 0_usize..21, len in 2_usize..90, cuts in prop::collection::vec(1_usize..90, 0..4), seed: u64,
    ) {
        let shape = shapes()[which];
        let mut numbers = Numbers(seed);
        let first = Sequence::new(&mut numbers, shape, len, vec![3, 11, 0, 7, 2, 9]);
        let other = Sequence::new(&mut numbers, shape, 40, vec![5, 4, 8]);
        let cpus = cpus();
        let mut kv = poisoned(&shape, 12, Compute::Bf16);
        first.write(&mut kv, 0..len);
        let whole = first.attend(&cpus[0], &kv, 0..len);

        let mut cuts: Vec<usize> = cuts.into_iter().filter(|&cut| cut < len).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut kv = poisoned(&shape, 12, Compute::Bf16);
        other.write(&mut kv, 0..40);
        let mut chunked = Vec::new();
        for (index, cut) in cuts.windows(2).enumerate() {
            let rows = cut[0]..cut[1];
            first.write(&mut kv, rows.clone());
            let count = rows.len();
            // The other sequence decodes a row of its own before and after this one's.
            let parts = [(&other, index..index + 1), (&first, rows), (&other, 39..40)];
            let out = attend_together(&cpus[index % cpus.len()], &kv, &parts);
            chunked.extend_from_slice(&out[first.width()..(count + 1) * first.width()]);
        }
        assert_same(&chunked, &whole, "chunked beside another");
        for position in [0, len / 2, first.len() - 1] {
            let row = first.attend(&cpus[0], &kv, position..position + 1);
            assert_same(&row, &whole[position * first.width()..(position + 1) * first.width()], "one row");
        }
    }
}

#[test]
fn scores_beyond_range_stay_visible_and_large_ones_are_exact() {
    let shape = AttentionShape { scale: 1.0, ..shape(1, 1, 1, Reach::All) };
    let run = |q: f32, k: [f32; 2]| {
        let mut kv = KvCache::new(ONE_NUMBER, 1, Compute::F32).unwrap();
        let slots = [0, 1].map(|position| KvSlot { position, blocks: &[0] });
        kv.write(0, &slots, &k, &[3.0, 5.0]);
        let mut out = [0.0; 2];
        attention(&cpu(1, Isa::detect()), &shape, 0, &[q, q], &slots, &kv, &mut out);
        out
    };
    assert_eq!(run(1e19, [-1e19, 1e19]), [3.0, 5.0]);
    assert_eq!(run(1e19, [1e19, 1e19]), [3.0, 4.0]);
    assert!(run(1e30, [1e30, 0.0]).iter().all(|v| v.is_nan()));
    assert!(run(f32::NAN, [1.0, 0.0]).iter().all(|v| v.is_nan()));
}

#[test]
fn a_sink_beside_one_score_takes_its_share() {
    let mut kv = KvCache::new(ONE_NUMBER, 1, Compute::F32).unwrap();
    let slots = [KvSlot { position: 0, blocks: &[0] }];
    kv.write(0, &slots, &[1.0], &[6.0]);
    let run = |score: f32, sink: f32| {
        let shape = AttentionShape { scale: 1.0, sinks: Some(&[sink]), ..shape(1, 1, 1, Reach::All) };
        let mut out = [0.0];
        attention(&cpu(1, Isa::detect()), &shape, 0, &[score], &slots, &kv, &mut out);
        out[0]
    };
    assert_eq!(run(2.0, 2.0), 3.0);
    assert_eq!(run(2.0, f32::NEG_INFINITY), 6.0);
    assert_eq!(run(2.0, 2000.0), 0.0);
    assert!((run(3.0_f32.ln(), 0.0) - 4.5).abs() < 1e-6 && (run(0.0, 3.0_f32.ln()) - 1.5).abs() < 1e-6);
    assert!(run(1.0, f32::NAN).is_nan());
}

#[test]
#[should_panic(expected = "shape: there must be one sink per head")]
fn sinks_of_another_number_are_refused() {
    let shape = AttentionShape { sinks: Some(&SINKS[..3]), ..shape(4, 4, 16, Reach::All) };
    let kv = poisoned(&shape, 1, Compute::F32);
    attention(&cpu(1, Isa::Portable), &shape, 0, &[], &[], &kv, &mut []);
}

#[test]
fn no_rows_are_no_work() {
    let shape = shape(4, 2, 16, Reach::All);
    let kv = poisoned(&shape, 1, Compute::F32);
    attention(&cpu(2, Isa::detect()), &shape, LAYER, &[], &[], &kv, &mut []);
}

#[test]
#[should_panic(expected = "shape: heads must divide by kv_heads")]
fn heads_that_do_not_divide_are_refused() {
    let kv = KvCache::new(KvShape { kv_heads: 2, ..ONE_NUMBER }, 1, Compute::F32).unwrap();
    let shape = shape(3, 2, 1, Reach::All);
    attention(&cpu(1, Isa::Portable), &shape, 0, &[], &[], &kv, &mut []);
}
