//! A shard off the wire: every rule checked, so that nothing in it can index out of bounds.

use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use muster_types::{Combine, DType, Epoch, ExpertId, LayerId};

use crate::convert::WireError;
use crate::description::layer_of;
use crate::expert::v1::LayerShard;
use crate::frame;
use muster_types::{Fault, FaultKind};

/// Rules for a shard.
#[derive(Debug, Clone)]
pub struct ShardRules {
    /// Elements of a hidden row.
    pub hidden: u32,
    /// Element type of rows.
    pub wire: DType,
    /// Routed experts of each layer, 0 in a dense one.
    pub experts: Arc<[u32]>,
    /// Most experts that one row goes to.
    pub top_k: u32,
    /// Most rows of one shard.
    pub max_rows: NonZeroU32,
    /// Longest deadline; longer ones are cut to it.
    pub max_deadline: Duration,
}

/// Check of one stream's shard ids: each must be greater than the last.
#[derive(Debug, Default)]
pub struct ShardIds {
    last: u64,
}

impl ShardIds {
    /// Checks the next id.
    ///
    /// # Errors
    /// `Missing` for 0, `Rule` for one that does not ascend.
    pub fn accept(&mut self, id: u64) -> Result<NonZeroU64, WireError> {
        let checked = NonZeroU64::new(id).ok_or(WireError::Missing("id"))?;
        if id <= self.last {
            return Err(WireError::rule("id", format!("{id} does not come after {}", self.last)));
        }
        self.last = id;
        Ok(checked)
    }
}

/// A checked shard, except for its values, which are checked when they are decoded, off the network thread.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardView {
    layer: LayerId,
    deadline: Duration,
    rows: u32,
    data: Bytes,
    experts: Vec<ExpertId>,
    counts: Vec<u32>,
    indices: Vec<u32>,
    weights: Option<Vec<f32>>,
}

impl ShardView {
    /// Checks a shard of a stream with this combine mode. `current` is the epoch of the worker's own description.
    ///
    /// # Errors
    /// The first rule that is broken: `Deadline` for a deadline that has passed, `BadRequest` for all others.
    pub fn parse(
        shard: LayerShard,
        rules: &ShardRules,
        combine: Combine,
        current: Epoch,
    ) -> Result<Self, Fault> {
        check_epoch(shard.epoch, current)?;
        let (layer, count) = layer_of(shard.layer, &rules.experts)
            .map_err(|source| WireError::OutOfRange { field: "layer", source })?;
        if shard.deadline_ms == 0 {
            return Err(Fault::new(FaultKind::Deadline, "field deadline_ms is 0: the deadline has passed"));
        }
        let deadline = Duration::from_millis(shard.deadline_ms.into()).min(rules.max_deadline);
        check_payload(&shard, rules)?;
        let experts = check_experts(&shard.experts, count)?;
        check_groups(&shard, rules.top_k)?;
        check_weights(&shard, combine)?;
        let LayerShard { rows, data, counts, indices, weights, .. } = shard;
        let weights = (combine == Combine::Partial).then_some(weights);
        Ok(Self { layer, deadline, rows, data, experts, counts, indices, weights })
    }

    /// The layer.
    #[must_use]
    pub const fn layer(&self) -> LayerId {
        self.layer
    }

