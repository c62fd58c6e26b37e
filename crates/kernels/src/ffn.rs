//! The gated MLPs of several experts in one call: `down(round(silu(gate(x)) * up(x)))`, or with another activation and
//! with biases (see [`crate::gating`]).
//!
//! What must hold: each output row depends on its own input row and expert alone; the work of all groups is shared
//! out together, so that a few rows on several experts keep every thread busy. It does not know which expert is
//! which, nor how outputs are weighted and combined.

use std::ops::Range;

use crate::convert::Precision;
use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::error::KernelError;
use crate::gating::{Activate, Biases, Gating, General, Plain};
use crate::isa::{Kernel, dispatch_flushing};
use crate::linear::{LinearTask, Output};
use crate::matrix::{Elements, Matrix, Panels, Stored};
use crate::pairs::{
    Engine, InPairs, PairBuffer, PairRows, PairTask, PairWork, Path, pack, path, words_per_row,
};
use crate::quant;
use crate::simd::{LANES, Simd, store_bf16_pairs, store_part};
use crate::tile::{Dense, Gathered, Sink, Work, panels_per_task, rows_per_task};

/// The weights of one gated MLP.
#[derive(Debug)]
pub struct Expert {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
    gating: Gating,
    biases: Option<Box<Biases>>,
}

impl Expert {
    /// `gate` and `up` are `[intermediate, hidden]`, `down` is `[hidden, intermediate]`; the activation is
    /// [`Gating::Silu`], and there are no biases.
    ///
    /// # Errors
    /// [`KernelError::ExpertShape`] if `up` or `down` does not fit `gate`; [`KernelError::ExpertTypes`] if gate and
    /// up differ in element type, or some but not all are quantised in one way.
    pub fn new(gate: Matrix, up: Matrix, down: Matrix) -> Result<Self, KernelError> {
        for (field, matrix, (want_n, want_k)) in
            [("up", &up, (gate.n(), gate.k())), ("down", &down, (gate.k(), gate.n()))]
        {
            let (n, k) = (matrix.n(), matrix.k());
            if (n, k) != (want_n, want_k) {
                return Err(KernelError::ExpertShape { field, n, k, want_n, want_k });
            }
        }
        match (&gate.elements, &up.elements, &down.elements) {
            (Elements::Bf16(_), Elements::Bf16(_), down)
            | (Elements::Mxfp4(_), Elements::Mxfp4(_), down)
            | (Elements::F32(_), Elements::F32(_), down)
                if !matches!(down, Elements::Quantised(_)) => {}
            (Elements::Quantised(gate), Elements::Quantised(up), Elements::Quantised(down))
                if gate.kind() == up.kind() && gate.kind() == down.kind() => {}
            _ => return Err(KernelError::ExpertTypes),
        }
        Ok(Self { gate, up, down, gating: Gating::Silu, biases: None })
    }

    /// The expert with another activation and with biases, or without.
    ///
    /// # Errors
    /// [`KernelError::Gating`] for constants that are unusable; [`KernelError::BiasLength`] and
    /// [`KernelError::BiasNonFinite`] for biases that are.
    pub fn with(self, gating: Gating, biases: Option<Biases>) -> Result<Self, KernelError> {
        gating.check()?;
        if let Some(biases) = &biases {
            biases.check(self.intermediate(), self.hidden())?;
        }
        Ok(Self { gating, biases: biases.map(Box::new), ..self })
    }

    /// What lies between the linears.
    #[must_use]
    pub fn gating(&self) -> Gating {
        self.gating
    }

    /// The linears' biases.
    #[must_use]
    pub fn biases(&self) -> Option<&Biases> {
        self.biases.as_deref()
    }

    /// What it does with the sums of gate and up, if that is not [`Plain`].
    pub(crate) fn general(&self) -> Option<General<'_>> {
        let (gating, biases, intermediate) = (self.gating, self.biases(), self.intermediate());
        (gating != Gating::Silu || biases.is_some()).then_some(General { gating, biases, intermediate })
    }

    /// What is added to the outputs of the last linear.
    fn down_bias(&self) -> Option<&[f32]> {
        self.biases().map(|biases| biases.down.as_slice())
    }

    /// Gate, up and down projection.
    #[must_use]
    pub fn matrices(&self) -> [&Matrix; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Its packed matrices and then its biases, gate, up and down each time: what another process can make it of.
    #[must_use]
    pub fn packed(&self) -> [&[u8]; 6] {
        let biases = self.biases.as_ref().map(|b| [&b.gate, &b.up, &b.down].map(Vec::as_slice));
        let [gate, up, down] = biases.unwrap_or_default().map(bytemuck::cast_slice);
        [self.gate.packed(), self.up.packed(), self.down.packed(), gate, up, down]
    }

    /// Features of an input and of an output row.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.gate.k()
    }

    /// Features between the linears.
    #[must_use]
    pub fn intermediate(&self) -> usize {
        self.gate.n()
    }

    /// Whether all its weights are bf16 values, whatever their packing.
    fn is_in_bf16(&self) -> bool {
        let in_bf16 = |matrix: &&Matrix| matches!(matrix.elements, Elements::Bf16(_) | Elements::Mxfp4(_));
        self.matrices().iter().all(in_bf16)
    }

    /// Whether the matrices are quantised.
    fn is_quantised(&self) -> bool {
        matches!(self.gate.elements, Elements::Quantised(_))
    }

    /// Bytes that the packed weights and the biases keep in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let biases = self.biases().map_or(0, Biases::bytes);
        self.gate.bytes() + self.up.bytes() + self.down.bytes() + biases
    }
}

