//! The gated MLPs of several experts in one call: `down(round(silu(gate(x)) * up(x)))`, or with another activation and
//! with biases (see [`crate::gating`]).
//!
//! What must hold: each output row depends on its own input row and expert alone; the work of all groups is shared out
//! together, so that a few rows on several experts keep every thread busy. It does not know the experts' ids, nor how
//! outputs are weighted and combined.

use std::ops::Range;

use muster_types::Compute;

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::expert::{Expert, ExpertRows, Halves, Weights, Wide};
use crate::gating::{Activate, Plain};
use crate::kernel::{Kernel, run_flushing};
use crate::linear::{LinearTask, Output};
use crate::pairs::{
    DotOrder, InPairs, PairBuffer, PairRows, PairTask, PairWork, Paired, pack, words_per_row,
};
use crate::panels::{Panels, Stored};
use crate::path::{Path, path};
use crate::quant::{self, Quantised};
use crate::simd::{LANES, Simd, store_bf16_pairs, store_part};
use crate::tile::{Dense, Gathered, Sink, Work, panels_per_task, rows_per_task};

/// Memory that [`grouped_ffn`] keeps between calls, grown to the largest call seen. Its content between calls is
/// meaningless.
#[derive(Debug, Default)]
pub struct FfnScratch {
    activated: Vec<f32>,
    packed: PairBuffer,
    activated_pairs: PairBuffer,
    first: Vec<Task>,
    second: Vec<Task>,
    quantised: quant::Buffers,
}

/// Some rows of a group times some panels of one of its stages.
#[derive(Debug, Clone, Copy)]
struct Task {
    group: usize,
    /// Rows of the groups before.
    rows_before: usize,
    /// Intermediate elements of the groups before; words if the group is computed in pairs.
    activated_before: usize,
    row: usize,
    rows: usize,
    panel: usize,
    panels: usize,
}

