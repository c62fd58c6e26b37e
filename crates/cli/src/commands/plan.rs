//! `muster plan`: resources for serving a model, computed from its configuration alone.
//!
//! Combines sizes (`muster_model::footprint`) with counts of workers and rows (`muster_placement`). Reads no weights.

use std::num::NonZeroU32;
use std::path::Path;

use muster_checkpoint::{Outline, Preset, StoredAs, Survey};
use muster_model::footprint::Footprint;
use muster_placement::{Demand, workers_per_row};
use muster_router::start::EngineSettings;
use muster_types::{Combine, Compute, DType, WeightDType, nearest};
use muster_worker::PART_FOR_EXPERTS;

use super::plan_report::{Given, Report, Size, Wire};
use super::plan_text;
use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::numbers::{Machines, Unit};
use crate::{models, out, text};

/// Memory sizes of workers, GiB, used when none are given.
const USUAL_GIB: [u64; 6] = [16, 24, 48, 80, 192, 512];
const USUAL_CONTEXT: u64 = 4096;

/// Machines that may be workers, with or without a count.
#[derive(Clone, Copy)]
struct Offer {
    machines: Machines,
    gpu: bool,
}

/// The model to plan for.
struct Subject {
    name: String,
    loaded_from: String,
    family: String,
    preset: bool,
    outline: Outline,
    indexed_bytes: Option<u64>,
}

pub(crate) fn run(args: &PlanArgs) -> Result<(), Failure> {
    let report = report(args, subject(args)?)?;
    if args.json {
        out::line(&serde_json::to_string(&report).map_err(Failure::runtime)?)?;
    } else {
        out::write(&plan_text::for_people(&report))?;
    }
    let fits = report.given_missing == 0 || report.given.is_empty() || !report.sizes.is_empty();
    if fits { Ok(()) } else { Err(Failure::Quiet) }
}

fn subject(args: &PlanArgs) -> Result<Subject, Failure> {
    let model = args.model.as_str();
    if let Some(preset) = Preset::find(&model.to_ascii_lowercase()) {
        return Ok(Subject {
            name: preset.name.to_owned(),
            loaded_from: preset.repository.to_owned(),
            family: preset.family.to_owned(),
            preset: true,
            outline: preset.outline(),
            indexed_bytes: None,
        });
    }
    let source = models::source(model, args.links.links()).map_err(|error| match error {
        Failure::Input(_) if !model.contains('/') => Failure::Input(unknown(model)),
        other => other,
    })?;
    let survey = Survey::open(&source).map_err(|error| Failure::input(format!("model {model}: {error}")))?;
    Ok(Subject {
        name: survey.name,
        loaded_from: whole_path(model),
        family: survey.spec.family.to_owned(),
        preset: false,
        outline: Outline::of(&survey.spec),
        indexed_bytes: survey.indexed_bytes,
    })
}

/// Absolute path of a model directory, for use in suggested commands; any other name as it is.
fn whole_path(model: &str) -> String {
    let path = Path::new(model);
    let whole = if model != models::DEMO && path.is_dir() { std::path::absolute(path).ok() } else { None };
    whole.map_or_else(|| model.to_owned(), |path| path.display().to_string())
}

/// Error text for an unknown name, with a suggestion.
fn unknown(model: &str) -> String {
    let asked = model.to_ascii_lowercase();
    let names = || Preset::all().iter().map(|preset| preset.name);
    let begun = || names().find(|name| !asked.is_empty() && name.starts_with(&asked));
    let meant = nearest(&asked, names()).or_else(begun);
    let meant = meant.map_or_else(String::new, |name| format!("; did you mean {name}?"));
    format!(
        "{model:?} is neither a well-known model nor a directory nor a pulled one{meant}\nwell-known are {}, and demo",
        names().collect::<Vec<_>>().join(", ")
    )
}

