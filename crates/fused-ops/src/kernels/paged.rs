//! Attention over pages: keys and values are written into a cache once and read in place by every later query.
//!
//! A page of a key head holds its keys with the tokens side by side and its values with the features side by side, so
//! that both products of attention stream panels ([`super::panel`]). A query's result does not depend on the queries
//! beside it.

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::matrix::{Shared, count};
use super::panel::{Element, Rows, WIDTH};
use super::simd::{exps, max, softcap, wide};
use crate::paged::{PAGE, Span};
use crate::{Heads, Scores};

const _: () = assert!(PAGE == WIDTH, "a page of keys is a panel");

/// Queries of a task.
const QUERIES: usize = 64;
/// Rows of scores that are made at a time.
const ROWS: usize = 12;

/// Rows `[tokens, kv · dim]` of new keys and values into the pages of their sequences.
pub fn write<T: Element>(new: [&[f32]; 2], cache: [&mut [T]; 2], spans: &[Span], heads: Heads) {
    let (dim, width) = (heads.dim, heads.kv * heads.dim);
    let ([k, v], caches) = (new, cache);
    // The pages that are written, each by one sequence.
    let mut parts: Vec<(usize, &Span, usize)> = spans
        .iter()
        .flat_map(|span| {
            let pages = span.seen / PAGE..span.tokens().div_ceil(PAGE);
            pages.map(move |i| (span.pages[i] as usize, span, i * PAGE))
        })
        .collect();
    parts.sort_unstable_by_key(|(page, ..)| *page);
    assert!(parts.is_sorted_by(|a, b| a.0 < b.0), "two sequences write to one page");
    let numbers: Vec<usize> = parts.iter().map(|(page, ..)| *page).collect();
    let [keys, values] = caches.map(|cache| chosen(cache, &numbers, PAGE * width));
    let pages = parts.into_par_iter().zip(keys).zip(values);
    pages.for_each(|(((_, span, first), keys), values)| {
        if first >= span.seen && first + PAGE > span.tokens() {
            // Probabilities of 0 do not take away a value that is not a number, left by a sequence before.
            values.fill(T::of(0.0));
        }
        for token in first.max(span.seen)..(first + PAGE).min(span.tokens()) {
            let (at, row) = (token - first, (span.query + token - span.seen) * width);
            for head in 0..heads.kv {
                let (base, from) = (head * PAGE * dim, row + head * dim);
                for d in 0..dim {
                    keys[base + (d / T::GROUP * PAGE + at) * T::GROUP + d % T::GROUP] = T::of(k[from + d]);
                    values[base + (at / T::GROUP * dim + d) * T::GROUP + at % T::GROUP] = T::of(v[from + d]);
                }
            }
        }
    });
}

/// The parts of `size` values with these numbers, which grow.
fn chosen<'a, T>(mut rest: &'a mut [T], numbers: &[usize], size: usize) -> Vec<&'a mut [T]> {
    let mut at = 0;
    let mut all = Vec::with_capacity(numbers.len());
    for &number in numbers {
        let (part, after) = rest[(number - at) * size..].split_at_mut(size);
        (rest, at) = (after, number + 1);
        all.push(part);
    }
    all
}

/// What queries read.
#[derive(Clone, Copy)]
pub struct Cache<'a, T> {
    pub keys: &'a [T],
    pub values: &'a [T],
    pub heads: Heads,
    pub scores: Scores,
}

#[derive(Default)]
struct Buffers<T> {
    q: Vec<f32>,
    /// Scores, `[rows, keys]`.
    products: Vec<f32>,
    /// Probabilities, `[rows, keys]`.
    p: Vec<T>,
    out: Vec<f32>,
    /// Columns of values that do not fill a panel.
    tail: Vec<T>,
}

/// Queries `[tokens, query heads · dim]` against the cache.
pub fn attend<T: Element>(q: &[f32], cache: Cache<T>, spans: &[Span]) -> Vec<f32> {
    let tasks: Vec<(&Span, usize, usize)> = spans
        .iter()
        .flat_map(|span| {
            let heads = (0..cache.heads.kv).map(move |head| (span, head));
            heads.flat_map(|(span, head)| (0..span.len).step_by(QUERIES).map(move |i| (span, head, i)))
        })
        .collect();
    let mut out = vec![0.0; q.len()];
    let to = Shared(out.as_mut_ptr());
    tasks.into_par_iter().for_each_init(Buffers::default, |buffers, (span, head, first)| {
        let (end, to) = ((first + QUERIES).min(span.len), to);
        let step = (ROWS / (cache.heads.query / cache.heads.kv)).max(1);
        for i in (first..end).step_by(step) {
            // SAFETY: each block of queries and key head writes its own part of `out`.
            unsafe { block(q, cache, span, head, i..(i + step).min(end), buffers, to) };
        }
    });
    out
}

