//! A private directory for Unix sockets, locked while this process lives, so that later processes can detect and remove
//! directories that killed processes left behind.

use std::fs::{self, File, Metadata, Permissions, TryLockError};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use muster_dispatch_grpc::Address;
use tempfile::TempDir;

use crate::failure::Failure;

const PREFIX: &str = "muster-run-";
/// Directory for sockets when the path of the temporary directory is too long.
const SHORT: &str = "/tmp";
/// Most attempts: another process may take a directory for abandoned between its creation and its lock.
const ATTEMPTS: usize = 8;

/// The directory; removed with its content when dropped.
pub(crate) struct SocketDirectory {
    directory: TempDir,
    /// The lock, where the file system has locks.
    _lock: Option<File>,
}

impl SocketDirectory {
    /// Creates a directory and removes abandoned ones.
    pub(crate) fn make() -> Result<Self, Failure> {
        let base = base(&std::env::temp_dir())?;
        let made = Self::below(&base)?;
        // Best effort: nothing depends on the cleanup.
        if let Ok(own) = fs::symlink_metadata(made.path()) {
            sweep(&base, &own);
        }
        Ok(made)
    }

    fn below(base: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::input(format!(
                "TMPDIR: cannot make a directory for sockets in {}: {error}; set TMPDIR to a directory that can be written",
                base.display()
            ))
        };
        for _ in 0..ATTEMPTS {
            let directory = tempfile::Builder::new()
                .prefix(PREFIX)
                .permissions(Permissions::from_mode(0o700))
                .tempdir_in(base)
                .map_err(failed)?;
            let Ok(lock) = File::open(directory.path()) else { continue };
            match lock.try_lock() {
                Ok(()) if is_there(directory.path(), &lock) => {
                    return Ok(Self { directory, _lock: Some(lock) });
                }
                Err(TryLockError::Error(_)) => return Ok(Self { directory, _lock: None }),
                Ok(()) | Err(TryLockError::WouldBlock) => {}
            }
        }
        Err(failed(std::io::Error::other("others take it away again and again")))
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Parent directory: `temporary`, if socket paths in it fit the system's limit, else a short one.
fn base(temporary: &Path) -> Result<PathBuf, Failure> {
    if fits(temporary) {
        return Ok(temporary.to_owned());
    }
    let shown = temporary.display();
    if !Path::new(SHORT).is_dir() {
        return Err(Failure::input(format!(
            "TMPDIR: {shown} is too long for the paths of Unix sockets, and there is no {SHORT}; set TMPDIR to a shorter one"
        )));
    }
    tracing::warn!("TMPDIR: {shown} is too long for the paths of Unix sockets; they are in {SHORT}");
    Ok(PathBuf::from(SHORT))
}

/// Whether the longest socket path below `base` fits the system's limit.
fn fits(base: &Path) -> bool {
    let longest = base.join(format!("{PREFIX}XXXXXX")).join("999.sock");
    format!("unix:{}", longest.display()).parse::<Address>().is_ok()
}

/// Whether `path` still names the opened directory.
fn is_there(path: &Path, opened: &File) -> bool {
    let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((fs::symlink_metadata(path), opened.metadata()), (Ok(now), Ok(then)) if same(&now, &then))
}

/// Removes directories below `base` like `own`, of the same user, that are abandoned.
fn sweep(base: &Path, own: &Metadata) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.filter_map(Result::ok) {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let is_ours = fs::symlink_metadata(&path)
            .is_ok_and(|found| found.is_dir() && (found.uid(), found.mode()) == (own.uid(), own.mode()));
        let Some(lock) = is_ours.then(|| File::open(&path).ok()).flatten() else { continue };
        if lock.try_lock().is_ok() {
            take_away(&path);
        }
    }
}

/// Removes a directory of sockets; one with any other content stays.
fn take_away(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    match fs::remove_dir(path) {
        Ok(()) => tracing::debug!(path = %path.display(), "took away sockets that nobody uses"),
        Err(error) => tracing::debug!(path = %path.display(), %error, "left alone"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_is_left_behind_is_taken_away_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        let made = |name: &str| {
            let path = at(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
            path
        };
        let left = made("muster-run-left");
        drop(UnixListener::bind(left.join("0.sock")).unwrap());
        let filled = made("muster-run-filled");
        fs::write(filled.join("notes"), "mine").unwrap();
        let open = made("muster-run-open");
        fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
        let other = made("muster-other");
        std::os::unix::fs::symlink(&other, at("muster-run-link")).unwrap();
        let used = SocketDirectory::below(base.path()).unwrap();

        let own = SocketDirectory::below(base.path()).unwrap();
        sweep(base.path(), &fs::symlink_metadata(own.path()).unwrap());
        assert!(!left.exists());
        for kept in [&filled, &open, &other, &at("muster-run-link")] {
            assert!(kept.exists(), "{}", kept.display());
        }
        assert!(used.path().exists() && own.path().exists() && filled.join("notes").exists());
        let gone = used.path().to_owned();
        drop(used);
        assert!(!gone.exists());
    }

    #[test]
    fn sockets_go_where_their_paths_fit() {
        let short = tempfile::tempdir().unwrap();
        assert_eq!(base(short.path()).unwrap(), short.path());
        let long = short.path().join("x".repeat(100));
        assert_eq!(base(&long).unwrap(), Path::new(SHORT));
        for length in 0..100 {
            let base = PathBuf::from(format!("/{}", "x".repeat(length)));
            let socket = base.join(format!("{PREFIX}XXXXXX")).join("255.sock");
            assert!(!fits(&base) || socket.as_os_str().len() <= 103, "{length}");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_made_names_the_variable() {
        let absent = tempfile::tempdir().unwrap().path().join("gone");
        let Err(Failure::Input(message)) = SocketDirectory::below(&absent) else { panic!("it was made") };
        assert!(
            message.starts_with("TMPDIR: cannot make a directory") && message.contains("gone"),
            "{message}"
        );
    }
}
