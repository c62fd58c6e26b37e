//! The two stages of quantised experts, and what their inputs are quantised into.

use super::Quantised;
use super::bytes::{Body, dispatch};
use super::dot::{Picked, Work};
use super::rows::{QRows, RowBlock, blocks_of, quantise, room};
use crate::convert::Precision;
use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::ffn::{Expert, ExpertRows, Gated, Task};
use crate::gating::{Activate, Plain};
use crate::linear::Output;
use crate::matrix::{Elements, Panels};

/// Quantised rows of a call, kept for the next.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    inputs: Vec<RowBlock>,
    between: Vec<RowBlock>,
    /// Where each group's rows start in `between`.
    starts: Vec<usize>,
}

/// The stages of one call over quantised experts.
pub(crate) struct Stages<'a, 'c> {
    pub(crate) cpu: &'a Cpu,
    pub(crate) groups: &'a [ExpertRows<'c>],
    pub(crate) hidden: usize,
}

impl Stages<'_, '_> {
    /// The activated gate and up of every task into `activated`. Each row of `x` is quantised once, however many experts
    /// read it.
    pub(crate) fn gate_up(
        &self,
        tasks: &[Task],
        work: usize,
        x: &[f32],
        buffers: &mut Buffers,
        activated: &mut [f32],
    ) {
        let inputs = room(&mut buffers.inputs, x.len() / self.hidden * blocks_of(self.hidden));
        quantise(self.cpu, x, self.hidden, inputs);
        let inputs = QRows::new(inputs, self.hidden);
        let activated = Disjoint::new(activated);
        let body = Body::of(self.cpu.isa());
        self.cpu.run(tasks.len(), work, &|index| {
            let task = tasks[index];
            let ExpertRows { expert, rows } = self.groups[task.group];
            let x = Picked { from: inputs, rows };
            // It is quantised next, from what it is in f32.
            let precision = Precision::F32;
            match expert.general() {
                None => {
                    let sink = Gated::new(&activated, task, expert, precision, Plain);
                    gate_up(body, task, expert, x, sink);
                }
                Some(activation) => {
                    let sink = Gated::new(&activated, task, expert, precision, activation);
                    gate_up(body, task, expert, x, sink);
                }
            }
        });
    }

    /// `down` of every task, from `activated` to `out`.
    pub(crate) fn down(
        &self,
        tasks: &[Task],
        work: usize,
        activated: &[f32],
        buffers: &mut Buffers,
        out: &mut [f32],
    ) {
        buffers.quantise_groups(self, activated);
        let Buffers { between, starts, .. } = buffers;
        let out = Disjoint::new(out);
        let body = Body::of(self.cpu.isa());
        self.cpu.run(tasks.len(), work, &|index| {
            let task = tasks[index];
            let expert = self.groups[task.group].expert;
            let x = QRows::new(&between[starts[task.group]..], expert.intermediate());
            let sink = Output::of(task, expert, &out);
            match &expert.down.elements {
                Elements::Quantised(Quantised::Q8(down)) => dispatch(body, task.quantised([down], x, sink)),
                Elements::Quantised(Quantised::Q4(down)) => dispatch(body, task.quantised([down], x, sink)),
                _ => unreachable!("a quantised expert has quantised matrices of one kind"),
            }
        });
    }
}

impl Buffers {
    /// Quantises each group's rows, which lie one group after the other; neighbours of one width are done together.
    fn quantise_groups(&mut self, stages: &Stages<'_, '_>, activated: &[f32]) {
        self.starts.clear();
        let mut blocks = 0;
        for ExpertRows { expert, rows } in stages.groups {
            self.starts.push(blocks);
            blocks += rows.len() * blocks_of(expert.intermediate());
        }
        let mut between = room(&mut self.between, blocks);
        let mut rest = activated;
        for alike in stages.groups.chunk_by(|a, b| a.expert.intermediate() == b.expert.intermediate()) {
            let width = alike[0].expert.intermediate();
            let rows: usize = alike.iter().map(|group| group.rows.len()).sum();
            let (x, others) = rest.split_at(rows * width);
            let (out, left) = between.split_at_mut(rows * blocks_of(width));
            quantise(stages.cpu, x, width, out);
            (rest, between) = (others, left);
        }
    }
}

/// The first stage of one task.
fn gate_up<A: Activate>(body: Body, task: Task, expert: &Expert, x: Picked<'_>, sink: Gated<'_, A>) {
    match (&expert.gate.elements, &expert.up.elements) {
        (Elements::Quantised(Quantised::Q8(gate)), Elements::Quantised(Quantised::Q8(up))) => {
            dispatch(body, task.quantised([gate, up], x, sink));
        }
        (Elements::Quantised(Quantised::Q4(gate)), Elements::Quantised(Quantised::Q4(up))) => {
            dispatch(body, task.quantised([gate, up], x, sink));
        }
        _ => unreachable!("a quantised expert has quantised matrices of one kind"),
    }
}

impl Task {
    fn quantised<'a, W, R, K, const M: usize>(
        self,
        weights: [&'a Panels<W>; M],
        x: R,
        sink: K,
    ) -> Work<'a, W, R, K, M> {
        Work { weights, x, sink, rows: self.row_range(), panels: self.panel_range() }
    }
}
