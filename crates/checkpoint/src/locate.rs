//! From what a person types to a model directory: a path, a model's folder in a Hugging Face hub cache, or `org/name` in one.
//!
//! The cache keeps a model under `models--org--name`, with `refs/main` naming the current one of its `snapshots`.
//! Reads directories only; downloads nothing, and takes its roots as arguments.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::checkpoint::CONFIG_FILE;
use crate::untrusted::{clip, is_plain};

/// Why no directory was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocateError {
    /// A path to something else.
    #[error("{0} is not a directory; a model is a directory with config.json and safetensors files")]
    NotDirectory(String),
    /// A model's folder in a hub cache that does not say which of its snapshots is meant.
    #[error(
        "{folder} is a model's folder in a hub cache, and {found}; give one of its snapshots by its path"
    )]
    Snapshot {
        /// The folder.
        folder: String,
        /// Its contents.
        found: String,
    },
    /// Neither a directory nor a name that a hub could have.
    #[error("no directory {0}; a model is given as a directory, or as org/name once it was pulled")]
    NoDirectory(String),
    /// A name that is in none of the caches.
    #[error("no model {name}; looked at {}; fetch it with `muster pull {name}`", .looked.join(", "))]
    NotFound {
        /// The name.
        name: String,
        /// Every place that was looked at.
        looked: Vec<String>,
    },
}

/// The model directory that `name` means: itself if it is one, or of a model's folder in a hub cache the current snapshot, else
/// the model of that name in the first of `hub_roots`
/// that has it (`models--org--name/snapshots/…`, the one that `refs/main` names, or the only one).
///
/// # Errors
/// [`LocateError`], listing every place that was looked at.
pub fn locate(name: &str, hub_roots: &[PathBuf]) -> Result<PathBuf, LocateError> {
    let path = Path::new(name);
    if path.is_dir() {
        let is_folder = path.join("snapshots").is_dir() && !path.join(CONFIG_FILE).exists();
        return if is_folder { snapshot_of(path) } else { Ok(path.to_owned()) };
    }
    if path.exists() {
        return Err(LocateError::NotDirectory(clip(name)));
    }
    let Some(folder) = hub_folder_name(name) else { return Err(LocateError::NoDirectory(clip(name))) };
    let mut looked = vec![path.display().to_string()];
    for root in hub_roots {
        let folder = root.join(&folder);
        looked.push(folder.display().to_string());
        if let Some(snapshot) = current_snapshot(&folder) {
            return Ok(snapshot);
        }
    }
    Err(LocateError::NotFound { name: name.to_owned(), looked })
}

/// `models--org--name` for a name that a hub could have: one or two plain parts.
fn hub_folder_name(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split('/').collect();
    let possible = parts.len() <= 2 && parts.iter().all(|part| is_plain(part) && !part.contains("--"));
    possible.then(|| format!("models--{}", parts.join("--")))
}

/// The current snapshot of a folder that was given by its path.
fn snapshot_of(folder: &Path) -> Result<PathBuf, LocateError> {
    const SHOWN: usize = 8;
    current_snapshot(folder).ok_or_else(|| {
        let entries = fs::read_dir(folder.join("snapshots")).into_iter().flatten().filter_map(Result::ok);
        let names = entries.map(|entry| clip(&entry.file_name().to_string_lossy()));
        let mut names: Vec<String> = names.take(SHOWN).collect();
        names.sort();
        let found = match names.as_slice() {
            [] => "its snapshots/ is empty: the download may be incomplete".to_owned(),
            names => format!("its refs/main names none of its snapshots {}", names.join(", ")),
        };
        LocateError::Snapshot { folder: clip(&folder.display().to_string()), found }
    })
}

fn current_snapshot(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.join("snapshots");
    let named =
        main_revision(folder).map(|revision| snapshots.join(revision)).filter(|snapshot| snapshot.is_dir());
    named.or_else(|| {
        // Two are enough to know that there is not one alone.
        let entries = fs::read_dir(&snapshots).ok()?.filter_map(Result::ok).map(|entry| entry.path());
        let mut found = entries.filter(|path| path.is_dir()).take(2);
        match (found.next(), found.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        }
    })
}

