//! Spreads the rows of a hot expert over its replicas.
//!
//! Owns the decision which rows are worth moving: each further replica has to read the expert's weights. So few rows, as in
//! decode, are never spread. Knows nothing of rows but their number.

use muster_placement::WorkerIx;

/// Rows whose computation takes about as long as reading an expert's weights.
const READ: u64 = 16;

/// Rows of one expert on one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// The expert, by a number of the caller's.
    pub(crate) expert: usize,
    /// The worker.
    pub(crate) worker: WorkerIx,
    /// At least one.
    pub(crate) rows: u32,
}

/// Moves rows of hot experts from overloaded to less loaded owners while that pays. `parts` has one part for each expert,
/// ascending; `others(expert)` are the workers that may take rows of it.
pub(crate) fn spread<I: Iterator<Item = WorkerIx>>(
    parts: &mut Vec<Part>,
    workers: usize,
    others: impl Fn(usize) -> I,
) {
    let mut busy = vec![0; workers];
    for part in &*parts {
        busy[part.worker.index()] += READ + u64::from(part.rows);
    }
    // Bound on the moves; further ones would change little.
    for _ in 0..4 * workers {
        let Some(Shift { from, to, rows }) = best(parts, &busy, &others) else { break };
        let Part { expert, worker, .. } = parts[from];
        parts[from].rows -= rows;
        busy[worker.index()] -= u64::from(rows);
        busy[to.index()] += u64::from(rows);
        match place(parts, expert, to) {
            Ok(at) => parts[at].rows += rows,
            Err(at) => {
                busy[to.index()] += READ;
                parts.insert(at, Part { expert, worker: to, rows });
            }
        }
    }
}

/// A move of rows from the part `from` to the worker `to`.
struct Shift {
    from: usize,
    to: WorkerIx,
    rows: u32,
}

/// The move that evens out most. Not always from the busiest worker, whose rows may fit only after another move.
fn best<I: Iterator<Item = WorkerIx>>(
    parts: &[Part],
    busy: &[u64],
    others: impl Fn(usize) -> I,
) -> Option<Shift> {
    let least = READ as u32;
    let mut best: Option<Shift> = None;
    for (from, part) in parts.iter().enumerate() {
        // Both sides keep enough rows to pay for reading the weights.
        if part.rows < 2 * least {
            continue;
        }
        let source = busy[part.worker.index()];
        for to in others(part.expert).filter(|&to| to != part.worker) {
            let reads = if place(parts, part.expert, to).is_ok() { 0 } else { READ };
            let even = source.saturating_sub(busy[to.index()]).saturating_sub(reads) / 2;
            let rows = u32::try_from(even).unwrap_or(u32::MAX).min(part.rows - least);
            if rows >= least && best.as_ref().is_none_or(|best| rows > best.rows) {
                best = Some(Shift { from, to, rows });
            }
        }
    }
    best
}

/// Index of an expert's part on a worker, or where to insert it.
fn place(parts: &[Part], expert: usize, worker: WorkerIx) -> Result<usize, usize> {
    parts.binary_search_by_key(&(expert, worker), |part| (part.expert, part.worker))
}

#[cfg(test)]
mod tests {
    use muster_placement::{Placement, Shape};
    use muster_types::{Epoch, ExpertId, ExpertKey, LayerId, WorkerId};

    use super::*;

    /// Three workers.
    fn three() -> Vec<WorkerIx> {
        let key = ExpertKey { layer: LayerId::new(0, 1).unwrap(), expert: ExpertId::new(0, 1).unwrap() };
        let holdings = ["a", "b", "c"].map(|name| (WorkerId::new(name).unwrap(), vec![key]));
        let placement = Placement::from_holdings(Epoch::new(1), &Shape::new(vec![1]), &holdings).unwrap();
        placement.owners(key).to_vec()
    }

    /// One expert on each, with so many rows.
    fn parts(rows: [u32; 3]) -> Vec<Part> {
        let part = |(expert, (worker, rows))| Part { expert, worker, rows };
        three().into_iter().zip(rows).enumerate().map(part).collect()
    }

    fn rows_of(parts: &[Part]) -> Vec<u32> {
        let of = |worker| parts.iter().filter(|part| part.worker == worker).map(|part| part.rows).sum();
        three().into_iter().map(of).collect()
    }

    #[test]
    fn a_hot_expert_is_spread_evenly_over_all_that_hold_it() {
        let mut parts = parts([3000, 400, 400]);
        spread(&mut parts, 3, |_| three().into_iter());
        let rows = rows_of(&parts);
        assert_eq!(rows.iter().sum::<u32>(), 3800);
        let mean = 3800.0 / 3.0;
        assert!(rows.iter().all(|&rows| (f64::from(rows) / mean - 1.0).abs() < 0.05), "{rows:?}");
        assert!(parts.is_sorted_by_key(|part| (part.expert, part.worker)));
    }

    #[test]
    fn who_does_not_hold_it_gets_nothing() {
        let mut parts = parts([1000, 10, 10]);
        let before = parts.clone();
        spread(&mut parts, 3, |_| three().into_iter().take(1));
        assert_eq!(parts, before);
        spread(&mut parts, 3, |_| three().into_iter().take(2));
        let rows = rows_of(&parts);
        assert_eq!(rows[2], 10);
        assert!(rows[0] < 600 && rows[1] < 600, "{rows:?}");
    }

    #[test]
    fn who_is_as_busy_gives_away_first() {
        // The first may give to the second alone, and that one only to the third.
        let mut parts = parts([1000, 1000, 10]);
        spread(&mut parts, 3, |expert| three().into_iter().skip(expert).take(2));
        let rows = rows_of(&parts);
        assert!(rows.iter().all(|&rows| (640..710).contains(&rows)), "{rows:?}");
    }

    #[test]
    fn few_rows_stay_together() {
        let mut parts = parts([40, 4, 4]);
        let before = parts.clone();
        spread(&mut parts, 3, |_| three().into_iter());
        assert_eq!(parts, before);
        spread(&mut Vec::new(), 0, |_| std::iter::empty());
    }
}
