//! "Did you mean": the known name nearest to an unknown one.

/// Longest name that is compared, in bytes: a longer one is not a typing error, and slow to compare.
const LONGEST: usize = 64;

/// The nearest of `known` by edit distance, where a swap of two neighbours counts as one edit; `None` when none is near
/// enough to be a likely typing error.
#[must_use]
pub fn nearest<'a>(unknown: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if unknown.is_empty() || unknown.len() > LONGEST {
        return None;
    }
    let (distance, name) = known.into_iter().map(|name| (strsim::osa_distance(unknown, name), name)).min()?;
    (distance <= (name.len() / 3).max(1)).then_some(name)
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
        assert_eq!(nearest("modle", ["model"]), Some("model"));
        assert_eq!(nearest("password", known), None);
        assert_eq!(nearest("", ["n"]), None);
        assert_eq!(nearest(&"x".repeat(10_000), known), None);
    }
}
