//! An allocator of processes that compute with tensors, told to keep what it has.
//!
//! Training and generation free and allocate the same large buffers every step. Given back to the system in between, they come back
//! as page faults: measured on SmolLM2-135M, 10 to 30 % more time a step. Kept by an allocator that sorts blocks by
//! size, they leave gaps that the next step's sizes do not fit: 13 % more memory. GNU's C library on Linux joins
//! neighbours that are free and takes the best that fits, so large blocks are left to it.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// Blocks of at least this size are the C library's.
const LARGE: usize = if cfg!(all(target_os = "linux", target_env = "gnu")) { 256 << 10 } else { usize::MAX };

/// To be the `#[global_allocator]` of a binary that calls [`keep_freed_memory`] first.
pub struct Allocator;

// SAFETY: a block's size, which is the same when it is freed, says whose it is.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { if layout.size() < LARGE { MiMalloc.alloc(layout) } else { System.alloc(layout) } }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe {
            if layout.size() < LARGE {
                MiMalloc.dealloc(block, layout);
            } else {
                System.dealloc(block, layout);
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            if layout.size() < LARGE { MiMalloc.alloc_zeroed(layout) } else { System.alloc_zeroed(layout) }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise; where the block changes hands, both have the smaller size.
        unsafe {
            match (layout.size() < LARGE, size < LARGE) {
                (true, true) => MiMalloc.realloc(block, layout, size),
                (false, false) => System.realloc(block, layout, size),
                _ => {
                    let to = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                    if !to.is_null() {
                        to.copy_from_nonoverlapping(block, size.min(layout.size()));
                        self.dealloc(block, layout);
                    }
                    to
                }
            }
        }
    }
}

/// Keeps freed memory for reuse. Called first thing in `main`.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [
        // No block is a mapping of its own, which would be given back at once.
        (libc::M_MMAP_MAX, 0),
        (libc::M_TRIM_THRESHOLD, -1),
        (libc::M_TOP_PAD, 64 << 20),
    ] {
        // SAFETY: sets a number of the allocator; a value it does not take is ignored.
        unsafe { libc::mallopt(option, value) };
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    {
        /// `mi_option_purge_delay` of mimalloc.h: milliseconds until freed memory is given back; -1 is never.
        const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
        // SAFETY: sets an integer option of the allocator; any value is valid.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    }
}