fn main_revision(folder: &Path) -> Option<String> {
    const LONGEST: u64 = 256;
    let path = folder.join("refs").join("main");
    if !path.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(path).ok()?.take(LONGEST).read_to_string(&mut text).ok()?;
    let revision = text.trim();
    is_plain(revision).then(|| revision.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(entries: &[&str], main: Option<&str>) -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("models--org--name");
        for entry in entries {
            fs::create_dir_all(folder.join("snapshots").join(entry)).unwrap();
        }
        if let Some(revision) = main {
            fs::create_dir_all(folder.join("refs")).unwrap();
            fs::write(folder.join("refs/main"), revision).unwrap();
        }
        (root, folder.join("snapshots"))
    }

    #[test]
    fn a_directory_is_itself_and_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(locate(path, &[]), Ok(dir.path().to_owned()));
        let file = dir.path().join("config.json");
        fs::write(&file, "{}").unwrap();
        assert!(locate(file.to_str().unwrap(), &[]).unwrap_err().to_string().contains("is not a directory"));
    }

    #[test]
    fn the_main_revision_wins_and_a_single_snapshot_is_enough() {
        let (root, snapshots) = cache(&["aaa", "bbb"], Some("bbb\n"));
        let empty = tempfile::tempdir().unwrap();
        let roots = [empty.path().to_owned(), root.path().to_owned()];
        assert_eq!(locate("org/name", &roots), Ok(snapshots.join("bbb")));
        let (root, snapshots) = cache(&["aaa"], None);
        assert_eq!(locate("org/name", &[root.path().to_owned()]), Ok(snapshots.join("aaa")));
        let (root, snapshots) = cache(&["aaa"], Some("../../../etc"));
        assert_eq!(locate("org/name", &[root.path().to_owned()]), Ok(snapshots.join("aaa")));
    }

    #[test]
    fn the_folder_of_a_model_means_its_current_snapshot() {
        let folder = |snapshots: &Path| snapshots.parent().unwrap().to_str().unwrap().to_owned();
        let (_root, snapshots) = cache(&["aaa", "bbb"], Some("bbb"));
        assert_eq!(locate(&folder(&snapshots), &[]), Ok(snapshots.join("bbb")));
        let (_root, snapshots) = cache(&["aaa"], None);
        assert_eq!(locate(&folder(&snapshots), &[]), Ok(snapshots.join("aaa")));
        let (_root, snapshots) = cache(&["aaa", "bbb"], None);
        let text = locate(&folder(&snapshots), &[]).unwrap_err().to_string();
        assert!(text.contains("snapshots aaa, bbb; give one of its snapshots"), "{text}");
        fs::remove_dir(snapshots.join("aaa")).unwrap();
        fs::remove_dir(snapshots.join("bbb")).unwrap();
        let text = locate(&folder(&snapshots), &[]).unwrap_err().to_string();
        assert!(text.contains("is empty"), "{text}");
        // A model that happens to have a folder of that name.
        fs::write(snapshots.parent().unwrap().join("config.json"), "{}").unwrap();
        assert_eq!(locate(&folder(&snapshots), &[]), Ok(snapshots.parent().unwrap().to_owned()));
    }

    #[test]
    fn what_is_not_there_says_where_it_was_looked_for() {
        let (root, _) = cache(&["aaa", "bbb"], None);
        let text = locate("org/name", &[root.path().to_owned()]).unwrap_err().to_string();
        assert!(text.contains(&root.path().join("models--org--name").display().to_string()), "{text}");
        assert!(text.ends_with("fetch it with `muster pull org/name`"), "{text}");
        for name in ["/no/such/place", "../up", "a/b/c", "", "a\nb", "a--b/c"] {
            assert!(matches!(locate(name, &[]), Err(LocateError::NoDirectory(_))), "{name}");
        }
    }
}