    /// Deadline, counted from receipt: later results are useless.
    #[must_use]
    pub const fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Rows sent.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows as usize
    }

    /// The payload, exactly as long as [`Self::rows`] rows.
    #[must_use]
    pub const fn data(&self) -> &Bytes {
        &self.data
    }

    /// Number of expert output rows: one per (row, expert).
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.indices.len()
    }

    /// Weight of each output in the sum of its row, in the order of [`Self::groups`]; `None` where the router sums.
    #[must_use]
    pub fn weights(&self) -> Option<&[f32]> {
        self.weights.as_deref()
    }

    /// Number of reply rows.
    #[must_use]
    pub fn answers(&self) -> u32 {
        // There are at most as many indices as a message has bytes.
        if self.weights.is_some() { self.rows } else { self.indices.len() as u32 }
    }

    /// Each expert with the number of rows it gets.
    pub fn row_counts(&self) -> impl Iterator<Item = (ExpertId, usize)> {
        self.experts.iter().copied().zip(self.counts.iter().map(|&count| count as usize))
    }

    /// Each expert with the rows it gets. Experts strictly ascending, rows strictly ascending and in range.
    #[must_use]
    pub fn groups(&self) -> Vec<(ExpertId, &[u32])> {
        let mut rest = self.indices.as_slice();
        let mut groups = Vec::with_capacity(self.experts.len());
        for (expert, count) in self.row_counts() {
            let (rows, tail) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            groups.push((expert, rows));
            rest = tail;
        }
        groups
    }
}

fn check_epoch(epoch: u64, current: Epoch) -> Result<(), WireError> {
    if epoch == 0 {
        return Err(WireError::Missing("epoch"));
    }
    if epoch > current.get() {
        return Err(WireError::rule(
            "epoch",
            format!("{epoch} was never announced; the current one is {current}"),
        ));
    }
    Ok(())
}

fn check_payload(shard: &LayerShard, rules: &ShardRules) -> Result<(), WireError> {
    let LayerShard { rows, data, .. } = shard;
    if *rows == 0 {
        return Err(WireError::Missing("rows"));
    }
    if *rows > rules.max_rows.get() {
        return Err(WireError::rule(
            "rows",
            format!("{rows} is more than this worker's max_rows {}", rules.max_rows),
        ));
    }
    frame::check_len(data, *rows as usize, rules.hidden as usize, rules.wire)
        .map_err(|error| WireError::rule("data", error.to_string()))
}

fn check_experts(experts: &[u32], count: u32) -> Result<Vec<ExpertId>, WireError> {
    let field = "experts";
    if experts.is_empty() {
        return Err(WireError::Missing(field));
    }
    if let Some(pair) = experts.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(WireError::rule(field, format!("{} after {}: must strictly ascend", pair[1], pair[0])));
    }
    let check = |&id| ExpertId::new(id, count).map_err(|source| WireError::OutOfRange { field, source });
    experts.iter().map(check).collect()
}

fn check_groups(shard: &LayerShard, top_k: u32) -> Result<(), WireError> {
    let LayerShard { rows, experts, counts, indices, .. } = shard;
    if counts.len() != experts.len() {
        let reason = format!("{} entries for {} experts", counts.len(), experts.len());
        return Err(WireError::rule("counts", reason));
    }
    if counts.contains(&0) {
        return Err(WireError::rule("counts", "has a 0; leave the expert out"));
    }
    // A u64 cannot overflow: entries are u32, and at most as many as a message has bytes.
    let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
    if total != indices.len() as u64 {
        let reason = format!("{} entries where counts add up to {total}", indices.len());
        return Err(WireError::rule("indices", reason));
    }
    let mut uses = vec![0u32; *rows as usize];
    let mut rest = indices.as_slice();
    for &count in counts {
        let (group, tail) = rest.split_at(count as usize);
        rest = tail;
        if let Some(pair) = group.windows(2).find(|pair| pair[0] >= pair[1]) {
            let reason = format!("{} after {}: must strictly ascend within an expert", pair[1], pair[0]);
            return Err(WireError::rule("indices", reason));
        }
        for &row in group {
            let Some(used) = uses.get_mut(row as usize) else {
                return Err(WireError::rule(
                    "indices",
                    format!("row {row} is out of range: there are {rows}"),
                ));
            };
            *used += 1;
            if *used > top_k {
                return Err(WireError::rule(
                    "indices",
                    format!("row {row} goes to more than {top_k} experts"),
                ));
            }
        }
    }
    Ok(())
}

