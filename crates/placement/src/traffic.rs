//! What a token's rows take on the wire, on average, when the experts of a layer are spread evenly over workers.
//!
//! A row goes once to every worker that has one of its experts. Assumed is a gate that chooses any `k` of `n` experts equally
//! often, which real ones come near over many tokens only; framing, expert numbers and row numbers are not counted.

/// Workers, on average, that hold one or more of the `top_k` experts of a row, when `workers` share the layer's `experts`.
///
/// A worker with `m` of them has none of the chosen with probability `C(n - m, k) / C(n, k)`.
#[must_use]
pub fn workers_per_row(experts: u32, top_k: u32, workers: u32) -> f64 {
    let workers = workers.clamp(1, experts.max(1));
    let (least, more) = (experts / workers, experts % workers);
    let hit = |held: u32| {
        let left_out = |drawn: u32| {
            let (left, all) = (experts.saturating_sub(held + drawn), experts - drawn);
            f64::from(left) / f64::from(all)
        };
        1.0 - (0..top_k.min(experts)).map(left_out).product::<f64>()
    };
    f64::from(workers - more) * hit(least) + f64::from(more) * hit(least + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By trying every choice.
    fn tried(experts: u32, top_k: u32, workers: u32) -> f64 {
        let choices = (0_u32..1 << experts).filter(|choice| choice.count_ones() == top_k);
        let reached = |choice: u32| {
            let owners =
                (0..experts).filter(|expert| choice >> expert & 1 == 1).map(|expert| expert % workers);
            owners.collect::<std::collections::BTreeSet<_>>().len()
        };
        let counts: Vec<usize> = choices.map(reached).collect();
        counts.iter().sum::<usize>() as f64 / counts.len() as f64
    }

    #[test]
    fn the_mean_is_that_of_all_choices() {
        for (experts, top_k, workers) in [
            (8, 2, 1),
            (8, 2, 2),
            (8, 2, 3),
            (8, 2, 5),
            (8, 2, 8),
            (8, 2, 20),
            (8, 8, 3),
            (10, 4, 4),
            (5, 1, 2),
        ] {
            let (mean, tried) = (workers_per_row(experts, top_k, workers), tried(experts, top_k, workers));
            assert!((mean - tried).abs() < 1e-12, "{experts} {top_k} {workers}: {mean} and {tried}");
        }
        assert!((workers_per_row(256, 8, 256) - 8.0).abs() < 1e-12);
        assert!((workers_per_row(256, 8, 1) - 1.0).abs() < 1e-12);
        assert!(workers_per_row(0, 0, 4).abs() < 1e-12);
    }
}
