//! Directories, indices, links and side files; and what the fingerprint depends on.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use muster_checkpoint::{Checkpoint, CheckpointError, FileError, Source};
use serde_json::{Value, json};

use crate::model::{FIRST, Model, SECOND, open, refused, shard_bytes};

const INDEX: &str = "model.safetensors.index.json";
const NORM: &str = "model.norm.weight";

#[test]
fn what_is_no_model_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    refused("absent", &dir.path().join("none"), &["model directory", "none"]);
    fs::write(dir.path().join("file"), "x").unwrap();
    refused("a file", &dir.path().join("file"), &["model directory", "is not a directory"]);
    refused("empty", dir.path(), &["config.json: not found"]);
    Model::mixtral().write(dir.path());
    for name in [INDEX, FIRST, SECOND] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02").unwrap();
    refused("pickles only", dir.path(), &["neither model.safetensors nor", "(.bin) and GGUF"]);
}

#[test]
fn a_single_file_needs_no_index() {
    let mut model = Model::mixtral();
    let second = model.shards.remove(1).1;
    model.shards[0].1.extend(second);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), serde_json::to_vec(&model.config).unwrap()).unwrap();
    fs::write(dir.path().join("model.safetensors"), shard_bytes(&model.shards[0].1)).unwrap();
    let single = open(dir.path()).unwrap();
    let sharded = Model::mixtral().written();
    let sharded = open(sharded.path()).unwrap();
    assert_eq!(single.spec(), sharded.spec());
    assert_ne!(single.fingerprint(), sharded.fingerprint());
    assert!(single.roles().eq(sharded.roles()));
}

fn with_index(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let mut model = Model::mixtral();
    let mut index = model.index();
    change(&mut index);
    model.index = Some(index);
    model.written()
}

#[test]
fn an_index_that_disagrees_with_the_shards_is_refused() {
    let elsewhere = with_index(|index| index["weight_map"][NORM] = json!(FIRST));
    refused("listed elsewhere", elsewhere.path(), &[INDEX, NORM, FIRST, "does not have it"]);
    let absent = with_index(|index| index["weight_map"]["model.ghost"] = json!(FIRST));
    refused("listed but absent", absent.path(), &[INDEX, "model.ghost", FIRST, "does not have it"]);
    let unlisted = with_index(|index| drop(index["weight_map"].as_object_mut().unwrap().remove(NORM)));
    refused("unlisted", unlisted.path(), &[INDEX, NORM, SECOND, "not listed there"]);
    let missing = with_index(|_| ());
    fs::remove_file(missing.path().join(SECOND)).unwrap();
    refused("missing shard", missing.path(), &[INDEX, SECOND, "not in the model directory"]);
    let other_model = with_index(|_| ());
    fs::write(other_model.path().join(SECOND), shard_bytes(&Model::qwen3_moe().shards[0].1)).unwrap();
    refused("shard of another model", other_model.path(), &[INDEX, "model"]);

    let mut twice = Model::mixtral();
    twice.add(0, NORM, &[8]);
    refused("in two shards", twice.written().path(), &[INDEX, NORM, FIRST, SECOND, "in both"]);
}

