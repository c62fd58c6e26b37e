//! Workers of several numerics classes, whose outputs differ in bits.

use muster_dispatch_grpc::{ConnectConfig, Fallback, GrpcDispatch, Start};
use muster_engine::dispatch::{DispatchError, ExpertDispatch};
use muster_testkit::fake::{OtherBits, other_bits};
use muster_types::{BindingName, ClassSet, Compute, ExpertKey, Numerics, NumericsClass};

use crate::support::{
    OneRow, TestWorker, all, connect_config, describe, eventually, expert, fakes, layer, once, server_config,
};

const CPU: NumericsClass = NumericsClass::CpuCanonical;
const CUDA: NumericsClass = NumericsClass::CudaMma;

/// A worker on a CUDA device, as far as a router can tell.
fn cuda(name: &str, held: Vec<ExpertKey>) -> TestWorker {
    let experts = OtherBits { inner: fakes(&held, Compute::F32), compute: Compute::F32 };
    let mut description = describe(name, held, Compute::F32);
    description.numerics = CUDA;
    TestWorker::with("127.0.0.1:0", &server_config(), description, experts)
}

fn cpu(name: &str, held: Vec<ExpertKey>) -> TestWorker {
    TestWorker::start(name, held, Compute::F32)
}

fn config(workers: &[&TestWorker], numerics: Numerics) -> ConnectConfig {
    let addresses: Vec<&str> = workers.iter().map(|worker| worker.address.as_str()).collect();
    ConnectConfig { numerics, start: Start::Assigned, ..connect_config(&addresses, Compute::F32) }
}

fn connect(workers: &[&TestWorker], numerics: Numerics) -> GrpcDispatch {
    muster_dispatch_grpc::connect(config(workers, numerics)).expect("workers of every class fit")
}

/// What the row is with experts on devices of these classes.
fn sum(row: &OneRow, class_of: impl Fn(u32) -> NumericsClass) -> Vec<f32> {
    row.sum_of(|expert, y| if class_of(expert.get()) == CUDA { other_bits(Compute::F32, y) } else { y })
}

fn classes(dispatch: &mut GrpcDispatch) -> Vec<NumericsClass> {
    dispatch.take_classes().iter().collect()
}

#[test]
fn only_workers_of_the_class_that_an_expert_is_bound_to_are_asked_for_it() {
    let (a, b) = (cpu("a", all()), cuda("b", all()));
    let mut dispatch = connect(&[&b, &a], Numerics::Exact);
    let rows = [OneRow::new(0, &[0, 1, 2]), OneRow::new(2, &[1, 3])];
    for row in &rows {
        assert_ne!(sum(row, |_| CPU), sum(row, |_| CUDA));
        for _ in 0..10 {
            assert_eq!(once(&mut dispatch, row), Ok(sum(row, |_| CPU)), "the worker in no use answers, too");
        }
    }
    assert_eq!(classes(&mut dispatch), [CPU]);
    let before = dispatch.bound();
    assert_eq!(before.name, BindingName::One(CPU));
    // What only the others hold is theirs from now on, and stays so.
    a.kill();
    eventually("the experts change class", || dispatch.bound().name == BindingName::One(CUDA));
    assert_eq!(dispatch.bound().changes, before.changes + 1);
    assert_eq!(once(&mut dispatch, &rows[0]), Ok(sum(&rows[0], |_| CUDA)));
    assert_eq!(classes(&mut dispatch), [CUDA]);
    let again = cpu("c", all());
    let address = again.address.parse().unwrap();
    let _joined = dispatch.transport().cluster().join(address).unwrap();
    let health = dispatch.transport().health();
    eventually("it is connected", || health.workers().iter().filter(|w| w.session.is_some()).count() == 2);
    for _ in 0..10 {
        assert_eq!(once(&mut dispatch, &rows[0]), Ok(sum(&rows[0], |_| CUDA)));
    }
    assert_eq!(dispatch.bound().name, BindingName::One(CUDA));
}

#[test]
fn experts_of_one_layer_may_be_bound_to_different_classes() {
    let is_cpu = |key: &ExpertKey| key.expert.get() < 2;
    let (first, second): (Vec<_>, Vec<_>) = all().into_iter().partition(is_cpu);
    let (a, b) = (cpu("a", first), cuda("b", second));
    let mut dispatch = connect(&[&a, &b], Numerics::Exact);
    let row = OneRow::new(0, &[0, 1, 2]);
    let expected = sum(&row, |expert| if expert < 2 { CPU } else { CUDA });
    assert_eq!(once(&mut dispatch, &row), Ok(expected));
    assert_eq!(dispatch.take_classes(), [CPU, CUDA].into_iter().collect::<ClassSet>());
    let name = dispatch.bound().name;
    assert!(matches!(name, BindingName::Several(_)), "{name}");
    // Another router that sees the same agrees.
    assert_eq!(connect(&[&b, &a], Numerics::Exact).bound().name, name);
}

#[test]
fn where_any_will_do_all_workers_are_asked() {
    let (a, b) = (cpu("a", all()), cuda("b", all()));
    let mut dispatch = connect(&[&a, &b], Numerics::Any);
    let row = OneRow::new(0, &[0, 1, 2]);
    let sums: Vec<_> =
        (0..8).map(|choice| sum(&row, |expert| if choice >> expert & 1 == 0 { CPU } else { CUDA })).collect();
    let got = once(&mut dispatch, &row).unwrap();
    assert!(sums.contains(&got), "{got:?}");
    assert_eq!(classes(&mut dispatch), [CPU, CUDA]);
    let bound = dispatch.bound();
    assert_eq!((bound.name, bound.changes), (BindingName::Any, 0));
}

#[test]
fn the_router_s_own_experts_stand_in_for_none_of_another_class() {
    let held: Vec<_> = all().into_iter().filter(|key| key.expert.get() > 0).collect();
    let b = cuda("b", held);
    let fallback = || Fallback { experts: Box::new(fakes(&all(), Compute::F32)) };
    let connect = |numerics| {
        muster_dispatch_grpc::connect_with(config(&[&b], numerics), Some(fallback())).expect("it fits")
    };
    let mut dispatch = connect(Numerics::Exact);
    let health = dispatch.transport().health();
    assert_eq!((health.missing_experts(), health.unreachable_experts()), (3, 3));
    let missing = DispatchError::NoOwner { layer: layer(0), expert: expert(0) };
    assert_eq!(once(&mut dispatch, &OneRow::new(0, &[0, 1])), Err(missing));
    let mut dispatch = connect(Numerics::Any);
    assert_eq!(dispatch.transport().health().unreachable_experts(), 0);
    let row = OneRow::new(0, &[0, 1]);
    assert_eq!(once(&mut dispatch, &row), Ok(sum(&row, |expert| if expert == 0 { CPU } else { CUDA })));
}