/// Applies each group's expert to its rows of `x` (`[m, hidden]`); `out` takes the groups' rows one group after the
/// other, `[sum of rows, hidden]`, and is overwritten.
///
/// `x` is rounded by the caller: where `compute` rounds, it holds bf16 values. An expert follows the order of
/// [`Compute::Bf16Pairs`] if all its weights are bf16. Quantised experts read `x` and the input of `down` as 32-wide
/// groups of bytes instead, quantised here from f32. Once `scratch` is warm nothing is allocated.
///
/// # Panics
/// If the experts' hidden sizes differ, `x` or `out` does not fit, or a row number is outside `x`.
pub fn grouped_ffn(
    cpu: &Cpu,
    groups: &[ExpertRows<'_>],
    x: &[f32],
    compute: Compute,
    scratch: &mut FfnScratch,
    out: &mut [f32],
) {
    match path(cpu.isa(), compute) {
        Path::Lanes => run::<InPairs>(None, cpu, groups, x, compute, scratch, out),
        Path::Pairs => run(Some(InPairs), cpu, groups, x, compute, scratch, out),
        Path::Tiles(order) => run(Some(order), cpu, groups, x, compute, scratch, out),
    }
}

/// Computes bf16 experts in `order`, if there is one, and all other plain experts in lanes.
fn run<E: DotOrder>(
    order: Option<E>,
    cpu: &Cpu,
    groups: &[ExpertRows<'_>],
    x: &[f32],
    compute: Compute,
    scratch: &mut FfnScratch,
    out: &mut [f32],
) {
    let Some(first) = groups.first() else {
        assert!(out.is_empty(), "out: there are no groups, so it must be empty");
        return;
    };
    let hidden = first.expert.hidden();
    check(groups, hidden, x, out);
    let in_pairs = |expert: &Expert| order.is_some() && matches!(expert.weights, Weights::Halves { .. });
    let plan = scratch.plan(cpu, groups, &in_pairs);
    if scratch.activated.len() < plan.activated {
        scratch.activated.resize(plan.activated, 0.0);
    }
    let FfnScratch { activated, packed, activated_pairs, first, second, quantised } = scratch;
    let is_quantised = groups.iter().any(|group| group.expert.is_quantised());
    let packed = if plan.words > 0 { pack_groups(cpu, groups, x, &in_pairs, packed) } else { &[] };
    let words = activated_pairs.words(plan.words, plan.words_per_row);
    let stage = GateUp {
        cpu,
        groups,
        compute,
        x: Dense { x, k: hidden },
        packed: PairRows { words: packed, per_row: words_per_row(hidden) },
        quantised: quantised.inputs(cpu, if is_quantised { x } else { &[] }, hidden),
        activated: &Disjoint::new(activated),
        words: &Disjoint::new(words),
    };
    cpu.run(first.len(), plan.work * 2, &|index| stage.run(order, first[index]));
    if is_quantised {
        quantised.between(cpu, groups, |group| !in_pairs(group.expert), activated);
    }
    let stage = Down { cpu, groups, activated, words, quantised, out: &Disjoint::new(out) };
    cpu.run(second.len(), plan.work, &|index| stage.run(order, second[index]));
}

/// Packs the inputs of the groups that are computed in pairs, each at the row that it has in `out`.
fn pack_groups<'s>(
    cpu: &Cpu,
    groups: &[ExpertRows<'_>],
    x: &[f32],
    in_pairs: &dyn Fn(&Expert) -> bool,
    packed: &'s mut PairBuffer,
) -> &'s [u32] {
    let k = groups.first().map_or(0, |group| group.expert.hidden());
    let per_row = words_per_row(k);
    let total: usize = groups.iter().map(|group| group.rows.len()).sum();
    let words = packed.words(total * per_row, per_row);
    let mut first = 0;
    for ExpertRows { expert, rows } in groups {
        if in_pairs(expert) {
            let words = &mut words[first * per_row..(first + rows.len()) * per_row];
            pack(cpu, words, rows.len(), k, &|row| &x[rows[row] as usize * k..][..k]);
        }
        first += rows.len();
    }
    words
}

fn check(groups: &[ExpertRows<'_>], hidden: usize, x: &[f32], out: &[f32]) {
    let rows = x.len() / hidden;
    assert_eq!(x.len(), rows * hidden, "x: its length must be a multiple of hidden = {hidden}");
    let mut total = 0;
    for group in groups {
        assert_eq!(group.expert.hidden(), hidden, "groups: experts must have one hidden size");
        for &row in group.rows {
            assert!((row as usize) < rows, "groups: row {row} is outside x, which has {rows} rows");
        }
        total += group.rows.len();
    }
    assert_eq!(out.len(), total * hidden, "out: its length must be {total} rows * hidden = {hidden}");
}

impl FfnScratch {
    /// Lists the tasks of both stages.
    fn plan(&mut self, cpu: &Cpu, groups: &[ExpertRows<'_>], in_pairs: &dyn Fn(&Expert) -> bool) -> Plan {
        let panels_of = |features: usize| features.div_ceil(LANES);
        let (mut work, mut panels) = (0, [0, 0]);
        for ExpertRows { expert, rows } in groups {
            work += rows.len() * expert.intermediate() * expert.hidden();
            let used = usize::from(!rows.is_empty());
            panels[0] += used * panels_of(expert.intermediate());
            panels[1] += used * panels_of(expert.hidden());
        }
        self.first.clear();
        self.second.clear();
        let per_task = [
            panels_per_task(panels[0], cpu.threads_for(work * 2)),
            panels_per_task(panels[1], cpu.threads_for(work)),
        ];
        let mut plan = Plan { activated: 0, words: 0, words_per_row: 0, work };
        let mut rows_before = 0;
        for (group, ExpertRows { expert, rows }) in groups.iter().enumerate() {
            let (hidden, intermediate) = (expert.hidden(), expert.intermediate());
            let per_row = words_per_row(intermediate);
            let (activated, width) = if in_pairs(expert) {
                plan.words_per_row = plan.words_per_row.max(per_row);
                (&mut plan.words, per_row)
            } else {
                (&mut plan.activated, intermediate)
            };
            let activated_before = *activated;
            *activated += rows.len() * width;
            for (tasks, n, k, per_task) in [
                (&mut self.first, intermediate, hidden, per_task[0]),
                (&mut self.second, hidden, intermediate, per_task[1]),
            ] {
                let (chunk, panels) = (rows_per_task(k), panels_of(n));
                for row in (0..rows.len()).step_by(chunk) {
                    for panel in (0..panels).step_by(per_task) {
                        tasks.push(Task {
                            group,
                            rows_before,
                            activated_before,
                            row,
                            rows: chunk.min(rows.len() - row),
                            panel,
                            panels: per_task.min(panels - panel),
                        });
                    }
                }
            }
            rows_before += rows.len();
        }
        plan
    }
}

/// Sizes of a call's buffers, and its work.
struct Plan {
    /// Intermediate elements of the groups that are computed in lanes.
    activated: usize,
    /// Intermediate words of the groups that are computed in pairs.
    words: usize,
    /// Words of the longest intermediate row.
    words_per_row: usize,
    /// Multiply-adds of the second stage; the first has twice as many.
    work: usize,
}

/// The first stage: gate and up, activated and rounded.
struct GateUp<'a> {
    cpu: &'a Cpu,
    groups: &'a [ExpertRows<'a>],
    compute: Compute,
    x: Dense<'a>,
    packed: PairRows<'a>,
    quantised: Quantised<'a>,
    activated: &'a Disjoint<'a, f32>,
    words: &'a Disjoint<'a, u32>,
}

impl GateUp<'_> {
    fn run<E: DotOrder>(&self, order: Option<E>, task: Task) {
        match (&self.groups[task.group].expert.weights, order) {
            (Weights::Halves { first: Halves::Bf16(w), .. }, Some(order)) => self.pairs(order, task, w),
            (Weights::Halves { first: Halves::Mxfp4(w), .. }, Some(order)) => self.pairs(order, task, w),
            (Weights::Halves { first, .. }, None) => self.halves(task, first),
            (Weights::Wide { first: Wide::Halves(first), .. }, _) => self.halves(task, first),
            (Weights::Wide { first: Wide::F32(w), .. }, _) => self.lanes(task, w),
            (Weights::Q8 { first, .. }, _) => self.bytes(task, first),
            (Weights::Q4 { first, .. }, _) => self.bytes(task, first),
        }
    }

    fn halves(&self, task: Task, first: &Halves<2>) {
        match first {
            Halves::Bf16(w) => self.lanes(task, w),
            Halves::Mxfp4(w) => self.lanes(task, w),
        }
    }

    fn lanes<B: Stored>(&self, task: Task, weights: &[Panels<B>; 2]) {
        let ExpertRows { expert, rows } = self.groups[task.group];
        let (isa, x) = (self.cpu.isa(), Gathered { from: self.x, rows });
        match expert.general() {
            None => {
                let sink = Gated::new(self.activated, task, expert, self.compute, Plain);
                run_flushing(isa, GateUpTask(task.work(weights, x, sink)));
            }
            Some(general) => {
                let sink = Gated::new(self.activated, task, expert, self.compute, general);
                run_flushing(isa, GateUpTask(task.work(weights, x, sink)));
            }
        }
    }

    fn pairs<E: DotOrder, B: Paired>(&self, order: E, task: Task, weights: &[Panels<B>; 2]) {
        let (expert, x) = (self.groups[task.group].expert, self.packed.from(task.rows_before));
        let isa = self.cpu.isa();
        match expert.general() {
            None => {
                let sink = GatedPairs::new(self.words, task, expert, Plain);
                run_flushing(isa, PairTask(order, task.pair_work(weights, x, sink)));
            }
            Some(general) => {
                let sink = GatedPairs::new(self.words, task, expert, general);
                run_flushing(isa, PairTask(order, task.pair_work(weights, x, sink)));
            }
        }
    }

    fn bytes<B: quant::Block>(&self, task: Task, weights: &[Panels<B>; 2]) {
        let ExpertRows { expert, rows } = self.groups[task.group];
        let x = self.quantised.picked(rows);
        let (rows, panels) = (task.row_range(), task.panel_range());
        // The second stage quantises f32 values, so they are not rounded to bf16 here.
        let compute = Compute::F32;
        match expert.general() {
            None => {
                let sink = Gated::new(self.activated, task, expert, compute, Plain);
                quant::run(self.cpu, weights, x, sink, rows, panels);
            }
            Some(general) => {
                let sink = Gated::new(self.activated, task, expert, compute, general);
                quant::run(self.cpu, weights, x, sink, rows, panels);
            }
        }
    }
}

