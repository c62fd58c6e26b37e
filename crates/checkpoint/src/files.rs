//! The files of one model: a directory, or bytes built into the program. Opens by plain name, reads by position.
//!
//! What always holds: a name is one plain component; what is opened is a regular file inside the directory, or, in a
//! Hugging Face hub cache, inside the same model's folder, where snapshots link to blobs, unless links to elsewhere are
//! allowed by name; no whole file is read without a cap. Files are read by position and never mapped (`docs/decisions/0002-positioned-reads.md`). Knows
//! nothing about formats.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use crate::error::{CheckpointError, FileError};
use crate::untrusted::is_plain;

/// Where a model's files come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A model directory. Links in it lead nowhere but into it, or, in a hub cache, into the model's folder.
    Directory(PathBuf),
    /// A model directory whose files may be links to anywhere.
    Linked(PathBuf),
    /// Files built into the program.
    Embedded {
        /// The model's name.
        name: &'static str,
        /// Names and contents.
        files: &'static [(&'static str, &'static [u8])],
    },
}

impl Source {
    /// The model's directory, if it has one.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(path) | Self::Linked(path) => Some(path),
            Self::Embedded { .. } => None,
        }
    }
}

/// The opened source.
#[derive(Debug)]
pub(crate) enum Files {
    Directory {
        root: PathBuf,
        /// What links may lead into; `None`: anything.
        boundary: Option<PathBuf>,
    },
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl Files {
    /// Opens the source and says what the model is called.
    pub(crate) fn open(source: &Source) -> Result<(Self, String), CheckpointError> {
        let (path, may_leave) = match source {
            Source::Embedded { name, files } => return Ok((Self::Embedded(files), (*name).to_owned())),
            Source::Directory(path) => (path, false),
            Source::Linked(path) => (path, true),
        };
        let fail = |reason: String| CheckpointError::Directory { path: path.clone(), reason };
        let root = fs::canonicalize(path).map_err(|error| fail(error.to_string()))?;
        if !root.is_dir() {
            return Err(fail("is not a directory".to_owned()));
        }
        let last =
            root.file_name().map_or_else(|| "model".into(), |last| last.to_string_lossy().into_owned());
        let (folder, name) = hub_folder(&root).unwrap_or_else(|| (root.clone(), last));
        Ok((Self::Directory { boundary: (!may_leave).then_some(folder), root }, name))
    }

    /// The file of this name; `None` when there is none.
    pub(crate) fn file(&self, name: &str) -> Result<Option<Blob>, CheckpointError> {
        if !is_plain(name) {
            return Err(FileError::Name.of(name));
        }
        self.find(name)
    }

    fn find(&self, name: &str) -> Result<Option<Blob>, CheckpointError> {
        match self {
            Self::Embedded(files) => {
                Ok(files.iter().find(|(known, _)| *known == name).map(|&(known, bytes)| Blob {
                    name: known.to_owned(),
                    length: bytes.len() as u64,
                    data: Data::Static(bytes),
                }))
            }
            Self::Directory { root, boundary } => {
                open_regular(&root.join(name), boundary.as_deref(), name).map_err(|problem| problem.of(name))
            }
        }
    }

    /// The whole of a file that may be at most `cap` bytes long; `None` when there is none.
    pub(crate) fn read_whole(&self, name: &str, cap: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.file(name)?.map(|blob| whole(&blob, name, cap)).transpose()
    }

    /// The same for a file in a folder of the directory. Both names are the program's own.
    pub(crate) fn read_nested(
        &self,
        folder: &'static str,
        name: &'static str,
        cap: u64,
    ) -> Result<Option<Vec<u8>>, CheckpointError> {
        let name = format!("{folder}/{name}");
        self.find(&name)?.map(|blob| whole(&blob, &name, cap)).transpose()
    }
}

/// All bytes of a file of at most `cap`.
fn whole(blob: &Blob, name: &str, cap: u64) -> Result<Vec<u8>, CheckpointError> {
    let too_long = || FileError::TooLong { length: blob.length, cap }.of(name);
    let length = usize::try_from(blob.length).map_err(|_| too_long())?;
    if blob.length > cap {
        return Err(too_long());
    }
    let mut bytes = vec![0; length];
    blob.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// The model's folder and name, if `root` is a snapshot in a hub cache: `models--org--name/snapshots/revision`.
fn hub_folder(root: &Path) -> Option<(PathBuf, String)> {
    let snapshots = root.parent()?;
    let folder = snapshots.parent()?;
    let name = folder.file_name()?.to_str()?.strip_prefix("models--")?;
    (snapshots.file_name()? == "snapshots").then(|| (folder.to_owned(), name.replacen("--", "/", 1)))
}

fn open_regular(path: &Path, boundary: Option<&Path>, name: &str) -> Result<Option<Blob>, FileError> {
    let target = match fs::canonicalize(path) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return if fs::symlink_metadata(path).is_ok() { Err(FileError::Dangling) } else { Ok(None) };
        }
        Err(error) => return Err(FileError::Io(error)),
    };
    let is_inside =
        |boundary| target.strip_prefix(boundary).is_ok_and(|rest| rest.components().all(is_normal));
    if !boundary.is_none_or(is_inside) {
        return Err(FileError::Outside);
    }
    // Looked at before opening as well, because opening a pipe waits for its other end.
    if !fs::metadata(&target).map_err(FileError::Io)?.is_file() {
        return Err(FileError::NotRegular);
    }
    let file = File::open(&target).map_err(FileError::Io)?;
    let metadata = file.metadata().map_err(FileError::Io)?;
    if !metadata.is_file() {
        return Err(FileError::NotRegular);
    }
    let modified = metadata.modified().ok();
    Ok(Some(Blob { name: name.to_owned(), length: metadata.len(), data: Data::File { file, modified } }))
}

