//! The comparisons: sides, rows of the table, and goals.

/// A measured configuration of Muster or of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    /// A router and two workers.
    Exact,
    LlamaBf16,
    Transformers,
    /// As `Exact`, with partial sums on the workers.
    Partial,
    /// As `Partial`, with bf16 products.
    PairsPartial,
    /// Everything in one process.
    Local,
    LlamaRpc,
    /// As `Exact`, with experts quantised.
    ExpertsQ8,
    /// With the trunk quantised too, as the peers have it.
    WeightsQ8,
    LlamaQ8,
    ExpertsQ4,
    WeightsQ4,
    LlamaQ4,
}

impl Side {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Exact => "muster exact",
            Self::Partial => "muster partial",
            Self::PairsPartial => "muster pairs+partial",
            Self::Local => "muster local",
            Self::ExpertsQ8 => "muster q8 experts",
            Self::ExpertsQ4 => "muster q4 experts",
            Self::WeightsQ8 => "muster q8 weights",
            Self::WeightsQ4 => "muster q4 weights",
            Self::LlamaBf16 => "llama.cpp BF16",
            Self::LlamaQ8 => "llama.cpp Q8_0",
            Self::LlamaQ4 => "llama.cpp Q4_K_M",
            Self::LlamaRpc => "llama.cpp RPC",
            Self::Transformers => "transformers bf16",
        }
    }

    pub(crate) const fn is_muster(self) -> bool {
        match self {
            Self::Exact
            | Self::Partial
            | Self::PairsPartial
            | Self::Local
            | Self::ExpertsQ8
            | Self::ExpertsQ4
            | Self::WeightsQ8
            | Self::WeightsQ4 => true,
            Self::LlamaBf16 | Self::LlamaQ8 | Self::LlamaQ4 | Self::LlamaRpc | Self::Transformers => false,
        }
    }

    /// Flags of `muster up` for this side, each with its value.
    pub(crate) const fn flags(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Partial => &[("--combine", "partial")],
            Self::PairsPartial => &[("--compute", "bf16-pairs"), ("--combine", "partial")],
            Self::ExpertsQ8 => &[("--expert-dtype", "q8")],
            Self::ExpertsQ4 => &[("--expert-dtype", "q4")],
            Self::WeightsQ8 => &[("--expert-dtype", "q8"), ("--trunk-dtype", "q8")],
            Self::WeightsQ4 => &[("--expert-dtype", "q4"), ("--trunk-dtype", "q8")],
            _ => &[],
        }
    }
}

/// Unit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    TokensPerSecond,
    Seconds,
    Bytes,
}

/// The machine's limit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Memory bandwidth: the active weights of every step read once, for a batch of this size.
    Reading(u32),
    /// Compute: the f32 multiplications of a prompt token.
    MultiplyingF32,
    /// Compute: the same as bf16 dot products.
    MultiplyingBf16,
    /// Memory bandwidth: the weights copied once.
    Copying,
    /// Memory: the router's weights and its KV cache.
    RouterBytes,
    /// Memory: the weights of all workers.
    WorkersBytes,
}

/// A line of the table.
pub(crate) struct Row {
    pub(crate) group: &'static str,
    pub(crate) label: &'static str,
    pub(crate) unit: Unit,
    pub(crate) side: Side,
    pub(crate) figure: &'static str,
    pub(crate) against: Option<(Side, &'static str)>,
    /// Goal, as a multiple of the other side.
    pub(crate) goal: Option<f64>,
    pub(crate) limit: Option<Limit>,
}

pub(crate) const GROUPS: [&str; 11] = [
    "prefill",
    "decode-1",
    "decode-8",
    "decode-32",
    "rpc",
    "q8",
    "q4",
    "dispatch",
    "split",
    "memory",
    "start",
];

const fn row(group: &'static str, label: &'static str, side: Side, figure: &'static str) -> Row {
    Row { group, label, unit: Unit::TokensPerSecond, side, figure, against: None, goal: None, limit: None }
}

impl Row {
    const fn against(self, side: Side) -> Self {
        Self { against: Some((side, self.figure)), ..self }
    }

    const fn goal(self, multiple: f64) -> Self {
        Self { goal: Some(multiple), ..self }
    }

    const fn limit(self, limit: Limit) -> Self {
        Self { limit: Some(limit), ..self }
    }

    const fn seconds(self) -> Self {
        Self { unit: Unit::Seconds, ..self }
    }

