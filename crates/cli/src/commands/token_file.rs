//! Files of token ids: a JSON list, or a list of lists.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::failure::Failure;

/// Most bytes of a file.
const LONGEST: u64 = 64 << 20;

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(Vec<u32>),
    More(Vec<Vec<u32>>),
}

/// One list of ids.
pub(crate) fn one(path: &Path) -> Result<Vec<u32>, Failure> {
    parse(path, "a JSON list of token ids, as in [1, 844, 624]")
}

/// One or more lists of ids.
pub(crate) fn more(path: &Path) -> Result<Vec<Vec<u32>>, Failure> {
    Ok(match parse(path, "a JSON list of token ids, or a list of such lists")? {
        OneOrMore::One(ids) => vec![ids],
        OneOrMore::More(lists) => lists,
    })
}

fn parse<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<T, Failure> {
    let failed = |reason: String| Failure::input(format!("--tokens: {}: {reason}", path.display()));
    let mut text = String::new();
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    file.take(LONGEST + 1).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    if text.len() as u64 > LONGEST {
        return Err(failed(format!("is longer than {LONGEST} bytes")));
    }
    serde_json::from_str(text.trim_start_matches('\u{feff}'))
        .map_err(|error| failed(format!("is not {expected} ({error})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn lists_and_lists_of_lists() {
        assert_eq!(one(file("[1, 2]").path()).unwrap(), [1, 2]);
        assert_eq!(more(file("[1, 2]").path()).unwrap(), [[1, 2]]);
        assert_eq!(more(file("[[1], [2, 3]]").path()).unwrap(), [vec![1], vec![2, 3]]);
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "{}", "[-1]", "[1.5]", "[4294967296]", "[\"1\"]", "[1", "[[1]]"] {
            assert!(
                matches!(one(file(text).path()), Err(Failure::Input(message)) if message.contains("--tokens: "))
            );
        }
        assert!(one(Path::new("/does/not/exist")).is_err());
    }
}
