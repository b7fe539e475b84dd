//! Linear layers on weights packed into panels ([`super::panel`]).

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::matrix::{Shared, count};
use super::panel::{Element, Rows, WIDTH};

/// Rows of a task: a multiple of what a panel is multiplied with at a time.
const ROWS: usize = 240;
/// Multiply-adds of a task, at least.
const WORK: usize = 1 << 21;

/// Shape of a packed weight of `[rows, k]`.
pub fn shape<T: Element>(rows: usize, k: usize) -> [usize; 2] {
    [rows.next_multiple_of(WIDTH), k.next_multiple_of(T::GROUP)]
}

/// A weight `[rows, k]`, row-major, in panels of `WIDTH` rows; what is missing is 0.
pub fn pack<T: Element>(weight: &[f32], rows: usize, k: usize) -> Vec<T> {
    let [padded, inner] = shape::<T>(rows, k);
    let mut out = vec![T::default(); padded * inner];
    out.par_chunks_mut(WIDTH * inner).enumerate().for_each(|(panel, out)| {
        let first = panel * WIDTH;
        for column in 0..WIDTH.min(rows - first) {
            for (i, &value) in weight[(first + column) * k..][..k].iter().enumerate() {
                out[(i / T::GROUP * WIDTH + column) * T::GROUP + i % T::GROUP] = T::of(value);
            }
        }
    });
    out
}

/// `x · wᵀ` for `x`: `[m, k]` and a packed weight of `rows` rows.
pub fn linear<T: Element>(x: &[f32], k: usize, weight: &[T], rows: usize) -> Vec<f32> {
    let m = x.len() / k;
    let inner = k.next_multiple_of(T::GROUP);
    let data = T::rows(x, k);
    let mut out: Vec<f32> = Vec::with_capacity(m * rows);
    let c = Shared(out.as_mut_ptr());
    let panels = rows.div_ceil(WIDTH);
    let block = ROWS.min(m.max(1));
    let group = (WORK / (block * inner * WIDTH)).clamp(1, panels);
    let (blocks, groups) = (m.div_ceil(ROWS), panels.div_ceil(group));
    (0..blocks * groups).into_par_iter().for_each(|task| {
        let (first, part) = (task % blocks * ROWS, task / blocks);
        let (count, c) = (ROWS.min(m - first), c);
        let a = Rows { data: &data[first * inner..], stride: inner, group: T::GROUP, count, k };
        for panel in part * group..((part + 1) * group).min(panels) {
            let (b, column) = (&weight[panel * WIDTH * inner..][..WIDTH * inner], panel * WIDTH);
            // SAFETY: each task writes its own rows and columns of `out`, which has room for all.
            unsafe {
                let to = c.0.add(first * rows + column);
                if column + WIDTH <= rows {
                    T::product(a, b, WIDTH, to, rows, false);
                } else {
                    last::<T>(a, b, to, rows, rows - column);
                }
            }
        }
    });
    // SAFETY: every element was written.
    unsafe { out.set_len(m * rows) };
    count(m, rows, k);
    out
}

/// The last panel, of which only some columns are wanted.
unsafe fn last<T: Element>(a: Rows<T>, b: &[T], to: *mut f32, stride: usize, columns: usize) {
    let mut all = vec![0.0; a.count * WIDTH];
    // SAFETY: `all` has room for the product; the wanted columns are the caller's.
    unsafe {
        T::product(a, b, WIDTH, all.as_mut_ptr(), WIDTH, false);
        for (row, values) in all.chunks_exact(WIDTH).enumerate() {
            std::ptr::copy_nonoverlapping(values.as_ptr(), to.add(row * stride), columns);
        }
    }
}
