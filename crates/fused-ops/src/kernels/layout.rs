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
///
/// # Safety
/// `from` must be readable for all of them, `to` writable for `W` groups for each group of a row.
#[inline(always)]
unsafe fn transpose<const W: usize>(from: *const u32, stride: usize, count: usize, len: usize, to: *mut u32) {
    // A line of the cache of every row at a time, so that what is written stays there.
    const PART: usize = 16;
    let mut start = 0;
    #[cfg(target_arch = "x86_64")]
    if W.is_multiple_of(PART) && count == W && is_x86_feature_detected!("avx512f") {
        while start + PART <= len {
            for first in (0..W).step_by(PART) {
                // SAFETY: the processor has the instructions; the caller's promise.
                unsafe {
                    let from = from.byte_add(first * stride).add(start);
                    square::transpose(from, stride, to.add(start * W + first), W);
                }
            }
            start += PART;
        }
    }
    for start in (start..len).step_by(PART) {
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

#[cfg(target_arch = "x86_64")]
mod square {
    use std::arch::x86_64::{
        __m512i, _mm512_loadu_si512, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    /// Sixteen rows of sixteen, `stride` bytes apart, to rows `to_stride` elements apart.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn transpose(from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        let mut a: [__m512i; 16] = [_mm512_setzero_si512(); 16];
        let mut b = a;
        for i in 0..16 {
            // SAFETY: the caller has the rows.
            a[i] = unsafe { _mm512_loadu_si512(from.byte_add(i * stride).cast()) };
        }
        // Pairs of rows, then fours, then blocks of four columns of eight rows and of sixteen.
        for i in 0..8 {
            b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        for i in (0..16).step_by(4) {
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for half in [0, 8] {
            for i in half..half + 4 {
                b[i] = _mm512_shuffle_i32x4::<0x88>(a[i], a[i + 4]);
                b[i + 4] = _mm512_shuffle_i32x4::<0xdd>(a[i], a[i + 4]);
            }
        }
        for i in 0..8 {
            a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[i + 8]);
            a[i + 8] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[i + 8]);
        }
        for i in 0..16 {
            // SAFETY: the caller has room for the columns.
            unsafe { _mm512_storeu_si512(to.add(i * to_stride).cast(), a[i]) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_their_rows_side_by_side() {
        // Whole lines of the cache and not, panels that are full and not.
        for (lines, k) in [(32, 32), (40, 70), (64, 37), (5, 3)] {
            let values: Vec<f32> = (0..lines * k).map(|i| i as f32).collect();
            let mut columns = vec![0.0; lines * k];
            (0..lines * k).for_each(|i| columns[i % k * lines + i / k] = values[i]);
            let of_rows = lay_out(Mat::rows(&values, k), lines, k);
            let of_columns = lay_out(Mat::rows(&columns, lines).t(), lines, k);
            for (at, (&a, &b)) in of_rows.iter().zip(&of_columns).enumerate() {
                let (line, i) = (at / (WIDTH * k) * WIDTH + at % WIDTH, at / WIDTH % k);
                let want = if line < lines { values[line * k + i] } else { 0.0 };
                assert!(a == want && b == want, "{lines}x{k}: {i} of {line}: {a} {b} {want}");
            }
        }
    }
}
