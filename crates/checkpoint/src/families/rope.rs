//! The configuration keys of rotary embedding: how much of a head turns, how fast, and for how long a context.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::defaults::{Defaults, Rotary};
use crate::config::{Config, ConfigError};
use crate::spec::{Llama3Spec, RopePairs, RopeScaling, RopeSpec, YarnSpec};

/// Longest sequence a model may be made for, tokens.
pub(super) const LONGEST_CONTEXT: usize = 1 << 30;
const PART: &str = "partial_rotary_factor";
const ORIGINAL: &str = "original_max_position_embeddings";
/// Keys of `rope_parameters` and `rope_scaling` that say nothing about scaling.
const USUAL: [&str; 4] = ["rope_theta", "rope_type", "type", PART];

/// The rotary embedding, and the context that it is good for, which is at most `context`.
pub(super) fn rope(
    config: &Config,
    defaults: &Defaults,
    head_dim: usize,
    context: usize,
) -> Result<(RopeSpec, usize), ConfigError> {
    let parameters = config.nested("rope_parameters")?;
    let scaling = config.nested("rope_scaling")?;
    let inside = |key: &str| parameters.as_ref().map(|nested| nested.optional_positive(key)).transpose();
    let theta = inside("rope_theta")?.flatten();
    let theta = agreed(config, "rope_theta", config.optional_positive("rope_theta")?, theta)?;
    let dim = rotated(config, defaults.habits.rotary, head_dim, inside(PART)?.flatten())?;
    let rope = RopeSpec {
        theta: theta.unwrap_or(defaults.rope_theta),
        dim,
        pairs: RopePairs::Halves,
        scaling: RopeScaling::None,
    };
    let Some(nested) = scaling.or(parameters) else { return Ok((rope, context)) };
    if defaults.habits.alpha
        && ["rope_type", "type"].iter().any(|key| nested.get(key).is_some_and(|kind| kind == "dynamic"))
    {
        return Ok((stretched(&nested, rope)?, context));
    }
    let (scaling, context) = scaling_of(config, &nested, dim / 2, context)?;
    Ok((RopeSpec { scaling, ..rope }, context))
}

/// A larger base instead of changed frequencies (HunYuan's "dynamic" scaling, which depends on no length).
fn stretched(parameters: &Config, rope: RopeSpec) -> Result<RopeSpec, ConfigError> {
    // What else is published beside `alpha` changes nothing in the reference, which reads no more than that.
    let missing = || ConfigError::Missing { key: parameters.name("alpha") };
    let alpha = parameters.optional_positive("alpha")?.ok_or_else(missing)?;
    let dim = rope.dim as f64;
    Ok(RopeSpec { theta: rope.theta * alpha.powf(dim / (dim - 2.0)), ..rope })
}

/// Elements of a head that turn.
fn rotated(
    config: &Config,
    rotary: Rotary,
    head_dim: usize,
    inside: Option<f64>,
) -> Result<usize, ConfigError> {
    let given = agreed(config, PART, config.optional_positive(PART)?, inside)?;
    let part = match rotary {
        Rotary::Whole | Rotary::Elements(..) => {
            let whole = |value: &Value| value.as_f64() == Some(1.0);
            config.refuse_unless(PART, "this family rotates whole heads", whole)?;
            if let Some(part) = inside.filter(|part| *part != 1.0) {
                return Err(config.conflict(PART, &part, "this family rotates whole heads".to_owned()));
            }
            1.0
        }
        Rotary::Partial(default) => given.unwrap_or(default),
        Rotary::Part(key) => match config.optional_size(key, 2..=head_dim)? {
            Some(elements) => elements as f64 / head_dim as f64,
            None => given.unwrap_or(1.0),
        },
    };
    // Rounded down, as the reference does.
    let dim = (head_dim as f64 * part) as usize;
    if part > 1.0 || dim < 2 || !dim.is_multiple_of(2) {
        let key = match rotary {
            Rotary::Elements(key, _) | Rotary::Part(key) => key,
            Rotary::Whole | Rotary::Partial(_) => PART,
        };
        let reason =
            format!("of {head_dim} elements of a head that rotates {dim}; it must be an even number");
        let said: &dyn fmt::Display = if key == PART { &part } else { &dim };
        return Err(config.conflict(key, said, reason));
    }
    Ok(dim)
}

/// A number that may stand at the top, in `rope_parameters`, or in both.
fn agreed(
    config: &Config,
    key: &str,
    flat: Option<f64>,
    nested: Option<f64>,
) -> Result<Option<f64>, ConfigError> {
    match (flat, nested) {
        (Some(flat), Some(nested)) if flat != nested => {
            Err(config.conflict(key, &flat, format!("`rope_parameters.{key}` is {nested}")))
        }
        _ => Ok(nested.or(flat)),
    }
}

