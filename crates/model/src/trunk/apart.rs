//! A test device as unlike the host as possible: buffers are handles, and operations run as late as possible. The trunk
//! gives the same bits on it as on the CPU, which shows that it relies on nothing beyond [`Device`].

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_checkpoint::spec::AttentionSpec;
use muster_checkpoint::{Checkpoint, Source};
use muster_engine::dispatch::{At, AtMut, DeviceSlice, RowsMut, UnevenRows};
use muster_kernels::{Angles, Cpu, Expert, KvCache, KvSlot, Matrix};
use muster_types::{DType, TokenId};

use super::cpu::{CpuScratch, choose_rows};
use super::device::{Gate, HeadColumns, Norm, Projection};
use super::*;
use crate::experts::ExpertSet;
use crate::local::{Local, local};
use crate::step::WantLogits;

/// A device that owns its buffers and defers its operations.
struct Apart {
    cpu: Arc<CpuDevice>,
    memory: Mutex<Memory>,
    /// Set when the device is lost.
    lost: Mutex<bool>,
}

#[derive(Default)]
struct Memory {
    buffers: BTreeMap<u64, Vec<f32>>,
    wires: BTreeMap<u64, Vec<u16>>,
    scratch: CpuScratch,
    last: u64,
    /// Deferred operations.
    late: Vec<Job>,
    /// Number of flushes, and of operations run.
    flushes: usize,
    ran: usize,
    heads: usize,
}

type Job = Box<dyn FnOnce(&CpuDevice, &mut Memory) + Send>;

/// A buffer's number; it has none before it is first written.
#[derive(Default, Clone, Copy)]
struct Handle(Option<u64>);

/// Data that only the device can read.
struct Opaque<T>(Arc<T>);

impl<T> Opaque<T> {
    fn new(inner: T) -> Self {
        Self(Arc::new(inner))
    }

    fn get(&self) -> Arc<T> {
        Arc::clone(&self.0)
    }
}

impl Memory {
    fn named(&mut self, handle: &mut Handle) -> u64 {
        *handle.0.get_or_insert_with(|| {
            self.last += 1;
            self.last
        })
    }

    /// Takes a buffer out for writing; the caller puts it back.
    fn take(&mut self, id: u64) -> Vec<f32> {
        self.buffers.remove(&id).unwrap_or_default()
    }

    fn read(&self, handle: Handle) -> &Vec<f32> {
        static EMPTY: Vec<f32> = Vec::new();
        handle.0.and_then(|id| self.buffers.get(&id)).unwrap_or(&EMPTY)
    }

    fn flush(&mut self, cpu: &CpuDevice) {
        self.flushes += usize::from(!self.late.is_empty());
        for job in std::mem::take(&mut self.late) {
            job(cpu, self);
            self.ran += 1;
        }
    }
}

impl Apart {
    fn new(compute: Compute) -> Arc<Self> {
        let cpu = CpuDevice::new(Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap()), compute);
        Arc::new(Self { cpu, memory: Mutex::default(), lost: Mutex::new(false) })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory after all deferred operations.
    fn up_to_date(&self) -> MutexGuard<'_, Memory> {
        let mut memory = self.memory();
        memory.flush(&self.cpu);
        memory
    }

    /// Defers writing `out` from `x`.
    fn later(
        &self,
        x: Handle,
        out: &mut Handle,
        job: impl FnOnce(&CpuDevice, &Vec<f32>, &mut Vec<f32>) + Send + 'static,
    ) {
        let mut memory = self.memory();
        let to = memory.named(out);
        memory.late.push(Box::new(move |cpu, memory| {
            let mut out = memory.take(to);
            job(cpu, memory.read(x), &mut out);
            memory.buffers.insert(to, out);
        }));
    }

    /// [`Self::later`] with scratch.
    fn later_with(
        &self,
        x: Handle,
        out: &mut Handle,
        job: impl FnOnce(&CpuDevice, &Vec<f32>, &mut CpuScratch, &mut Vec<f32>) + Send + 'static,
    ) {
        let mut memory = self.memory();
        let to = memory.named(out);
        memory.late.push(Box::new(move |cpu, memory| {
            let (mut out, mut scratch) = (memory.take(to), std::mem::take(&mut memory.scratch));
            job(cpu, memory.read(x), &mut scratch, &mut out);
            memory.scratch = scratch;
            memory.buffers.insert(to, out);
        }));
    }

    fn check(&self) -> Result<(), DeviceError> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if *lost { Err(DeviceError("the device fell off the bus".to_owned())) } else { Ok(()) }
    }

    fn slice<'b, T: ?Sized>(owner: &'b T, id: u64, bytes: usize) -> DeviceSlice<'b> {
        DeviceSlice::new(owner, 7, id, bytes, 0)
    }
}

