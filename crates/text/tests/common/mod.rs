//! The tokenizers that the tests share.

#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "all of it is test code")]

use std::path::{Path, PathBuf};

use muster_text::{ChatMessage, TextError, Tokenizer, TokenizerFiles};
use serde_json::Value;

/// A file below the crate's directory.
pub(crate) fn file(path: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A JSON file below the crate's directory.
pub(crate) fn json(path: &str) -> Value {
    serde_json::from_slice(&file(path)).unwrap()
}

/// The tokenizer in a directory below the crate's.
pub(crate) fn tokenizer(directory: &str, vocab: u32) -> Tokenizer {
    let directory = PathBuf::from(directory);
    let read = |name| file(directory.join(name).to_str().unwrap());
    load(&read("tokenizer.json"), Some(&read("tokenizer_config.json")), vocab).unwrap()
}

/// The tokenizer of these two files.
pub(crate) fn load(json: &[u8], config: Option<&[u8]>, vocab: u32) -> Result<Tokenizer, TextError> {
    Tokenizer::from_files(&TokenizerFiles { config, ..TokenizerFiles::alone(json) }, vocab)
}

pub(crate) const MIXTRAL: &str = "tests/fixtures/mixtral";
pub(crate) const DEMO: &str = "../../models/demo";

pub(crate) fn mixtral() -> Tokenizer {
    tokenizer(MIXTRAL, 320)
}

pub(crate) fn demo() -> Tokenizer {
    tokenizer(DEMO, 4096)
}

/// The `decoder` of Llama-like tokenizers.
pub(crate) const LLAMA_DECODER: &str = r#"{"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;

/// A small SentencePiece-like `tokenizer.json`: three special tokens, all bytes, some words.
pub(crate) fn llama_json() -> String {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "▁▁", "h", "i", "▁h", "▁hi", "é", "世"].map(String::from));
    let vocab: serde_json::Map<String, Value> = tokens.iter().cloned().zip((0..).map(Value::from)).collect();
    let added: Vec<Value> = (0..3)
        .map(|id| {
            serde_json::json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    serde_json::json!({
        "version": "1.0", "truncation": {"max_length": 2, "direction": "Right", "stride": 0,
        "strategy": "LongestFirst"}, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": serde_json::from_str::<Value>(LLAMA_DECODER).unwrap(),
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": ["▁ h", "▁h i", "▁ ▁"]}
    })
    .to_string()
}

pub(crate) fn llama() -> Tokenizer {
    load(llama_json().as_bytes(), None, 300).unwrap()
}

pub(crate) fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage::new(role, content)
}

pub(crate) fn read_message(value: &Value) -> ChatMessage {
    message(value["role"].as_str().unwrap(), value["content"].as_str().unwrap())
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The library's own reading of a `tokenizer.json`.
pub(crate) fn library(json: &[u8]) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_bytes(json).unwrap()
}
