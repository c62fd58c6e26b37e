//! Fetches a model: the commit, its files one after the other, and the cache's reference to it.
//!
//! Always holds: all files are of one commit, and the revision's reference in the cache names it only when
//! all of them are there. Files that are already there are not fetched again,
//! and one that was cut off goes on where it stopped.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};

use crate::name::{ModelName, Revision};
use crate::select::{INDEX, Weights, small_files, weight_files};

/// Attempts per file; each goes on where the one before was cut off.
const ATTEMPTS: u32 = 5;
/// Largest index that is read; published ones stay below 20 MiB.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// Fetches `name` at `revision` and returns the directory it is in.
///
/// # Errors
/// The hub cannot be reached or refuses, the repository is not a servable model, or the cache cannot be
/// written. What was fetched stays for the next attempt.
pub(crate) fn fetch(
    name: &ModelName,
    revision: &Revision,
    cache_dir: Option<PathBuf>,
    token: Option<String>,
) -> Result<PathBuf> {
    // The standard places and the standard endpoint override, as every tool of the hub has them.
    let mut builder = ApiBuilder::from_env();
    let mut cache = Cache::from_env();
    if let Some(dir) = cache_dir {
        cache = Cache::new(absolute(&dir)?);
        builder = builder.with_cache_dir(cache.path().clone());
    }
    if token.is_some() {
        builder = builder.with_token(token);
    }
    // Attempts are counted here: the library's own would append to a resumed file from its beginning.
    let api = builder.with_retries(0).with_progress(false).build().context("cannot set up the client")?;

    let at = |revision: &str| Repo::with_revision(name.as_str().into(), RepoType::Model, revision.into());
    let asked = api.repo(at(revision.as_str()));
    let info = asked.info().map_err(|e| explain(&e, name, &asked.url("config.json")))?;
    let commit = info.sha;
    ensure!(
        commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit()),
        "{}: the hub's answer names no commit",
        name.as_str()
    );
    let available: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();

    let repo = Download { repo: api.repo(at(&commit)), cache: cache.repo(at(&commit)), name };
    let (small, weights) = small_files(&available).with_context(|| name.as_str().to_owned())?;
    for (done, file) in small.iter().enumerate() {
        repo.get(file, &format!("{}/{}", done + 1, small.len()))?;
    }
    let directory = cache.repo(at(&commit)).pointer_path(&commit);
    let index = match weights {
        Weights::Indexed => Some(read_index(&directory.join(INDEX))?),
        Weights::Single => None,
    };
    let shards = weight_files(index.as_deref(), &available).with_context(|| name.as_str().to_owned())?;
    for (done, shard) in shards.iter().enumerate() {
        repo.get(shard, &format!("{}/{}", done + 1, shards.len()))?;
    }
    cache.repo(at(revision.as_str())).create_ref(&commit).context("cannot write the cache's reference")?;
    Ok(directory)
}

/// The library links files relative to each other only between absolute paths.
fn absolute(dir: &Path) -> Result<PathBuf> {
    std::path::absolute(dir).with_context(|| format!("--cache-dir {} is not a path", dir.display()))
}

fn read_index(path: &Path) -> Result<String> {
    let shown = path.display();
    let bytes = std::fs::metadata(path).with_context(|| format!("cannot read {shown}"))?.len();
    ensure!(bytes <= MAX_INDEX_BYTES, "{shown} is {bytes} bytes, more than any index is");
    std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))
}

/// One commit of a repository, and where it is cached.
struct Download<'a> {
    repo: ApiRepo,
    cache: hf_hub::CacheRepo,
    name: &'a ModelName,
}

impl Download<'_> {
    fn get(&self, file: &str, position: &str) -> Result<()> {
        if self.cache.get(file).is_some() {
            return Ok(());
        }
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.repo.download_with_progress(file, Bar::new(position)) {
                Ok(_) => return Ok(()),
                Err(error) => {
                    let hopeless = status(&error).is_some();
                    last = Some(explain(&error, self.name, &self.repo.url(file)));
                    if hopeless {
                        break;
                    }
                }
            }
        }
        last.map_or_else(|| bail!("{file}: not attempted"), Err)
    }
}

/// The HTTP status that the hub refused with.
fn status(error: &ApiError) -> Option<u16> {
    let ApiError::RequestError(request) = error else { return None };
    // The client library's own error type is not re-exported; this is its wording of a status.
    request.to_string().strip_prefix("http status: ")?.parse().ok()
}

/// What a person can do about `error`, met when asking for `url`.
fn explain(error: &ApiError, name: &ModelName, url: &str) -> anyhow::Error {
    let name = name.as_str();
    match status(error) {
        Some(401 | 403) => anyhow!(
            "{name}: the hub refused {url}: the model does not exist, or it needs an access token \
             (--token-file FILE) of an account that accepted its terms"
        ),
        Some(404) => anyhow!("{name}: the hub has no {url}: check the name and --revision"),
        // The range asked for begins at the file's end or after it.
        Some(416) => stale_part(name, url),
        Some(status) => anyhow!("{name}: the hub answered {url} with status {status}; try again later"),
        None => match error {
            ApiError::LockAcquisition(path) => {
                anyhow!("{name}: another download holds {}; wait for it to end", path.display())
            }
            ApiError::InvalidResume => stale_part(name, url),
            ApiError::IoError(error) => anyhow!("{name}: fetching {url} into the cache failed: {error}"),
            other => anyhow!(
                "{name}: could not fetch {url}: {other}. Without access to the hub, copy the model's files \
                 to this machine by hand and serve them with --model DIR; what was fetched is kept"
            ),
        },
    }
}

fn stale_part(name: &str, url: &str) -> anyhow::Error {
    anyhow!(
        "{name}: the partial download of {url} does not fit the file; delete the `.part` files in the \
         model's `blobs` directory of the cache and try again"
    )
}

/// A progress bar for one file, on standard error, gone when the file is there.
struct Bar {
    bar: ProgressBar,
    position: String,
}

impl Bar {
    fn new(position: &str) -> Self {
        Self { bar: ProgressBar::new(0), position: position.to_owned() }
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.bar.set_length(size as u64);
        let template = "{prefix} {msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_prefix(self.position.clone());
        self.bar.set_message(filename.to_owned());
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}
