//! Every metric that a crate counts is described, and nothing is described that nobody counts.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use muster_telemetry::names;

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// String literals that follow `counter!(`, `gauge!(` or `histogram!(`.
fn counted(text: &str) -> impl Iterator<Item = &str> {
    ["counter!(", "gauge!(", "histogram!("].into_iter().flat_map(move |mark| {
        let calls = text.split(mark).skip(1);
        calls.filter_map(|call| call.trim_start().strip_prefix('"')?.split('"').next())
    })
}

#[test]
fn the_names_are_those_that_the_crates_count() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = Vec::new();
    for entry in fs::read_dir(crates).unwrap().map(Result::unwrap) {
        let source = entry.path().join("src");
        if source.is_dir() {
            sources(&source, &mut files);
        }
    }
    let texts: Vec<String> = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let used: BTreeSet<&str> = texts.iter().flat_map(|text| counted(text)).collect();
    let described: BTreeSet<&str> = names::all().collect();
    assert!(used.len() > 10, "the sources were not found: {used:?}");
    assert_eq!(
        used.difference(&described).collect::<Vec<_>>(),
        Vec::<&&str>::new(),
        "counted, but not in names.rs"
    );
    assert_eq!(
        described.difference(&used).collect::<Vec<_>>(),
        Vec::<&&str>::new(),
        "in names.rs, but not counted"
    );
}