/// The second stage.
struct Down<'a> {
    cpu: &'a Cpu,
    groups: &'a [ExpertRows<'a>],
    activated: &'a [f32],
    words: &'a [u32],
    quantised: &'a quant::Buffers,
    out: &'a Disjoint<'a, f32>,
}

impl Down<'_> {
    fn run<E: DotOrder>(&self, order: Option<E>, task: Task) {
        match (&self.groups[task.group].expert.weights, order) {
            (Weights::Halves { down: Halves::Bf16(w), .. }, Some(order)) => self.pairs(order, task, w),
            (Weights::Halves { down: Halves::Mxfp4(w), .. }, Some(order)) => self.pairs(order, task, w),
            (Weights::Halves { down, .. }, None) => self.halves(task, down),
            (Weights::Wide { down: Wide::Halves(down), .. }, _) => self.halves(task, down),
            (Weights::Wide { down: Wide::F32(w), .. }, _) => self.lanes(task, w),
            (Weights::Q8 { down, .. }, _) => self.bytes(task, down),
            (Weights::Q4 { down, .. }, _) => self.bytes(task, down),
        }
    }

    fn halves(&self, task: Task, down: &Halves<1>) {
        match down {
            Halves::Bf16(w) => self.lanes(task, w),
            Halves::Mxfp4(w) => self.lanes(task, w),
        }
    }

    fn lanes<B: Stored>(&self, task: Task, weights: &[Panels<B>; 1]) {
        let expert = self.groups[task.group].expert;
        // The slice starts with the group's first row.
        let x = Dense { x: &self.activated[task.activated_before..], k: expert.intermediate() };
        run_flushing(self.cpu.isa(), LinearTask(task.work(weights, x, self.sink(task, expert))));
    }

    fn pairs<E: DotOrder, B: Paired>(&self, order: E, task: Task, weights: &[Panels<B>; 1]) {
        let expert = self.groups[task.group].expert;
        let words = &self.words[task.activated_before..];
        let x = PairRows { words, per_row: words_per_row(expert.intermediate()) };
        let work = task.pair_work(weights, x, self.sink(task, expert));
        run_flushing(self.cpu.isa(), PairTask(order, work));
    }

    fn bytes<B: quant::Block>(&self, task: Task, weights: &[Panels<B>; 1]) {
        let expert = self.groups[task.group].expert;
        let x = self.quantised.group(task.group, expert.intermediate());
        let (rows, panels) = (task.row_range(), task.panel_range());
        quant::run(self.cpu, weights, x, self.sink(task, expert), rows, panels);
    }

    /// The destination of the results.
    fn sink<'s>(&'s self, task: Task, expert: &'s Expert) -> Output<'s> {
        Output { out: self.out, first_row: task.rows_before, n: expert.hidden(), bias: expert.down_bias() }
    }
}

