//! The tables of `docs/specification.md`: every command names a package, a test or a file that exists.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use muster_tests::workspace_root;

/// Where a package of this workspace is.
fn directory(package: &str) -> Option<PathBuf> {
    let name = package.strip_prefix("muster-")?;
    let directory = match name {
        "tests" => workspace_root().join("tests"),
        name => workspace_root().join("crates").join(name),
    };
    directory.join("Cargo.toml").exists().then_some(directory)
}

/// Full names of all tests below a directory: modules after its files and folders.
fn tests_below(directory: &Path, module: &str, names: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.map(Result::unwrap) {
        let path = entry.path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let inner = match stem.as_str() {
            "main" | "mod" | "lib" => module.to_owned(),
            stem => format!("{module}{stem}::"),
        };
        if path.is_dir() {
            tests_below(&path, &inner, names);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let mut is_test = false;
            // Those of an inner module of tests have its name in theirs.
            let mut of = String::new();
            for line in text.lines().map(str::trim) {
                if line == "mod tests {" {
                    of = "tests::".to_owned();
                }
                is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
                let function = line.trim_start_matches("async ").strip_prefix("fn ");
                if let Some(name) = function.and_then(|name| name.split('(').next()) {
                    if is_test || text.contains("proptest!") {
                        names.push(format!("{inner}{of}{name}"));
                    }
                    is_test = false;
                }
            }
        }
    }
}

/// Tests of a package by the program that they are in: `lib`, or the name of a file or folder of `tests`.
fn programs(package: &Path) -> BTreeMap<String, Vec<String>> {
    let mut programs = BTreeMap::new();
    let mut unit = Vec::new();
    tests_below(&package.join("src"), "", &mut unit);
    programs.insert("lib".to_owned(), unit);
    // The cross-process tests are one program in a folder beside their sources.
    let folder = if package.join("suite").exists() { package.to_owned() } else { package.join("tests") };
    for entry in std::fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
        let path = entry.path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut names = Vec::new();
        if path.is_dir() {
            tests_below(&path, "", &mut names);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let alone = tempfile::tempdir().unwrap();
            std::fs::copy(&path, alone.path().join("main.rs")).unwrap();
            tests_below(alone.path(), "", &mut names);
        }
        if !names.is_empty() {
            programs.insert(name, names);
        }
    }
    programs
}

/// What is wrong with `cargo test` and these arguments.
fn wrong(arguments: &[&str]) -> Option<String> {
    let mut package = None;
    let mut program = None;
    let mut filters = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(&argument) = arguments.next() {
        match argument {
            "--release" | "--" | "--nocapture" | "--ignored" => {}
            "-p" => package = arguments.next().copied(),
            "--test" => program = arguments.next().copied(),
            "--lib" => program = Some("lib"),
            "--workspace" => return None,
            flag if flag.starts_with('-') => return Some(format!("unknown flag {flag}")),
            filter => filters.push(filter),
        }
    }
    let Some(directory) = directory(package?) else { return Some(format!("no package {package:?}")) };
    let programs = programs(&directory);
    let names: Vec<&String> = match program {
        None => programs.values().flatten().collect(),
        Some(program) => match programs.get(program) {
            None => return Some(format!("no test program {program}")),
            Some(names) => names.iter().collect(),
        },
    };
    if names.is_empty() {
        return Some("no tests at all".into());
    }
    let unmatched = filters.iter().find(|filter| !names.iter().any(|name| name.contains(**filter)));
    unmatched.map(|filter| format!("no test is called {filter}"))
}

#[test]
fn every_command_of_the_specification_names_what_exists() {
    let page = std::fs::read_to_string(workspace_root().join("docs/specification.md")).unwrap();
    let mut checked = 0;
    for row in page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| promise")) {
        let commands: Vec<&str> = row.rsplit(" | ").next().unwrap().split('`').skip(1).step_by(2).collect();
        for command in commands {
            let words: Vec<&str> = command.split_whitespace().collect();
            let problem = match words[..] {
                ["cargo", "test", ref rest @ ..] => wrong(rest),
                ["cargo", "xtask", task, ..] => {
                    let file = workspace_root().join("crates/xtask/src").join(task);
                    let exists = file.exists() || file.with_extension("rs").exists();
                    (!exists).then(|| format!("no task {task}"))
                }
                ["muster", subcommand, ..] => {
                    let file = format!("crates/cli/src/commands/{}.rs", subcommand.replace('-', "_"));
                    (!workspace_root().join(file).exists()).then(|| format!("no command {subcommand}"))
                }
                [path] if path.starts_with("tests/") => {
                    (!workspace_root().join(path).exists()).then(|| format!("no file {path}"))
                }
                // A single word is no command, such as the name of a required program.
                [_] => None,
                _ => Some("a command of no known kind".into()),
            };
            assert_eq!(problem, None, "`{command}` in {row}");
            checked += 1;
        }
        let shown_by = row.rsplit(" | ").next().unwrap();
        let is_shown = shown_by.contains('`') || shown_by.contains("*test pending*");
        assert!(is_shown, "nothing shows {row}");
    }
    assert!(checked > 80, "{checked} commands");
    // Control: wrong commands are found.
    assert!(wrong(&["--release", "-p", "muster-tests", "no_such_test"]).is_some());
    assert!(wrong(&["-p", "muster-nobody"]).is_some());
    assert!(wrong(&["-p", "muster-kernels", "--test", "nothing"]).is_some());
}