#[test]
fn an_index_that_leads_out_or_is_damaged_is_refused() {
    let dir = Model::mixtral().written();
    let inside = dir.path().join("inside.safetensors");
    let absolute = inside.to_str().unwrap();
    for shard in [
        "../x.safetensors",
        "a/x.safetensors",
        "a\\x.safetensors",
        "..",
        "",
        absolute,
        "model.bin",
        "x.safetensors\n",
    ] {
        let dir = with_index(|index| index["weight_map"][NORM] = json!(shard));
        refused(shard, dir.path(), &[INDEX, NORM, "not the plain name of a .safetensors file"]);
    }
    let number = with_index(|index| index["weight_map"][NORM] = json!(3));
    refused("a number", number.path(), &[INDEX, NORM, "is in 3"]);
    let upper = FIRST.to_uppercase().replace(".SAFETENSORS", ".safetensors");
    let clash = with_index(|index| index["weight_map"][NORM] = json!(upper));
    refused("two cases", clash.path(), &[INDEX, FIRST, "differ in case alone"]);
    for (text, says) in [
        ("", "not valid JSON"),
        ("{}", "`weight_map` must be an object"),
        (r#"{"weight_map": []}"#, "`weight_map` must be an object"),
        (r#"{"weight_map": {}}"#, "`weight_map` is empty"),
        (r#"{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}"#, "key `a` comes twice"),
    ] {
        fs::write(dir.path().join(INDEX), text).unwrap();
        refused(text, dir.path(), &[INDEX, says]);
    }
    let many = (0..4097)
        .map(|i| (format!("t{i}"), json!(format!("{i}.safetensors"))))
        .collect::<serde_json::Map<_, _>>();
    let many = with_index(|index| index["weight_map"] = Value::Object(many));
    refused("4097 shards", many.path(), &[INDEX, "lists 4097 shards"]);
}

#[test]
fn only_regular_files_inside_the_directory_are_opened() {
    let outside = Model::mixtral().written();
    for name in [FIRST, "config.json", INDEX] {
        let dir = Model::mixtral().written();
        let path = dir.path().join(name);
        let replace = |target: &Path| {
            fs::remove_file(&path).unwrap();
            symlink(target, &path).unwrap();
        };
        replace(&outside.path().join(name));
        refused("a link out", dir.path(), &[name, "leads out of the model directory"]);
        replace(&dir.path().join("gone"));
        refused("a link to nothing", dir.path(), &[name, "is a link to nothing"]);
        replace(Path::new("/dev/zero"));
        refused("a device", dir.path(), &[name, "leads out of the model directory"]);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused("a directory", dir.path(), &[name, "is not a regular file"]);
        fs::remove_dir(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        refused("a pipe", dir.path(), &[name, "is not a regular file"]);
    }
}

#[test]
fn links_within_the_directory_are_followed() {
    let dir = Model::mixtral().written();
    fs::create_dir(dir.path().join("..data")).unwrap();
    fs::rename(dir.path().join(FIRST), dir.path().join("..data").join(FIRST)).unwrap();
    symlink(Path::new("..data").join(FIRST), dir.path().join(FIRST)).unwrap();
    let by_link = tempfile::tempdir().unwrap();
    symlink(dir.path(), by_link.path().join("model")).unwrap();
    open(dir.path()).unwrap();
    open(&by_link.path().join("model")).unwrap();
}

#[test]
fn a_hub_cache_links_to_its_blobs_and_nowhere_else() {
    let hub = tempfile::tempdir().unwrap();
    let folder = hub.path().join("models--org--tiny");
    let (blobs, snapshot) = (folder.join("blobs"), folder.join("snapshots/abc"));
    for dir in [&blobs, &snapshot, &folder.join("refs")] {
        fs::create_dir_all(dir).unwrap();
    }
    fs::write(folder.join("refs/main"), "abc").unwrap();
    Model::mixtral().write(&blobs);
    for name in ["config.json", INDEX, FIRST, SECOND] {
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    let found = muster_checkpoint::locate("org/tiny", &[hub.path().to_owned()]).unwrap();
    let checkpoint = open(&found).unwrap();
    assert_eq!(checkpoint.name(), "org/tiny");
    checkpoint.roles().for_each(|role| drop(checkpoint.read(role).unwrap()));

    fs::rename(blobs.join(SECOND), hub.path().join(SECOND)).unwrap();
    fs::remove_file(snapshot.join(SECOND)).unwrap();
    symlink(hub.path().join(SECOND), snapshot.join(SECOND)).unwrap();
    refused("a link out of the model's folder", &found, &[SECOND, "leads out"]);
}

#[test]
fn links_to_elsewhere_are_followed_where_that_is_asked_for() {
    let elsewhere = Model::mixtral().written();
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", INDEX, FIRST, SECOND] {
        symlink(elsewhere.path().join(name), dir.path().join(name)).unwrap();
    }
    refused("links alone", dir.path(), &["leads out of the model directory", "--allow-links"]);
    let linked = || Source::Linked(dir.path().to_owned());
    let checkpoint = Checkpoint::open(&linked()).unwrap();
    checkpoint.roles().for_each(|role| drop(checkpoint.read(role).unwrap()));
    assert_eq!(checkpoint.fingerprint(), open(elsewhere.path()).unwrap().fingerprint());
    // What is no regular file stays refused.
    fs::remove_file(dir.path().join(FIRST)).unwrap();
    symlink("/dev/zero", dir.path().join(FIRST)).unwrap();
    let error = Checkpoint::open(&linked()).unwrap_err().to_string();
    assert!(error.contains(FIRST) && error.contains("is not a regular file"), "{error}");
}

#[test]
fn the_template_for_tools_is_in_a_folder_of_its_own() {
    let dir = Model::mixtral().written();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.tool_template().unwrap(), None);
    let folder = dir.path().join("additional_chat_templates");
    fs::create_dir(&folder).unwrap();
    assert_eq!(checkpoint.tool_template().unwrap(), None);
    fs::write(folder.join("tool_use.jinja"), "t").unwrap();
    assert_eq!(checkpoint.tool_template().unwrap().as_deref(), Some(b"t".as_slice()));
    fs::remove_file(folder.join("tool_use.jinja")).unwrap();
    symlink("/etc/hostname", folder.join("tool_use.jinja")).unwrap();
    assert!(checkpoint.tool_template().is_err());
}

#[test]
fn side_files_are_read_by_plain_name_and_capped() {
    let dir = Model::mixtral().written();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let huge = fs::File::create(dir.path().join("huge.json")).unwrap();
    huge.set_len((128 << 20) + 1).unwrap();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.side_file("tokenizer.json").unwrap().as_deref(), Some(b"{}".as_slice()));
    assert_eq!(checkpoint.side_file("chat_template.jinja").unwrap(), None);
    for name in ["../config.json", "/etc/hostname", "a/b", "..", "", ".env", "a\0b"] {
        let error = checkpoint.side_file(name).unwrap_err();
        assert!(matches!(error, CheckpointError::File { problem: FileError::Name, .. }), "{name:?}");
    }
    let error = checkpoint.side_file("huge.json").unwrap_err().to_string();
    assert_eq!(error, "huge.json: is 134217729 bytes long; at most 134217728 are read");
    symlink("/etc/hostname", dir.path().join("link.json")).unwrap();
    assert!(checkpoint.side_file("link.json").is_err());
}

#[test]
fn the_fingerprint_depends_on_configuration_index_and_headers_alone() {
    let of = |model: &Model| open(model.written().path()).unwrap().fingerprint();
    let good = of(&Model::mixtral());
    assert_eq!(good, of(&Model::mixtral()), "not on the place or the time");
    let mut config = Model::mixtral();
    config.config.insert("use_cache".to_owned(), json!(true));
    assert_ne!(good, of(&config));
    let mut index = Model::mixtral();
    index.index = Some(json!({"weight_map": index.index()["weight_map"]}));
    assert_ne!(good, of(&index));
    let mut order = Model::mixtral();
    order.shards[0].1.reverse();
    assert_ne!(good, of(&order));
    let mut values = Model::mixtral();
    values.tensor(NORM).bytes.fill(0);
    assert_eq!(good, of(&values), "weights are not digested");
}

#[test]
fn names_come_from_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("my-model");
    fs::create_dir(&model).unwrap();
    Model::mixtral().write(&model);
    assert_eq!(open(&model).unwrap().name(), "my-model");
    assert_eq!(open(&model.join(".")).unwrap().name(), "my-model");
    let empty = Source::Embedded { name: "none", files: &[] };
    assert!(Checkpoint::open(&empty).unwrap_err().to_string().contains("config.json: not found"));
}
