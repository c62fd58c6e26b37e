//! Rows of a call quantised to bytes: inputs of quantised linears, and activated rows of quantised experts.

use super::dot::Picked;
use super::rows::{QRows, RowBlock, blocks_of, quantise, room};
use crate::cpu::Cpu;
use crate::expert::ExpertRows;

/// Buffers of quantised rows, reused between calls.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    inputs: Vec<RowBlock>,
    between: Vec<RowBlock>,
    /// Start of each group's rows in `between`.
    starts: Vec<usize>,
}

/// Quantised inputs of a call.
#[derive(Clone, Copy)]
pub(crate) struct Quantised<'a>(QRows<'a>);

impl<'a> Quantised<'a> {
    /// All rows.
    pub(crate) const fn rows(self) -> QRows<'a> {
        self.0
    }

    /// The rows with these numbers.
    pub(crate) const fn picked(self, rows: &'a [u32]) -> Picked<'a> {
        Picked { from: self.0, rows }
    }
}

impl Buffers {
    /// Quantises rows of `k` elements, each once, however many experts read it.
    pub(crate) fn inputs(&mut self, cpu: &Cpu, x: &[f32], k: usize) -> Quantised<'_> {
        let inputs = room(&mut self.inputs, x.len() / k * blocks_of(k));
        quantise(cpu, x, k, inputs);
        Quantised(QRows::new(inputs, k))
    }

    /// Quantises the activated rows of quantised experts. `activated` holds the rows of all `counted` groups, one group
    /// after the other. Neighbouring groups of one width are quantised together.
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

    /// The quantised activated rows of a group.
    pub(crate) fn group(&self, group: usize, intermediate: usize) -> QRows<'_> {
        QRows::new(&self.between[self.starts[group]..], intermediate)
    }
}