fn projection(of: &Projection<Apart>) -> impl Fn(&CpuDevice, &Vec<f32>, &mut Vec<f32>) + use<> {
    let (weight, bias) = (of.weight.get(), of.bias.as_ref().map(Opaque::get));
    move |cpu, x, out| {
        out.resize(x.len() / weight.k() * weight.n(), 0.0);
        muster_kernels::linear(cpu.cpu(), &weight, x, cpu.compute(), out);
        for row in out.chunks_exact_mut(weight.n()) {
            row.iter_mut().zip(bias.iter().flat_map(|bias| bias.iter())).for_each(|(x, bias)| *x += bias);
        }
    }
}

/// Positions and block tables of rows, owned.
struct Places(Vec<(u32, Vec<u32>)>);

impl Places {
    fn of(slots: &[KvSlot<'_>]) -> Self {
        Self(slots.iter().map(|slot| (slot.position, slot.blocks.to_vec())).collect())
    }

    fn slots(&self) -> Vec<KvSlot<'_>> {
        self.0.iter().map(|&(position, ref blocks)| KvSlot { position, blocks }).collect()
    }
}

impl Device for Apart {
    type Matrix = Opaque<Matrix>;
    type Vector = Opaque<Vec<f32>>;
    type Mlp = Opaque<Expert>;
    type Kv = Opaque<Mutex<KvCache>>;
    type Buffer = Handle;
    type Wire = Handle;
    type Angles = Option<Arc<Angles>>;
    type Scratch = ();

    fn compute(&self) -> Compute {
        self.cpu.compute()
    }

