//! Products of rows with panels of 32 columns.
//!
//! A panel holds the values of its columns for one summed index after the other, so that a product streams it and
//! needs no copy, however few rows there are. Every element of a result is one sum in one order, whatever stands in
//! the rows beside it: a sequence's result does not depend on what it is batched with.

#![allow(unsafe_code)]
// Plain indices keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::borrow::Cow;

use pulp::{Simd, WithSimd};

/// Columns of a panel.
pub const WIDTH: usize = 32;

/// Rows that are multiplied with a panel at a time, where the processor has 32 registers of 512 bits.
pub const TILE: usize = 12;

/// Rows beside a panel: `count` of `k` elements, `stride` elements from one to the next and `group` from one group of
/// elements of a row to the next.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub group: usize,
    pub count: usize,
    pub k: usize,
}

/// Types that panels hold.
pub trait Element: burn::tensor::Element + bytemuck::Pod {
    /// Values of a column that stand side by side: the summed index runs over groups of so many.
    const GROUP: usize;

    /// Rounds to the nearest.
    fn of(value: f32) -> Self;

    /// In 32 bits.
    fn single(self) -> f32;

    /// This processor multiplies them in panels faster than any other way.
    fn has_panels() -> bool;

    /// A group of elements of each of `count` columns side by side, of lines `stride` elements apart.
    ///
    /// # Safety
    /// `from` must be readable for `GROUP` lines of `count` columns, `to` writable for the groups of `count` columns.
    unsafe fn beside<const W: usize>(from: *const Self, stride: usize, count: usize, to: *mut Self);

    /// Rows of `k` values, those of a group that is not full filled up with 0.
    fn rows(values: &[f32], k: usize) -> Cow<'_, [Self]>;

    /// `c = a · b`, or `c += a · b`: `c` has `stride` elements from one row to the next. `b` has `WIDTH` columns,
    /// `b_stride` columns from one group of the summed index to the next.
    ///
    /// # Safety
    /// `c` must be writable for all rows and columns, and nothing else may access those.
    unsafe fn product(a: Rows<Self>, b: &[Self], b_stride: usize, c: *mut f32, stride: usize, add: bool);

    /// The same in the type of the operands, with a panel that has no gaps, where the processor rounds sums by itself;
    /// elsewhere false, and nothing is written.
    ///
    /// # Safety
    /// As for [`Element::product`].
    unsafe fn rounded_product(_: Rows<Self>, _: &[Self], _: *mut Self, _: usize, _: bool) -> bool {
        false
    }
}

/// Panics where operands are too short.
pub fn check<T: Element>(a: &Rows<T>, b: &[T], b_stride: usize) {
    let groups = a.k.div_ceil(T::GROUP);
    assert!(
        a.count * groups == 0 || (a.count - 1) * a.stride + (groups - 1) * a.group + T::GROUP <= a.data.len(),
        "rows end too early"
    );
    assert!(
        groups == 0 || ((groups - 1) * b_stride + WIDTH) * T::GROUP <= b.len(),
        "the panel ends too early"
    );
}

/// Has the places of a row's results, one of a panel, brought to the first-level cache while they are computed: they
/// are read, if they are, and written only afterwards.
#[inline(always)]
pub fn ahead<T>(row: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let size = WIDTH * size_of::<T>();
        // Rows start at any element: the last line may be one more.
        for at in (0..size).step_by(64).chain([size - 1]) {
            // SAFETY: a hint, which reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(row.cast::<i8>().wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

impl Element for f32 {
    const GROUP: usize = 1;

    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn single(self) -> f32 {
        self
    }

    fn has_panels() -> bool {
        // Tiles are made for registers of 512 bits.
        #[cfg(target_arch = "x86_64")]
        {
            matches!(pulp::Arch::new(), pulp::Arch::V4(_))
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            false
        }
    }

    #[inline(always)]
    unsafe fn beside<const W: usize>(from: *const f32, _: usize, count: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            if count == W {
                // Of a size that is known: no call.
                to.cast::<[f32; W]>().write_unaligned(from.cast::<[f32; W]>().read_unaligned());
            } else {
                std::ptr::copy_nonoverlapping(from, to, count);
            }
        }
    }

    fn rows(values: &[f32], _: usize) -> Cow<'_, [f32]> {
        Cow::Borrowed(values)
    }

    unsafe fn product(a: Rows<f32>, b: &[f32], b_stride: usize, c: *mut f32, stride: usize, add: bool) {
        check(&a, b, b_stride);
        let product = Product { a, b: b.as_ptr(), b_stride, c, stride, add };
        pulp::Arch::new().dispatch(product);
    }
}

