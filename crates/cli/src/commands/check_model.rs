//! `muster check-model`: facts about a model, the sizes of its parts, and a check that it loads.

use std::ops::RangeInclusive;

use muster_checkpoint::spec::{MlpSpec, ModelSpec};
use muster_checkpoint::{Checkpoint, Inventory, LayerInventory, Unused};
use muster_model::LoadProgress;
use muster_model::defaults::{SamplingDefaults, Wanted};
use muster_router::tokenizer;
use muster_text::Tokenizer;
use serde::Serialize;

use super::check_tokenizer::TokenizerReport;
use super::digests::{self, Digested};
use super::in_words;
use super::quality::{self, Quality};
use crate::args::CheckModelArgs;
use crate::failure::Failure;
use crate::progress::Bar;
use crate::{models, out, text};

/// JSON of `--json`. Sizes are in bytes as stored.
#[derive(Serialize)]
struct Report {
    model: String,
    family: &'static str,
    fingerprint: String,
    parameters: u64,
    active_parameters: u64,
    weights: Weights,
    hidden: usize,
    vocabulary: u32,
    context: usize,
    end_of_text: Vec<u32>,
    /// Sampling defaults of `generation_config.json`.
    sampling: SamplingReport,
    tokenizer: Option<TokenizerReport>,
    /// Remedy for a missing tokenizer.
    tokenizer_remedy: Option<String>,
    layers: Vec<LayerReport>,
    /// Tensors of the checkpoint that serving does not need.
    left_alone: Vec<LeftAlone>,
    quality: Option<Quality>,
    /// Digest files of the experts' weights, compared or written.
    digests: Vec<Digested>,
}

#[derive(Serialize)]
struct SamplingReport {
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_tokens: Option<u32>,
    /// Settings that are not supported.
    not_followed: Vec<String>,
    #[serde(skip)]
    in_words: String,
}

impl From<Wanted> for SamplingReport {
    fn from(wanted: Wanted) -> Self {
        let Wanted { defaults, not_followed } = wanted;
        let in_words = defaults.to_string();
        let SamplingDefaults { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens } = defaults;
        Self { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, not_followed, in_words }
    }
}