    fn matrix(&self, packed: Matrix) -> Result<Self::Matrix, DeviceError> {
        Ok(Opaque::new(packed))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, DeviceError> {
        Ok(Opaque::new(values))
    }

    fn mlp(&self, packed: Expert) -> Result<Self::Mlp, DeviceError> {
        Ok(Opaque::new(packed))
    }

    fn kv(&self, shape: KvShape, blocks: usize) -> Result<Self::Kv, DeviceError> {
        Ok(Opaque::new(Mutex::new(self.cpu.kv(shape, blocks)?)))
    }

    fn embed(&self, table: &Self::Matrix, tokens: &[TokenId], multiplier: f32, out: &mut Handle) {
        let (table, tokens) = (table.get(), tokens.to_vec());
        self.later(Handle(None), out, move |cpu, _, out| cpu.embed(&table, &tokens, multiplier, out));
    }

    fn norm(&self, norm: &Norm<Self>, x: &Handle, out: &mut Handle) {
        let bias = norm.bias.as_ref().map(|bias| bias.get().to_vec());
        let norm = Norm { weight: norm.weight.get().to_vec(), bias, eps: norm.eps };
        self.later(*x, out, move |cpu, x, out| cpu.norm(&norm, x, out));
    }

    fn norm_heads(&self, weight: &Self::Vector, eps: f32, x: &mut Handle) {
        let weight = weight.get();
        self.later(Handle(None), x, move |cpu, _, x| cpu.norm_heads(&weight, eps, x));
    }

    fn round(&self, x: &mut Handle) {
        self.later(Handle(None), x, |cpu, _, x| cpu.round(x));
    }

    fn linear(&self, of: &Projection<Self>, x: &Handle, out: &mut Handle) {
        self.later(*x, out, projection(of));
    }

    fn linear_heads(
        &self,
        weights: &[Self::Matrix],
        (x, from): (&Handle, HeadColumns),
        (out, to): (&mut Handle, HeadColumns),
        (): &mut (),
    ) {
        // One head after the other: a matrix cannot be moved out of its `Arc`.
        let (heads, weights) = (weights.len(), weights.iter().map(Opaque::get).collect::<Vec<_>>());
        self.later(*x, out, move |cpu, x, out| {
            let rows = x.len() / (heads * from.width);
            out.resize(rows * heads * to.width, 0.0);
            for row in 0..rows {
                for (head, weight) in weights.iter().enumerate() {
                    let from = (row * heads + head) * from.width + from.first;
                    let mut input = x[from..from + weight.k()].to_vec();
                    cpu.round(&mut input);
                    let to = (row * heads + head) * to.width + to.first;
                    let out = &mut out[to..to + weight.n()];
                    muster_kernels::linear(cpu.cpu(), weight, &input, cpu.compute(), out);
                }
            }
        });
    }

    fn copy_columns(
        &self,
        (from, at): (&Handle, HeadColumns),
        len: usize,
        (to, into): (&mut Handle, HeadColumns),
    ) {
        self.later(*from, to, move |cpu, from, to| cpu.copy_columns((from, at), len, (to, into)));
    }

    fn clamp(&self, limit: f32, x: &mut Handle) {
        self.later(Handle(None), x, move |cpu, _, x| cpu.clamp(limit, x));
    }

    fn scale_rows(&self, factors: &[f32], x: &mut Handle) {
        let factors = factors.to_vec();
        self.later(Handle(None), x, move |cpu, _, x| cpu.scale_rows(&factors, x));
    }

    fn angles(&self, rope: &Rope, positions: &[u32], out: &mut Self::Angles) {
        let mut angles = Angles::default();
        rope.angles(positions, &mut angles);
        *out = Some(Arc::new(angles));
    }

    fn rotate(&self, angles: &Self::Angles, head_dim: usize, x: &mut Handle) {
        let angles = angles.clone().unwrap();
        self.later(Handle(None), x, move |cpu, _, x| cpu.rotate(&angles, head_dim, x));
    }

    fn append(&self, kv: &mut Self::Kv, layer: usize, slots: &[KvSlot<'_>], k: &Handle, v: &Handle) {
        let (kv, places, k, v) = (kv.get(), Places::of(slots), *k, *v);
        self.memory().late.push(Box::new(move |cpu, memory| {
            let mut kv = kv.lock().unwrap_or_else(PoisonError::into_inner);
            cpu.append(&mut kv, layer, &places.slots(), memory.read(k), memory.read(v));
        }));
    }

    fn attend(
        &self,
        (spec, sinks): (&AttentionSpec, Option<&Self::Vector>),
        kv: &Self::Kv,
        layer: usize,
        q: &Handle,
        slots: &[KvSlot<'_>],
        out: &mut Handle,
    ) {
        let (spec, sinks) = (spec.clone(), sinks.map(Opaque::get));
        let (kv, places) = (kv.get(), Places::of(slots));
        self.later(*q, out, move |cpu, q, out| {
            let kv = kv.lock().unwrap_or_else(PoisonError::into_inner);
            cpu.attend((&spec, sinks.as_deref()), &kv, layer, q, &places.slots(), out);
        });
    }

    fn choose(
        &self,
        gate: &Gate<Self>,
        x: &Handle,
        (): &mut (),
        choice: &mut Choice,
    ) -> Result<(), DeviceError> {
        self.check()?;
        let memory = self.up_to_date();
        let x = memory.read(*x);
        let mut logits = Vec::new();
        projection(&gate.projection)(&self.cpu, x, &mut logits);
        choose_rows(gate, &logits, x, &mut crate::gate::GateScratch::default(), choice);
        Ok(())
    }

    fn gated_mlp(&self, mlp: &Self::Mlp, x: &Handle, (): &mut (), out: &mut Handle) {
        let mlp = mlp.get();
        self.later_with(*x, out, move |cpu, x, scratch, out| cpu.gated_mlp(&mlp, x, scratch, out));
    }

    fn sigmoid_gate(&self, weight: &Self::Matrix, x: &Handle, (): &mut (), out: &mut Handle) {
        let weight = weight.get();
        self.later_with(*x, out, move |cpu, x, scratch, out| cpu.sigmoid_gate(&weight, x, scratch, out));
    }

    fn add_scaled(&self, from: &Handle, factor: f32, to: &mut Handle) {
        self.later(*from, to, move |cpu, from, to| cpu.add_scaled(from, factor, to));
    }

    fn weigh(&self, x: &Handle, weights: &[f32], k: usize, out: &mut Handle) {
        let weights = weights.to_vec();
        self.later(*x, out, move |cpu, x, out| cpu.weigh(x, &weights, k, out));
    }

    fn sum_copies(&self, copies: usize, hidden: usize, x: &mut Handle) {
        self.later(Handle(None), x, move |cpu, _, x| cpu.sum_copies(copies, hidden, x));
    }

    fn to_wire(&self, x: &Handle, wire: &mut Handle) {
        let mut memory = self.memory();
        let (x, wire) = (*x, memory.named(wire));
        memory.late.push(Box::new(move |cpu, memory| {
            let mut bits = Vec::new();
            cpu.to_wire(memory.read(x), &mut bits);
            memory.wires.insert(wire, bits);
        }));
    }

    fn rows<'b>(&self, x: &'b Handle, wire: &'b Handle, hidden: usize) -> Result<Rows<'b>, UnevenRows> {
        let memory = self.up_to_date();
        let (dtype, id) = match self.compute().wire_dtype() {
            DType::F32 => (DType::F32, x.0.unwrap()),
            DType::Bf16 => (DType::Bf16, wire.0.unwrap()),
        };
        let len = match dtype {
            DType::F32 => memory.buffers[&id].len(),
            DType::Bf16 => memory.wires[&id].len(),
        };
        Rows::of_device(Self::slice(x, id, len * dtype.size()), dtype, hidden)
    }

    fn rows_mut<'b>(&self, len: usize, out: &'b mut Handle) -> RowsMut<'b> {
        let mut memory = self.up_to_date();
        let id = memory.named(out);
        memory.buffers.entry(id).or_default().resize(len, 0.0);
        RowsMut::of_device(Self::slice(out, id, len * size_of::<f32>()))
    }

    fn keep(&self, kept: &[Range<usize>], width: usize, x: &mut Handle) {
        let kept = kept.to_vec();
        self.later(Handle(None), x, move |cpu, _, x| cpu.keep(&kept, width, x));
    }

    fn gather(&self, from: &Handle, ranges: &[Range<usize>], width: usize, out: &mut Handle) {
        let ranges = ranges.to_vec();
        self.later(*from, out, move |cpu, from, out| cpu.gather(from, &ranges, width, out));
    }

    fn head(
        &self,
        head: Head<'_, Self>,
        x: &Handle,
        (): &mut (),
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        self.check()?;
        let mut memory = self.up_to_date();
        let (weight, bias) = (head.weight.get(), head.bias.map(Opaque::get));
        let head = Head { weight: &*weight, bias: bias.as_deref(), divisor: head.divisor };
        memory.heads += 1;
        self.cpu.head(head, memory.read(*x), &mut CpuScratch::default(), logits)
    }

    fn read(&self, _: &Handle, _: &mut Vec<f32>) -> Result<(), DeviceError> {
        panic!("nobody observes: the host needs no rows")
    }
}

/// A dispatch to experts of this process for rows of a device: rows are copied.
struct Bridge {
    device: Arc<Apart>,
    local: Local,
    hidden: usize,
}

impl ExpertDispatch for Bridge {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        let At::Device(slice) = batch.rows.at() else { panic!("rows are on the device") };
        assert_eq!((slice.device(), batch.rows.hidden()), (7, self.hidden));
        let memory = self.device.up_to_date();
        let rows = match batch.rows.dtype() {
            DType::F32 => Rows::of_f32(&memory.buffers[&slice.pointer()], self.hidden),
            DType::Bf16 => Rows::of_bf16(&memory.wires[&slice.pointer()], self.hidden),
        };
        self.local.submit(&LayerBatch { rows: rows.unwrap(), ..*batch })
    }

    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        let AtMut::Device(slice) = out.into_memory() else { panic!("room is on the device") };
        let mut memory = self.device.up_to_date();
        let out = memory.buffers.get_mut(&slice.pointer()).unwrap();
        assert_eq!(size_of_val(&**out), slice.bytes());
        self.local.collect(ticket, deadline, RowsMut::of_f32(out))
    }

    fn cancel(&mut self, ticket: Ticket) {
        self.local.cancel(ticket);
    }

    fn close(&mut self) {
        self.local.close();
    }
}