impl Task {
    fn work<B, R, K, const M: usize>(self, weights: &[Panels<B>; M], x: R, sink: K) -> Work<'_, B, R, K, M> {
        let weights = weights.each_ref();
        Work { weights, x, sink, rows: self.row_range(), panels: self.panel_range() }
    }

    fn pair_work<'a, B, K, const M: usize>(
        self,
        weights: &'a [Panels<B>; M],
        x: PairRows<'a>,
        sink: K,
    ) -> PairWork<'a, B, K, M> {
        let weights = weights.each_ref();
        PairWork { weights, x, sink, rows: self.row_range(), panels: self.panel_range() }
    }

    const fn row_range(self) -> Range<usize> {
        self.row..self.row + self.rows
    }

    const fn panel_range(self) -> Range<usize> {
        self.panel..self.panel + self.panels
    }
}

struct GateUpTask<'a, B, A>(Work<'a, B, Gathered<'a>, Gated<'a, A>, 2>);

impl<B: Stored, A: Activate> Kernel for GateUpTask<'_, B, A> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(s);
    }
}

/// Activates the sums of gate and up and stores them for the second stage.
struct Gated<'a, A> {
    out: &'a Disjoint<'a, f32>,
    before: usize,
    intermediate: usize,
    compute: Compute,
    activation: A,
}

impl<'a, A> Gated<'a, A> {
    fn new(out: &'a Disjoint<'a, f32>, task: Task, expert: &Expert, compute: Compute, activation: A) -> Self {
        let (before, intermediate) = (task.activated_before, expert.intermediate());
        Self { out, before, intermediate, compute, activation }
    }
}

impl<A: Activate> Sink<2> for Gated<'_, A> {
    #[inline(always)]
    fn put<S: Simd>(&self, s: S, row: usize, panel: usize, sums: [S::V; 2]) {
        let mut value = self.activation.of(s, panel, sums);
        if self.compute.rounds() {
            value = s.round_bf16(value);
        }
        let column = panel * LANES;
        let len = LANES.min(self.intermediate - column);
        // SAFETY: tasks share no (group, row, panel), and the piece is dropped before the next.
        let piece = unsafe { self.out.piece(self.before + row * self.intermediate + column, len) };
        store_part(s, value, piece);
    }
}

