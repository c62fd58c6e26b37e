//! Which files of a repository make a model.
//!
//! Pure: lists of names and the bytes of an index in, lists of names out. Only names that are written here, and plain
//! names of shards at the top of the repository, are ever chosen; pickled weights and code are not.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use crate::name::is_plain;

/// The list of shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Every model has this.
const CONFIG: &str = "config.json";
/// Fetched where they exist.
const OPTIONAL: [&str; 8] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.json",
];
/// Shards of one model; the largest published ones have a few hundred.
const MAX_SHARDS: usize = 4096;

/// Where a repository keeps its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    /// In one file.
    Single,
    /// In the files that the index lists.
    Indexed,
}

/// The files to fetch before the shards, smallest purpose first, and where the weights are.
///
/// # Errors
/// The repository has no `config.json` or no safetensors weights.
pub(crate) fn small_files(available: &[String]) -> Result<(Vec<&'static str>, Weights)> {
    let has = |name: &str| available.iter().any(|file| file == name);
    ensure!(has(CONFIG), "it has no {CONFIG}, so it is not a model that can be served");
    let mut files = vec![CONFIG];
    files.extend(OPTIONAL.into_iter().filter(|name| has(name)));
    if has(INDEX) {
        files.push(INDEX);
        return Ok((files, Weights::Indexed));
    }
    ensure!(has(SINGLE), "it has neither {INDEX} nor {SINGLE}; only safetensors weights are read");
    Ok((files, Weights::Single))
}

/// The weight files, each once, in order. `index` is the index file's text where the weights are indexed.
///
/// # Errors
/// The index names no shard, or one that is not a plain safetensors file of the repository.
pub(crate) fn weight_files(index: Option<&str>, available: &[String]) -> Result<Vec<String>> {
    let Some(index) = index else { return Ok(vec![SINGLE.to_owned()]) };
    let index: serde_json::Value =
        serde_json::from_str(index).with_context(|| format!("{INDEX} is not JSON"))?;
    let weight_map = index["weight_map"].as_object().with_context(|| format!("{INDEX} has no weight_map"))?;
    let shards: BTreeSet<&str> = weight_map.values().filter_map(|shard| shard.as_str()).collect();
    ensure!(!shards.is_empty(), "{INDEX} names no safetensors file");
    ensure!(shards.len() <= MAX_SHARDS, "{INDEX} names more than {MAX_SHARDS} files");
    for shard in &shards {
        ensure!(is_plain(shard), "{INDEX} names {shard:?}, which is not a plain file name");
        let present = available.iter().any(|file| file == shard);
        ensure!(present, "{INDEX} names {shard}, which the repository does not have");
    }
    Ok(shards.into_iter().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_sharded_model_is_its_small_files_and_the_shards_of_the_index() {
        let available = names(&[
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            INDEX,
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "modeling_custom.py",
            "original/params.json",
        ]);
        let (small, weights) = small_files(&available).unwrap();
        assert_eq!(small, ["config.json", "generation_config.json", "tokenizer.json", INDEX]);
        assert_eq!(weights, Weights::Indexed);
        let index = r#"{"metadata": {"total_size": 12}, "weight_map": {
            "b.weight": "model-00002-of-00002.safetensors", "a.weight": "model-00001-of-00002.safetensors",
            "c.weight": "model-00002-of-00002.safetensors"}}"#;
        let expected = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(weight_files(Some(index), &available).unwrap(), expected);
    }

    #[test]
    fn a_model_in_one_file_needs_no_index() {
        let available = names(&["config.json", "model.safetensors", "chat_template.jinja"]);
        let (small, weights) = small_files(&available).unwrap();
        assert_eq!((small, weights), (vec!["config.json", "chat_template.jinja"], Weights::Single));
        assert_eq!(weight_files(None, &available).unwrap(), ["model.safetensors"]);
    }

    #[test]
    fn all_that_tokenizers_are_read_from_is_fetched() {
        let beside = [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        ];
        let available =
            [&["config.json", "model.safetensors", "additional_chat_templates/rag.jinja"], &beside[..]]
                .concat();
        let (small, _) = small_files(&names(&available)).unwrap();
        assert_eq!(small[1..], beside);
    }

    #[test]
    fn a_repository_that_cannot_be_served_is_refused() {
        for (available, word) in [
            (&["model.safetensors"][..], "config.json"),
            (&["config.json", "pytorch_model.bin"], "safetensors"),
            (&["sub/config.json", "model.safetensors"], "config.json"),
        ] {
            let error = small_files(&names(available)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn an_index_cannot_name_anything_else() {
        let available = names(&["config.json", INDEX, "a.safetensors"]);
        for (index, word) in [
            ("", "not JSON"),
            ("{}", "weight_map"),
            (r#"{"weight_map": {}}"#, "names no safetensors"),
            (r#"{"weight_map": {"w": "../a.safetensors"}}"#, "plain"),
            (r#"{"weight_map": {"w": "/etc/a.safetensors"}}"#, "plain"),
            (r#"{"weight_map": {"w": "sub/a.safetensors"}}"#, "plain"),
            (r#"{"weight_map": {"w": "\u002e./a.safetensors"}}"#, "plain"),
            (r#"{"weight_map": {"v": "a.safetensors", "w": "b.safetensors"}}"#, "does not have"),
        ] {
            let error = weight_files(Some(index), &available).unwrap_err().to_string();
            assert!(error.contains(word), "{index}: {error}");
        }
    }
}