/// Outcomes of some steps in two lanes: bits of the logits, or the error.
fn run<D: Device>(
    trunk: &Trunk<D>,
    dispatch: &mut dyn ExpertDispatch,
    before: &mut dyn FnMut(usize),
) -> Vec<Result<Vec<u32>, StepError>> {
    let vocab = trunk.spec().vocab;
    let tokens: Vec<TokenId> =
        (0..40).map(|at| TokenId::new((at * 37 + 5) % vocab, vocab).unwrap()).collect();
    let groups = trunk.kv_groups().reaches().len();
    let tables: Vec<Vec<u32>> =
        (0..3).map(|of| (of * 2 * groups as u32..).take(2 * groups).collect()).collect();
    let mut kv = trunk.new_kv(6 * groups).unwrap();
    let mut state = StepState::default();
    let mut outcomes = Vec::new();
    for (step, (start, count)) in [(0, 11), (11, 1), (12, 6)].into_iter().enumerate() {
        before(step);
        let input = |of: usize, logits| SeqInput {
            start: start as u32,
            tokens: &tokens[of * 7 + start..][..count],
            blocks: &tables[of],
            logits,
        };
        let (first, second) =
            ([input(0, WantLogits::Last), input(1, WantLogits::None)], [input(2, WantLogits::All)]);
        let timeout = Duration::from_secs(60);
        let mut ctx = StepContext { kv: &mut kv, dispatch: &mut *dispatch, timeout, observe: None };
        trunk.forward(&mut ctx, [&first, &second], &mut state);
        for (lane, sequence) in [(0, 0), (0, 1), (1, 0)] {
            let logits = state.logits(lane, sequence, vocab as usize);
            outcomes.push(logits.map(|logits| logits.iter().map(|x| x.to_bits()).collect()));
        }
    }
    outcomes
}

