//! Zeroed, cache-line aligned memory for weights and keys and values.
//!
//! What must hold: the memory is zero and not resident until it is touched; refusal is an error, not an abort; large
//! buffers ask for huge pages where the system has them. It knows nothing of what is stored.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::error::KernelError;

/// Bytes of a cache line, and of sixteen f32 lanes.
const ALIGN: usize = 64;

/// Types for which memory of zeros is a value.
///
/// # Safety
/// All-zero bytes must be a valid value, there must be no drop glue, and the alignment must be at most 64.
pub(crate) unsafe trait Zeroed: Copy {}

// SAFETY: zero bytes are the number zero.
unsafe impl Zeroed for u16 {}
// SAFETY: zero bytes are the number zero.
unsafe impl Zeroed for u32 {}
// SAFETY: zero bytes are the number zero.
unsafe impl Zeroed for f32 {}
// SAFETY: an array is its elements.
unsafe impl<T: Zeroed, const N: usize> Zeroed for [T; N] {}

/// A slice of `T` that starts at a multiple of 64 bytes.
pub(crate) struct Buffer<T> {
    base: NonNull<u8>,
    layout: Layout,
    start: NonNull<T>,
    len: usize,
}

// SAFETY: the buffer owns its memory as a `Vec<T>` would.
unsafe impl<T: Send> Send for Buffer<T> {}
// SAFETY: as for `Vec<T>`.
unsafe impl<T: Sync> Sync for Buffer<T> {}

impl<T: Zeroed> Buffer<T> {
    /// `len` zeros; `field` names the owner in errors.
    pub(crate) fn zeroed(field: &'static str, len: usize) -> Result<Self, KernelError> {
        let too_large = || KernelError::TooLarge { field };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(too_large)?;
        // The allocator clears memory of a large alignment by writing it, which would make all of it resident at
        // once; at its natural alignment it hands out untouched zero pages. So the alignment is made by hand.
        let room = bytes.checked_add(ALIGN).ok_or_else(too_large)?;
        let layout = Layout::from_size_align(room, align_of::<u64>()).map_err(|_| too_large())?;
        // SAFETY: the layout has at least `ALIGN` bytes.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).ok_or(KernelError::OutOfMemory { field, bytes })?;
        let skip = base.as_ptr().align_offset(ALIGN);
        // SAFETY: `skip` is below `ALIGN`, so start and end stay inside the allocation.
        let start = unsafe { base.add(skip) }.cast::<T>();
        advise_huge(start.cast(), bytes);
        Ok(Self { base, layout, start, len })
    }

    /// Bytes that the elements take.
    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is aligned and owns `len` elements, valid since they were zeroed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the elements need no drop.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Asks for huge pages in the whole ones that the range covers; a system that has none says no, and that is fine.
#[cfg(target_os = "linux")]
fn advise_huge(start: NonNull<u8>, bytes: usize) {
    const HUGE: usize = 2 << 20;
    let skip = start.as_ptr().align_offset(HUGE);
    let Some(rest) = bytes.checked_sub(skip) else { return };
    let whole = rest / HUGE * HUGE;
    if whole > 0 {
        // SAFETY: the range lies within our allocation, and this advice changes no content.
        unsafe { libc::madvise(start.as_ptr().add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_start: NonNull<u8>, _bytes: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zero_and_writable() {
        for len in [1, 3, 1000, 3 << 20] {
            let mut buffer = Buffer::<u16>::zeroed("test", len).unwrap();
            assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
            assert_eq!(buffer.bytes(), 2 * len);
            assert!(buffer.iter().all(|&v| v == 0));
            buffer[len - 1] = 7;
            assert_eq!(buffer.last(), Some(&7));
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let error = |len| Buffer::<[f32; 16]>::zeroed("test", len).err().unwrap();
        assert!(matches!(error(usize::MAX / 2), KernelError::TooLarge { field: "test" }));
        assert!(matches!(error(usize::MAX / 64 - 1), KernelError::TooLarge { .. }));
        assert!(matches!(error(1 << 56), KernelError::OutOfMemory { .. }));
    }
}