fn check_weights(shard: &LayerShard, combine: Combine) -> Result<(), WireError> {
    let LayerShard { indices, weights, .. } = shard;
    let want = if combine == Combine::Partial { indices.len() } else { 0 };
    if weights.len() != want {
        let reason = format!("{} entries; combine is {combine}, so {want} are due", weights.len());
        return Err(WireError::rule("weights", reason));
    }
    match weights.iter().find(|weight| !weight.is_finite()) {
        None => Ok(()),
        Some(bad) => Err(WireError::rule("weights", format!("{bad} is not finite"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules() -> ShardRules {
        ShardRules {
            hidden: 4,
            wire: DType::Bf16,
            experts: [8, 0, 8].into(),
            top_k: 2,
            max_rows: NonZeroU32::new(16).unwrap(),
            max_deadline: Duration::from_secs(60),
        }
    }

    /// Row 0 to experts 1 and 6, row 1 to expert 1, row 2 to expert 6.
    fn good() -> LayerShard {
        LayerShard {
            id: 1,
            layer: 2,
            epoch: 3,
            deadline_ms: 500,
            rows: 3,
            data: vec![0; 3 * 4 * 2].into(),
            experts: vec![1, 6],
            counts: vec![2, 2],
            indices: vec![0, 1, 0, 2],
            weights: vec![],
        }
    }

    fn parse(shard: LayerShard) -> Result<ShardView, Fault> {
        ShardView::parse(shard, &rules(), Combine::Exact, Epoch::new(4))
    }

    #[test]
    fn a_good_shard_is_split_by_expert() {
        let view = parse(good()).unwrap();
        let groups: Vec<_> = view.groups().into_iter().map(|(e, rows)| (e.get(), rows.to_vec())).collect();
        assert_eq!(groups, [(1, vec![0, 1]), (6, vec![0, 2])]);
        assert_eq!((view.rows(), view.outputs(), view.answers(), view.layer().get()), (3, 4, 4, 2));
        assert_eq!(view.weights(), None);
        assert_eq!(view.deadline(), Duration::from_millis(500));
    }

    #[test]
    fn every_broken_rule_is_a_bad_request_that_names_its_field() {
        let cases: [(&str, LayerShard); 25] = [
            ("weights", LayerShard { weights: vec![1.0; 4], ..good() }),
            ("epoch", LayerShard { epoch: 0, ..good() }),
            ("epoch", LayerShard { epoch: 5, ..good() }),
            ("layer", LayerShard { layer: 3, ..good() }),
            ("layer", LayerShard { layer: u32::MAX, ..good() }),
            ("experts", LayerShard { layer: 1, ..good() }),
            ("rows", LayerShard { rows: 0, ..good() }),
            ("rows", LayerShard { rows: 17, data: vec![0; 17 * 8].into(), ..good() }),
            ("rows", LayerShard { rows: u32::MAX, ..good() }),
            ("data", LayerShard { data: Bytes::new(), ..good() }),
            ("data", LayerShard { data: vec![0; 23].into(), ..good() }),
            ("data", LayerShard { data: vec![0; 25].into(), ..good() }),
            ("data", LayerShard { rows: 4, ..good() }),
            ("experts", LayerShard { experts: vec![], ..good() }),
            ("experts", LayerShard { experts: vec![1, 8], ..good() }),
            ("experts", LayerShard { experts: vec![1, 1], ..good() }),
            ("experts", LayerShard { experts: vec![6, 1], ..good() }),
            ("counts", LayerShard { counts: vec![], ..good() }),
            ("counts", LayerShard { counts: vec![4], ..good() }),
            ("counts", LayerShard { counts: vec![4, 0], ..good() }),
            ("indices", LayerShard { counts: vec![u32::MAX, u32::MAX], ..good() }),
            ("indices", LayerShard { indices: vec![], ..good() }),
            ("indices", LayerShard { indices: vec![0, 1, 0, 3], ..good() }),
            ("indices", LayerShard { indices: vec![0, u32::MAX, 0, 2], ..good() }),
            ("indices", LayerShard { indices: vec![0, 0, 0, 2], ..good() }),
        ];
        for (field, shard) in cases {
            let text = format!("{shard:?}");
            let fault = parse(shard).expect_err(&text);
            assert_eq!(fault.kind, FaultKind::BadRequest, "{text}");
            assert!(fault.message.starts_with(&format!("field {field}")), "{}: {text}", fault.message);
        }
    }

    #[test]
    fn weights_are_there_where_the_worker_adds_up() {
        let parse = |weights: Vec<f32>| {
            let shard = LayerShard { weights, ..good() };
            ShardView::parse(shard, &rules(), Combine::Partial, Epoch::new(4))
        };
        let view = parse(vec![0.5, -1.0, 0.0, 2.0]).unwrap();
        assert_eq!((view.outputs(), view.answers()), (4, 3));
        assert_eq!(view.weights(), Some(&[0.5, -1.0, 0.0, 2.0][..]));
        for bad in [vec![], vec![1.0; 3], vec![1.0; 5], vec![1.0, f32::NAN, 1.0, 1.0], vec![f32::INFINITY; 4]]
        {
            let fault = parse(bad).unwrap_err();
            assert_eq!(fault.kind, FaultKind::BadRequest);
            assert!(fault.message.starts_with("field weights"), "{}", fault.message);
        }
    }

    #[test]
    fn a_row_goes_to_no_more_experts_than_the_model_picks() {
        let shard =
            LayerShard { experts: vec![1, 2, 3], counts: vec![1, 1, 1], indices: vec![0, 0, 0], ..good() };
        let fault = parse(shard).unwrap_err();
        assert_eq!(fault.message, "field indices: row 0 goes to more than 2 experts");
    }

    #[test]
    fn deadlines_of_nothing_and_of_forever() {
        assert_eq!(parse(LayerShard { deadline_ms: 0, ..good() }).unwrap_err().kind, FaultKind::Deadline);
        let view = parse(LayerShard { deadline_ms: u32::MAX, ..good() }).unwrap();
        assert_eq!(view.deadline(), rules().max_deadline);
    }

    #[test]
    fn ids_ascend() {
        let mut ids = ShardIds::default();
        assert_eq!(ids.accept(0), Err(WireError::Missing("id")));
        assert_eq!(ids.accept(1).map(NonZeroU64::get), Ok(1));
        assert_eq!(ids.accept(9).map(NonZeroU64::get), Ok(9));
        assert!(ids.accept(9).is_err());
        assert!(ids.accept(2).is_err());
        assert!(ids.accept(u64::MAX).is_ok());
        assert!(ids.accept(1).is_err());
    }

    fn number() -> impl Strategy<Value = u32> {
        prop_oneof![0u32..20, Just(u32::MAX), any::<u32>()]
    }

    proptest! {
        /// A shard that passes the checks indexes nothing out of bounds.
        #[test]
        fn what_passes_is_in_bounds(
            layer in 0u32..4,
            rows in number(),
            bytes in 0usize..200,
            experts in prop::collection::vec(0u32..10, 0..4),
            counts in prop::collection::vec(number(), 0..4),
            indices in prop::collection::vec(number(), 0..8),
        ) {
            let data = vec![0; bytes].into();
            let shard = LayerShard { layer, rows, data, experts, counts, indices, ..good() };
            if let Ok(view) = parse(shard) {
                prop_assert_eq!(view.data().len(), view.rows() * 8);
                let groups = view.groups();
                prop_assert_eq!(groups.iter().map(|(_, g)| g.len()).sum::<usize>(), view.outputs());
                for (expert, group) in groups {
                    prop_assert!(expert.get() < 8 && !group.is_empty());
                    prop_assert!(group.iter().all(|&row| (row as usize) < view.rows()));
                }
            }
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(shard) = <LayerShard as prost::Message>::decode(bytes.as_slice()) {
                let _ = parse(shard);
            }
        }
    }
}