/// A few queries of all heads that share key head `head`.
unsafe fn block<T: Element>(
    q: &[f32],
    cache: Cache<T>,
    span: &Span,
    head: usize,
    queries: std::ops::Range<usize>,
    buffers: &mut Buffers<T>,
    to: Shared,
) {
    let Cache { keys, values, heads, scores } = cache;
    let (dim, group) = (heads.dim, heads.query / heads.kv);
    let rows = queries.len() * group;
    let place = |query: usize| (span.query + query) * heads.query * dim + head * group * dim;
    let Buffers { q: block, products, p, out, tail } = buffers;
    block.clear();
    for query in queries.clone() {
        let at = place(query);
        block.extend(q[at..at + group * dim].iter().map(|value| value * scores.scale));
    }
    let window = scores.window.unwrap_or(usize::MAX);
    let sees = |query: usize| (span.seen + query + 1).saturating_sub(window)..span.seen + query + 1;
    let (low, high) = (sees(queries.start).start / PAGE, sees(queries.end - 1).end.div_ceil(PAGE));
    let pages = &span.pages[low..high];
    let width = pages.len() * PAGE;
    products.resize(rows * width, 0.0);
    p.resize(rows * width, T::default());
    let part = |page: u32| (page as usize * heads.kv + head) * PAGE * dim..;
    let a = T::rows(block, dim);
    let a = Rows { data: &a, stride: dim.next_multiple_of(T::GROUP), group: T::GROUP, count: rows, k: dim };
    for (i, &page) in pages.iter().enumerate() {
        // SAFETY: `products` has `PAGE` columns for each page.
        unsafe { T::product(a, &keys[part(page)], PAGE, products.as_mut_ptr().add(i * PAGE), width, false) };
    }
    let sums: Vec<f32> = (0..rows)
        .map(|row| {
            let seen = sees(queries.start + row / group);
            let seen = seen.start - low * PAGE..seen.end - low * PAGE;
            let row = row * width..(row + 1) * width;
            softmax(&mut products[row.clone()], seen, scores.softcap, &mut p[row])
        })
        .collect();
    out.clear();
    out.resize(rows * dim.next_multiple_of(WIDTH), 0.0);
    let stride = dim.next_multiple_of(WIDTH);
    for (i, &page) in pages.iter().enumerate() {
        let a = Rows { data: &p[i * PAGE..], stride: width, group: T::GROUP, count: rows, k: PAGE };
        let values = &values[part(page)];
        for column in (0..dim).step_by(WIDTH) {
            let columns = &values[column * T::GROUP..];
            // SAFETY: `out` has whole panels of columns.
            unsafe {
                let c = out.as_mut_ptr().add(column);
                if column + WIDTH <= dim {
                    T::product(a, columns, dim, c, stride, i > 0);
                } else {
                    filled(columns, dim, dim - column, tail);
                    T::product(a, tail, WIDTH, c, stride, i > 0);
                }
            }
        }
    }
    count(rows, width, 2 * dim);
    for (row, sum) in sums.into_iter().enumerate() {
        let (query, in_group) = (queries.start + row / group, row % group);
        // SAFETY: the caller leaves this part of the output to this block.
        unsafe {
            let to = to.0.add(place(query) + in_group * dim);
            let from = &out[row * stride..][..dim];
            from.iter().enumerate().for_each(|(d, value)| *to.add(d) = value / sum);
        }
    }
}

/// Probabilities of the keys that are seen, not yet divided by the sum that is returned, to `p`; 0 for the others.
fn softmax<T: Element>(
    scores: &mut [f32],
    seen: std::ops::Range<usize>,
    cap: Option<f32>,
    p: &mut [T],
) -> f32 {
    p[..seen.start].fill(T::default());
    p[seen.end..].fill(T::default());
    let (scores, p) = (&mut scores[seen.clone()], &mut p[seen]);
    wide(
        #[inline(always)]
        || {
            if let Some(cap) = cap {
                scores.iter_mut().for_each(|score| *score = softcap(*score, cap));
            }
            exps(scores, (1.0, max(scores)), p, T::of)
        },
    )
}

/// The first `columns` columns of a page of values as a panel of their own.
fn filled<T: Element>(values: &[T], stride: usize, columns: usize, panel: &mut Vec<T>) {
    panel.clear();
    panel.resize(PAGE * WIDTH, T::default());
    for group in 0..PAGE / T::GROUP {
        let from = &values[group * stride * T::GROUP..][..columns * T::GROUP];
        panel[group * WIDTH * T::GROUP..][..from.len()].copy_from_slice(from);
    }
}
