//! The target placement.
//!
//! Owns the plan and its order of importance: every expert has a holder if any memory is left for it; then as many
//! copies on as many failure domains as asked; then an even load. A worker is never given more bytes than it has or
//! a key twice, a draining worker is given nothing, and what is held is kept unless something better needs its
//! place. Where numerics are exact, all copies of an expert are on workers of one class: that which it is bound to, while workers
//! of that class have the memory for it. The idea is that of EPLB (an expert's load is shared over its copies; the heaviest goes where the load is
//! least) for workers that differ in memory and speed, and that start with what they hold.
//!
//! Layers run one after the other, and a layer takes as long as its busiest worker. So loads are evened out layer
//! by layer, which evens out their sums too; a layer counts as one, whatever the number of its experts. Does not
//! know how the target is reached: that is the transition's.

mod cover;
mod draft;
mod rebalance;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;

use muster_types::{ExpertKey, NumericsClass, Speed, WorkerId};

use crate::{Binding, ExpertSizes, Loads, Shape};
use draft::Draft;

/// Keys by worker.
pub type Holdings = BTreeMap<WorkerId, BTreeSet<ExpertKey>>;

/// A worker, as the plan sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Of its device.
    pub class: NumericsClass,
    /// Bytes it has for experts.
    pub capacity: u64,
    /// How fast it is.
    pub speed: Speed,
    /// What it shares its fate with, such as a host or a rack; `zone/host` where hosts share theirs with a zone. Without
    /// one, it shares it with nobody.
    pub domain: Option<String>,
    /// Whether it is about to leave, and shall hold nothing.
    pub draining: bool,
    /// What it holds. Keys that the model does not have are ignored.
    pub held: BTreeSet<ExpertKey>,
}

/// What a plan shall reach, and at what price.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goals {
    /// Copies that each expert shall have, on distinct failure domains where there are as many.
    pub min_replicas: NonZero<u32>,
    /// Most bytes to be loaded for one plan, beyond those that give an expert its first copy. Below the size of
    /// one expert nothing is moved.
    pub budget: u64,
    /// Least part by which a layer's busiest worker must be relieved for its experts to be moved or copied; between
    /// 0 and 1.
    pub hysteresis: f64,
}

impl Default for Goals {
    /// Two copies; 8 GiB a round; a tenth.
    fn default() -> Self {
        Self {
            min_replicas: NonZero::new(2).unwrap_or(NonZero::<u32>::MIN),
            budget: 8 << 30,
            hysteresis: 0.1,
        }
    }
}

/// Who ought to hold what, and what comes of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// What each worker that was given to the plan shall hold; a draining one nothing.
    pub hold: Holdings,
    /// What the plan expects.
    pub figures: Figures,
}

/// What a plan expects of its target.
#[derive(Debug, Clone, PartialEq)]
pub struct Figures {
    /// Load over speed of the busiest worker, all layers together, in terms of the mean (all load over all speed):
    /// 1 is even. It is 1 too when there is nothing to hold or nobody to hold it.
    pub imbalance: f64,
    /// The same, but with the busiest worker of each layer: what the layers take one after the other. Never below
    /// `imbalance`.
    pub layer_imbalance: f64,
    /// Bytes to be loaded for first copies, of experts that no worker holds, or draining ones only.
    pub first_bytes: u64,
    /// Bytes to be loaded beyond those.
    pub moved_bytes: u64,
    /// Experts that nobody has the memory for, ascending.
    pub uncovered: Vec<ExpertKey>,
    /// Experts with a copy, but with fewer than asked or on fewer failure domains than there are and were asked,
    /// ascending.
    pub under_replicated: Vec<ExpertKey>,
}

/// Plans who shall hold what.
///
/// An expert's load is the part of its layer's rows that it gets, blended with a tenth of an even spread: counts
/// are a sample, and reading the weights of an expert takes as long for one row as for several. The same
/// arguments give the same target.
#[must_use]
pub fn plan(
    shape: &Shape,
    sizes: &ExpertSizes,
    members: &BTreeMap<WorkerId, Member>,
    loads: &Loads,
    goals: &Goals,
    binding: &Binding,
) -> Target {
    let mut draft = Draft::new(shape, sizes, members, loads, goals, binding);
    draft.shed_overflow();
    let on_leave = held_by_leavers(members);
    let mut uncovered = cover::cover(&mut draft, &on_leave);
    cover::replicate(&mut draft, goals.budget);
    if uncovered.is_empty() {
        draft.relax_all();
        rebalance::rebalance(&mut draft, goals.budget);
    } else {
        // A new copy elsewhere may have made another one dispensable.
        uncovered = cover::cover(&mut draft, &on_leave);
        draft.relax_all();
    }
    Target { figures: draft.figures(uncovered), hold: draft.into_holdings(members) }
}

/// What draining workers still serve.
fn held_by_leavers(members: &BTreeMap<WorkerId, Member>) -> BTreeSet<ExpertKey> {
    members.values().filter(|member| member.draining).flat_map(|member| &member.held).copied().collect()
}
