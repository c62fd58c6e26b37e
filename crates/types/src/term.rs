//! Weighted sums of output rows, said in numbers.

/// One output row and what it counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Term {
    /// Which of the sources of outputs.
    pub source: u32,
    /// Row in it.
    pub row: u32,
    /// Its factor.
    pub weight: f32,
}

/// The terms of every row's sum, in the order in which they are given: where each row's begin, and the terms, row after
/// row.
///
/// # Panics
/// If a term is for a row outside `rows`.
#[must_use]
pub fn terms_by_row(rows: usize, terms: impl Iterator<Item = (u32, Term)> + Clone) -> (Vec<u32>, Vec<Term>) {
    let mut starts = vec![0_u32; rows + 1];
    for (row, _) in terms.clone() {
        starts[row as usize + 1] += 1;
    }
    for row in 1..starts.len() {
        starts[row] += starts[row - 1];
    }
    let mut next = starts.clone();
    let mut sorted = vec![Term { source: 0, row: 0, weight: 0.0 }; starts[rows] as usize];
    for (row, term) in terms {
        let at = &mut next[row as usize];
        sorted[*at as usize] = term;
        *at += 1;
    }
    (starts, sorted)
}
