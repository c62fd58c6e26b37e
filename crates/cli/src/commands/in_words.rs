//! A model's parts in words.

use muster_checkpoint::spec::{
    AttentionSpec, GroupWorth, MoeSpec, QkNorm, Renormalise, RopePairs, RopeScaling, RopeSpec, Score,
    SharedSpec, Temperature, WeightOn,
};
use muster_checkpoint::{StoredAs, StoredForms};
use muster_types::{Gating, Reach};

/// Stored forms of weights.
pub(super) fn stored(forms: &StoredForms) -> String {
    let StoredForms { tables, linears, experts } = *forms;
    let mut words = form(tables);
    if linears != tables {
        words += &format!(", linears {}", form(linears));
    }
    if experts != linears {
        words += &format!(", experts {}", form(experts));
    }
    words
}

fn form(form: StoredAs) -> String {
    match form {
        StoredAs::Plain(dtype) => dtype.to_string(),
        StoredAs::F16 => "f16".to_owned(),
        StoredAs::Fp8 => "FP8 E4M3 with a scale per 128 by 128".to_owned(),
        StoredAs::Mxfp4 => "MXFP4".to_owned(),
    }
}

/// A gate's function, in a sentence.
pub(super) fn gate(moe: &MoeSpec) -> String {
    let (gate, top_k) = (&moe.gate, moe.top_k);
    let bias = if gate.bias { "logits with a bias, " } else { "" };
    let groups = gate.groups.map_or_else(String::new, |limit| {
        let by = match limit.worth {
            GroupWorth::Best => "best expert",
            GroupWorth::BestTwo => "two best experts",
        };
        format!(" from {} of {} groups, those with the highest {by}", limit.kept, limit.groups)
    });
    let selected = if gate.selection_bias { ", selected with a bias that weights leave out" } else { "" };
    let top = format!("top-{top_k}{groups}{selected}");
    let score = match gate.score {
        Score::SoftmaxThenTopK => format!("softmax over all experts, then {top}"),
        Score::SigmoidThenTopK => format!("sigmoid of every expert, then {top}"),
        Score::TopKThenSoftmax => format!("{top}, then softmax over those"),
        Score::TopKThenSigmoid => format!("{top}, then sigmoid of each"),
        Score::SparseMixer { jitter } => {
            format!(
                "{top} one by one, each weighed against the others within {} of it (SparseMixer)",
                2.0 * jitter
            )
        }
    };
    let renormalise = match gate.renormalise {
        Renormalise::None => String::new(),
        Renormalise::Sum { .. } => ", weights divided by their sum".to_owned(),
        Renormalise::SumAtLeast { floor } => {
            format!(", weights divided by their sum or {floor:e} if that is more")
        }
    };
    let scale = if gate.scale == 1.0 { String::new() } else { format!(", times {}", gate.scale) };
    let on = match moe.weight_on {
        WeightOn::Output => "",
        WeightOn::Input => ", multiplied with the expert's input",
    };
    format!("{bias}{score}{renormalise}{scale}{on}")
}

/// A routed expert's function.
pub(super) fn expert(moe: &MoeSpec) -> String {
    let gating = match moe.gating {
        Gating::Silu => "silu(gate) * up".to_owned(),
        Gating::ClampedSwish { alpha, limit } => {
            format!("(up + 1) * gate * sigmoid({alpha} gate), clamped to {limit}")
        }
    };
    let biases = if moe.biases { ", biases" } else { "" };
    format!("{} wide, {gating}{biases}", moe.intermediate)
}

/// Experts and MLPs that every token passes beside its routed experts; `None` where there are none.
pub(super) fn shared(shared: SharedSpec) -> Option<String> {
    match shared {
        SharedSpec::None => None,
        SharedSpec::Add { intermediate } => Some(format!("{intermediate} wide, added; kept in the router")),
        SharedSpec::SigmoidGated { intermediate } => {
            Some(format!("{intermediate} wide, added times a sigmoid per token; kept in the router"))
        }
    }
}

/// A layer's attention, in a phrase.
pub(super) fn attention(attention: &AttentionSpec) -> String {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = attention;
    let mut words = match &attention.latent {
        None => format!("{heads} heads of {head_dim}, {kv_heads} for keys and values"),
        Some(latent) => format!(
            "{heads} heads over compressed rows of {} and {} rotated elements (MLA)",
            latent.kv_rank,
            attention.rotated()
        ),
    };
    words += match attention.qk_norm {
        QkNorm::None => "",
        QkNorm::PerHead => ", queries and keys normed per head",
        QkNorm::FullWidth => ", queries and keys normed",
        QkNorm::PerHeadRotated => ", queries and keys normed per head once rotated",
        QkNorm::UnweightedRotated => ", queries and keys normed per head once rotated, without weights",
    };
    if let Some(limit) = attention.clip_qkv {
        words += &format!(", clamped to {limit}");
    }
    if attention.qkv_bias || attention.o_bias {
        words += ", biases";
    }
    if attention.sinks {
        words += ", sinks";
    }
    match &attention.rope {
        None => words += ", nothing rotated",
        Some(rope) => {
            if attention.latent.is_none() && rope.dim < *head_dim {
                words += &format!(", {} elements of a head rotated", rope.dim);
            }
            words += &rotation(rope);
        }
    }
    if let Some(Temperature { floor, scale }) = attention.temperature {
        words += &format!(", queries that grow by {scale} of a logarithm every {floor} positions");
    }
    match attention.reach {
        Reach::All => {}
        Reach::Last(count) => words += &format!(", a window of {count}"),
        Reach::Chunk(length) => words += &format!(", chunks of {length}"),
    }
    words
}

fn rotation(rope: &RopeSpec) -> String {
    let pairs = match rope.pairs {
        RopePairs::Halves => "",
        RopePairs::Neighbours => ", neighbours rotated together",
    };
    let scaling = match &rope.scaling {
        RopeScaling::None => String::new(),
        RopeScaling::Linear { factor } => format!(", frequencies divided by {factor}"),
        RopeScaling::Yarn(yarn) => format!(", YaRN by {}", yarn.factor),
        RopeScaling::Llama3(scaling) => format!(", Llama 3 scaling by {}", scaling.factor),
        RopeScaling::Each { .. } => {
            ", LongRoPE with its short factors, so only for the context trained on first".to_owned()
        }
    };
    format!("{pairs}{scaling}")
}
