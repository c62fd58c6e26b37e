//! Runs a computation on a thread whose stack is known to be deep enough.
//!
//! The template engine recurses once per nested expression and per nested value. How deep that can go is
//! bounded (by the template's length and by its fuel), but by more than a thread of a server has.

use crate::TextError;

/// Stack of the thread, in bytes. Address space, not memory: only pages that are touched are backed.
///
/// Measured per level, at the worst: 0.5 KiB for a byte of template while parsing and 0.4 KiB for a unit of
/// fuel in a rendering, four times that without optimisation. `template.rs` caps both numbers.
pub(crate) const STACK_BYTES: usize = 512 << 20;

/// Runs `work` to its end on a thread of its own and returns its result.
///
/// # Errors
/// The operating system refuses the thread, or `work` panicked.
pub(crate) fn run<T: Send>(work: impl FnOnce() -> Result<T, TextError> + Send) -> Result<T, TextError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("chat-template".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|e| TextError::TemplateFailed { reason: format!("no thread to run it on: {e}") })?;
        let panicked = || TextError::TemplateFailed { reason: "the template engine failed on it".into() };
        thread.join().unwrap_or_else(|_| Err(panicked()))
    })
}