#[derive(Serialize)]
struct LeftAlone {
    begins_with: String,
    tensors: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct Weights {
    dtype: String,
    /// Stored forms of the weights, in words.
    stored: String,
    bytes: u64,
    trunk_bytes: u64,
    /// Whether every weight was read and found finite; false when only headers were checked.
    read: bool,
}

#[derive(Serialize)]
struct LayerReport {
    trunk_bytes: u64,
    experts: u32,
    experts_per_token: u32,
    expert_bytes: u64,
    gate: Option<String>,
    expert: Option<String>,
    shared_expert: Option<String>,
    attention: String,
}

pub(crate) fn run(args: &CheckModelArgs) -> Result<(), Failure> {
    let checkpoint = models::open(&args.model, args.links.links())?;
    let tokenizer = tokenizer::read(&checkpoint).map_err(Failure::input)?;
    let sampling = Wanted::of(&checkpoint).map_err(Failure::input)?;
    if !args.headers_only {
        read_everything(&checkpoint)?;
    }
    let digests = match digests::make(args, &checkpoint)? {
        Some(made) => vec![made],
        None if args.headers_only => Vec::new(),
        None => digests::compare(args, &checkpoint)?,
    };
    let mut report = report(&checkpoint, tokenizer.as_ref(), sampling, !args.headers_only);
    report.digests = digests;
    if args.quality {
        report.quality = Some(quality::measure(args, checkpoint)?);
    }
    if args.json {
        return out::line(&serde_json::to_string(&report).map_err(Failure::runtime)?);
    }
    out::write(&for_people(&report))
}

/// Reads every weight once, which finds damage beyond the headers.
fn read_everything(checkpoint: &Checkpoint) -> Result<(), Failure> {
    let bar = Bar::single("weights");
    let total_bytes = checkpoint.inventory().total_bytes;
    let mut done_bytes = 0;
    for role in checkpoint.roles() {
        checkpoint.read(role).map_err(Failure::input)?;
        done_bytes += checkpoint.stored(role).map_or(0, |stored| stored.bytes);
        bar.update(LoadProgress { done_bytes, total_bytes });
    }
    bar.finish();
    Ok(())
}

fn report(checkpoint: &Checkpoint, tokenizer: Option<&Tokenizer>, sampling: Wanted, read: bool) -> Report {
    let (spec, inventory) = (checkpoint.spec(), checkpoint.inventory());
    let Inventory { parameters, active_parameters, total_bytes, trunk_bytes, ref layers } = inventory;
    Report {
        model: checkpoint.name().to_owned(),
        family: spec.family,
        fingerprint: checkpoint.fingerprint().to_string(),
        parameters,
        active_parameters,
        weights: Weights {
            dtype: spec.dtype.to_string(),
            stored: in_words::stored(&spec.stored),
            bytes: total_bytes,
            trunk_bytes,
            read,
        },
        hidden: spec.hidden,
        vocabulary: spec.vocab,
        context: spec.context,
        end_of_text: spec.eos.clone(),
        sampling: sampling.into(),
        tokenizer: tokenizer.map(TokenizerReport::of),
        tokenizer_remedy: tokenizer.is_none().then(|| tokenizer::remedy(checkpoint)),
        layers: layers.iter().enumerate().map(|(number, layer)| layer_report(spec, number, *layer)).collect(),
        left_alone: checkpoint.unused().into_iter().map(left_alone).collect(),
        quality: None,
        digests: Vec::new(),
    }
}

fn left_alone(unused: Unused) -> LeftAlone {
    let Unused { prefix, tensors, bytes } = unused;
    LeftAlone { begins_with: prefix, tensors, bytes }
}

fn layer_report(spec: &ModelSpec, number: usize, layer: LayerInventory) -> LayerReport {
    let LayerInventory { trunk_bytes, experts, expert_bytes } = layer;
    let moe = match spec.layers.get(number).map(|layer| &layer.mlp) {
        Some(MlpSpec::Moe(moe)) => Some(moe),
        _ => None,
    };
    LayerReport {
        trunk_bytes,
        experts,
        experts_per_token: moe.map_or(0, |moe| moe.top_k),
        expert_bytes,
        gate: moe.map(in_words::gate),
        expert: moe.map(in_words::expert),
        shared_expert: moe.and_then(|moe| in_words::shared(moe.shared)),
        attention: spec
            .layers
            .get(number)
            .map_or_else(String::new, |layer| in_words::attention(&layer.attention)),
    }
}

impl LayerReport {
    /// Values in the table's row.
    const fn columns(&self) -> (u64, u32, u32, u64) {
        (self.trunk_bytes, self.experts, self.experts_per_token, self.expert_bytes)
    }
}

/// Text of a layer's part, if it has that part.
type Part = fn(&LayerReport) -> Option<&String>;

/// Text of a part over all layers that have it; a line per variant with its layers where they differ.
fn in_kinds(layers: &[LayerReport], part: Part) -> Vec<String> {
    const SHOWN: usize = 4;
    let mut kinds: Vec<(&String, Vec<usize>)> = Vec::new();
    for (number, words) in
        layers.iter().enumerate().filter_map(|(number, layer)| Some((number, part(layer)?)))
    {
        match kinds.iter_mut().find(|(other, _)| *other == words) {
            Some((_, numbers)) => numbers.push(number),
            None => kinds.push((words, vec![number])),
        }
    }
    if let [(words, _)] = kinds.as_slice() {
        return vec![(*words).clone()];
    }
    let kind = |(words, numbers): (&String, Vec<usize>)| {
        let shown: Vec<String> = numbers.iter().take(SHOWN).map(ToString::to_string).collect();
        let more = if numbers.len() > SHOWN { ", …" } else { "" };
        let layers = if numbers.len() == 1 { "layer" } else { "layers" };
        format!("{layers} {}{more}: {words}", shown.join(", "))
    };
    kinds.into_iter().map(kind).collect()
}

/// Groups of neighbouring layers with equal rows in the table.
fn alike(layers: &[LayerReport]) -> Vec<(RangeInclusive<usize>, &LayerReport)> {
    let mut groups: Vec<(RangeInclusive<usize>, &LayerReport)> = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        match groups.last_mut() {
            Some((range, first)) if first.columns() == layer.columns() => *range = *range.start()..=number,
            _ => groups.push((number..=number, layer)),
        }
    }
    groups
}

/// `6 layers, 8 experts each, top-2`.
fn layers_in_words(layers: &[LayerReport]) -> String {
    let with_experts: Vec<&LayerReport> = layers.iter().filter(|layer| layer.experts > 0).collect();
    let mut kinds: Vec<String> = with_experts
        .iter()
        .map(|layer| format!("{} experts each, top-{}", layer.experts, layer.experts_per_token))
        .collect();
    kinds.dedup();
    let dense = layers.len() - with_experts.len();
    let which = if dense == 0 { String::new() } else { format!(", {} of them with", with_experts.len()) };
    let separator = if dense == 0 { ", " } else { " " };
    format!("{}{which}{separator}{}", layers.len(), kinds.join(" or "))
}

