//! Pages of measurements: their provenance, and their places in documents.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::process::output;

const ASK: Duration = Duration::from_secs(30);

/// Commit of a work tree, marked if there are uncommitted changes.
pub(crate) fn commit(root: &Path) -> String {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.arg("-C").arg(root).args(arguments);
        said(git)
    };
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
    format!("{}{}", git(&["rev-parse", "--short=10", "HEAD"]), if changed { " with changes" } else { "" })
}

/// Today's date, in UTC.
pub(crate) fn date() -> String {
    let mut date = Command::new("date");
    date.args(["-u", "+%Y-%m-%d"]);
    said(date)
}

fn said(command: Command) -> String {
    output(command, ASK).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// Replaces the text between the marks `name` of a document by `page`.
pub(crate) fn put(path: &Path, name: &str, page: &str) -> Result<()> {
    let told = || format!("cannot put the tables into {}", path.display());
    let document = fs::read_to_string(path).with_context(told)?;
    fs::write(path, replaced(&document, name, page).with_context(told)?).with_context(told)
}

fn replaced(document: &str, name: &str, page: &str) -> Result<String> {
    let [begin, end] = ["begin", "end"].map(|end| format!("<!-- {name}:{end} -->"));
    let (before, rest) = document.split_once(&begin).with_context(|| format!("there is no {begin}"))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("there is no {end}"))?;
    Ok(format!("{before}{begin}\n{page}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_keep_what_is_around_the_tables() {
        let document = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n";
        let new = replaced(document, "x", "new").unwrap();
        assert_eq!(new, "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n");
        assert!(replaced(document, "y", "new").is_err());
    }
}
