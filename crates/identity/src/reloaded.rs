//! Something read from files, and read again when they change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use sha2::{Digest, Sha256};

/// Longest file that is read, bytes.
const LONGEST: u64 = 1 << 20;
/// Interval of the checks of files.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A value that is parsed from the contents of files.
pub trait Reload: Sized + Send + Sync + 'static {
    /// Why it cannot be parsed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// What it is, for the log.
    const WHAT: &'static str;

    /// From one content per path, in order.
    ///
    /// # Errors
    /// When something is wrong with them.
    fn make(paths: &[PathBuf], contents: &[Vec<u8>]) -> Result<Self, Self::Error>;

    /// A file that cannot be read.
    fn unreadable(path: &Path, reason: String) -> Self::Error;

    /// A warning for when it is taken into use.
    fn warning(&self) -> Option<&'static str> {
        None
    }

    /// Reports on the value in use, at every check of the files.
    fn report(&self) {}
}

/// See the module. Always holds a value that was valid as a whole.
#[derive(Debug)]
pub struct Reloaded<T> {
    paths: Vec<PathBuf>,
    current: RwLock<Arc<T>>,
    /// Of the contents that were looked at last, right or wrong.
    seen: Mutex<[u8; 32]>,
}

impl<T: Reload> Reloaded<T> {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read, or they are not valid.
    pub fn load(paths: Vec<PathBuf>) -> Result<Self, T::Error> {
        let contents = read::<T>(&paths)?;
        let made = T::make(&paths, &contents)?;
        made.report();
        warn(&made, &paths);
        Ok(Self { current: RwLock::new(Arc::new(made)), seen: Mutex::new(digest(&contents)), paths })
    }

    /// What is in use.
    #[must_use]
    pub fn current(&self) -> Arc<T> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the files again and takes them into use, if they changed since the last time and are valid. Returns whether they
    /// were.
    ///
    /// # Errors
    /// When they are not valid; the value in use stays.
    pub fn refresh(&self) -> Result<bool, T::Error> {
        let contents = read::<T>(&self.paths)?;
        let digest = digest(&contents);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if *seen == digest {
            return Ok(false);
        }
        *seen = digest;
        let made = T::make(&self.paths, &contents)?;
        warn(&made, &self.paths);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(made);
        Ok(true)
    }

    /// Refreshes for ever.
    pub async fn keep_fresh(self: Arc<Self>) {
        let mut last = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let this = Arc::clone(&self);
            let Ok(refreshed) = tokio::task::spawn_blocking(move || this.refresh()).await else { continue };
            let wrong = refreshed.as_ref().err().map(ToString::to_string);
            match (&refreshed, &wrong) {
                (Ok(true), _) => tracing::info!("{} changed and are in use", T::WHAT),
                // Logged once for each problem.
                (_, Some(error)) if wrong != last => {
                    tracing::warn!(%error, "{} changed and cannot be used; those from before stay in use", T::WHAT);
                    metrics::counter!("muster_reload_failures_total", "what" => T::WHAT).increment(1);
                }
                _ => {}
            }
            last = wrong;
            self.current().report();
        }
    }
}

fn warn<T: Reload>(made: &T, paths: &[PathBuf]) {
    if let Some(warning) = made.warning() {
        let file = paths.first().map(|path| tracing::field::display(path.display()));
        tracing::warn!(file, "{}: {warning}", T::WHAT);
    }
}

fn read<T: Reload>(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, T::Error> {
    paths.iter().map(|path| read_one(path).map_err(|reason| T::unreadable(path, reason))).collect()
}

fn read_one(path: &Path) -> Result<Vec<u8>, String> {
    use std::io::Read;

    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    // Checked before opening, because opening a pipe waits for its other end.
    if !metadata.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut contents = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut contents).map_err(|error| error.to_string())?;
    if contents.len() as u64 > LONGEST {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    Ok(contents)
}

fn digest(contents: &[Vec<u8>]) -> [u8; 32] {
    let mut digest = Sha256::new();
    for content in contents {
        digest.update((content.len() as u64).to_le_bytes());
        digest.update(content);
    }
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Number(u32);

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct NoNumber(String);

    impl Reload for Number {
        type Error = NoNumber;
        const WHAT: &'static str = "numbers";

        fn make(_: &[PathBuf], contents: &[Vec<u8>]) -> Result<Self, NoNumber> {
            let text = String::from_utf8_lossy(&contents[0]).into_owned();
            text.trim().parse().map(Self).map_err(|_| NoNumber(text))
        }

        fn unreadable(path: &Path, reason: String) -> NoNumber {
            NoNumber(format!("{}: {reason}", path.display()))
        }
    }

    #[test]
    fn what_is_wrong_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("n");
        assert!(Reloaded::<Number>::load(vec![path.clone()]).is_err());
        std::fs::write(&path, "7").unwrap();
        let number = Reloaded::<Number>::load(vec![path.clone()]).unwrap();
        assert!(!number.refresh().unwrap());
        std::fs::write(&path, "x").unwrap();
        assert!(number.refresh().is_err());
        assert_eq!(number.current().0, 7);
        // It was told once.
        assert!(!number.refresh().unwrap());
        std::fs::write(&path, "8").unwrap();
        assert!(number.refresh().unwrap());
        assert_eq!(number.current().0, 8);
        std::fs::remove_file(&path).unwrap();
        assert!(number.refresh().is_err() && number.refresh().is_err());
        std::fs::write(&path, vec![b'1'; (1 << 20) + 1]).unwrap();
        assert!(number.refresh().unwrap_err().to_string().contains("longer"));
        assert_eq!(number.current().0, 8);
    }
}
