//! Resolves a model's name to its files; owns the built-in model.
//!
//! The only place of this program that reads the environment for model directories.

use std::env;
use std::path::PathBuf;

use muster_checkpoint::{Checkpoint, Source, locate};

use crate::failure::Failure;

/// Name of the built-in model. A directory of that name is given as `./demo`.
pub(crate) const DEMO: &str = "demo";

macro_rules! demo_files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../../models/demo/", $name)))),*]
    };
}

static DEMO_FILES: &[(&str, &[u8])] = demo_files![
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Allowed targets of links in a model's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Links {
    /// The directory itself, or in a hub cache the model's folder.
    Inside,
    /// Any file.
    Anywhere,
}

impl Links {
    /// Value of the flag.
    pub(crate) const fn of(allow_links: bool) -> Self {
        if allow_links { Self::Anywhere } else { Self::Inside }
    }
}

/// Source of the model's files.
pub(crate) fn source(model: &str, links: Links) -> Result<Source, Failure> {
    if model.is_empty() {
        return Err(Failure::input(
            "--model: is empty; give a directory, org/name of a pulled model, or demo",
        ));
    }
    if model == DEMO {
        return Ok(Source::Embedded { name: DEMO, files: DEMO_FILES });
    }
    locate(model, &hub_roots())
        .map(match links {
            Links::Inside => Source::Directory,
            Links::Anywhere => Source::Linked,
        })
        .map_err(|error| Failure::input(format!("--model: {error}")))
}

/// Opens a model and checks everything that its headers can show.
pub(crate) fn open(model: &str, links: Links) -> Result<Checkpoint, Failure> {
    Checkpoint::open(&source(model, links)?)
        .map_err(|error| Failure::input(format!("model {model}: {error}")))
}

/// The program's cache directory, if the user has one.
pub(crate) fn cache() -> Option<PathBuf> {
    let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
    caches.filter(|caches| caches.is_absolute()).map(|caches| caches.join("muster"))
}

/// Hub cache directories, in the search order of the hub's own library.
fn hub_roots() -> Vec<PathBuf> {
    let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let roots = [
        path("HF_HUB_CACHE"),
        path("HF_HOME").map(|home| home.join("hub")),
        path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")),
        path("HOME").map(|home| home.join(".cache/huggingface/hub")),
    ];
    roots.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_model_is_whole() {
        let checkpoint = open(DEMO, Links::Inside).unwrap();
        assert_eq!((checkpoint.name(), checkpoint.spec().family), ("demo", "mixtral"));
        assert!(checkpoint.side_file("tokenizer.json").unwrap().is_some());
    }
}