fn report(args: &PlanArgs, subject: Subject) -> Result<Report, Failure> {
    let outline = &subject.outline;
    let compute = Compute::default_for(outline.stored.read_as());
    let footprint = |experts| Footprint::of(outline, compute, experts, args.trunk_dtype);
    let uncountable = || Failure::input(format!("model {}: its bytes cannot be counted", subject.name));
    let sizes = footprint(args.expert_dtype).ok_or_else(uncountable)?;
    let demand = demand(outline, &sizes, args.replicas.get()).ok_or_else(|| {
        Failure::input(format!("model {}: has no layer with experts to place", subject.name))
    })?;
    let context = context(args, outline)?;
    // The router's default.
    let chunk = EngineSettings::default().prefill_chunk;
    let kv_bytes = sizes.kv_sequence_bytes(context, chunk).saturating_mul(args.sequences.into());
    let (given, open) = asked(args);
    for offer in given.iter().chain(&open) {
        if demand.held_by(for_experts(offer.machines)) == 0 {
            let smaller = |dtype| footprint(dtype).map(|sizes| (dtype, largest(&sizes)));
            let smaller = [WeightDType::Q8, WeightDType::Q4].map(smaller);
            return Err(too_small(offer.machines, &demand, smaller.into_iter().flatten()));
        }
    }
    let given: Vec<Given> = given.into_iter().map(|offer| there(offer, &demand)).collect();
    let present = || given.iter().flat_map(|given| (0..given.workers).map(|_| given.expert_memory_bytes));
    let nothing_said = given.is_empty() && open.is_empty();
    let usual = USUAL_GIB.map(|gib| Offer {
        machines: Machines { memory: gib << 30, unit: Unit::Binary, count: None },
        gpu: false,
    });
    let open = if nothing_said { usual.to_vec() } else { open };
    let (is_met, beside) =
        (demand.missing(present()) == 0, u64::from(given.iter().map(|g| g.workers).sum::<u32>()));
    let size = |offer| size(offer, &demand, &present);
    let options: Vec<Size> = open.into_iter().filter_map(size).collect();
    let mut counts: Vec<u64> = options.iter().map(|size| size.workers + beside).collect();
    if beside > 0 && (is_met || options.is_empty()) {
        counts.insert(0, beside);
    }
    counts.dedup();
    let wire = |workers| wire(workers, outline, compute, args);
    let first = outline.moe_layers().next();
    Ok(Report {
        parameters: outline.parameters(),
        active_parameters: outline.active_parameters(),
        layers: outline.layers.len(),
        moe_layers: outline.moe_layers().count(),
        experts_per_layer: first.map_or(0, |moe| moe.count),
        experts_per_token: first.map_or(0, |moe| moe.top_k),
        hidden: outline.hidden,
        stored_bytes: outline.stored_bytes(),
        indexed_bytes: subject.indexed_bytes.filter(|bytes| *bytes != outline.stored_bytes()),
        experts_stored_as: in_words(outline.experts),
        expert_dtype: args.expert_dtype.to_string(),
        trunk_dtype: args.trunk_dtype.to_string(),
        trunk_bytes: sizes.trunk_bytes,
        expert_bytes: demand.bytes_each,
        experts: demand.experts,
        all_experts_bytes: all_experts(outline, &sizes),
        kv_token_bytes: sizes.kv_token_bytes,
        context,
        sequences: args.sequences,
        kv_bytes,
        router_bytes: sizes.trunk_bytes.saturating_add(kv_bytes),
        replicas: args.replicas.get(),
        memory_for_experts_percent: PART_FOR_EXPERTS,
        given_copies: demand.whole_copies(present()),
        given_missing: demand.missing(present()),
        given,
        sizes: options,
        combine: args.combine.to_string(),
        wire_dtype: compute.wire_dtype().to_string(),
        rate: args.rate,
        wire: counts.into_iter().map(wire).collect(),
        model: subject.name,
        loaded_from: subject.loaded_from,
        family: subject.family,
        preset: subject.preset,
    })
}

/// Machines with a count, and sizes of which any number may be added.
fn asked(args: &PlanArgs) -> (Vec<Offer>, Vec<Offer>) {
    let one = |machines: &Machines| Machines { count: machines.count.or(Some(NonZeroU32::MIN)), ..*machines };
    let workers = args.workers.iter().copied().chain(args.devices.iter().map(one));
    let workers = workers.map(|machines| Offer { machines, gpu: false });
    let gpus = args.gpus.iter().map(|machines| Offer { machines: *machines, gpu: true });
    workers.chain(gpus).partition(|offer| offer.machines.count.is_some())
}

/// A worker's memory for experts, rounded down to whole MiB or MB (if at least one), as commands take it.
const fn for_experts(Machines { memory, unit, .. }: Machines) -> u64 {
    let step = unit.step();
    let part = memory / 100 * PART_FOR_EXPERTS + memory % 100 * PART_FOR_EXPERTS / 100;
    if part < step { part } else { part / step * step }
}

fn largest(sizes: &Footprint) -> u64 {
    sizes.expert_bytes.iter().copied().max().unwrap_or(0)
}

fn demand(outline: &Outline, sizes: &Footprint, replicas: u32) -> Option<Demand> {
    let experts: u64 = outline.moe_layers().map(|moe| u64::from(moe.count)).sum();
    (experts > 0).then(|| Demand { experts, bytes_each: largest(sizes), replicas })
}