/// As [`Gated`], rounded to bf16 and packed in pairs, padded to whole blocks.
struct GatedPairs<'a, A> {
    out: &'a Disjoint<'a, u32>,
    before: usize,
    intermediate: usize,
    activation: A,
}

impl<'a, A> GatedPairs<'a, A> {
    fn new(out: &'a Disjoint<'a, u32>, task: Task, expert: &Expert, activation: A) -> Self {
        Self { out, before: task.activated_before, intermediate: expert.intermediate(), activation }
    }
}

impl<A: Activate> Sink<2> for GatedPairs<'_, A> {
    #[inline(always)]
    fn put<S: Simd>(&self, s: S, row: usize, panel: usize, sums: [S::V; 2]) {
        const WORDS: usize = LANES / 2;
        let value = self.activation.of(s, panel, sums);
        let (from, left) = (panel * WORDS, self.intermediate - panel * LANES);
        let last = left <= LANES;
        let len = if last { words_per_row(self.intermediate) - from } else { WORDS };
        let from = self.before + row * words_per_row(self.intermediate) + from;
        // SAFETY: tasks share no (group, row, panel), and the piece is dropped before the next.
        let piece = unsafe { self.out.piece(from, len) };
        store_bf16_pairs(s, value, piece.first_chunk_mut().expect("a panel has eight words"));
        if last {
            // The padding must be zero; infinite inputs would make it NaN.
            piece[left.div_ceil(2)..].fill(0);
            if left % 2 == 1 {
                piece[left / 2] &= 0xffff;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use muster_types::Gating;

    use crate::amx::tests::{assert_same, numbers};
    use crate::amx::{InTiles, Software};
    use crate::gating::Biases;
    use crate::isa::Isa;
    use crate::matrix::Matrix;

    #[test]
    fn experts_on_tiles_give_the_bits_of_lanes() {
        // SAFETY: plain Rust runs anywhere.
        let tiles = unsafe { InTiles::<Software>::new() };
        let matrix = |n: usize, k: usize, seed| {
            if k == 64 && seed != 3 {
                let codes: Vec<u8> = (0..n * k / 2).map(|i| (i * 101 / 3 + seed as usize) as u8).collect();
                return Matrix::pack_mxfp4(n, k, &codes, &vec![125; n * k / 32]).unwrap();
            }
            let mut bits = vec![0; n * k];
            crate::to_bf16(&numbers(n * k, seed), &mut bits);
            Matrix::pack_bf16(n, k, &bits).unwrap()
        };
        let mut scratch = FfnScratch::default();
        for (hidden, widths) in [(64, [32, 32, 32]), (70, [48, 17, 131]), (33, [1, 300, 16])] {
            let known = widths.map(|width| {
                let (gate, up) = (matrix(width, hidden, 1), matrix(width, hidden, 2));
                let expert = Expert::new(gate, up, matrix(hidden, width, 3)).unwrap();
                if width % 2 == 0 {
                    return expert;
                }
                let bias = |len| (0..len).map(|i| i as f32 * 0.01 - 0.3).collect();
                let biases = Biases { gate: bias(width), up: bias(width), down: bias(hidden) };
                expert.with(Gating::ClampedSwish { alpha: 1.702, limit: 1.25 }, Some(biases)).unwrap()
            });
            let x = numbers(90 * hidden, 4);
            let rows: [Vec<u32>; 4] = [vec![5], vec![], (0..90).rev().collect(), (0..47).collect()];
            let groups: Vec<_> =
                (0..4).map(|g| ExpertRows { expert: &known[g % 3], rows: &rows[g] }).collect();
            let mut want = vec![0.0; 138 * hidden];
            let canonical = Cpu::with_isa(NonZeroUsize::MIN, Isa::Portable).unwrap();
            grouped_ffn(&canonical, &groups, &x, Compute::Bf16, &mut scratch, &mut want);
            for threads in [1, 3] {
                let cpu = Cpu::new(NonZeroUsize::new(threads).unwrap()).unwrap();
                let mut out = vec![f32::NAN; want.len()];
                run(Some(tiles), &cpu, &groups, &x, Compute::Bf16, &mut scratch, &mut out);
                assert_same(&out, &want, &format!("hidden {hidden}, {threads} threads"));
            }
        }
    }
}
