//! Large matrix products on all cores: `b` is laid out in panels ([`super::panel`]), rows of `a` are read where they are
//! or, where they do not lie side by side, from tiles that stay in the second-level cache.

#![allow(unsafe_code)]
// Plain indices are unrolled.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::elementwise::cast;
use super::matrix::{Mat, Shared, count};
use super::panel::{Element, Rows, TILE, WIDTH};
use super::simd::{made, wide};

/// Rows of a task, at most.
const ROWS: usize = 20 * TILE;
/// Bytes of a row that are multiplied at a time: rows of a task stay in the second-level cache.
const DEPTH: usize = 2048;
/// Rows this far apart share their places in the first-level cache.
const ALIASED: usize = 4096;

/// How a product is divided: a function of its size and of the number of threads, on which no result depends.
struct Division {
    /// Rows of a task.
    rows: usize,
    /// Panels of a task.
    panels: usize,
    /// Summed elements at a time.
    depth: usize,
}

impl Division {
    fn new<T: Element>((m, n, k): (usize, usize, usize)) -> Self {
        let (threads, panels) = (rayon::current_num_threads(), n.div_ceil(WIDTH));
        // As many tasks for each thread, of whole tiles.
        let tasks = m.div_ceil(ROWS).next_multiple_of(threads);
        let rows = m.div_ceil(tasks).next_multiple_of(TILE);
        let groups = threads.div_ceil(m.div_ceil(rows)).min(panels);
        let most = DEPTH / size_of::<T>();
        let depth = k.div_ceil(k.div_ceil(most + most / 2)).next_multiple_of(T::GROUP);
        Self { rows, panels: panels.div_ceil(groups), depth }
    }
}

/// Types of results.
pub trait Output: Element {
    /// Products are written as they are.
    const SINGLE: bool;

    /// Lets `write` put `len` products in 32 bits where they belong.
    ///
    /// # Safety
    /// `to` must be writable for them; where `write` adds, it must hold products of 32 bits.
    unsafe fn whole(to: *mut Self, len: usize, write: impl FnOnce(*mut f32));
}

impl Output for f32 {
    const SINGLE: bool = true;

    unsafe fn whole(to: *mut f32, _: usize, write: impl FnOnce(*mut f32)) {
        write(to);
    }
}

impl Output for bf16 {
    const SINGLE: bool = false;

    unsafe fn whole(to: *mut bf16, len: usize, write: impl FnOnce(*mut f32)) {
        let mut all = vec![0.0; len];
        write(all.as_mut_ptr());
        let narrow = cast::<f32, bf16>(&all);
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(narrow.as_ptr(), to, len) };
    }
}

/// `dst = a · b` (or `dst += a · b`) for `a`: `[m, k]`, `b`: `[k, n]`, `dst`: `[m, n]` row-major; none of the three is 0.
///
/// # Safety
/// `dst` must be writable for all `m * n` elements and, where it is added to, hold them.
pub unsafe fn panels<T: Element, O: Output>(
    dst: *mut O,
    add: bool,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    b: Mat<T>,
) {
    assert!(a.holds(m, k) && b.holds(k, n), "operands hold [{m}, {k}] and [{k}, {n}]");
    count(m, n, k);
    let Division { rows, panels, depth } = Division::new::<T>((m, n, k));
    // Sums that are rounded are whole.
    let depth = if O::SINGLE { depth } else { k };
    let inner = k.next_multiple_of(T::GROUP);
    let b = lay_out::<T>(b.t(), n, k);
    // A row whose last group is not full is continued by the next one.
    let direct = a.col == 1 && inner == k && !(a.row * size_of::<T>()).is_multiple_of(ALIASED);
    let (all, blocks, dst) = (n.div_ceil(WIDTH), m.div_ceil(rows), Shared(dst));
    let tasks = (0..blocks * all.div_ceil(panels)).into_par_iter();
    tasks.for_each_init(Buffers::default, |buffers: &mut Buffers<T>, task| {
        let (first, dst) = (task % blocks * rows, dst);
        let (of, columns) = (first..(first + rows).min(m), task / blocks * panels);
        for start in (0..k).step_by(depth) {
            let deep = start..(start + depth).min(k);
            if !direct {
                tile(a, &of, &deep, &mut buffers.tiles);
            }
            let source = direct.then_some(a);
            for panel in columns..(columns + panels).min(all) {
                let place = Place { column: panel * WIDTH, stride: n, add: add || start > 0 };
                let b = &b[(panel * inner + start) * WIDTH..];
                // SAFETY: each task writes its own rows and columns of `dst`.
                unsafe { buffers.times(source, &of, &deep, b, &place, dst.0) };
            }
        }
    });
}

/// Where a panel's products go.
struct Place {
    column: usize,
    stride: usize,
    add: bool,
}

/// What a task needs besides its operands.
struct Buffers<T> {
    tiles: Vec<T>,
    products: Vec<f32>,
}

impl<T> Default for Buffers<T> {
    fn default() -> Self {
        Self { tiles: Vec::new(), products: Vec::new() }
    }
}

