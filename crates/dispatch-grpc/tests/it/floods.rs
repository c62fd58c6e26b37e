//! Frames that carry nothing, and those of a router at work.

use std::time::Duration;

use muster_telemetry::Process;
use muster_testkit::flood::{Flood, flood};
use muster_types::Compute;

use crate::support::{OneRow, TestWorker, all, connect_config, once, runtime};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn floods_end_and_a_router_at_work_is_none() {
    let metrics = muster_telemetry::install_metrics(Process::Worker).unwrap();
    let floods = || {
        let text = metrics.render();
        let line = text.lines().find_map(|line| line.strip_prefix("muster_connections_flooding_total "));
        line.map_or(0, |count| count.parse::<u64>().unwrap())
    };
    let worker = TestWorker::start("w0", all(), Compute::F32);
    let mut dispatch =
        muster_dispatch_grpc::connect(connect_config(&[&worker.address], Compute::F32)).unwrap();
    let row = OneRow::new(0, &[0, 1]);
    for kind in Flood::ALL {
        let before = floods();
        runtime().block_on(flood(&worker.address, "/muster.expert.v1.Experts/Dispatch", kind, SOON));
        // The library has limits of its own for some, and is sometimes first.
        let may_end_otherwise =
            matches!(kind, Flood::RapidReset | Flood::Continuation | Flood::Resets | Flood::EmptyData);
        assert!(floods() == before + 1 || may_end_otherwise, "{kind:?}");
        assert_eq!(once(&mut dispatch, &row).unwrap(), row.sum(), "after {kind:?}");
    }
    let before = floods();
    for _ in 0..10_000 {
        assert_eq!(once(&mut dispatch, &row).unwrap(), row.sum());
    }
    assert_eq!(floods(), before);
}