fn for_people(report: &Report) -> String {
    let experts_bytes = report.weights.bytes - report.weights.trunk_bytes;
    let tokenizer = report.tokenizer.as_ref();
    let loads = if report.weights.read {
        "yes: every weight was read and is finite"
    } else {
        "headers are sound; weights not read"
    };
    let mut facts = vec![
        ("model", format!("{} ({})", report.model, report.family)),
        (
            "parameters",
            format!(
                "{}, {} active per token",
                text::count(report.parameters),
                text::count(report.active_parameters)
            ),
        ),
        (
            "weights",
            format!(
                "{} {}: trunk {}, experts {}",
                text::bytes(report.weights.bytes),
                report.weights.stored,
                text::bytes(report.weights.trunk_bytes),
                text::bytes(experts_bytes)
            ),
        ),
        ("hidden", report.hidden.to_string()),
        ("context", format!("{} tokens", report.context)),
        ("vocabulary", report.vocabulary.to_string()),
        ("end of text", format!("{:?}", report.end_of_text)),
        ("sampling", format!("{}, where a request says nothing", report.sampling.in_words)),
    ];
    match tokenizer {
        Some(tokenizer) => facts.extend(tokenizer.facts()),
        None => {
            let remedy = report.tokenizer_remedy.as_deref().unwrap_or_default();
            facts.extend([("tokenizer", format!("none: {remedy}")), ("chat template", "none".to_owned())]);
        }
    }
    let not_followed = report.sampling.not_followed.iter();
    facts.extend(not_followed.map(|field| ("not done", format!("generation_config.json: {field}"))));
    let groups = alike(&report.layers);
    facts.push(("layers", layers_in_words(&report.layers)));
    let parts: [(&str, Part); 4] = [
        ("attention", |layer| Some(&layer.attention)),
        ("gate", |layer| layer.gate.as_ref()),
        ("expert", |layer| layer.expert.as_ref()),
        ("shared expert", |layer| layer.shared_expert.as_ref()),
    ];
    for (name, part) in parts {
        facts.extend(in_kinds(&report.layers, part).into_iter().map(|words| (name, words)));
    }
    for LeftAlone { begins_with, tensors, bytes } in &report.left_alone {
        let words = format!("{tensors} tensors of {}: {begins_with}*", text::bytes(*bytes));
        facts.push(("not needed", words));
    }
    facts.push(("fingerprint", report.fingerprint.clone()));
    facts.push(("loads", loads.to_owned()));
    facts.extend(report.digests.iter().map(|digested| ("digests", digested.in_words())));
    let lines: String = facts.iter().map(|(name, value)| format!("{name:<14} {value}\n")).collect();
    let rows: Vec<Vec<String>> = groups.iter().map(|(range, layer)| row(range, layer)).collect();
    let header = ["layers", "trunk each", "experts", "per token", "expert each", "experts each layer"];
    let quality =
        report.quality.as_ref().map_or_else(String::new, |quality| format!("\n{}\n", quality.in_words()));
    format!("{lines}\n{}\n{quality}", text::table(&header, &rows))
}

fn row(range: &RangeInclusive<usize>, layer: &LayerReport) -> Vec<String> {
    let name = if range.start() == range.end() {
        range.start().to_string()
    } else {
        format!("{}-{}", range.start(), range.end())
    };
    vec![
        name,
        text::bytes(layer.trunk_bytes),
        layer.experts.to_string(),
        layer.experts_per_token.to_string(),
        text::bytes(layer.expert_bytes),
        text::bytes(layer.expert_bytes * u64::from(layer.experts)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Links;

    #[test]
    fn neighbours_that_are_alike_are_one_line() {
        let layer = |experts| LayerReport {
            trunk_bytes: 1,
            experts,
            experts_per_token: 2,
            expert_bytes: 3,
            gate: None,
            expert: None,
            shared_expert: None,
            attention: String::new(),
        };
        let layers = [layer(0), layer(8), layer(8), layer(8), layer(0)];
        let ranges: Vec<_> = alike(&layers).into_iter().map(|(range, _)| range).collect();
        assert_eq!(ranges, [0..=0, 1..=3, 4..=4]);
    }

    #[test]
    fn parts_that_differ_say_where() {
        let layer = |attention: &str, gate: Option<&str>| LayerReport {
            trunk_bytes: 1,
            experts: 0,
            experts_per_token: 0,
            expert_bytes: 0,
            gate: gate.map(str::to_owned),
            expert: None,
            shared_expert: None,
            attention: attention.to_owned(),
        };
        let layers: Vec<LayerReport> = (0..11)
            .map(|n| layer(if n % 2 == 0 { "near" } else { "far" }, (n > 0).then_some("top-2")))
            .collect();
        let attention = in_kinds(&layers, |layer| Some(&layer.attention));
        assert_eq!(attention, ["layers 0, 2, 4, 6, …: near", "layers 1, 3, 5, 7, …: far"]);
        assert_eq!(in_kinds(&layers, |layer| layer.gate.as_ref()), ["top-2"]);
        assert!(in_kinds(&layers, |layer| layer.expert.as_ref()).is_empty());
        assert_eq!(alike(&layers).len(), 1);
    }

    #[test]
    fn the_built_in_model_is_described() {
        let checkpoint = models::open(models::DEMO, Links::Inside).unwrap();
        let tokenizer = tokenizer::read(&checkpoint).unwrap();
        let sampling = Wanted::of(&checkpoint).unwrap();
        let report = report(&checkpoint, tokenizer.as_ref(), sampling, true);
        let text = for_people(&report);
        for fact in [
            "demo (mixtral)",
            "9.4 M, ",
            "bf16: trunk ",
            "512 tokens",
            "0-5",
            "6, 8 experts each, top-2",
            "attention      ",
            "softmax over all experts, then top-2, weights divided by their sum",
            "chat template  yes: user",
            "special tokens 0 \"<",
            "sampling       temperature 0, max_tokens 200, where a request says nothing",
        ] {
            assert!(text.contains(fact), "{fact} in\n{text}");
        }
    }
}
