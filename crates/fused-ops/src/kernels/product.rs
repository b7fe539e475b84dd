//! Large matrix products on all cores: `b` is laid out in panels ([`super::panel`]), rows of `a` are read where they are
//! or, where they do not lie side by side, from tiles that stay in the second-level cache.

#![allow(unsafe_code)]

use std::any::TypeId;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::elementwise::cast;
use super::layout::{beside, lay_out};
use super::matrix::{Mat, Shared, count};
use super::panel::{Element, Rows, TILE, WIDTH};
use super::simd::wide;

/// Tiles of a task, at most.
const TILES: usize = 20;
/// Tiles of a task, at least, where there are so many.
const LEAST: usize = 8;
/// Tasks of a thread, so that all end at about the same time.
const TASKS: usize = 4;
/// Bytes of a row that are multiplied at a time: rows of a task stay in the second-level cache.
const DEPTH: usize = 2048;
/// Rows this far apart share their places in the first-level cache.
const ALIASED: usize = 4096;

/// How a product is divided: a function of its size and of the number of threads, on which no result depends.
struct Division {
    rows: usize,
    tiles: usize,
    panels: usize,
    /// Parts of the rows, and of the panels.
    parts: [usize; 2],
    /// Summed elements at a time.
    depth: usize,
}

impl Division {
    fn new<T: Element>((m, n, k): (usize, usize, usize)) -> Self {
        let (tiles, panels) = (m.div_ceil(TILE), n.div_ceil(WIDTH));
        let wanted = TASKS * rayon::current_num_threads();
        // What does not divide evenly by rows is divided by columns too: each part of the rows reads all of its panels.
        let few = tiles.div_ceil(TILES);
        let of_rows =
            if few >= wanted { few.next_multiple_of(wanted) } else { wanted.min(tiles.div_ceil(LEAST)) };
        let of_rows = of_rows.min(tiles);
        let of_panels = wanted.div_ceil(of_rows).min(panels);
        let most = DEPTH / size_of::<T>();
        let depth = k.div_ceil(k.div_ceil(most + most / 2)).next_multiple_of(T::GROUP);
        Self { rows: m, tiles, panels, parts: [of_rows, of_panels], depth }
    }

    fn tasks(&self) -> usize {
        self.parts[0] * self.parts[1]
    }

    /// Rows and panels of a task.
    fn task(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let [of_rows, of_panels] = self.parts;
        let even = |all: usize, parts: usize, i: usize| all * i / parts..all * (i + 1) / parts;
        let tiles = even(self.tiles, of_rows, task % of_rows);
        (tiles.start * TILE..(tiles.end * TILE).min(self.rows), even(self.panels, of_panels, task / of_rows))
    }
}

/// Types of results.
pub trait Output: Element {
    /// Products are written as they are.
    const SINGLE: bool;

    /// Lets `write` put `len` products in 32 bits where they belong, or add them (`add`) to what is there.
    ///
    /// # Safety
    /// `to` must be writable for them, and hold values where they are added to.
    unsafe fn whole(to: *mut Self, len: usize, add: bool, write: impl FnOnce(*mut f32));
}

impl Output for f32 {
    const SINGLE: bool = true;

    unsafe fn whole(to: *mut f32, _: usize, _: bool, write: impl FnOnce(*mut f32)) {
        write(to);
    }
}

impl Output for bf16 {
    const SINGLE: bool = false;

    unsafe fn whole(to: *mut bf16, len: usize, add: bool, write: impl FnOnce(*mut f32)) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut all = if add { cast(std::slice::from_raw_parts(to, len)) } else { vec![0.0; len] };
            write(all.as_mut_ptr());
            std::ptr::copy_nonoverlapping(cast::<f32, bf16>(&all).as_ptr(), to, len);
        }
    }
}

/// What becomes of products.
pub trait Finish<O>: Sync {
    /// `put` only rounds them, so sums may be added up in parts.
    const PLAIN: bool;

    /// Puts products of row `row` and the columns from `column` on into their places, or adds them (`add`, only asked of
    /// those that are plain) to what is there.
    ///
    /// # Safety
    /// `to` must be writable for them, and hold values where they are added to.
    unsafe fn put(&self, row: usize, column: usize, values: &[f32], to: *mut O, add: bool);
}

/// They are rounded to the type of the result.
struct Rounded;

impl<O: Element> Finish<O> for Rounded {
    const PLAIN: bool = true;

    #[inline(always)]
    unsafe fn put(&self, _: usize, _: usize, values: &[f32], to: *mut O, add: bool) {
        for (i, &value) in values.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let to = to.add(i);
                to.write(O::of(if add { to.read().single() + value } else { value }));
            }
        }
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
    // SAFETY: the caller's promise.
    unsafe { finished(dst, add, (m, n, k), a, b, &Rounded) }
}

