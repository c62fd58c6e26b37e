//! Zeroed, cache-line aligned memory for weights, keys and values.
//!
//! What must hold: the memory is zero and not resident until it is touched; a failed allocation is an error, not an
//! abort; freed memory is used again or returned to the system. Buffers lie side by side in chunks of whole huge pages,
//! because an expert's matrix is often smaller than a huge page, and filling memory page by page costs more than
//! packing. It does not know the contents.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use crate::error::KernelError;

/// Unit of huge pages: their size on supported systems is a multiple of it.
const HUGE: usize = 2 << 20;
/// Bytes of a chunk, shared by small buffers.
const CHUNK: usize = 32 << 20;
/// Smallest buffer with a mapping of its own, bytes.
const LARGE: usize = CHUNK / 4;

/// Bytes of a cache line, and of sixteen f32 lanes.
const ALIGN: usize = 64;

/// Types for which any bytes are a valid value.
///
/// # Safety
/// Any bytes must be a valid value, there must be no padding and no drop glue, and the alignment must be at most 64.
pub(crate) unsafe trait Zeroed: Copy {}

// SAFETY: any bytes are a number.
unsafe impl Zeroed for u16 {}
// SAFETY: any bytes are a number.
unsafe impl Zeroed for u32 {}
// SAFETY: any bytes are a number.
unsafe impl Zeroed for f32 {}
// SAFETY: an array is its elements.
unsafe impl<T: Zeroed, const N: usize> Zeroed for [T; N] {}

/// A slice of `T` that starts at a multiple of 64 bytes.
pub(crate) struct Buffer<T> {
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
        const { assert!(align_of::<T>() <= ALIGN) };
        let too_large = || KernelError::TooLarge { field };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(too_large)?;
        let room = room(bytes).ok_or_else(too_large)?;
        let start = if room >= LARGE { map(room) } else { heap().take(room) };
        let start = start.ok_or(KernelError::OutOfMemory { field, bytes })?.cast();
        Ok(Self { start, len })
    }
}

impl<T: Zeroed> Buffer<T> {
    /// The elements' bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        // SAFETY: `start` owns that many bytes, all initialised, since `T` has no padding.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes()) }
    }

    /// The elements' bytes, mutable.
    pub(crate) fn as_bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes();
        // SAFETY: as for `as_bytes`; any bytes are elements, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), bytes) }
    }
}

impl<T> Buffer<T> {
    /// Bytes that the elements take.
    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

/// Bytes allocated for a buffer of `bytes` bytes; `None` if that overflows.
fn room(bytes: usize) -> Option<usize> {
    let unit = if bytes >= LARGE { HUGE } else { ALIGN };
    bytes.max(1).checked_next_multiple_of(unit).filter(|room| isize::try_from(*room).is_ok())
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
        let Some(room) = room(self.bytes()) else { return };
        let start = self.start.cast();
        if room >= LARGE {
            // SAFETY: mapped with this size, and the elements need no drop.
            unsafe { unmap(start, room) };
        } else {
            heap().give_back(start, room);
        }
    }
}

static HEAP: Mutex<Heap> = Mutex::new(Heap { chunks: Vec::new() });

fn heap() -> std::sync::MutexGuard<'static, Heap> {
    // Nothing panics while it holds the lock between two halves of a change.
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The chunks that small buffers lie in.
struct Heap {
    chunks: Vec<Chunk>,
}

struct Chunk {
    start: NonNull<u8>,
    /// Ascending, and no two touch.
    free: Vec<Free>,
}

// SAFETY: a chunk owns its mapping; no thread has a claim on it.
unsafe impl Send for Chunk {}

/// A free part of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Free {
    at: usize,
    len: usize,
    /// Never handed out, hence still zero.
    fresh: bool,
}

impl Heap {
    /// Allocates `room` zero bytes, first fit.
    fn take(&mut self, room: usize) -> Option<NonNull<u8>> {
        if let Some(start) = self.chunks.iter_mut().find_map(|chunk| chunk.take(room)) {
            return Some(start);
        }
        let start = map(CHUNK)?;
        let mut chunk = Chunk { start, free: vec![Free { at: 0, len: CHUNK, fresh: true }] };
        let taken = chunk.take(room);
        self.chunks.push(chunk);
        taken
    }

    fn give_back(&mut self, start: NonNull<u8>, room: usize) {
        let address = start.as_ptr() as usize;
        let holds = |chunk: &Chunk| (chunk.address()..chunk.address() + CHUNK).contains(&address);
        let Some(index) = self.chunks.iter().position(holds) else { return };
        let chunk = &mut self.chunks[index];
        chunk.give_back(address - chunk.address(), room);
        if chunk.free.first().is_some_and(|free| free.len == CHUNK) {
            let chunk = self.chunks.swap_remove(index);
            // SAFETY: mapped with this size, and all of it is free.
            unsafe { unmap(chunk.start, CHUNK) };
        }
    }
}

