//! A trunk with a KV cache and buffers of its own, for an engine.

use std::sync::Arc;
use std::time::Duration;

use muster_engine::dispatch::ExpertDispatch;
use muster_kernels::Cpu;
use muster_types::TokenId;

use super::device::{Device, DeviceError};
use super::{CpuDevice, StepContext, StepState, Trunk};
use crate::sampler::{Pick, Sampler};
use crate::step::{Draw, SeqInput, StepError, StepModel};

/// A trunk that runs steps.
pub struct Stepper<D: Device = CpuDevice> {
    trunk: Arc<Trunk<D>>,
    kv: D::Kv,
    state: StepState<D>,
    sampler: Sampler,
    /// Threads that sample tokens.
    cpu: Arc<Cpu>,
}

impl<D: Device> Stepper<D> {
    /// A stepper with a KV cache of `blocks` blocks; tokens are sampled on `cpu`.
    ///
    /// # Errors
    /// When the cache does not fit the device.
    pub fn new(trunk: Arc<Trunk<D>>, blocks: usize, cpu: Arc<Cpu>) -> Result<Self, DeviceError> {
        let kv = trunk.new_kv(blocks)?;
        Ok(Self { trunk, kv, state: StepState::default(), sampler: Sampler::default(), cpu })
    }
}

impl<D: Device> StepModel for Stepper<D> {
    fn vocab(&self) -> usize {
        self.trunk.spec().vocab as usize
    }

    fn step(&mut self, lanes: [&[SeqInput<'_>]; 2], dispatch: &mut dyn ExpertDispatch, timeout: Duration) {
        let mut ctx = StepContext { kv: &mut self.kv, dispatch, timeout, observe: None };
        self.trunk.forward(&mut ctx, lanes, &mut self.state);
    }

    fn logits(&self, lane: usize, sequence: usize) -> Result<&[f32], StepError> {
        self.state.logits(lane, sequence, self.vocab())
    }

    fn sample(&self, draws: &[Draw<'_>]) -> Result<Vec<TokenId>, StepError> {
        let picks = draws.iter().map(|&Draw { lane, sequence, sampling, history, position }| {
            let logits = self.logits(lane, sequence)?;
            Ok(Pick { sampling, logits, history, position })
        });
        let picks: Vec<Pick<'_>> = picks.collect::<Result<_, StepError>>()?;
        Ok(self.sampler.sample(&self.cpu, &picks))
    }
}
