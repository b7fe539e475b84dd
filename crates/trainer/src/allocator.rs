//! The global allocator, told to keep what it has.
//!
//! Training frees and allocates the same large buffers every step. Given back to the system in between,
//! they come back as page faults: measured on SmolLM2-135M, 30 % more time a step.

#![allow(unsafe_code)]

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h: milliseconds until freed memory is given back; -1 is never.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps freed memory for reuse. Called first thing in `main`.
pub fn keep_freed_memory() {
    // SAFETY: sets an integer option of the allocator; any value is valid.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}