/// The scaling that these parameters describe, for so many pairs, and the context that it is good for.
fn scaling_of(
    config: &Config,
    parameters: &Config,
    pairs: usize,
    context: usize,
) -> Result<(RopeScaling, usize), ConfigError> {
    const KNOWN: &str = "this build computes \"default\", \"linear\", \"yarn\", \"llama3\" and \"longrope\"";
    let named = |key| parameters.get(key).and_then(Value::as_str);
    for key in ["rope_type", "type"] {
        parameters.refuse_unless(key, KNOWN, |value| {
            ["default", "linear", "yarn", "llama3", "longrope"].iter().any(|known| value == known)
        })?;
    }
    let kind = match (named("rope_type"), named("type")) {
        (Some(kind), Some(other)) if kind != other => {
            return Err(parameters.conflict("rope_type", &kind, format!("`type` is {other}")));
        }
        (kind, other) => kind.or(other).unwrap_or("default"),
    };
    let only = |keys: &[&str]| parameters.only(&[&USUAL[..], keys].concat());
    // Some have it beside the parameters, which counts more.
    let original = match config.optional_size(ORIGINAL, 1..=LONGEST_CONTEXT)? {
        Some(original) => original,
        None => parameters.optional_size(ORIGINAL, 1..=LONGEST_CONTEXT)?.unwrap_or(context),
    };
    let needed = |key: &str| {
        let missing = || ConfigError::Missing { key: parameters.name(key) };
        parameters.optional_positive(key)?.ok_or_else(missing)
    };
    Ok(match kind {
        "linear" => {
            only(&["factor", ORIGINAL])?;
            (RopeScaling::Linear { factor: needed("factor")? }, context)
        }
        "llama3" => {
            only(&["factor", "low_freq_factor", "high_freq_factor", ORIGINAL])?;
            let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if low > high {
                let reason = format!("`high_freq_factor` is {high}");
                return Err(parameters.conflict("low_freq_factor", &low, reason));
            }
            let spec = Llama3Spec { factor: needed("factor")?, original_context: original, low, high };
            (RopeScaling::Llama3(spec), context)
        }
        "yarn" => {
            only(&[
                "factor",
                ORIGINAL,
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "attention_factor",
                "truncate",
            ])?;
            (RopeScaling::Yarn(yarn(parameters, original, context)?), context)
        }
        "longrope" => {
            only(&[
                "factor",
                ORIGINAL,
                "short_factor",
                "long_factor",
                "short_mscale",
                "long_mscale",
                "attention_factor",
            ])?;
            let divisors = divisors(parameters, pairs)?;
            let amplitude = longrope_amplitude(parameters, original, context)?;
            // Beyond the original context the reference changes all frequencies when a sequence grows past it, which
            // would change the keys that are cached already.
            (RopeScaling::Each { divisors, amplitude: amplitude as f32 }, context.min(original))
        }
        _ => {
            only(&[])?;
            (RopeScaling::None, context)
        }
    })
}

fn yarn(parameters: &Config, original: usize, context: usize) -> Result<YarnSpec, ConfigError> {
    let factor = parameters.optional_positive("factor")?.unwrap_or(context as f64 / original as f64);
    let scales = [parameters.optional_positive("mscale")?, parameters.optional_positive("mscale_all_dim")?];
    let amplitude = match (parameters.optional_positive("attention_factor")?, scales) {
        (Some(given), _) => given,
        (None, [Some(scale), Some(all)]) => yarn_scale(factor, scale) / yarn_scale(factor, all),
        (None, _) => yarn_scale(factor, 1.0),
    };
    Ok(YarnSpec {
        factor,
        original_context: original,
        beta_fast: parameters.positive("beta_fast", 32.0)?,
        beta_slow: parameters.positive("beta_slow", 1.0)?,
        truncate: parameters.flag("truncate", true)?,
        amplitude: amplitude as f32,
    })
}

/// How much larger scores become where the context is `factor` times as long.
pub(super) fn yarn_scale(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// What LongRoPE divides frequencies by within the original context.
fn divisors(parameters: &Config, pairs: usize) -> Result<Arc<[f32]>, ConfigError> {
    const KEY: &str = "short_factor";
    let missing = || ConfigError::Missing { key: parameters.name(KEY) };
    let value = parameters.get(KEY).ok_or_else(missing)?;
    let number = |item: &Value| item.as_f64().map(|n| n as f32).filter(|n| *n > 0.0 && n.is_finite());
    let list: Option<Vec<f32>> = value.as_array().and_then(|list| list.iter().map(number).collect());
    let list = list.filter(|list| list.len() == pairs);
    list.map(Arc::from).ok_or_else(|| parameters.bad(KEY, value, format!("{pairs} numbers above 0")))
}

fn longrope_amplitude(parameters: &Config, original: usize, context: usize) -> Result<f64, ConfigError> {
    for key in ["short_mscale", "attention_factor"] {
        if let Some(given) = parameters.optional_positive(key)? {
            return Ok(given);
        }
    }
    let ratio = context as f64 / original as f64;
    let factor = parameters.optional_positive("factor")?.unwrap_or(ratio);
    Ok(if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() })
}
