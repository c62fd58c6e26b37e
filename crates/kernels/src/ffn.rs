//! The gated MLPs of several experts in one call: `down(round(silu(gate(x)) * up(x)))`.
//!
//! What must hold: each output row depends on its own input row and expert alone; the work of all groups is shared
//! out together, so that a few rows on several experts keep every thread busy. It does not know which expert is
//! which, nor how outputs are weighted and combined.

use std::ops::Range;

use crate::convert::Precision;
use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::error::KernelError;
use crate::isa::{Kernel, dispatch};
use crate::linear::{LinearTask, Output};
use crate::math::silu_lanes;
use crate::matrix::{Block, Elements, Matrix, Panels};
use crate::quant;
use crate::simd::{LANES, Simd, store_part};
use crate::tile::{Dense, Gathered, Sink, Work, panels_per_task, rows_per_task};

/// The weights of one gated MLP.
#[derive(Debug)]
pub struct Expert {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

impl Expert {
    /// `gate` and `up` are `[intermediate, hidden]`, `down` is `[hidden, intermediate]`.
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
            (Elements::Bf16(_), Elements::Bf16(_), Elements::Bf16(_) | Elements::F32(_))
            | (Elements::F32(_), Elements::F32(_), Elements::Bf16(_) | Elements::F32(_)) => {}
            (Elements::Quantised(gate), Elements::Quantised(up), Elements::Quantised(down))
                if gate.kind() == up.kind() && gate.kind() == down.kind() => {}
            _ => return Err(KernelError::ExpertTypes),
        }
        Ok(Self { gate, up, down })
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

    /// Whether the matrices are quantised.
    fn is_quantised(&self) -> bool {
        matches!(self.gate.elements, Elements::Quantised(_))
    }

    /// Bytes that the packed weights keep in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
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
    /// Intermediate elements of the groups before.
    activated_before: usize,
    row: usize,
    rows: usize,
    panel: usize,
    panels: usize,
}

/// Applies each group's expert to its rows of `x` (`[m, hidden]`); `out` takes the groups' rows one group after the
/// other, `[sum of rows, hidden]`, and is overwritten.
///
/// `x` is given as the linears shall read it, that is already rounded under [`Precision::Bf16`]; `precision` says
/// whether the input of `down` is rounded. Quantised experts read `x` and the input of `down` as 32-wide groups of bytes
/// instead, quantised here from what they are in f32. Once `scratch` is warm the only allocations are the thread pool's own, one
/// small one per helping thread and stage.
///
/// # Panics
/// If the experts' hidden sizes differ, some but not all are quantised, `x` or `out` does not fit, or a row number is outside `x`.
pub fn grouped_ffn(
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
    let (activated, work) = scratch.plan(cpu, groups);
    if scratch.activated.len() < activated {
        scratch.activated.resize(activated, 0.0);
    }
    if first.expert.is_quantised() {
        let FfnScratch { activated, first, second, quantised } = scratch;
        let stages = quant::Stages { cpu, groups, hidden };
        stages.gate_up(first, work * 2, x, quantised, activated);
        stages.down(second, work, activated, quantised, out);
        return;
    }
    let between = Disjoint::new(&mut scratch.activated);
    cpu.run(scratch.first.len(), work * 2, &|index| {
        let task = scratch.first[index];
        let ExpertRows { expert, rows } = groups[task.group];
        let step =
            GateUp { task, x: Gathered { from: Dense { x, k: hidden }, rows }, out: &between, precision };
        step.run(cpu, expert);
    });
    let out = Disjoint::new(out);
    cpu.run(scratch.second.len(), work, &|index| {
        let task = scratch.second[index];
        down(cpu, task, groups[task.group].expert, &scratch.activated[task.activated_before..], &out);
    });
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
    /// Lists the tasks of both stages. Returns the intermediate elements of all groups, and the multiply-adds of the
    /// second stage (the first has twice as many).
    fn plan(&mut self, cpu: &Cpu, groups: &[ExpertRows<'_>]) -> (usize, usize) {
        let (mut activated, mut work, mut panels) = (0, 0, [0, 0]);
        for ExpertRows { expert, rows } in groups {
            activated += rows.len() * expert.intermediate();
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
        let (mut rows_before, mut activated_before) = (0, 0);
        for (group, ExpertRows { expert, rows }) in groups.iter().enumerate() {
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
            activated_before += rows.len() * expert.intermediate();
        }
        (activated, work)
    }
}

/// The first stage of one task: `round(silu(gate(x)) * up(x))`.
struct GateUp<'a> {
    task: Task,
    x: Gathered<'a>,
    out: &'a Disjoint<'a, f32>,
    precision: Precision,
}

impl GateUp<'_> {
    fn run(&self, cpu: &Cpu, expert: &Expert) {
        match (&expert.gate.elements, &expert.up.elements) {
            (Elements::Bf16(gate), Elements::Bf16(up)) => self.run_on(cpu, expert, [gate, up]),
            (Elements::F32(gate), Elements::F32(up)) => self.run_on(cpu, expert, [gate, up]),
            _ => unreachable!("an expert's gate and up have one element type"),
        }
    }

    fn run_on<B: Block>(&self, cpu: &Cpu, expert: &Expert, weights: [&Panels<B>; 2]) {
        let sink = Gated::new(self.out, self.task, expert, self.precision);
        dispatch(cpu.isa(), GateUpTask(self.task.work(weights, self.x, sink)));
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
}

/// The second stage of one task; `activated` starts with the group's first row.
fn down(cpu: &Cpu, task: Task, expert: &Expert, activated: &[f32], out: &Disjoint<'_, f32>) {
    let x = Dense { x: activated, k: expert.intermediate() };
    let sink = Output { out, first_row: task.rows_before, n: expert.hidden() };
    match &expert.down.elements {
        Elements::Bf16(w) => dispatch(cpu.isa(), LinearTask(task.work([w], x, sink))),
        Elements::F32(w) => dispatch(cpu.isa(), LinearTask(task.work([w], x, sink))),
        Elements::Quantised(_) => unreachable!("an expert is quantised whole or not at all"),
    }
}

struct GateUpTask<'a, B>(Work<'a, B, Gathered<'a>, Gated<'a>, 2>);

impl<B: Block> Kernel for GateUpTask<'_, B> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(s);
    }
}

/// Activates what gate and up gave and keeps it for the second stage.
pub(crate) struct Gated<'a> {
    out: &'a Disjoint<'a, f32>,
    before: usize,
    intermediate: usize,
    precision: Precision,
}

impl<'a> Gated<'a> {
    pub(crate) fn new(out: &'a Disjoint<'a, f32>, task: Task, expert: &Expert, precision: Precision) -> Self {
        Self { out, before: task.activated_before, intermediate: expert.intermediate(), precision }
    }
}

impl Sink<2> for Gated<'_> {
    #[inline(always)]
    fn put<S: Simd>(&self, s: S, row: usize, panel: usize, [gate, up]: [S::V; 2]) {
        let mut value = s.mul(silu_lanes(s, gate), up);
        if self.precision == Precision::Bf16 {
            value = s.round_bf16(value);
        }
        let column = panel * LANES;
        let len = LANES.min(self.intermediate - column);
        // SAFETY: tasks share no (group, row, panel), and the piece is dropped before the next.
        let piece = unsafe { self.out.piece(self.before + row * self.intermediate + column, len) };
        store_part(s, value, piece);
    }
}
