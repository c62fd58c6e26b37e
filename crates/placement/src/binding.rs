//! Which numerics class each expert is bound to.
//!
//! Owns the rule that keeps outputs exact where workers of several classes hold the same expert: it is bound to one class, and
//! workers of others are not asked for it. The rule follows from announcements alone and is sticky: an expert stays bound to
//! its class while a worker of that class holds it, and while nobody does; it goes to the first class, in the order of
//! [`NumericsClass::ALL`], of those that hold it when only others do. Experts that nobody ever held are taken to be of one
//! class: that of the workers there are, by the same rule. So where all workers are of one class, routers agree at any
//! moment; else as soon as experts are held in one class each, which the leader sees to.

use muster_types::{BindingName, ClassSet, ExpertKey, Numerics, NumericsClass};

use crate::Shape;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    numerics: Numerics,
    /// By layer and expert; `None` until somebody holds it.
    classes: Vec<Vec<Option<NumericsClass>>>,
    /// Of experts that nobody held yet.
    presumed: NumericsClass,
    name: BindingName,
    changes: u64,
}

impl Binding {
    /// Before any worker is known.
    #[must_use]
    pub fn new(numerics: Numerics, shape: &Shape) -> Self {
        let classes = shape.experts().iter().map(|&experts| vec![None; experts as usize]).collect();
        let presumed = NumericsClass::CpuCanonical;
        let name = match numerics {
            Numerics::Exact => BindingName::One(presumed),
            Numerics::Any => BindingName::Any,
        };
        Self { numerics, classes, presumed, name, changes: 0 }
    }

    /// What it becomes when these workers, and no others, hold these experts.
    #[must_use]
    pub fn after<'a>(&self, workers: impl Iterator<Item = (NumericsClass, &'a [ExpertKey])>) -> Self {
        if self.numerics == Numerics::Any {
            return self.clone();
        }
        let sets = |layer: &Vec<_>| vec![ClassSet::EMPTY; layer.len()];
        let mut holders: Vec<Vec<ClassSet>> = self.classes.iter().map(sets).collect();
        let mut present = ClassSet::EMPTY;
        for (class, keys) in workers {
            present.insert(class);
            for key in keys {
                let known = holders.get_mut(key.layer.index());
                if let Some(known) = known.and_then(|layer| layer.get_mut(key.expert.index())) {
                    known.insert(class);
                }
            }
        }
        let mut next = self.clone();
        next.presumed = rebind(Some(self.presumed), present).unwrap_or(self.presumed);
        for (bound, holders) in next.classes.iter_mut().flatten().zip(holders.iter().flatten()) {
            *bound = rebind(*bound, *holders);
        }
        let presumed = next.presumed;
        next.name = BindingName::of(next.classes.iter().flatten().map(|bound| bound.unwrap_or(presumed)));
        next.changes += u64::from(next.name != self.name);
        next
    }

    /// Whether experts are bound at all.
    #[must_use]
    pub const fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// The class that an expert was bound to by somebody who held it.
    #[must_use]
    pub fn of(&self, key: ExpertKey) -> Option<NumericsClass> {
        self.classes.get(key.layer.index())?.get(key.expert.index()).copied().flatten()
    }

    /// The class whose workers alone are asked for an expert; `None` where those of any are.
    #[must_use]
    pub fn class(&self, key: ExpertKey) -> Option<NumericsClass> {
        match self.numerics {
            Numerics::Exact => Some(self.of(key).unwrap_or(self.presumed)),
            Numerics::Any => None,
        }
    }

    /// Whether a worker of this class may be asked for an expert.
    #[must_use]
    pub fn admits(&self, key: ExpertKey, class: NumericsClass) -> bool {
        self.class(key).is_none_or(|bound| bound == class)
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> BindingName {
        self.name
    }

    /// How often it changed, all those before it included.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }
}

/// The class of something that was bound so and is now held by workers of these classes.
pub(crate) fn rebind(bound: Option<NumericsClass>, holders: ClassSet) -> Option<NumericsClass> {
    bound.filter(|&class| holders.contains(class)).or_else(|| holders.iter().next()).or(bound)
}

#[cfg(test)]
mod tests {
    use NumericsClass::{CpuCanonical, CudaMma, CudaWgmma};
    use muster_types::{ExpertId, LayerId};
    use proptest::prelude::*;

    use super::*;

    fn key(expert: u32) -> ExpertKey {
        ExpertKey { layer: LayerId::new(1, 2).unwrap(), expert: ExpertId::new(expert, 100).unwrap() }
    }

    fn keys(experts: &[u32]) -> Vec<ExpertKey> {
        experts.iter().map(|&expert| key(expert)).collect()
    }

