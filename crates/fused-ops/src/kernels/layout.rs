//! How operands lie: rows side by side in panels or tiles, the groups of elements of all of them together.

#![allow(unsafe_code)]
// Plain indices are unrolled.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::matrix::Mat;
use super::panel::{Element, WIDTH};
use super::simd::{made, wide};

/// `lines` rows of `k` elements, `W` of them side by side, on this thread; what is missing is 0.
pub fn beside<T: Element, const W: usize>(rows: Mat<T>, lines: usize, k: usize, into: &mut Vec<T>) {
    let size = W * k.next_multiple_of(T::GROUP);
    let all = lines.div_ceil(W) * size;
    into.clear();
    into.reserve(all);
    for (i, part) in into.spare_capacity_mut()[..all].chunks_exact_mut(size).enumerate() {
        interleave::<T, W>(rows.skip_rows(i * W), (lines - i * W).min(W), k, part);
    }
    // SAFETY: every part was written.
    unsafe { into.set_len(all) };
}

/// `lines` rows of `k` elements in panels of `WIDTH` rows; what is missing is 0.
pub fn lay_out<T: Element>(rows: Mat<T>, lines: usize, k: usize) -> Vec<T> {
    let size = WIDTH * k.next_multiple_of(T::GROUP);
    // SAFETY: every panel is written.
    unsafe {
        made(lines.div_ceil(WIDTH) * size, |out| {
            out.par_chunks_mut(size).enumerate().for_each(|(panel, out)| {
                let first = panel * WIDTH;
                interleave::<T, WIDTH>(rows.skip_rows(first), (lines - first).min(WIDTH), k, out);
            });
        })
    }
}

/// `count` rows of `k` elements beside one another: `W` places for each group of elements of a row; what is missing is 0.
fn interleave<T: Element, const W: usize>(rows: Mat<T>, count: usize, k: usize, out: &mut [MaybeUninit<T>]) {
    let whole = k / T::GROUP;
    assert!(rows.holds(count, k) && count <= W && out.len() >= k.next_multiple_of(T::GROUP) * W);
    assert!(size_of::<T>() * T::GROUP == size_of::<u32>(), "a group has 32 bits");
    if count < W || whole * T::GROUP < k {
        out.fill(MaybeUninit::new(T::default()));
    }
    let to = out.as_mut_ptr().cast::<u32>();
    wide(
        #[inline(always)]
        || {
            // SAFETY: the assertions; `to` has `W` groups for each group of a row.
            unsafe {
                if rows.col == 1 {
                    transpose::<W>(rows.data.as_ptr().cast(), rows.row * size_of::<T>(), count, whole, to);
                } else {
                    assert_eq!(rows.row, 1, "elements of a row or of a column lie side by side");
                    for group in 0..whole {
                        let first = rows.data.as_ptr().add(group * T::GROUP * rows.col);
                        T::beside::<W>(first, rows.col, count, to.add(group * W).cast());
                    }
                }
            }
        },
    );
    for (row, i) in (0..count).flat_map(|row| (whole * T::GROUP..k).map(move |i| (row, i))) {
        let value = rows.data[row * rows.row + i * rows.col];
        out[(whole * W + row) * T::GROUP + i % T::GROUP] = MaybeUninit::new(value);
    }
}

/// `to[i * W + row] = from[row][i]` for `count` rows, `stride` bytes from one to the next, of `len` groups each.
#[inline(always)]
unsafe fn transpose<const W: usize>(from: *const u32, stride: usize, count: usize, len: usize, to: *mut u32) {
    // A line of the cache of every row at a time, so that what is written stays there.
    const PART: usize = 16;
    for start in (0..len).step_by(PART) {
        for row in 0..count {
            // SAFETY: the caller's promise.
            unsafe {
                let (from, to) = (from.byte_add(row * stride).add(start), to.add(start * W + row));
                if start + PART <= len {
                    let line = from.cast::<[u32; PART]>().read_unaligned();
                    for i in 0..PART {
                        to.add(i * W).write_unaligned(line[i]);
                    }
                } else {
                    (0..len - start)
                        .for_each(|i| to.add(i * W).write_unaligned(from.add(i).read_unaligned()));
                }
            }
        }
    }
}
