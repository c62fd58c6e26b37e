//! The tables of docs/configuration.md equal those generated from the declared settings.
//!
//! `MUSTER_WRITE_DOCS=1 cargo test --release --workspace --locked --test page` rewrites them.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::fs;
use std::path::Path;

use muster_config::{DefaultTo, Group, Key, RoleSettings, RouterSettings, WorkerSettings};

/// Name of the table of settings that both routers and workers have.
const BOTH: &str = "both";

#[test]
fn the_page_has_every_setting_as_it_is_declared() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let page = fs::read_to_string(&path).unwrap();
    let [router, worker] = [RouterSettings::ROLE, WorkerSettings::ROLE].map(|role| role.groups);
    let is_in = |group: &Group, role: &[Group]| role.iter().any(|other| names(other).eq(names(group)));
    let own = |role: &'static [Group], other| role.iter().filter(move |group| !is_in(group, other));
    let written = [
        ("router", table(own(router, worker))),
        ("worker", table(own(worker, router))),
        (BOTH, table(router.iter().filter(|group| is_in(group, worker)))),
    ];
    let new = written.iter().fold(page.clone(), |page, (name, table)| between(&page, name, table));
    if std::env::var_os("MUSTER_WRITE_DOCS").is_some() {
        return fs::write(&path, &new).unwrap();
    }
    assert!(
        page == new,
        "docs/configuration.md is not what the settings say; write it anew with \
         MUSTER_WRITE_DOCS=1 cargo test --release --workspace --locked --test page"
    );
}

fn names(group: &Group) -> impl Iterator<Item = &'static str> {
    group.keys.iter().map(Key::name)
}

/// The page with `table` between the marks of `name`.
fn between(page: &str, name: &str, table: &str) -> String {
    let [begin, end] = ["begin", "end"].map(|end| format!("<!-- {name}:{end} -->"));
    let (before, rest) = page.split_once(&begin).unwrap_or_else(|| panic!("there is no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("there is no {end}"));
    format!("{before}{begin}\n{table}{end}{after}")
}

fn table<'a>(groups: impl Iterator<Item = &'a Group>) -> String {
    let rows: String = groups.flat_map(|group| group.keys).map(row).collect();
    format!("| key | default | meaning |\n|---|---|---|\n{rows}")
}

fn row(key: &Key) -> String {
    let default = match (key.default(), key.placeholder()) {
        (DefaultTo::Value("false"), None) => "off".to_owned(),
        (DefaultTo::Value(value), _) => format!("`{value}`"),
        (DefaultTo::Words(words), _) => words.to_owned(),
        (DefaultTo::Nothing, _) => String::new(),
    };
    let mut meaning = key.help().trim_end_matches('.').to_owned();
    if key.is_list() {
        meaning += &format!("; `--{} {}`, once for each", key.flag(), key.placeholder().unwrap_or_default());
    }
    let remarks = key.remarks();
    if !remarks.is_empty() {
        meaning += &format!(". {}", remarks.trim_end_matches('.'));
    }
    format!("| `{}` | {default} | {meaning} |\n", key.name())
}
