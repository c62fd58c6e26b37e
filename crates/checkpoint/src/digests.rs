//! Digests of a model's packed experts, kept in a file, so that they need not be computed at every start.
//!
//! A file of text: what it was made for (model, compute mode, dtype of experts, every shard's length and time of change),
//! a line for every expert, and a digest of all lines above it. Always holds: a file is used only if it was written whole and
//! the shards are unchanged since. Knows nothing about how experts are packed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use muster_types::{Compute, ExpertKey, WeightDType, WeightDigest};

use crate::checkpoint::{Checkpoint, Shard};

/// The folder in a model's directory where such files are.
pub const FOLDER: &str = ".muster";
const MAGIC: &str = "muster expert digests 1";
/// Bytes of a file: more than any model's experts take.
const LONGEST: u64 = 64 << 20;

/// Contents of such a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DigestFile {
    /// The lines that say what it was made for.
    made_for: Vec<String>,
    /// By layer and expert.
    digests: BTreeMap<(u32, u32), WeightDigest>,
}

/// A file of digests that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DigestFileError {
    /// The operating system refused.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file, or its folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The folder in the model's directory is a link: its target is not the model's.
    #[error("{path} is a link, and nothing is written through it; put a folder there, or name a file: --digests=FILE", path = .path.display())]
    Link {
        /// The folder.
        path: PathBuf,
    },
    /// It is no such file, or not all of it.
    #[error("{path}: {reason}; delete it, or make it anew with `muster check-model MODEL --digests`", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Name of such a file, for experts that are packed so.
#[must_use]
pub fn file_name(compute: Compute, dtype: WeightDType) -> String {
    format!("experts-{compute}-{dtype}.digests")
}

/// Where such files may be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// The one file to use; `None` looks for those below.
    pub file: Option<PathBuf>,
    /// The model's directory, for a file that was made there on purpose.
    pub model: Option<PathBuf>,
    /// Where a process keeps what it computed.
    pub cache: Option<PathBuf>,
}

impl Places {
    /// Files that may be there, in the order in which they are looked for.
    #[must_use]
    pub fn candidates(&self, checkpoint: &Checkpoint, compute: Compute, dtype: WeightDType) -> Vec<PathBuf> {
        match &self.file {
            Some(file) => vec![file.clone()],
            None => {
                self.beside(compute, dtype).into_iter().chain(self.own(checkpoint, compute, dtype)).collect()
            }
        }
    }

    /// The file in the model's directory.
    #[must_use]
    pub fn beside(&self, compute: Compute, dtype: WeightDType) -> Option<PathBuf> {
        self.model.as_ref().map(|model| model.join(FOLDER).join(file_name(compute, dtype)))
    }

    /// Where a process keeps what it computed, if there is such a place.
    #[must_use]
    pub fn own(&self, checkpoint: &Checkpoint, compute: Compute, dtype: WeightDType) -> Option<PathBuf> {
        if self.file.is_some() {
            return self.file.clone();
        }
        // Copies of a model have files of other times, and so have files of their own.
        let model = self.model.as_ref()?;
        let model = model.canonicalize().unwrap_or_else(|_| model.clone());
        let place = WeightDigest::of([model.as_os_str().as_encoded_bytes()]).to_string();
        let name = format!("{}-{:.12}", checkpoint.fingerprint().short(), place);
        Some(self.cache.as_ref()?.join("digests").join(name).join(file_name(compute, dtype)))
    }
}

impl DigestFile {
    /// Of a model's experts, packed so.
    #[must_use]
    pub fn new(
        checkpoint: &Checkpoint,
        compute: Compute,
        dtype: WeightDType,
        digests: &BTreeMap<ExpertKey, WeightDigest>,
    ) -> Self {
        let number = |key: &ExpertKey| (key.layer.get(), key.expert.get());
        let digests = digests.iter().map(|(key, digest)| (number(key), *digest)).collect();
        Self { made_for: made_for(checkpoint, compute, dtype), digests }
    }

    /// The digest of an expert.
    #[must_use]
    pub fn get(&self, key: ExpertKey) -> Option<WeightDigest> {
        self.digests.get(&(key.layer.get(), key.expert.get())).copied()
    }

