//! Claims in a file never size an allocation: a counting allocator watches hostile checkpoints being opened.
//!
//! A test binary of its own with a single test, because the allocator and its counters are the process's.

#![allow(clippy::unwrap_used, reason = "helpers outside test functions fail tests by panicking too")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use muster_checkpoint::{Checkpoint, Source};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system allocator unchanged; only counters are kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract, which is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout, hence from the system allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CONFIG: &str = r#"{"model_type": "mixtral", "vocab_size": 12, "hidden_size": 8}"#;

/// Opens what must not open; the peak of what that allocated, in bytes.
fn peak_of_opening(config: &str, shard: &[u8]) -> usize {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    fs::write(dir.path().join("model.safetensors"), shard).unwrap();
    let source = Source::Directory(dir.path().to_owned());
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let opened = Checkpoint::open(&source);
    let peak = PEAK.load(Ordering::Relaxed);
    assert!(opened.is_err());
    peak - before
}

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn hostile_claims_cost_no_more_than_the_files_are_long() {
    const SLACK: usize = 256 << 10;
    let huge = 1u64 << 61;
    let claims = [
        [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(),
        [90_000_000u64.to_le_bytes().as_slice(), b"{}"].concat(),
        file(&format!(r#"{{"a":{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}}}}"#), b""),
        file(
            &format!(r#"{{"a":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(50_000)),
            b"x",
        ),
        file(&format!(r#"{{"a":{{"dtype":"{}"}}}}"#, "x".repeat(100_000)), b""),
        file(&format!(r#"{{"{}":1}}"#, "\\u0001".repeat(20_000)), b""),
    ];
    for shard in claims {
        let peak = peak_of_opening(CONFIG, &shard);
        assert!(peak <= SLACK + 6 * shard.len(), "a file of {} bytes cost {peak}", shard.len());
    }
    let empty = file("{}", b"");
    for config in [
        r#"{"model_type": "mixtral", "num_hidden_layers": 1000000000}"#,
        r#"{"model_type": "mixtral", "num_local_experts": 4096, "num_hidden_layers": 1024}"#,
        r#"{"model_type": "mixtral", "vocab_size": 16777216, "hidden_size": 131072, "intermediate_size": 1048576}"#,
    ] {
        let peak = peak_of_opening(config, &empty);
        assert!(peak <= SLACK, "{config} cost {peak}");
    }
}
