//! Names of models and revisions. What passes here is safe as a part of a path and of a URL.

use std::str::FromStr;

/// Longest organisation, model name or revision.
const MAX_LENGTH: usize = 96;

/// `org/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModelName(String);

impl ModelName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ModelName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The cache writes the slash as `--`.
        let good = |part: &str| is_plain(part) && !part.contains("--");
        match text.split_once('/') {
            Some((org, name)) if good(org) && good(name) => Ok(Self(text.to_owned())),
            _ => Err("a model is named org/name, of letters, digits, `.`, `_` and single `-`".into()),
        }
    }
}

/// A branch, a tag or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Revision(String);

impl Revision {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Revision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() <= MAX_LENGTH && text.split('/').all(is_plain) {
            return Ok(Self(text.to_owned()));
        }
        Err("a revision is a branch, tag or commit, of letters, digits, `.`, `_`, `-` and `/`".into())
    }
}

/// A part of a path that is a name: not hidden, not a way up, nothing a URL would read.
pub(crate) fn is_plain(part: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !part.is_empty()
        && part.len() <= MAX_LENGTH
        && !part.starts_with(['.', '-'])
        && !part.contains("..")
        && part.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_published_models_are_accepted() {
        for name in ["mistralai/Mixtral-8x7B-Instruct-v0.1", "Qwen/Qwen3-30B-A3B", "a/b_c.d"] {
            assert_eq!(name.parse::<ModelName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn anything_that_is_not_org_and_name_is_refused() {
        let long = format!("org/{}", "x".repeat(97));
        for name in [
            "",
            "name",
            "/name",
            "org/",
            "org/name/more",
            "../name",
            "org/..",
            "org/.hidden",
            "org/a..b",
            "org/a--b",
            "-org/name",
            "org/na me",
            "org/name?x",
            "org/%2e",
            "org/näme",
            "org\\name",
            "org/name\n",
            &long,
        ] {
            assert!(name.parse::<ModelName>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn revisions_are_branches_tags_and_commits() {
        for good in ["main", "v1.0", "refs/pr/3", "0123456789abcdef0123456789abcdef01234567"] {
            assert!(good.parse::<Revision>().is_ok(), "{good}");
        }
        for bad in
            ["", "/main", "main/", "a//b", "../main", "a/../b", "--x", "a b", "a?b", "a#b", &"x".repeat(97)]
        {
            assert!(bad.parse::<Revision>().is_err(), "{bad}");
        }
    }
}