struct Product<'a> {
    a: Rows<'a, f32>,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // As many rows at a time as sums fit into the registers.
        // SAFETY: the vectors of a panel are `WIDTH` floats; `check` has seen to the operands.
        unsafe {
            match S::F32_LANES {
                16 => {
                    let mut row = 0;
                    self.tiles::<S, 12, 2>(simd, &mut row);
                    self.tiles::<S, 6, 2>(simd, &mut row);
                    self.tiles::<S, 4, 2>(simd, &mut row);
                    self.tiles::<S, 3, 2>(simd, &mut row);
                    self.tiles::<S, 2, 2>(simd, &mut row);
                    self.tiles::<S, 1, 2>(simd, &mut row);
                }
                8 => {
                    let mut row = 0;
                    self.tiles::<S, 3, 4>(simd, &mut row);
                    self.tiles::<S, 2, 4>(simd, &mut row);
                    self.tiles::<S, 1, 4>(simd, &mut row);
                }
                4 => {
                    let mut row = 0;
                    self.tiles::<S, 2, 8>(simd, &mut row);
                    self.tiles::<S, 1, 8>(simd, &mut row);
                }
                _ => self.tiles::<S, 1, 32>(simd, &mut 0),
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const M: usize, const V: usize>(&self, simd: S, row: &mut usize) {
        while *row + M <= self.a.count {
            // SAFETY: these rows exist.
            unsafe { self.tile::<S, M, V>(simd, *row) };
            *row += M;
        }
    }

    /// `M` rows against `V` vectors of columns.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const V: usize>(&self, simd: S, row: usize) {
        // SAFETY: as the caller's.
        unsafe {
            let a = self.a.data.as_ptr().add(row * self.a.stride);
            let c = self.c.add(row * self.stride);
            let vector = |from: *const f32| from.cast::<S::f32s>().read_unaligned();
            let mut sums = [[simd.splat_f32s(0.0); V]; M];
            for i in 0..M {
                ahead(c.wrapping_add(i * self.stride));
            }
            for k in 0..self.a.k {
                let mut columns = [simd.splat_f32s(0.0); V];
                for j in 0..V {
                    columns[j] = vector(self.b.add(k * self.b_stride + j * S::F32_LANES));
                }
                for i in 0..M {
                    let x = simd.splat_f32s(*a.add(i * self.a.stride + k * self.a.group));
                    for j in 0..V {
                        sums[i][j] = simd.mul_add_f32s(x, columns[j], sums[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..V {
                    let to = c.add(i * self.stride + j * S::F32_LANES);
                    let sum = if self.add { simd.add_f32s(vector(to), sums[i][j]) } else { sums[i][j] };
                    to.cast::<S::f32s>().write_unaligned(sum);
                }
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use half::bf16;

    use super::*;

    pub fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + seed) % 23) as f32 / 8.0 - 1.25).collect()
    }

    pub fn panel<T: Element>(b: &[f32], k: usize) -> Vec<T> {
        let mut out = vec![T::default(); k.div_ceil(T::GROUP) * T::GROUP * WIDTH];
        for (i, value) in b.iter().enumerate() {
            let (row, column) = (i / WIDTH, i % WIDTH);
            out[(row / T::GROUP * WIDTH + column) * T::GROUP + row % T::GROUP] = T::of(*value);
        }
        out
    }

    fn compare<T: Element>(rows: usize, k: usize, add: bool) {
        let stride = k.div_ceil(T::GROUP) * T::GROUP;
        let (x, b) = (values(rows * k, 3), values(k * WIDTH, 11));
        let mut a = vec![T::default(); rows * stride];
        x.iter().enumerate().for_each(|(i, &v)| a[i / k * stride + i % k] = T::of(v));
        let mut c = values(rows * 40, 5);
        let before = c.clone();
        // SAFETY: `c` has 40 columns in each row.
        unsafe {
            let a = Rows { data: &a, stride, group: T::GROUP, count: rows, k };
            T::product(a, &panel::<T>(&b, k), WIDTH, c.as_mut_ptr(), 40, add);
        }
        for (i, &got) in c.iter().enumerate() {
            let (row, column) = (i / 40, i % 40);
            if column >= WIDTH {
                assert_eq!(got, before[i], "columns beyond the panel stay as they are");
                continue;
            }
            let sum: f32 = (0..k).map(|j| x[row * k + j] * b[j * WIDTH + column]).sum();
            let want = sum + if add { before[i] } else { 0.0 };
            assert!(
                (got - want).abs() < 1e-4 * (1.0 + want.abs()),
                "{rows}x{k} ({row}, {column}): {got} {want}"
            );
        }
    }

    #[test]
    fn products_are_those_of_plain_loops() {
        for (rows, k) in [(1, 1), (2, 7), (5, 64), (12, 33), (17, 48), (29, 576)] {
            for add in [false, true] {
                compare::<f32>(rows, k, add);
                // All values are multiples of 1/8 below 2, which 16 bits hold.
                compare::<bf16>(rows, k, add);
            }
        }
    }

    #[test]
    fn a_row_has_the_same_result_beside_any_other() {
        let (x, b) = (values(29 * 64, 1), panel::<f32>(&values(64 * WIDTH, 2), 64));
        let run = |first: usize, rows: usize| {
            let mut c = vec![0.0; rows * WIDTH];
            let a = Rows { data: &x[first * 64..], stride: 64, group: 1, count: rows, k: 64 };
            // SAFETY: `c` has `WIDTH` columns.
            unsafe { f32::product(a, &b, WIDTH, c.as_mut_ptr(), WIDTH, false) };
            c
        };
        let all = run(0, 29);
        for row in 0..29 {
            assert_eq!(run(row, 1), all[row * WIDTH..][..WIDTH], "row {row}");
        }
    }
}