    const fn bytes(self) -> Self {
        Self { unit: Unit::Bytes, ..self }
    }
}

pub(crate) const ROWS: &[Row] = &{
    use Limit::{Copying, MultiplyingBf16, MultiplyingF32, Reading, RouterBytes, WorkersBytes};
    use Side::{
        Exact, ExpertsQ4, ExpertsQ8, LlamaBf16, LlamaQ4, LlamaQ8, LlamaRpc, Local, PairsPartial, Partial,
        Transformers, WeightsQ4, WeightsQ8,
    };
    const PARTIAL: &str = "prefill 512, combine partial";
    const EXACT: &str = "prefill 512, combine exact";
    const PAIRS: &str = "prefill 512, bf16-pairs, combine partial";
    [
        row("prefill", PARTIAL, Partial, "prefill").against(LlamaBf16).goal(10.0).limit(MultiplyingF32),
        row("prefill", EXACT, Exact, "prefill").against(LlamaBf16).goal(8.0).limit(MultiplyingF32),
        row("prefill", PAIRS, PairsPartial, "prefill").against(LlamaBf16).limit(MultiplyingBf16),
        row("prefill", PARTIAL, Partial, "prefill").against(Transformers).goal(5.0),
        row("prefill", EXACT, Exact, "prefill").against(Transformers).goal(4.0),
        row("prefill", PAIRS, PairsPartial, "prefill").against(Transformers),
        row("decode-1", "decode, batch 1", Exact, "decode-1").against(LlamaBf16).goal(1.1).limit(Reading(1)),
        row("decode-1", "decode, batch 1", Exact, "decode-1").against(Transformers),
        row("decode-8", "decode, batch 8", Exact, "decode-8").against(LlamaBf16).goal(1.8).limit(Reading(8)),
        row("decode-8", "decode, batch 8", Exact, "decode-8").against(Transformers),
        row("decode-32", "decode, batch 32", Exact, "decode-32")
            .against(LlamaBf16)
            .goal(4.0)
            .limit(Reading(32)),
        row("rpc", PARTIAL, Partial, "prefill").against(LlamaRpc).goal(15.0),
        row("rpc", EXACT, Exact, "prefill").against(LlamaRpc).goal(15.0),
        row("rpc", "decode, batch 1", Exact, "decode-1").against(LlamaRpc).goal(2.0),
        row("q8", "q8 experts, decode, batch 1", ExpertsQ8, "decode-1").against(LlamaQ8).goal(1.3),
        row("q8", "q8 experts, decode, batch 32", ExpertsQ8, "decode-32").against(LlamaQ8).goal(4.0),
        row("q8", "q8 experts and trunk, decode, batch 1", WeightsQ8, "decode-1").against(LlamaQ8).goal(1.3),
        row("q8", "q8 experts and trunk, decode, batch 32", WeightsQ8, "decode-32")
            .against(LlamaQ8)
            .goal(4.0),
        row("q4", "q4 experts, decode, batch 1", ExpertsQ4, "decode-1").against(LlamaQ4).goal(1.2),
        row("q4", "q4 experts, q8 trunk, decode, batch 1", WeightsQ4, "decode-1").against(LlamaQ4).goal(1.2),
        row("dispatch", "dispatch + combine per layer, batch 1, p50", Exact, "dispatch-1-p50").seconds(),
        row("dispatch", "dispatch + combine per layer, batch 1, p99", Exact, "dispatch-1-p99").seconds(),
        row("dispatch", "dispatch + combine per layer, batch 8, p50", Exact, "dispatch-8-p50").seconds(),
        row("dispatch", "dispatch + combine per layer, batch 8, p99", Exact, "dispatch-8-p99").seconds(),
        row("dispatch", "dispatch + combine per layer, batch 32, p50", Exact, "dispatch-32-p50").seconds(),
        row("dispatch", "dispatch + combine per layer, batch 32, p99", Exact, "dispatch-32-p99").seconds(),
        row("split", "decode, batch 1, 2 workers", Exact, "decode-1").against(Local),
        row("split", "prefill 512, 2 workers, combine exact", Exact, "prefill").against(Local),
        row("split", "prefill 512, 2 workers, combine partial", Partial, "prefill").against(Local),
        row("memory", "router, resident", Exact, "router-bytes").bytes().limit(RouterBytes),
        row("memory", "both workers, resident", Exact, "workers-bytes").bytes().limit(WorkersBytes),
        row("start", "from start to ready", Exact, "start-seconds").seconds().limit(Copying),
    ]
};

/// Batch size of a figure: N of `decode-N` and `dispatch-N-…`.
pub(crate) fn batch_of(figure: &str) -> Option<u32> {
    let rest = figure.strip_prefix("decode-").or_else(|| figure.strip_prefix("dispatch-"))?;
    rest.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_has_rows_and_every_row_a_group() {
        for group in GROUPS {
            assert!(ROWS.iter().any(|row| row.group == group), "{group}");
        }
        assert!(ROWS.iter().all(|row| GROUPS.contains(&row.group)));
    }

    #[test]
    fn goals_have_something_to_be_a_multiple_of() {
        assert!(ROWS.iter().all(|row| row.goal.is_none() || row.against.is_some()));
        assert!(ROWS.iter().all(|row| row.side.is_muster()));
    }

    #[test]
    fn batches_are_in_the_names() {
        assert_eq!(batch_of("decode-32"), Some(32));
        assert_eq!(batch_of("dispatch-8-p99"), Some(8));
        assert_eq!(batch_of("prefill"), None);
    }
}