fn is_normal(component: Component<'_>) -> bool {
    matches!(component, Component::Normal(_))
}

/// One open file. Holds its descriptor, so that replacing the name does not change what is read.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) name: String,
    /// Bytes, when it was opened.
    pub(crate) length: u64,
    data: Data,
}

#[derive(Debug)]
enum Data {
    File { file: File, modified: Option<SystemTime> },
    Static(&'static [u8]),
}

impl Blob {
    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// When the range is not in the file, reading fails, or the file is no longer as it was when opened.
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        match &self.data {
            Data::Static(bytes) => {
                let start = usize::try_from(offset).ok();
                let end = start.and_then(|start| start.checked_add(buffer.len()));
                let range = start.zip(end).and_then(|(start, end)| bytes.get(start..end));
                let range = range.ok_or_else(|| self.changed(self.length))?;
                buffer.copy_from_slice(range);
                Ok(())
            }
            Data::File { file, modified } => {
                let outcome = file.read_exact_at(buffer, offset);
                // After reading, so that a change before or during it shows; and before the outcome is looked at,
                // because "the file changed" explains a short read better than "end of file".
                let now = file.metadata().map_err(|error| FileError::Io(error).of(&self.name))?;
                if now.len() != self.length || now.modified().ok() != *modified {
                    return Err(self.changed(now.len()));
                }
                outcome.map_err(|error| FileError::Io(error).of(&self.name))
            }
        }
    }

    /// When it was changed last, as of when it was opened.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        match &self.data {
            Data::Static(_) => None,
            Data::File { modified, .. } => *modified,
        }
    }

    fn changed(&self, now: u64) -> CheckpointError {
        CheckpointError::Changed { file: self.name.clone(), was: self.length, now }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_ranges_are_checked() {
        let files = Files::Embedded(&[("a.bin", b"0123")]);
        let blob = files.file("a.bin").unwrap().unwrap();
        let mut two = [0; 2];
        blob.read_at(2, &mut two).unwrap();
        assert_eq!(&two, b"23");
        assert!(blob.read_at(3, &mut two).is_err());
        assert!(files.file("b.bin").unwrap().is_none());
    }

    #[test]
    fn hub_snapshots_are_named_after_their_model() {
        let (folder, name) = hub_folder(Path::new("/c/models--org--a--b/snapshots/abc")).unwrap();
        assert_eq!((folder.as_path(), name.as_str()), (Path::new("/c/models--org--a--b"), "org/a--b"));
        assert!(hub_folder(Path::new("/c/models--org--a/other/abc")).is_none());
    }
}
