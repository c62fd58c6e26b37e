//! `crates/ARCHITECTURE.md` against `cargo metadata` and the sources: edges, levels, who may name which library, and
//! the path of a token.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use muster_tests::workspace_root;
use serde_json::Value;

/// Crates of this workspace with the normal dependencies of each, our prefix taken off.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(workspace_root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let short = |name: &str| name.strip_prefix("muster-").unwrap_or(name).to_owned();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let normal = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
            let names = normal.map(|d| short(d["name"].as_str().unwrap())).collect();
            (short(package["name"].as_str().unwrap()), names)
        })
        .collect()
}

struct Row {
    level: u32,
    uses: BTreeSet<String>,
}

fn table() -> BTreeMap<String, Row> {
    let page = std::fs::read_to_string(workspace_root().join("crates/ARCHITECTURE.md")).unwrap();
    let table =
        page.split("<!-- edges:begin -->").nth(1).unwrap().split("<!-- edges:end -->").next().unwrap();
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    let rows = table.lines().filter(|line| line.starts_with("| `")).map(|line| {
        let cells = cells(line);
        let uses = cells[2].split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
        (cells[0].clone(), Row { level: cells[1].parse().unwrap(), uses: uses.collect() })
    });
    rows.collect()
}

#[test]
fn a_token_is_followed_in_few_files() {
    let page = std::fs::read_to_string(workspace_root().join("crates/ARCHITECTURE.md")).unwrap();
    let path = page.split("<!-- path:begin -->").nth(1).unwrap().split("<!-- path:end -->").next().unwrap();
    let (mut files, mut lines) = (0, 0);
    for row in path.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<String> = row.split('|').map(|cell| cell.trim().replace('`', "")).collect();
        let (file, function) = (&cells[1], &cells[2]);
        let source = std::fs::read_to_string(workspace_root().join("crates").join(file)).unwrap();
        let product = source.split("#[cfg(test)]\nmod tests {").next().unwrap();
        assert!(product.contains(&format!("fn {function}")), "{file} has no function `{function}`");
        files += 1;
        lines += product.lines().count();
    }
    assert!((8..=12).contains(&files) && lines <= 4000, "{files} files, {lines} lines");
}

#[test]
fn the_edge_table_is_true() {
    let table = table();
    let ours: BTreeSet<String> = table.keys().cloned().collect();
    let actual = dependencies();
    for (name, uses) in &actual {
        if ["testkit", "tests"].contains(&name.as_str()) {
            continue;
        }
        let row =
            table.get(name).unwrap_or_else(|| panic!("`{name}` is missing from crates/ARCHITECTURE.md"));
        let internal: BTreeSet<String> = uses.intersection(&ours).cloned().collect();
        assert_eq!(internal, row.uses, "the row of `{name}` in crates/ARCHITECTURE.md");
        assert!(!uses.contains("testkit"), "`{name}` ships test code");
    }
    for name in ours {
        assert!(actual.contains_key(&name), "crates/ARCHITECTURE.md names `{name}`, which is no crate");
    }
}

#[test]
fn crates_depend_on_lower_levels_only() {
    let table = table();
    for (name, row) in &table {
        for used in &row.uses {
            assert!(table[used].level < row.level, "`{name}` uses `{used}`, which is not on a lower level");
        }
    }
}

#[test]
fn libraries_stay_where_they_belong() {
    let allowed: [(&str, &[&str]); 10] = [
        ("candle-core", &["model"]),
        ("tonic", &["proto", "client", "dispatch-grpc", "router", "tests"]),
        ("prost", &["proto", "tests"]),
        ("axum", &["admin", "router"]),
        ("rcgen", &["identity"]),
        ("rustls", &["identity", "dispatch-grpc", "router", "tests"]),
        ("tokenizers", &["text"]),
        ("hf-hub", &["pull"]),
        ("toml", &["config"]),
        ("kube", &["discovery"]),
    ];
    let dependencies = dependencies();
    for (library, users) in allowed {
        let actual: Vec<&String> =
            dependencies.iter().filter(|(_, uses)| uses.contains(library)).map(|(name, _)| name).collect();
        assert!(!actual.is_empty(), "nobody uses {library}: take it off this list");
        for user in actual {
            assert!(users.contains(&user.as_str()), "`{user}` must not depend on {library}");
        }
    }
    for pure in ["types", "engine", "placement", "checkpoint", "kernels", "model", "text"] {
        assert!(!dependencies[pure].contains("tokio"), "`{pure}` is synchronous and must not know tokio");
    }
}

/// A listener made by hand would lack a backlog, places and patience.
#[test]
fn only_one_crate_listens() {
    fn visit(directory: &std::path::Path, made: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                visit(&entry, made);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&entry).unwrap();
                let shipped =
                    text.split("#[cfg(test)]").next().unwrap().split("#[cfg(all(test").next().unwrap();
                if ["TcpListener::bind", "UnixListener::bind", ".listen(BACKLOG)"]
                    .iter()
                    .any(|way| shipped.contains(way))
                {
                    made.insert(
                        entry.strip_prefix(workspace_root().join("crates")).unwrap().display().to_string(),
                    );
                }
            }
        }
    }
    let mut made = BTreeSet::new();
    for name in dependencies().keys().filter(|name| !["testkit", "tests"].contains(&name.as_str())) {
        visit(&workspace_root().join("crates").join(name).join("src"), &mut made);
    }
    let files: Vec<&str> =
        made.iter().map(String::as_str).filter(|file| !file.ends_with("/tests.rs")).collect();
    assert_eq!(files, ["net/src/listen.rs"]);
}
