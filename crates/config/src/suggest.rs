//! "Did you mean": the known name nearest to one that is not known.

/// The nearest of `known`, if it is near enough to be meant.
pub(crate) fn nearest<'a>(unknown: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A name longer than any key is not a slip of the keyboard, and would be slow to compare.
    if unknown.len() > 64 {
        return None;
    }
    let (distance, name) = known.into_iter().map(|name| (distance(unknown, name), name)).min()?;
    (distance <= (name.len() / 3).max(1)).then_some(name)
}

/// Edit distance (Levenshtein) over characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let known = ["http", "grpc", "kv_memory", "expert_timeout"];
        assert_eq!(nearest("htp", known), Some("http"));
        assert_eq!(nearest("kv-memory", known), Some("kv_memory"));
        assert_eq!(nearest("expert_time_out", known), Some("expert_timeout"));
        assert_eq!(nearest("password", known), None);
        assert_eq!(nearest(&"x".repeat(10_000), known), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