impl<T: Element> Buffers<T> {
    /// Rows `of` and summed elements `deep`, of `a` or in tiles, times a panel.
    unsafe fn times<O: Output>(
        &mut self,
        a: Option<Mat<T>>,
        of: &Range<usize>,
        deep: &Range<usize>,
        b: &[T],
        place: &Place,
        dst: *mut O,
    ) {
        let width = (place.stride - place.column).min(WIDTH);
        // SAFETY: these are the caller's places.
        let to = unsafe { dst.add(of.start * place.stride + place.column) };
        let straight = O::SINGLE && width == WIDTH;
        let (c, stride) = if straight {
            (to.cast::<f32>(), place.stride)
        } else {
            self.products.resize(of.len() * WIDTH, 0.0);
            (self.products.as_mut_ptr(), WIDTH)
        };
        // SAFETY: `c` has room for all rows.
        unsafe { products(a, &self.tiles, of, deep, b, (c, stride), straight && place.add) };
        if straight {
            return;
        }
        for (row, from) in self.products.chunks_exact(WIDTH).enumerate() {
            wide(
                #[inline(always)]
                || {
                    for (column, &value) in from[..width].iter().enumerate() {
                        // SAFETY: as above.
                        unsafe {
                            let to = to.add(row * place.stride + column);
                            *to = O::of(if place.add { (*to).single() + value } else { value });
                        }
                    }
                },
            );
        }
    }
}

/// Products of rows with one panel.
unsafe fn products<T: Element>(
    a: Option<Mat<T>>,
    tiles: &[T],
    of: &Range<usize>,
    deep: &Range<usize>,
    b: &[T],
    (to, stride): (*mut f32, usize),
    add: bool,
) {
    let k = deep.len();
    if let Some(a) = a {
        let data = &a.data[of.start * a.row + deep.start..];
        let a = Rows { data, stride: a.row, group: T::GROUP, count: of.len(), k };
        // SAFETY: the caller's promise.
        return unsafe { T::product(a, b, WIDTH, to, stride, add) };
    }
    for (i, data) in tiles.chunks_exact(TILE * k.next_multiple_of(T::GROUP)).enumerate() {
        let count = (of.len() - i * TILE).min(TILE);
        let a = Rows { data, stride: T::GROUP, group: TILE * T::GROUP, count, k };
        // SAFETY: the caller's promise.
        unsafe { T::product(a, b, WIDTH, to.add(i * TILE * stride), stride, add) };
    }
}

/// Rows and summed elements of `a` in tiles.
fn tile<T: Element>(a: Mat<T>, rows: &Range<usize>, deep: &Range<usize>, into: &mut Vec<T>) {
    let size = TILE * deep.len().next_multiple_of(T::GROUP);
    let all = rows.len().div_ceil(TILE) * size;
    into.clear();
    into.reserve(all);
    for (i, tile) in into.spare_capacity_mut()[..all].chunks_exact_mut(size).enumerate() {
        let first = rows.start + i * TILE;
        let count = (rows.end - first).min(TILE);
        interleave::<T, TILE>(a.skip_rows(first).skip_cols(deep.start), count, deep.len(), tile);
    }
    // SAFETY: every tile was written.
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
                        *to.add(i * W) = line[i];
                    }
                } else {
                    (0..len - start).for_each(|i| *to.add(i * W) = from.add(i).read_unaligned());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::matrix::{matmul, product_of};

    fn values<T: Element>(n: usize, seed: usize) -> Vec<T> {
        // Multiples of 1/8 below 2, which 16 bits hold.
        (0..n).map(|i| T::of(((i * 7 + seed) % 23) as f32 / 8.0 - 1.25)).collect()
    }

    /// All four ways in which operands lie, against plain loops.
    fn compare<T: Element>((m, n, k): (usize, usize, usize)) {
        let (a, b): (Vec<T>, Vec<T>) = (values(m * k, 3), values(k * n, 5));
        for (a_row, b_row) in [(true, true), (true, false), (false, true), (false, false)] {
            let a = if a_row { Mat::rows(&a, k) } else { Mat::rows(&a, m).t() };
            let b = if b_row { Mat::rows(&b, n) } else { Mat::rows(&b, k).t() };
            let at = |x: &Mat<T>, i: usize, j: usize| x.data[i * x.row + j * x.col].single();
            let want: Vec<f32> =
                (0..m * n).map(|i| (0..k).map(|j| at(&a, i / n, j) * at(&b, j, i % n)).sum()).collect();
            let near = |got: &[f32], factor: f32, rounding: f32| {
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let (want, allowed) = (factor * want, (1e-4 + rounding * want.abs()) * factor);
                    assert!(
                        (got - want).abs() <= allowed,
                        "{m}x{n}x{k} {a_row} {b_row} at {i}: {got} {want}"
                    );
                }
            };
            let mut got: Vec<f32> = product_of((m, n, k), a, b);
            near(&got, 1.0, 0.0);
            matmul(&mut got, true, (m, n, k), a, b);
            near(&got, 2.0, 0.0);
            let narrow: Vec<bf16> = product_of((m, n, k), a, b);
            near(&narrow.iter().map(|v| v.single()).collect::<Vec<_>>(), 1.0, 0.004);
        }
    }

    #[test]
    fn products_are_those_of_plain_loops() {
        // Fewer rows and columns than a tile and a panel, odd sums, several parts of a sum, many tasks, and rows that
        // share places in the cache.
        for size in
            [(1, 1, 1), (5, 7, 3), (12, 32, 64), (13, 33, 65), (250, 40, 31), (30, 70, 1700), (70, 90, 2048)]
        {
            compare::<f32>(size);
            compare::<bf16>(size);
        }
    }

    #[test]
    fn nothing_times_nothing() {
        let nothing: Vec<f32> = product_of((2, 3, 0), Mat::rows(&[] as &[f32], 1), Mat::rows(&[], 3));
        assert_eq!(nothing, [0.0; 6]);
        assert!(product_of::<f32, bf16>((0, 3, 2), Mat::rows(&[], 2), Mat::rows(&[0.0; 6], 3)).is_empty());
    }
}