fn all_experts(outline: &Outline, sizes: &Footprint) -> u64 {
    let layers = outline.layers.iter().zip(&sizes.expert_bytes);
    layers.map(|(layer, bytes)| layer.experts.map_or(0, |moe| u64::from(moe.count)) * bytes).sum()
}

fn context(args: &PlanArgs, outline: &Outline) -> Result<u64, Failure> {
    let most = outline.context as u64;
    match args.context.map(u64::from) {
        None => Ok(USUAL_CONTEXT.min(most)),
        Some(context) if context > most => Err(Failure::input(format!(
            "--context: is {context}; the model was made for sequences of up to {most} tokens"
        ))),
        Some(context) => Ok(context),
    }
}

fn too_small(
    machines: Machines,
    demand: &Demand,
    smaller: impl Iterator<Item = (WeightDType, u64)>,
) -> Failure {
    let Machines { memory, unit, .. } = machines;
    let (has, needs, step) = (for_experts(machines), demand.bytes_each, unit.step());
    let least = (needs.div_ceil(step) * step).saturating_mul(100).div_ceil(PART_FOR_EXPERTS);
    let enough = least.div_ceil(step) * step;
    let shown = |bytes| text::memory(bytes, unit);
    let fewer: Vec<String> = smaller
        .filter(|(_, bytes)| *bytes < needs)
        .map(|(dtype, bytes)| format!("as {dtype} it takes {}", shown(bytes)))
        .collect();
    let fewer = if fewer.is_empty() { String::new() } else { format!("; {}", fewer.join(", ")) };
    Failure::input(format!(
        "a worker of {} has {} for experts, which is {} too little for one of {}; the least is a worker of {}{fewer}",
        shown(memory),
        shown(has),
        shown(needs - has),
        shown(needs),
        shown(enough),
    ))
}

fn there(Offer { machines, gpu }: Offer, demand: &Demand) -> Given {
    let expert_memory_bytes = for_experts(machines);
    Given {
        memory_bytes: machines.memory,
        expert_memory_bytes,
        workers: machines.count.map_or(1, NonZeroU32::get),
        experts_each: demand.held_by(expert_memory_bytes),
        gpu,
        unit: machines.unit,
    }
}

/// Workers of a size needed beside those present; `None` when one is too small for an expert.
fn size<I: Iterator<Item = u64>>(offer: Offer, demand: &Demand, present: &impl Fn() -> I) -> Option<Size> {
    let Offer { machines, gpu } = offer;
    let Machines { memory, unit, .. } = machines;
    let expert_memory_bytes = for_experts(machines);
    let needed = |replicas| Demand { replicas, ..*demand }.workers_of(expert_memory_bytes, present());
    let mut copies = vec![1, 2, demand.replicas];
    copies.dedup();
    copies.truncate(if demand.replicas > 2 { 3 } else { 2 });
    Some(Size {
        memory_bytes: memory,
        expert_memory_bytes,
        experts_each: demand.held_by(expert_memory_bytes),
        workers_by_copies: copies.into_iter().map(|r| Some((r, needed(r)?))).collect::<Option<_>>()?,
        workers: needed(demand.replicas)? + u64::from(demand.replicas > 1),
        gpu,
        unit,
    })
}

fn wire(workers: u64, outline: &Outline, compute: Compute, args: &PlanArgs) -> Wire {
    let row = (outline.hidden * compute.wire_dtype().size()) as f64;
    let count = u32::try_from(workers).unwrap_or(u32::MAX);
    let mut total = [0.0; 4];
    for moe in outline.moe_layers() {
        let reached = workers_per_row(moe.count, moe.top_k, count);
        let each = [reached, reached * row, f64::from(moe.top_k) * row, reached * row];
        total.iter_mut().zip(each).for_each(|(sum, more)| *sum += more);
    }
    let layers = outline.moe_layers().count().max(1) as f64;
    let [reached, sent, exact, partial] = total;
    let returned = match args.combine {
        Combine::Exact => exact,
        Combine::Partial => partial,
    };
    let rate = f64::from(args.rate);
    Wire {
        workers,
        workers_per_row: reached / layers,
        sent_per_layer: sent / layers,
        returned_per_layer: returned / layers,
        returned_per_layer_partial: partial / layers,
        sent_per_token: sent,
        returned_per_token: returned,
        sent_per_second: sent * rate,
        returned_per_second: returned * rate,
    }
}

const fn in_words(stored: StoredAs) -> &'static str {
    match stored {
        StoredAs::Plain(DType::F32) => "f32",
        StoredAs::Plain(DType::Bf16) => "bf16",
        StoredAs::F16 => "f32 (published in f16)",
        StoredAs::Fp8 => "bf16 (published in FP8)",
        StoredAs::Mxfp4 => "MXFP4, as published",
    }
}
