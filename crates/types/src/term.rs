//! Terms of weighted sums of output rows.

/// One output row and its weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Term {
    /// Index of the source of outputs.
    pub source: u32,
    /// Row of the source.
    pub row: u32,
    /// Factor on the row.
    pub weight: f32,
}

/// Groups terms by the row of their sum and keeps their order. Returns the start of each row's terms, and the terms,
/// row after row.
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
