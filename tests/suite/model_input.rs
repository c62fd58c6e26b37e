//! Bad model directories, as a person meets them: one line that names file, tensor and remedy, exit code not zero,
//! nothing hung. The full catalogue is in the tests of `muster-checkpoint`; here it is shown to reach the terminal.

use std::fs;
use std::path::Path;
use std::process::Output;

use muster_tests::golden_model;
use muster_tests::process::{Process, run};
use tempfile::TempDir;

fn copy_of(family: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden_model(family)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    directory
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from:?} is not in {}", path.display());
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

fn check(directory: &Path) -> Output {
    run(&["check-model", &directory.display().to_string()])
}

fn refused(name: &str, directory: &Path, expected: &[&str]) {
    let output = check(directory);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{name} was accepted");
    assert!(!error.contains("panicked") && !error.contains("backtrace"), "{name}: {error}");
    for word in expected {
        assert!(error.contains(word), "{name}: {word:?} is not in {error:?}");
    }
    // A worker refuses it just the same.
    let model = directory.display().to_string();
    let args = ["worker", "--model", &model, "--listen", "127.0.0.1:0"].map(String::from);
    assert!(Process::start(&args).is_err(), "{name}: a worker took it");
}

const SHARD: &str = "model-00001-of-00002.safetensors";

#[test]
fn broken_directories_are_refused_by_name() {
    /// What it is called, how to do the damage, and words that the refusal must have.
    type Case = (&'static str, fn(&Path), &'static [&'static str]);
    let cases: &[Case] = &[
        ("missing shard", |d| fs::remove_file(d.join(SHARD)).unwrap(), &[SHARD]),
        ("truncated shard", |d| edit(&d.join(SHARD), |b| b.truncate(b.len() - 4096)), &[SHARD]),
        ("one byte short", |d| edit(&d.join(SHARD), |b| b.truncate(b.len() - 1)), &[SHARD]),
        ("extra bytes", |d| edit(&d.join(SHARD), |b| b.extend([0; 8])), &[SHARD]),
        ("absurd header", |d| edit(&d.join(SHARD), |b| b[..8].fill(0xff)), &[SHARD, "header"]),
        (
            "wrong dtype",
            |d| {
                edit(&d.join(SHARD), |b| {
                    let at = b.windows(5).position(|w| w == b"\"F32\"").unwrap();
                    b[at..at + 5].copy_from_slice(b"\"I32\"");
                });
            },
            &["I32"],
        ),
        (
            "wrong shape",
            |d| replace(&d.join("config.json"), "\"intermediate_size\": 48", "\"intermediate_size\": 47"),
            &["47", "48"],
        ),
        (
            "unknown model_type",
            |d| replace(&d.join("config.json"), "\"model_type\": \"mixtral\"", "\"model_type\": \"mystery\""),
            &["model_type", "mystery"],
        ),
        ("no config", |d| fs::remove_file(d.join("config.json")).unwrap(), &["config.json"]),
        (
            "no layers",
            |d| replace(&d.join("config.json"), "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 0"),
            &["num_hidden_layers"],
        ),
        (
            "too many experts per token",
            |d| replace(&d.join("config.json"), "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9"),
            &["num_experts_per_tok", "9"],
        ),
    ];
    for (name, damage, expected) in cases {
        let directory = copy_of("mixtral");
        damage(directory.path());
        refused(name, directory.path(), expected);
    }
}

#[test]
fn a_single_nan_is_found_and_its_tensor_named() {
    let directory = copy_of("mixtral");
    let path = directory.path().join(SHARD);
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let (name, entry) =
        header.as_object().unwrap().iter().find(|(name, _)| name.contains("experts")).unwrap();
    let start = 8 + length + entry["data_offsets"][0].as_u64().unwrap() as usize;
    edit(&path, |bytes| bytes[start + 40..start + 44].copy_from_slice(&f32::NAN.to_le_bytes()));
    let error = String::from_utf8_lossy(&check(directory.path()).stderr).into_owned();
    assert!(error.contains(name.as_str()) && error.contains("NaN"), "{error}");
    let model = directory.path().display().to_string();
    let args = ["worker", "--model", &model, "--listen", "127.0.0.1:0"].map(String::from);
    let error = Process::start(&args).err().expect("refused");
    assert!(error.contains(name.as_str()), "{error}");
}

#[test]
fn a_name_that_is_no_directory_says_where_it_looked() {
    let output = run(&["check-model", "nobody/nothing-8x7b"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(error.contains("muster pull nobody/nothing-8x7b"), "{error}");
}

#[test]
fn a_model_without_a_tokenizer_is_told_with_what_to_do() {
    let bare = copy_of("olmoe");
    let told = || String::from_utf8(check(bare.path()).stdout).unwrap();
    let alone = told();
    assert!(alone.contains("none: the model has no tokenizer.json, and no other form of it"), "{alone}");
    fs::write(bare.path().join("tokenizer.model"), "\n").unwrap();
    let other = told();
    assert!(
        other.contains("only tokenizer.model, which is not read") && other.contains("save_pretrained"),
        "{other}"
    );
}

#[test]
fn tokens_beyond_the_embedding_are_told_and_refused_in_prompts() {
    let model = copy_of("mixtral");
    let config = model.path().join("tokenizer_config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["extra_special_tokens"] = serde_json::json!(["<beyond>"]);
    fs::write(&config, json.to_string()).unwrap();
    let told = String::from_utf8(check(model.path()).stdout).unwrap();
    assert!(told.contains("320 \"<beyond>\" (tokenizer_config.json: extra_special_tokens[0])"), "{told}");
    assert!(told.contains("1 of its tokens have ids of 320 and more"), "{told}");
    let generate = |prompt: &str| {
        run(&["generate", prompt, "--model", &model.path().display().to_string(), "--max-tokens", "2"])
    };
    assert!(generate("a < beyond >").status.success());
    let refused = generate("a <beyond>");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("\"<beyond>\" has id 320"), "{error}");
}

#[test]
fn tokenizer_files_that_cannot_be_taken_are_refused_by_key() {
    let model = copy_of("mixtral");
    replace(&model.path().join("tokenizer_config.json"), "\"bos_token\": \"<s>\"", "\"bos_token\": 3");
    let output = check(model.path());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("tokenizer_config.json: `bos_token` is 3"), "{error}");
}
