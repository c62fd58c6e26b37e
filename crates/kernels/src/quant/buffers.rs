//! Rows of a call in bytes: the inputs of quantised linears, and what lies between those of an expert.

use super::dot::Picked;
use super::rows::{QRows, RowBlock, blocks_of, quantise, room};
use crate::cpu::Cpu;
use crate::expert::ExpertRows;

/// Quantised rows of a call, kept for the next.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    inputs: Vec<RowBlock>,
    between: Vec<RowBlock>,
    /// Where each group's rows start in `between`.
    starts: Vec<usize>,
}

/// The inputs of a call.
#[derive(Clone, Copy)]
pub(crate) struct Quantised<'a>(QRows<'a>);

impl<'a> Quantised<'a> {
    /// All of them.
    pub(crate) const fn rows(self) -> QRows<'a> {
        self.0
    }

    /// Some of them, by number.
    pub(crate) const fn picked(self, rows: &'a [u32]) -> Picked<'a> {
        Picked { from: self.0, rows }
    }
}

impl Buffers {
    /// Rows of `k` elements: each once, however many experts read it.
    pub(crate) fn inputs(&mut self, cpu: &Cpu, x: &[f32], k: usize) -> Quantised<'_> {
        let inputs = room(&mut self.inputs, x.len() / k * blocks_of(k));
        quantise(cpu, x, k, inputs);
        Quantised(QRows::new(inputs, k))
    }

    /// The activated rows of quantised experts, which lie in `activated` one group after the other with those of the other
    /// groups that are `counted`. Neighbours of one width are done together.
    pub(crate) fn between(
        &mut self,
        cpu: &Cpu,
        groups: &[ExpertRows<'_>],
        counted: impl Fn(&ExpertRows<'_>) -> bool,
        activated: &[f32],
    ) {
        self.starts.clear();
        let mut blocks = 0;
        for ExpertRows { expert, rows } in groups {
            self.starts.push(blocks);
            blocks += if expert.is_quantised() { rows.len() * blocks_of(expert.intermediate()) } else { 0 };
        }
        let (mut between, mut rest) = (room(&mut self.between, blocks), activated);
        let alike = |a: &ExpertRows<'_>, b: &ExpertRows<'_>| {
            let kind = |group: &ExpertRows<'_>| {
                (group.expert.is_quantised(), counted(group), group.expert.intermediate())
            };
            kind(a) == kind(b)
        };
        for groups in groups.chunk_by(alike).filter(|groups| counted(&groups[0])) {
            let (expert, rows) =
                (groups[0].expert, groups.iter().map(|group| group.rows.len()).sum::<usize>());
            let width = expert.intermediate();
            let (x, others) = rest.split_at(rows * width);
            if expert.is_quantised() {
                let (out, left) = between.split_at_mut(rows * blocks_of(width));
                quantise(cpu, x, width, out);
                between = left;
            }
            rest = others;
        }
    }

    /// The rows between the linears of a group's expert.
    pub(crate) fn group(&self, group: usize, intermediate: usize) -> QRows<'_> {
        QRows::new(&self.between[self.starts[group]..], intermediate)
    }
}
