//! The Prometheus text in one order: the recorder keeps series in hash tables, and gives them as they lie there.

/// The same text, families by name, series by labels. Buckets stay in front of the sum and count that they belong to.
pub(crate) fn sorted(text: &str) -> String {
    let mut families: Vec<(&str, String)> = text
        .split("\n\n")
        .filter(|family| !family.trim().is_empty())
        .map(|family| {
            let name = family.lines().find_map(|line| line.strip_prefix("# TYPE ")).unwrap_or(family);
            (name, family_sorted(family))
        })
        .collect();
    families.sort();
    families.into_iter().map(|(_, family)| family + "\n").collect()
}

fn family_sorted(family: &str) -> String {
    let (comments, samples): (Vec<&str>, Vec<&str>) = family.lines().partition(|line| line.starts_with('#'));
    let is_histogram = comments.iter().any(|line| line.ends_with(" histogram"));
    let ends_series =
        |line: &&str| !is_histogram || line.split(['{', ' ']).next().is_some_and(|n| n.ends_with("_count"));
    let mut series: Vec<&[&str]> = samples.split_inclusive(ends_series).collect();
    series.sort_by_key(|lines| lines.last().copied());
    let lines = comments.into_iter().chain(series.into_iter().flatten().copied());
    lines.fold(String::with_capacity(family.len() + 2), |text, line| text + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::sorted;

    #[test]
    fn families_and_series_are_sorted_and_buckets_stay() {
        let given = "# HELP b_seconds B.\n# TYPE b_seconds histogram\n\
            b_seconds_bucket{to=\"y\",le=\"2\"} 1\nb_seconds_bucket{to=\"y\",le=\"10\"} 1\nb_seconds_sum{to=\"y\"} 1\nb_seconds_count{to=\"y\"} 1\n\
            b_seconds_bucket{to=\"x\",le=\"2\"} 0\nb_seconds_bucket{to=\"x\",le=\"10\"} 0\nb_seconds_sum{to=\"x\"} 0\nb_seconds_count{to=\"x\"} 0\n\n\
            # HELP a_total A.\n# TYPE a_total counter\na_total{code=\"z\"} 3\na_total{code=\"a\"} 4\n\n";
        let wanted = "# HELP a_total A.\n# TYPE a_total counter\na_total{code=\"a\"} 4\na_total{code=\"z\"} 3\n\n\
            # HELP b_seconds B.\n# TYPE b_seconds histogram\n\
            b_seconds_bucket{to=\"x\",le=\"2\"} 0\nb_seconds_bucket{to=\"x\",le=\"10\"} 0\nb_seconds_sum{to=\"x\"} 0\nb_seconds_count{to=\"x\"} 0\n\
            b_seconds_bucket{to=\"y\",le=\"2\"} 1\nb_seconds_bucket{to=\"y\",le=\"10\"} 1\nb_seconds_sum{to=\"y\"} 1\nb_seconds_count{to=\"y\"} 1\n\n";
        assert_eq!(sorted(given), wanted);
        assert_eq!(sorted(wanted), wanted);
        assert_eq!(sorted(""), "");
    }
}
