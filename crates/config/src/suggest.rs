//! "Did you mean": the known name nearest to one that is not known.

/// The nearest of `known`, if it is near enough to be meant.
#[must_use]
pub fn nearest<'a>(unknown: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A name longer than any key is not a slip of the keyboard, and would be slow to compare.
    if unknown.len() > 64 {
        return None;
    }
    let (distance, name) = known.into_iter().map(|name| (distance(unknown, name), name)).min()?;
    (distance <= (name.len() / 3).max(1)).then_some(name)
}

/// Edit distance over characters, where two neighbours swapped count as one edit (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let substituted = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = substituted.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
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
        assert_eq!(distance("modle", "model"), 1);
    }
}