    /// The mismatch, if it cannot be used for the model as it is now: the recorded and the current line.
    #[must_use]
    pub fn stale(&self, checkpoint: &Checkpoint, compute: Compute, dtype: WeightDType) -> Option<String> {
        let now = made_for(checkpoint, compute, dtype);
        if let Some((then, now)) = self.made_for.iter().zip(&now).find(|(then, now)| then != now) {
            return Some(format!("it was made for `{then}`, and there is `{now}`"));
        }
        if self.made_for.len() != now.len() {
            return Some(format!("it was made for {} shards", self.made_for.len().saturating_sub(3)));
        }
        let experts: usize = checkpoint.spec().moe_layers().map(|(_, moe)| moe.experts as usize).sum();
        let is_complete = self.digests.len() == experts
            && checkpoint.spec().moe_layers().all(|(layer, moe)| {
                (0..moe.experts).all(|expert| self.digests.contains_key(&(layer, expert)))
            });
        (!is_complete).then(|| format!("it has {} experts, and the model has {experts}", self.digests.len()))
    }

    /// Reads a file; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read, or is not one that was written whole.
    pub fn read(path: &Path) -> Result<Option<Self>, DigestFileError> {
        let io = |source| DigestFileError::Io { path: path.to_owned(), source };
        let damaged = |reason: String| DigestFileError::Damaged { path: path.to_owned(), reason };
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(io)?,
        };
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > LONGEST {
            return Err(damaged(format!("is longer than {LONGEST} bytes")));
        }
        let text = String::from_utf8(bytes).map_err(|_| damaged("is not text".to_owned()))?;
        Self::parse(&text).map(Some).map_err(damaged)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let foreign = || format!("does not begin with `{MAGIC}`");
        let rest = text.strip_prefix(MAGIC).and_then(|rest| rest.strip_prefix('\n')).ok_or_else(foreign)?;
        // The last line is the digest of all before it.
        let cut = || "is cut off or was changed: its last line is no digest of the others".to_owned();
        let body =
            text.strip_suffix('\n').and_then(|text| text.rsplit_once('\n')).ok_or_else(cut)?.0.len() + 1;
        let sum = text[body..].trim_end_matches('\n').strip_prefix("sum ").ok_or_else(cut)?;
        if sum.parse() != Ok(WeightDigest::of([&text.as_bytes()[..body]])) {
            return Err(cut());
        }
        let lines = rest[..body - MAGIC.len() - 1].lines();
        let (mut made_for, mut digests) = (Vec::new(), BTreeMap::new());
        for (number, line) in (2..).zip(lines) {
            let wrong =
                || format!("line {number} is not what it should be: {:.80}", line.escape_debug().to_string());
            match line.strip_prefix("expert ") {
                None if digests.is_empty() => made_for.push(line.to_owned()),
                None => return Err(wrong()),
                Some(entry) => {
                    let (key, digest) = parse_expert(entry).ok_or_else(wrong)?;
                    if digests.last_key_value().is_some_and(|(last, _)| *last >= key) {
                        return Err(wrong());
                    }
                    digests.insert(key, digest);
                }
            }
        }
        Ok(Self { made_for, digests })
    }

    /// Writes the file at once or not at all, and its folder where there is none.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&self, path: &Path) -> Result<(), DigestFileError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| DigestFileError::Io { path, source }
        };
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let is_link = fs::symlink_metadata(folder).is_ok_and(|folder| folder.is_symlink());
        if is_link && folder.file_name().is_some_and(|name| name == FOLDER) {
            return Err(DigestFileError::Link { path: folder.to_owned() });
        }
        fs::create_dir_all(folder).map_err(io(folder))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let new = folder.join(format!(".{name}.{}", std::process::id()));
        let written = (|| {
            // Of a process of the same number that was killed meanwhile, on this machine or another.
            let _ = fs::remove_file(&new);
            let mut file = OpenOptions::new().write(true).create_new(true).open(&new)?;
            file.write_all(self.to_text().as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, path)
        })();
        written.map_err(|error| {
            let _ = fs::remove_file(&new);
            io(path)(error)
        })
    }

    fn to_text(&self) -> String {
        let mut text = format!("{MAGIC}\n");
        for line in &self.made_for {
            text += &format!("{line}\n");
        }
        for ((layer, expert), digest) in &self.digests {
            text += &format!("expert {layer} {expert} {digest}\n");
        }
        let sum = WeightDigest::of([text.as_bytes()]);
        text + &format!("sum {sum}\n")
    }
}

