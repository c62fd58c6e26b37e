//! Experts' outputs off the wire: checked against their shard, and combined on the CPU.

use std::sync::Arc;

use muster_engine::delivery::{Outputs, Sums, Unsound};
use muster_engine::dispatch::{Place, RowsMut};
use muster_kernels::{Cpu, NotFinite, combine};
use muster_proto::frame;
use muster_proto::reply::OutputRows;
use muster_types::{DType, Term};

/// Output rows off the wire, not yet checked against their shard.
#[derive(Debug)]
pub struct WireRows {
    rows: OutputRows,
    hidden: usize,
    wire: DType,
}

impl WireRows {
    pub(super) const fn new(rows: OutputRows, hidden: usize, wire: DType) -> Self {
        Self { rows, hidden, wire }
    }

    fn outputs(&self) -> muster_kernels::Outputs<'_> {
        match self.wire {
            DType::F32 => muster_kernels::Outputs::WireF32(self.rows.data.as_chunks().0),
            DType::Bf16 => muster_kernels::Outputs::WireBf16(self.rows.data.as_chunks().0),
        }
    }
}

impl Outputs for WireRows {
    fn check(&self, rows: usize) -> Result<(), String> {
        if self.rows.rows as usize != rows {
            return Err(format!("{} rows instead of {rows}", self.rows.rows));
        }
        frame::check_len(&self.rows.data, rows, self.hidden, self.wire).map_err(|error| error.to_string())
    }

    fn marks(&self) -> &[u32] {
        &self.rows.not_finite
    }
}

/// Combines outputs off the wire, on the CPU.
pub struct WireSums {
    pub(super) cpu: Arc<Cpu>,
    pub(super) hidden: usize,
}

impl Sums<WireRows> for WireSums {
    fn place(&self) -> Place {
        Place::Host
    }

    fn sum(
        &mut self,
        sources: &[&WireRows],
        starts: &[u32],
        terms: &[Term],
        out: &mut RowsMut<'_>,
    ) -> Result<(), Unsound> {
        // As `place` says.
        let Some(out) = out.f32_mut() else { return Ok(()) };
        let sources: Vec<_> = sources.iter().map(|source| source.outputs()).collect();
        combine(&self.cpu, self.hidden, &sources, starts, terms, out).map_err(|error| match error {
            NotFinite::Output { source, row } => Unsound::Source { source, row },
            NotFinite::Sums(rows) => Unsound::Sums(rows),
        })
    }
}