    fn exact() -> Binding {
        Binding::new(Numerics::Exact, &Shape::new(vec![0, 4]))
    }

    fn after(binding: &Binding, workers: &[(NumericsClass, &[u32])]) -> Binding {
        let held: Vec<_> = workers.iter().map(|&(class, experts)| (class, keys(experts))).collect();
        binding.after(held.iter().map(|(class, keys)| (*class, &keys[..])))
    }

    #[test]
    fn workers_of_one_class_change_nothing_as_they_come_and_go() {
        let mut binding = exact();
        for workers in [&[][..], &[(CpuCanonical, &[0][..])], &[], &[(CpuCanonical, &[0, 1, 2, 3])]] {
            binding = after(&binding, workers);
            assert_eq!((binding.name(), binding.changes()), (BindingName::default(), 0));
        }
        // Devices of another class, alone: known with the first of them, whatever it holds.
        let mut binding = after(&exact(), &[(CudaMma, &[])]);
        assert_eq!((binding.name(), binding.changes()), (BindingName::One(CudaMma), 1));
        for workers in [&[(CudaMma, &[0, 1][..])][..], &[], &[(CudaMma, &[2, 3])]] {
            binding = after(&binding, workers);
            assert_eq!((binding.name(), binding.changes()), (BindingName::One(CudaMma), 1));
        }
    }

    #[test]
    fn an_expert_stays_with_its_class_until_only_others_hold_it() {
        let both = after(&exact(), &[(CudaWgmma, &[0, 1]), (CudaMma, &[1, 2])]);
        assert_eq!(
            [0, 1, 2, 3].map(|e| both.of(key(e))),
            [Some(CudaWgmma), Some(CudaMma), Some(CudaMma), None]
        );
        // A class that comes before is no reason to change.
        let more = after(&both, &[(CpuCanonical, &[0, 1, 2]), (CudaWgmma, &[0, 1]), (CudaMma, &[1, 2])]);
        assert_eq!((more.name(), more.changes()), (both.name(), both.changes()));
        // Nor is it when nobody holds it.
        let none = after(&both, &[(CudaWgmma, &[0]), (CudaMma, &[])]);
        assert_eq!((none.of(key(2)), none.changes()), (Some(CudaMma), both.changes()));
        let other = after(&none, &[(CudaWgmma, &[0, 2]), (CpuCanonical, &[2])]);
        assert_eq!(other.of(key(2)), Some(CpuCanonical));
        assert_eq!(other.changes(), both.changes() + 1);
        assert!(other.admits(key(2), CpuCanonical) && !other.admits(key(2), CudaWgmma));
    }

    #[test]
    fn any_class_will_do_where_nothing_is_bound() {
        let any = Binding::new(Numerics::Any, &Shape::new(vec![0, 4]));
        let any = after(&any, &[(CudaWgmma, &[0]), (CpuCanonical, &[0])]);
        assert!(NumericsClass::ALL.iter().all(|&class| any.admits(key(0), class)));
        assert_eq!((any.name(), any.changes(), any.of(key(0))), (BindingName::Any, 0, None));
    }

    proptest! {
        #[test]
        fn whoever_saw_the_same_last_agrees_once_experts_are_in_one_class(
            before in prop::collection::vec(prop::collection::vec((0_usize..3, 0_u32..4), 0..6), 0..4),
            last in prop::collection::vec(0_usize..3, 4),
        ) {
            let mut binding = exact();
            for held in before {
                let held: Vec<_> =
                    held.iter().map(|&(class, expert)| (NumericsClass::ALL[class], [expert])).collect();
                let held: Vec<_> = held.iter().map(|(class, experts)| (*class, &experts[..])).collect();
                let next = after(&binding, &held);
                for expert in 0..4 {
                    let holds = |class| held.iter().any(|(of, experts)| *of == class && experts[0] == expert);
                    let (was, is) = (binding.of(key(expert)), next.of(key(expert)));
                    if was.is_some_and(holds) || !NumericsClass::ALL.into_iter().any(holds) {
                        prop_assert_eq!(is, was, "it was left without need");
                    } else {
                        prop_assert!(is.is_some_and(holds));
                    }
                }
                binding = next;
            }
            let held: Vec<_> =
                last.iter().zip(0..).map(|(&class, expert)| (NumericsClass::ALL[class], [expert])).collect();
            let held: Vec<_> = held.iter().map(|(class, experts)| (*class, &experts[..])).collect();
            prop_assert_eq!(after(&binding, &held).name(), after(&exact(), &held).name());
        }
    }
}