fn golden(family: &str) -> Checkpoint {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
    Checkpoint::open(&Source::Directory(goldens.join(family))).unwrap()
}

fn experts(checkpoint: &Checkpoint, cpu: &Arc<Cpu>, compute: Compute) -> Local {
    let keys = ExpertSet::all_keys(checkpoint);
    let dtype = WeightDType::Native;
    let experts = ExpertSet::load(checkpoint, &keys, compute, dtype, &mut |_| {}).unwrap();
    local(Arc::clone(cpu), &experts).unwrap()
}

#[test]
fn a_device_apart_gives_the_bits_of_the_host() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
    let families = std::fs::read_dir(goldens).unwrap().map(|entry| entry.unwrap().file_name());
    let mut checked = 0;
    for family in families {
        let family = family.to_str().unwrap();
        let checkpoint = golden(family);
        for compute in [Compute::F32, Compute::Bf16] {
            let cpu = Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap());
            let here = CpuDevice::new(Arc::clone(&cpu), compute);
            let trunk = Trunk::load(&here, &checkpoint, WeightDType::Native, &mut |_| {}).unwrap();
            let expected = run(&trunk, &mut experts(&checkpoint, &cpu, compute), &mut |_| {});
            assert!(expected.iter().all(Result::is_ok), "{family}");

            let device = Apart::new(compute);
            let trunk = Trunk::load(&device, &checkpoint, WeightDType::Native, &mut |_| {}).unwrap();
            let hidden = checkpoint.spec().hidden;
            let local = experts(&checkpoint, &cpu, compute);
            let mut bridge = Bridge { device: Arc::clone(&device), local, hidden };
            assert_eq!(run(&trunk, &mut bridge, &mut |_| {}), expected, "{family} {compute}");

            let memory = device.memory();
            assert_eq!(memory.heads, 2 * 3, "{family}: logits come to the host once a lane and step");
            assert!(memory.ran > 4 * memory.flushes, "{family}: operations run late");
            checked += 1;
        }
    }
    assert!(checked >= 30, "{checked}");
}

#[test]
fn a_lost_device_fails_the_step_and_says_so() {
    let (checkpoint, compute) = (golden("mixtral"), Compute::F32);
    let cpu = Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap());
    let device = Apart::new(compute);
    let trunk = Trunk::load(&device, &checkpoint, WeightDType::Native, &mut |_| {}).unwrap();
    let local = experts(&checkpoint, &cpu, compute);
    let mut bridge = Bridge { device: Arc::clone(&device), local, hidden: checkpoint.spec().hidden };
    let outcomes = run(&trunk, &mut bridge, &mut |step| {
        *device.lost.lock().unwrap_or_else(PoisonError::into_inner) = step == 1;
    });
    let lost = Err(StepError::Device(DeviceError("the device fell off the bus".to_owned())));
    assert!(outcomes[..3].iter().all(Result::is_ok));
    assert!(outcomes[3..6].iter().all(|outcome| *outcome == lost), "{:?}", &outcomes[3..6]);
}