/// An expert and the rows that it is applied to.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRows<'a> {
    /// The expert.
    pub expert: &'a Expert,
    /// Row numbers into `x`; a row may occur in any number of groups.
    pub rows: &'a [u32],
}

/// Memory that [`grouped_ffn`] keeps between calls, grown to the largest call seen. Its content never matters.
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
pub(crate) struct Task {
    pub(crate) group: usize,
    /// Rows of the groups before.
    pub(crate) rows_before: usize,
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
/// `x` is given as the linears shall read it: where `precision` rounds, it holds bf16 values already. An expert follows
/// the order of [`Precision::Bf16Pairs`] if all its weights are bf16. Quantised experts read `x` and the input of `down`
/// as 32-wide groups of bytes instead, quantised here from what they are in f32. Once `scratch` is warm nothing is
/// allocated.
///
/// # Panics
/// If the experts' hidden sizes differ, some but not all are quantised, `x` or `out` does not fit, or a row number is
/// outside `x`.
pub fn grouped_ffn(
    cpu: &Cpu,
    groups: &[ExpertRows<'_>],
    x: &[f32],
    precision: Precision,
    scratch: &mut FfnScratch,
    out: &mut [f32],
) {
    match path(cpu.isa(), precision) {
        Path::Lanes => run::<InPairs>(None, cpu, groups, x, precision, scratch, out),
        Path::Pairs => run(Some(InPairs), cpu, groups, x, precision, scratch, out),
        Path::Tiles(engine) => run(Some(engine), cpu, groups, x, precision, scratch, out),
    }
}

/// Experts in bf16 go to `engine` if there is one; the others, and all if there is none, are computed in lanes.
fn run<E: Engine>(
    engine: Option<E>,
    cpu: &Cpu,
    groups: &[ExpertRows<'_>],
    x: &[f32],
    precision: Precision,
    scratch: &mut FfnScratch,
    out: &mut [f32],
) {
    let Some(first) = groups.first() else {
        assert!(out.is_empty(), "out: there are no groups, so it must be empty");
        return;
    };
    let hidden = first.expert.hidden();
    check(groups, hidden, x, out);
    let in_pairs = |expert: &Expert| engine.is_some() && expert.is_in_bf16();
    let plan = scratch.plan(cpu, groups, &in_pairs);
    if scratch.activated.len() < plan.activated {
        scratch.activated.resize(plan.activated, 0.0);
    }
    if first.expert.is_quantised() {
        let FfnScratch { activated, first, second, quantised, .. } = scratch;
        let stages = quant::Stages { cpu, groups, hidden };
        stages.gate_up(first, plan.work * 2, x, quantised, activated);
        stages.down(second, plan.work, activated, quantised, out);
        return;
    }
    let FfnScratch { activated, packed, activated_pairs, first, second, .. } = scratch;
    let x = Dense { x, k: hidden };
    let packed = if plan.words > 0 { pack_groups(cpu, groups, x, &in_pairs, packed) } else { &[] };
    let packed = PairRows { words: packed, per_row: words_per_row(hidden) };
    let words = activated_pairs.words(plan.words, plan.words_per_row);
    let (between, between_pairs) = (Disjoint::new(activated), Disjoint::new(words));
    cpu.run(first.len(), plan.work * 2, &|index| {
        let task = first[index];
        let ExpertRows { expert, rows } = groups[task.group];
        if let Some(engine) = engine.filter(|_| expert.is_in_bf16()) {
            let x = packed.from(task.rows_before);
            match expert.general() {
                None => {
                    let sink = GatedPairs::new(&between_pairs, task, expert, Plain);
                    gate_up_in_pairs(engine, cpu, task, expert, x, sink);
                }
                Some(activation) => {
                    let sink = GatedPairs::new(&between_pairs, task, expert, activation);
                    gate_up_in_pairs(engine, cpu, task, expert, x, sink);
                }
            }
            return;
        }
        let x = Gathered { from: x, rows };
        match expert.general() {
            None => gate_up(cpu, task, expert, x, Gated::new(&between, task, expert, precision, Plain)),
            Some(activation) => {
                gate_up(cpu, task, expert, x, Gated::new(&between, task, expert, precision, activation));
            }
        }
    });
    let out = Disjoint::new(out);
    let (activated, words) = (&*activated, &*words);
    cpu.run(second.len(), plan.work, &|index| {
        let task = second[index];
        let expert = groups[task.group].expert;
        if let Some(engine) = engine.filter(|_| expert.is_in_bf16()) {
            let x = PairRows {
                words: &words[task.activated_before..],
                per_row: words_per_row(expert.intermediate()),
            };
            down_in_pairs(engine, cpu, task, expert, x, &out);
            return;
        }
        down(cpu, task, expert, &activated[task.activated_before..], &out);
    });
}

/// The inputs of the groups that are computed in pairs, each group's in its order, at the rows that `out` has for them.
fn pack_groups<'s>(
    cpu: &Cpu,
    groups: &[ExpertRows<'_>],
    x: Dense<'_>,
    in_pairs: &dyn Fn(&Expert) -> bool,
    packed: &'s mut PairBuffer,
) -> &'s [u32] {
    let per_row = words_per_row(x.k);
    let total: usize = groups.iter().map(|group| group.rows.len()).sum();
    let words = packed.words(total * per_row, per_row);
    let mut first = 0;
    for ExpertRows { expert, rows } in groups {
        if in_pairs(expert) {
            let words = &mut words[first * per_row..(first + rows.len()) * per_row];
            pack(cpu, words, rows.len(), x.k, &|row| &x.x[rows[row] as usize * x.k..][..x.k]);
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
        assert_eq!(
            group.expert.is_quantised(),
            groups[0].expert.is_quantised(),
            "groups: either all experts are quantised or none"
        );
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
        let (mut work, mut panels) = (0, [0, 0]);
        for ExpertRows { expert, rows } in groups {
            work += rows.len() * expert.intermediate() * expert.hidden();
            let used = usize::from(!rows.is_empty());
            panels[0] += used * expert.gate.panels();
            panels[1] += used * expert.down.panels();
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
            let per_row = words_per_row(expert.intermediate());
            let (activated, width) = if in_pairs(expert) {
                plan.words_per_row = plan.words_per_row.max(per_row);
                (&mut plan.words, per_row)
            } else {
                (&mut plan.activated, expert.intermediate())
            };
            let activated_before = *activated;
            *activated += rows.len() * width;
            for (tasks, matrix, per_task) in
                [(&mut self.first, &expert.gate, per_task[0]), (&mut self.second, &expert.down, per_task[1])]
            {
                let chunk = rows_per_task(matrix.k());
                for row in (0..rows.len()).step_by(chunk) {
                    for panel in (0..matrix.panels()).step_by(per_task) {
                        tasks.push(Task {
                            group,
                            rows_before,
                            activated_before,
                            row,
                            rows: chunk.min(rows.len() - row),
                            panel,
                            panels: per_task.min(matrix.panels() - panel),
                        });
                    }
                }
            }
            rows_before += rows.len();
        }
        plan
    }
}

/// What a call needs.
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

/// The first stage of one task: activated and rounded.
fn gate_up<A: Activate>(cpu: &Cpu, task: Task, expert: &Expert, x: Gathered<'_>, sink: Gated<'_, A>) {
    match (&expert.gate.elements, &expert.up.elements) {
        (Elements::Bf16(gate), Elements::Bf16(up)) => {
            dispatch_flushing(cpu.isa(), GateUpTask(task.work([gate, up], x, sink)));
        }
        (Elements::Mxfp4(gate), Elements::Mxfp4(up)) => {
            dispatch_flushing(cpu.isa(), GateUpTask(task.work([gate, up], x, sink)));
        }
        (Elements::F32(gate), Elements::F32(up)) => {
            dispatch_flushing(cpu.isa(), GateUpTask(task.work([gate, up], x, sink)));
        }
        _ => unreachable!("an expert's gate and up have one element type"),
    }
}

/// The same where all weights are bf16 values.
fn gate_up_in_pairs<E: Engine, A: Activate>(
    engine: E,
    cpu: &Cpu,
    task: Task,
    expert: &Expert,
    x: PairRows<'_>,
    sink: GatedPairs<'_, A>,
) {
    match (&expert.gate.elements, &expert.up.elements) {
        (Elements::Bf16(gate), Elements::Bf16(up)) => {
            dispatch_flushing(cpu.isa(), PairTask(engine, task.pair_work([gate, up], x, sink)));
        }
        (Elements::Mxfp4(gate), Elements::Mxfp4(up)) => {
            dispatch_flushing(cpu.isa(), PairTask(engine, task.pair_work([gate, up], x, sink)));
        }
        _ => unreachable!("an expert's gate and up have one element type, here of bf16 values"),
    }
}

impl Task {
    fn work<'a, B, R, K, const M: usize>(
        self,
        weights: [&'a Panels<B>; M],
        x: R,
        sink: K,
    ) -> Work<'a, B, R, K, M> {
        Work { weights, x, sink, rows: self.row_range(), panels: self.panel_range() }
    }

    pub(crate) fn row_range(self) -> Range<usize> {
        self.row..self.row + self.rows
    }

    pub(crate) fn panel_range(self) -> Range<usize> {
        self.panel..self.panel + self.panels
    }

    fn pair_work<'a, B, K, const M: usize>(
        self,
        weights: [&'a Panels<B>; M],
        x: PairRows<'a>,
        sink: K,
    ) -> PairWork<'a, B, K, M> {
        PairWork { weights, x, sink, rows: self.row_range(), panels: self.panel_range() }
    }
}

/// The second stage of one task; `activated` starts with the group's first row.
fn down(cpu: &Cpu, task: Task, expert: &Expert, activated: &[f32], out: &Disjoint<'_, f32>) {
    let x = Dense { x: activated, k: expert.intermediate() };
    let sink = Output::of(task, expert, out);
    match &expert.down.elements {
        Elements::Bf16(w) => dispatch_flushing(cpu.isa(), LinearTask(task.work([w], x, sink))),
        Elements::Mxfp4(w) => dispatch_flushing(cpu.isa(), LinearTask(task.work([w], x, sink))),
        Elements::F32(w) => dispatch_flushing(cpu.isa(), LinearTask(task.work([w], x, sink))),
        Elements::Quantised(_) => unreachable!("an expert is quantised whole or not at all"),
    }
}

/// The same where all weights are bf16 values.
fn down_in_pairs<E: Engine>(
    engine: E,
    cpu: &Cpu,
    task: Task,
    expert: &Expert,
    x: PairRows<'_>,
    out: &Disjoint<'_, f32>,
) {
    let sink = Output::of(task, expert, out);
    match &expert.down.elements {
        Elements::Bf16(w) => {
            dispatch_flushing(cpu.isa(), PairTask(engine, task.pair_work([w], x, sink)));
        }
        Elements::Mxfp4(w) => {
            dispatch_flushing(cpu.isa(), PairTask(engine, task.pair_work([w], x, sink)));
        }
        _ => unreachable!("the expert's weights are bf16 values"),
    }
}

impl<'a> Output<'a> {
    /// Where the second stage of a task leaves its results.
    pub(crate) fn of(task: Task, expert: &'a Expert, out: &'a Disjoint<'a, f32>) -> Self {
        Self { out, first_row: task.rows_before, n: expert.hidden(), bias: expert.down_bias() }
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

/// Activates what gate and up gave and keeps it for the second stage.
pub(crate) struct Gated<'a, A> {
    out: &'a Disjoint<'a, f32>,
    before: usize,
    intermediate: usize,
    precision: Precision,
    activation: A,
}

impl<'a, A> Gated<'a, A> {
    pub(crate) fn new(
        out: &'a Disjoint<'a, f32>,
        task: Task,
        expert: &Expert,
        precision: Precision,
        activation: A,
    ) -> Self {
        let (before, intermediate) = (task.activated_before, expert.intermediate());
        Self { out, before, intermediate, precision, activation }
    }
}

impl<A: Activate> Sink<2> for Gated<'_, A> {
    #[inline(always)]
    fn put<S: Simd>(&self, s: S, row: usize, panel: usize, sums: [S::V; 2]) {
        let mut value = self.activation.of(s, panel, sums);
        if self.precision.rounds() {
            value = s.round_bf16(value);
        }
        let column = panel * LANES;
        let len = LANES.min(self.intermediate - column);
        // SAFETY: tasks share no (group, row, panel), and the piece is dropped before the next.
        let piece = unsafe { self.out.piece(self.before + row * self.intermediate + column, len) };
        store_part(s, value, piece);
    }
}

/// As [`Gated`], rounded and in pairs, whole blocks of them.
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
            // The padding is zero even where an infinite input made something else of it.
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
    use crate::amx::tests::{assert_same, numbers};
    use crate::amx::{InTiles, Software};
    use crate::isa::Isa;

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
            grouped_ffn(&canonical, &groups, &x, Precision::Bf16, &mut scratch, &mut want);
            for threads in [1, 3] {
                let cpu = Cpu::new(NonZeroUsize::new(threads).unwrap()).unwrap();
                let mut out = vec![f32::NAN; want.len()];
                run(Some(tiles), &cpu, &groups, &x, Precision::Bf16, &mut scratch, &mut out);
                assert_same(&out, &want, &format!("hidden {hidden}, {threads} threads"));
            }
        }
    }
}
