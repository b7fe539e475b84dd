//! Matrix products on row-major, strided data.

#![allow(unsafe_code)]

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};

use gemm::Parallelism;

use super::elementwise::cast;
use super::panel::Element;
use super::product::{Output, panels};

static FLOPS: AtomicU64 = AtomicU64::new(0);

/// See [`crate::flops`].
pub fn flops() -> u64 {
    FLOPS.load(Ordering::Relaxed)
}

/// Counts a product that is not made by this module.
pub fn count(m: usize, n: usize, k: usize) {
    FLOPS.fetch_add(2 * (m * n * k) as u64, Ordering::Relaxed);
}

/// A read-only matrix: element `(i, j)` is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T = f32> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major data with `row` elements from one row to the next.
    pub fn rows(data: &'a [T], row: usize) -> Self {
        Self { data, row, col: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { data: self.data, row: self.col, col: self.row }
    }

    /// Without the first `n` rows.
    pub fn skip_rows(self, n: usize) -> Self {
        Self { data: &self.data[n * self.row..], ..self }
    }

    /// Without the first `n` columns.
    pub fn skip_cols(self, n: usize) -> Self {
        Self { data: &self.data[n * self.col..], ..self }
    }

    /// There is an element for each of so many rows and columns.
    pub fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row + (cols - 1) * self.col < self.data.len()
    }
}

/// A pointer that several threads may write through, each to its own elements.
pub struct Shared<T = f32>(pub *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: whoever writes through it keeps to elements that no other thread touches; that is an
// obligation of the unsafe functions that do.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

/// `dst = a · b` (or `dst += a · b`) for `a`: `[m, k]`, `b`: `[k, n]`, `dst`: `[m, n]` row-major, on all
/// cores.
pub fn matmul<T: Element, O: Output>(
    dst: &mut [O],
    add: bool,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    b: Mat<T>,
) {
    assert!(dst.len() >= m * n, "the destination holds {m}x{n}");
    // SAFETY: `dst` is borrowed mutably and long enough.
    unsafe { large(dst.as_mut_ptr(), add, (m, n, k), a, b) }
}

/// `a · b`, on all cores; sums have 32 bits.
pub fn product_of<T: Element, O: Output>((m, n, k): (usize, usize, usize), a: Mat<T>, b: Mat<T>) -> Vec<O> {
    if m == 0 || n == 0 || k == 0 {
        return vec![O::default(); m * n];
    }
    let mut out = Vec::with_capacity(m * n);
    // SAFETY: there is room for `m * n` elements, and the product writes every one of them.
    unsafe {
        large(out.as_mut_ptr(), false, (m, n, k), a, b);
        out.set_len(m * n);
    }
    out
}

/// Puts `a · b` after what is in `out`.
pub fn append<T: Element>(out: &mut Vec<f32>, (m, n, k): (usize, usize, usize), a: Mat<T>, b: Mat<T>) {
    out.reserve(m * n);
    // SAFETY: there is room for `m * n` elements more, and the product writes every one of them.
    unsafe {
        large(out.as_mut_ptr().add(out.len()), false, (m, n, k), a, b);
        out.set_len(out.len() + m * n);
    }
}

unsafe fn large<T: Element, O: Output>(
    dst: *mut O,
    add: bool,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    b: Mat<T>,
) {
    assert!(a.holds(m, k) && b.holds(k, n), "operands hold [{m}, {k}] and [{k}, {n}]");
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0, "a sum of nothing");
    // SAFETY: the caller's promise about `dst`.
    unsafe {
        if T::has_panels() {
            return panels(dst, add, (m, n, k), a, b);
        }
        let [a_data, b_data]: [Cow<'_, [f32]>; 2] = [a.data, b.data].map(widened);
        let (a, b) =
            (Mat { data: &a_data, row: a.row, col: a.col }, Mat { data: &b_data, row: b.row, col: b.col });
        O::whole(dst, m * n, add, |dst| {
            if f32::has_panels() {
                panels(dst, add, (m, n, k), a, b);
            } else {
                gemm_of(dst, add, (m, n, k), a, b);
            }
        });
    }
}

/// Values of 32 bits.
fn widened<T: Element>(values: &[T]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(values) {
        Ok(same) if size_of::<T>() == size_of::<f32>() => Cow::Borrowed(same),
        _ => Cow::Owned(cast(values)),
    }
}

/// The same by a library, which knows the tiles of other processors.
unsafe fn gemm_of(dst: *mut f32, add: bool, (m, n, k): (usize, usize, usize), a: Mat, b: Mat) {
    count(m, n, k);
    // SAFETY: the caller has checked the operands and answers for the destination.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
}