/// The same with something else done with the products.
///
/// # Safety
/// As for [`panels`].
pub unsafe fn finished<T: Element, O: Output, F: Finish<O>>(
    dst: *mut O,
    add: bool,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    b: Mat<T>,
    finish: &F,
) {
    assert!(a.holds(m, k) && b.holds(k, n), "operands hold [{m}, {k}] and [{k}, {n}]");
    count(m, n, k);
    assert!(F::PLAIN || !add, "only products are added to others");
    let division = Division::new::<T>((m, n, k));
    // Sums that are rounded are whole.
    let depth = if O::SINGLE && F::PLAIN { division.depth } else { k };
    let inner = k.next_multiple_of(T::GROUP);
    let b = lay_out::<T>(b.t(), n, k);
    // A row whose last group is not full is continued by the next one.
    let direct = a.col == 1 && inner == k && !(a.row * size_of::<T>()).is_multiple_of(ALIASED);
    let (dst, tasks) = (Shared(dst), (0..division.tasks()).into_par_iter());
    tasks.for_each_init(Buffers::default, |buffers: &mut Buffers<T>, task| {
        let (dst, (of, panels)) = (dst, division.task(task));
        for start in (0..k).step_by(depth) {
            let deep = start..(start + depth).min(k);
            if !direct {
                let a = a.skip_rows(of.start).skip_cols(deep.start);
                beside::<T, TILE>(a, of.len(), deep.len(), &mut buffers.tiles);
            }
            let source = direct.then_some(a);
            for panel in panels.clone() {
                let place = Place { column: panel * WIDTH, stride: n, add: add || start > 0, finish };
                let b = &b[(panel * inner + start) * WIDTH..];
                // SAFETY: each task writes its own rows and columns of `dst`.
                unsafe { buffers.times(source, &of, &deep, b, &place, dst.0) };
            }
        }
    });
}

/// Where a panel's products go.
struct Place<'a, F> {
    column: usize,
    stride: usize,
    add: bool,
    finish: &'a F,
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
    unsafe fn times<O: Output, F: Finish<O>>(
        &mut self,
        a: Option<Mat<T>>,
        of: &Range<usize>,
        deep: &Range<usize>,
        b: &[T],
        place: &Place<F>,
        dst: *mut O,
    ) {
        let width = (place.stride - place.column).min(WIDTH);
        // SAFETY: these are the caller's places.
        let to = unsafe { dst.add(of.start * place.stride + place.column) };
        let whole = F::PLAIN && width == WIDTH;
        if whole && TypeId::of::<O>() == TypeId::of::<T>() {
            let mut to = to.cast::<T>();
            // SAFETY: `T` is `O`, and these are the caller's places.
            let rounded = unsafe {
                each(a, &self.tiles, of, deep, |rows| {
                    let done = T::rounded_product(rows, b, to, place.stride, place.add);
                    // Past the last row it is used no more.
                    to = to.wrapping_add(rows.count * place.stride);
                    done
                })
            };
            if rounded {
                return;
            }
        }
        let straight = O::SINGLE && whole;
        let (c, stride) = if straight {
            (to.cast::<f32>(), place.stride)
        } else {
            self.products.resize(of.len() * WIDTH, 0.0);
            (self.products.as_mut_ptr(), WIDTH)
        };
        let mut to_rows = c;
        each(a, &self.tiles, of, deep, |rows| {
            // SAFETY: `c` has room for all rows.
            unsafe {
                T::product(rows, b, WIDTH, to_rows, stride, straight && place.add);
                to_rows = to_rows.wrapping_add(rows.count * stride);
            }
            true
        });
        if straight {
            return;
        }
        let rows = self.products.as_chunks::<WIDTH>().0.iter().enumerate();
        wide(
            #[inline(always)]
            || {
                for (row, from) in rows {
                    // SAFETY: as above.
                    let to = unsafe { to.add(row * place.stride) };
                    let (row, finish) = (of.start + row, place.finish);
                    // SAFETY: these columns are the caller's.
                    unsafe {
                        if width < WIDTH {
                            finish.put(row, place.column, &from[..width], to, place.add);
                        } else {
                            finish.put(row, place.column, from, to, place.add);
                        }
                    }
                }
            },
        );
    }
}

/// Rows `of` and summed elements `deep` of `a`, or tiles of them, one after the other until `product` returns false.
fn each<T: Element>(
    a: Option<Mat<T>>,
    tiles: &[T],
    of: &Range<usize>,
    deep: &Range<usize>,
    mut product: impl FnMut(Rows<T>) -> bool,
) -> bool {
    let k = deep.len();
    if let Some(a) = a {
        let data = &a.data[of.start * a.row + deep.start..];
        return product(Rows { data, stride: a.row, group: T::GROUP, count: of.len(), k });
    }
    tiles.chunks_exact(TILE * k.next_multiple_of(T::GROUP)).enumerate().all(|(i, data)| {
        let count = (of.len() - i * TILE).min(TILE);
        product(Rows { data, stride: T::GROUP, group: TILE * T::GROUP, count, k })
    })
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
            let mut narrow: Vec<bf16> = product_of((m, n, k), a, b);
            near(&narrow.iter().map(|v| v.single()).collect::<Vec<_>>(), 1.0, 0.004);
            matmul(&mut narrow, true, (m, n, k), a, b);
            near(&narrow.iter().map(|v| v.single()).collect::<Vec<_>>(), 2.0, 0.008);
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