/// `LAYER EXPERT DIGEST`.
fn parse_expert(entry: &str) -> Option<((u32, u32), WeightDigest)> {
    let mut words = entry.split(' ');
    let mut number = || -> Option<u32> {
        let word = words.next()?;
        let number: u32 = word.parse().ok()?;
        (number.to_string() == word).then_some(number)
    };
    let key = (number()?, number()?);
    let digest = words.next()?.parse().ok()?;
    words.next().is_none().then_some((key, digest))
}

/// What digests of this model's experts depend on, a line each.
fn made_for(checkpoint: &Checkpoint, compute: Compute, dtype: WeightDType) -> Vec<String> {
    let shard = |Shard { name, length, modified }: Shard<'_>| {
        let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified = since.map_or_else(|| "-".to_owned(), |since| format!("{:?}", since.as_nanos()));
        format!("shard {name} {length} {modified}")
    };
    let mut lines = vec![
        format!("model {}", checkpoint.fingerprint()),
        format!("compute {compute}"),
        format!("experts {dtype}"),
    ];
    lines.extend(checkpoint.shards().map(shard));
    lines
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest(byte: u8) -> WeightDigest {
        WeightDigest::new([byte; 32])
    }

    fn some() -> DigestFile {
        let made_for = ["model aa", "compute bf16", "experts q8", "shard a.safetensors 12 7"];
        let digests = [((0, 1), digest(1)), ((0, 10), digest(2)), ((3, 0), digest(3))];
        DigestFile { made_for: made_for.map(str::to_owned).into(), digests: digests.into() }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/file.digests");
        assert_eq!(DigestFile::read(&path).unwrap(), None);
        for _ in 0..2 {
            some().write(&path).unwrap();
            assert_eq!(DigestFile::read(&path).unwrap(), Some(some()));
        }
        let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        let nowhere = path.join("below-a-file/x");
        let text = some().write(&nowhere).unwrap_err().to_string();
        assert!(text.contains("file.digests"), "{text}");
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_written_through_a_link_in_a_models_directory() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let folder = directory.path().join(FOLDER);
        std::os::unix::fs::symlink(elsewhere.path(), &folder).unwrap();
        let text = some().write(&folder.join("x.digests")).unwrap_err().to_string();
        assert!(text.contains("is a link") && text.contains("--digests=FILE"), "{text}");
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
        // A file that is a link is replaced, not followed.
        fs::remove_file(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        let (link, target) = (folder.join("x.digests"), elsewhere.path().join("target"));
        fs::write(&target, "kept").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        some().write(&link).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "kept");
        assert_eq!(DigestFile::read(&link).unwrap(), Some(some()));
    }

    #[test]
    fn what_was_not_written_whole_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.digests");
        let good = some().to_text();
        let refused = |text: &[u8]| {
            fs::write(&path, text).unwrap();
            let error = DigestFile::read(&path).unwrap_err().to_string();
            assert!(error.contains("x.digests") && error.contains("--digests"), "{error}");
        };
        for length in 0..good.len() {
            refused(&good.as_bytes()[..length]);
        }
        for at in 0..good.len() {
            let mut bytes = good.clone().into_bytes();
            bytes[at] ^= 1;
            refused(&bytes);
        }
        refused(format!("{good}\n").as_bytes());
        // Sealed, and still nonsense.
        for line in ["expert 0 1", "expert 3 0 00", "nonsense", "expert 4 04 ", "expert 0 1 "] {
            let body = format!("{}{line}{}\n", good.rsplit_once("sum").unwrap().0, digest(4));
            refused(format!("{body}sum {}\n", WeightDigest::of([body.as_bytes()])).as_bytes());
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(muster expert digests 1\n)?.{0,40}(\n.{0,40}){0,4}") {
            let _ = DigestFile::parse(&text);
        }
    }
}