impl Chunk {
    fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    fn take(&mut self, room: usize) -> Option<NonNull<u8>> {
        let index = self.free.iter().position(|free| free.len >= room)?;
        let Free { at, len, fresh } = self.free[index];
        if len == room {
            self.free.remove(index);
        } else {
            self.free[index] = Free { at: at + room, len: len - room, fresh };
        }
        // SAFETY: `at + room` lies within the chunk.
        let start = unsafe { self.start.add(at) };
        if !fresh {
            // SAFETY: no other buffer holds this part of the mapping.
            unsafe { start.write_bytes(0, room) };
        }
        Some(start)
    }

    fn give_back(&mut self, at: usize, len: usize) {
        let index = self.free.partition_point(|free| free.at < at);
        self.free.insert(index, Free { at, len, fresh: false });
        if self.free.get(index + 1).is_some_and(|next| at + len == next.at) {
            let next = self.free.remove(index + 1);
            self.free[index].len += next.len;
        }
        if index > 0 && self.free[index - 1].at + self.free[index - 1].len == at {
            let this = self.free.remove(index);
            self.free[index - 1].len += this.len;
            self.free[index - 1].fresh = false;
        }
    }
}

/// Maps zero bytes at a multiple of [`HUGE`] and advises huge pages, which a system may ignore. `None` if memory is
/// short.
fn map(bytes: usize) -> Option<NonNull<u8>> {
    let wide = bytes.checked_add(HUGE)?;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new private mapping, wherever the system wants it.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), wide, prot, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    let base = NonNull::new(base.cast::<u8>())?;
    let skip = base.as_ptr().align_offset(HUGE);
    // SAFETY: `skip` is below `HUGE`, so start and end stay inside the mapping; what lies before and behind is given
    // back in whole pages, because mappings begin at pages and both sizes are multiples of a page.
    unsafe {
        let start = base.add(skip);
        if skip > 0 {
            unmap(base, skip);
        }
        if skip < HUGE {
            unmap(start.add(bytes), HUGE - skip);
        }
        advise_huge(start, bytes);
        Some(start)
    }
}

/// # Safety
/// The range must be mapped by [`map`] and not in use.
unsafe fn unmap(start: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller's promise. It fails only for ranges that are no pages.
    unsafe { libc::munmap(start.as_ptr().cast(), bytes) };
}

/// # Safety
/// The range must be mapped.
#[cfg(target_os = "linux")]
unsafe fn advise_huge(start: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller's promise; this advice changes no content.
    unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
unsafe fn advise_huge(_start: NonNull<u8>, _bytes: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zero_and_writable() {
        for len in [0, 1, 3, 1000, 3 << 20, 5 << 20] {
            let mut buffer = Buffer::<u16>::zeroed("test", len).unwrap();
            assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
            assert_eq!(buffer.bytes(), 2 * len);
            assert!(buffer.iter().all(|&v| v == 0));
            if let Some(last) = buffer.last_mut() {
                *last = 7;
            }
            assert_eq!(buffer.last().copied().unwrap_or(7), 7);
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let error = |len| Buffer::<[f32; 16]>::zeroed("test", len).err().unwrap();
        assert!(matches!(error(usize::MAX / 2), KernelError::TooLarge { field: "test" }));
        assert!(matches!(error(usize::MAX / 64 - 1), KernelError::TooLarge { .. }));
        assert!(matches!(error(1 << 56), KernelError::OutOfMemory { .. }));
    }

    #[test]
    fn buffers_in_use_never_share_and_used_memory_comes_back_zero() {
        let mut held: Vec<(u8, Buffer<[u16; 32]>)> = Vec::new();
        let mut random = 1_u64;
        for round in 0..400_u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let pick = (random >> 33) as usize;
            if pick.is_multiple_of(3) && !held.is_empty() {
                let (mark, buffer) = held.swap_remove(pick % held.len());
                assert!(buffer.iter().flatten().all(|&v| v == u16::from(mark)));
            } else {
                let mark = (round % 250 + 1) as u8;
                let mut buffer = Buffer::<[u16; 32]>::zeroed("test", pick % 20_000).unwrap();
                assert!(buffer.iter().flatten().all(|&v| v == 0));
                buffer.iter_mut().flatten().for_each(|v| *v = mark.into());
                held.push((mark, buffer));
            }
        }
        assert!(held.iter().all(|(mark, buffer)| buffer.iter().flatten().all(|&v| v == u16::from(*mark))));
    }

    #[test]
    fn free_parts_join_and_an_empty_chunk_goes_back() {
        let mut heap = Heap { chunks: Vec::new() };
        let a = heap.take(128).unwrap();
        let b = heap.take(64).unwrap();
        let c = heap.take(192).unwrap();
        let rest = Free { at: 384, len: CHUNK - 384, fresh: true };
        heap.give_back(b, 64);
        assert_eq!(heap.chunks[0].free, [Free { at: 128, len: 64, fresh: false }, rest]);
        heap.give_back(a, 128);
        assert_eq!(heap.chunks[0].free, [Free { at: 0, len: 192, fresh: false }, rest]);
        assert_eq!(heap.take(192), Some(a));
        heap.give_back(a, 192);
        heap.give_back(c, 192);
        assert!(heap.chunks.is_empty());
    }
}
