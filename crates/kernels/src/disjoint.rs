//! One output slice written by several threads, each in places of its own.

use std::marker::PhantomData;

/// A mutable slice that tasks take disjoint pieces of.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out `&mut [T]` under the contract of `piece`, so sharing it is sending pieces of `T`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Elements `from..from + len`.
    ///
    /// # Safety
    /// No element of the piece may be reachable through another piece that is alive.
    ///
    /// # Panics
    /// If the piece does not lie within the slice.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // that is the point; the contract above stands in for the borrow
    pub(crate) unsafe fn piece(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "piece outside the slice");
        // SAFETY: the range was checked, the slice is borrowed for 'a, and the caller keeps pieces apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}
