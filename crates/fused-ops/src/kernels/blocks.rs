//! What attention works on: operands, tasks, blocks of queries, and keys side by side.

#![allow(unsafe_code)]

use std::ops::Range;

use super::layout::beside;
use super::matrix::{Mat, count};
use super::panel::{Element, Rows, TILE, WIDTH};
use crate::{Heads, Scores, Segment, Segments};

/// Rows of a block, of all query heads that share a key head: scores of a thousand keys stay in a second-level cache.
const ROWS: usize = 48;

/// Queries of a task: segments are taken apart, however many threads there are.
const QUERIES: usize = 256;
/// Tasks of a segment and key head, at most: each has gradients of its own for all keys that it sees.
const PARTS: usize = 8;

/// Operands of one attention call; activations are `[tokens, heads * dim]`.
#[derive(Clone, Copy)]
pub struct Operands<'a, T> {
    /// Queries.
    pub q: &'a [T],
    /// Keys.
    pub k: &'a [T],
    /// Values.
    pub v: &'a [T],
    /// Head layout.
    pub heads: Heads,
    /// How scores are made.
    pub scores: Scores,
}

impl<T> Operands<'_, T> {
    pub fn group(&self) -> usize {
        self.heads.query / self.heads.kv
    }

    /// Features of the query heads of key head `kv` for one token, one after the other.
    pub fn of_query(&self, token: usize, kv: usize) -> Range<usize> {
        let width = self.group() * self.heads.dim;
        let at = (token * self.heads.kv + kv) * width;
        at..at + width
    }

    /// Log-sum-exps of the same heads.
    pub fn of_lse(&self, token: usize, kv: usize) -> Range<usize> {
        let at = (token * self.heads.kv + kv) * self.group();
        at..at + self.group()
    }
}

/// A block of queries of a segment and the keys that any of them sees, counted from the first key of its task.
#[derive(Clone, Copy)]
pub struct Block {
    /// First query, within the segment.
    pub first: usize,
    /// Number of queries.
    pub len: usize,
    /// First key, of a panel, and one past the last.
    pub start: usize,
    pub end: usize,
    /// Keys before the first query's own.
    pub position: usize,
    pub window: usize,
}

impl Block {
    pub fn keys(self) -> usize {
        self.end - self.start
    }

    /// The same in whole panels.
    pub fn width(self) -> usize {
        self.keys().next_multiple_of(WIDTH)
    }

    /// Those of the block's keys that query `i` sees.
    pub fn visible(self, i: usize) -> Range<usize> {
        let end = self.position + i + 1;
        end.saturating_sub(self.window).max(self.start) - self.start..end - self.start
    }
}

/// Some queries of a segment with one key head.
#[derive(Clone, Copy)]
pub struct Task {
    pub s: Segment,
    pub kv: usize,
    /// First query and one past the last, within the segment.
    pub start: usize,
    pub end: usize,
    /// Keys, in whole panels, that the window hides from all of them.
    skip: usize,
}

impl Task {
    pub fn all(segments: &Segments, heads: Heads, window: Option<usize>) -> Vec<Self> {
        let window = window.unwrap_or(usize::MAX);
        let parts = |&s: &Segment| {
            let step = QUERIES.max((s.prefix_len + s.len).div_ceil(PARTS));
            (0..s.len).step_by(step).flat_map(move |start| {
                let end = (start + step).min(s.len);
                let skip = (s.prefix_len + start + 1).saturating_sub(window) / WIDTH * WIDTH;
                (0..heads.kv).map(move |kv| Self { s, kv, start, end, skip })
            })
        };
        segments.segments().iter().flat_map(parts).collect()
    }

    /// Keys that any of the queries may see: the prefix, then the segment's own; with each the place of its first.
    pub fn runs(&self) -> [(Range<usize>, usize); 2] {
        let Segment { prefix, prefix_len, own, .. } = self.s;
        let hidden = self.skip.min(prefix_len);
        let first = own + self.skip - hidden;
        [(prefix + hidden..prefix + prefix_len, 0), (first..own + self.end, prefix_len - hidden)]
    }

    /// The same one by one.
    pub fn keys(&self) -> impl Iterator<Item = usize> {
        self.runs().into_iter().flat_map(|(run, _)| run)
    }
}

pub fn blocks(task: &Task, group: usize, window: Option<usize>) -> impl Iterator<Item = Block> {
    let (end, Task { s, skip, .. }) = (task.end, *task);
    let (window, step) = (window.unwrap_or(usize::MAX), (ROWS / group).clamp(16, 64));
    (task.start..end).step_by(step).map(move |first| {
        let len = step.min(end - first);
        let position = s.prefix_len + first - skip;
        // What the window hides from the first query it hides from all.
        let start = (position + 1).saturating_sub(window) / WIDTH * WIDTH;
        Block { first, len, start, end: position + len, position, window }
    })
}

/// Keys or values of a task for one key head.
#[derive(Default)]
pub struct Laid<T> {
    rows: Vec<T>,
    /// Keys side by side.
    pub of_keys: Vec<T>,
    /// Features side by side.
    pub of_features: Vec<T>,
}

impl<T: Element> Laid<T> {
    /// Of the rows of `data`, keys side by side or features side by side or both; returns the number of keys.
    pub fn fill(&mut self, x: &Operands<T>, data: &[T], task: &Task, [keys, features]: [bool; 2]) -> usize {
        let dim = x.heads.dim;
        self.rows.clear();
        for token in task.keys() {
            self.rows.extend_from_slice(&data[(token * x.heads.kv + task.kv) * dim..][..dim]);
        }
        let (count, rows) = (self.rows.len() / dim, Mat::rows(&self.rows, dim));
        if keys {
            beside::<T, WIDTH>(rows, count, dim, &mut self.of_keys);
        }
        if features {
            beside::<T, WIDTH>(rows.t(), dim, count, &mut self.of_features);
        }
        count
    }
}

/// `c = a · b` (or `c += a · b`) on this thread, for rows `a` of `k` elements and `b` in panels of rows of `depth` elements,
/// from element `first` of them on. `c` has whole panels of columns.
pub fn times<T: Element>(
    c: &mut [f32],
    stride: usize,
    add: bool,
    a: Rows<T>,
    b: &[T],
    (depth, first): (usize, usize),
) {
    let panel = depth.next_multiple_of(T::GROUP) * WIDTH;
    let panels = b.len() / panel;
    assert!(
        a.count == 0 || c.len() >= (a.count - 1) * stride + panels * WIDTH,
        "the destination holds the products"
    );
    count(a.count, panels * WIDTH, a.k);
    for (i, b) in b.chunks_exact(panel).enumerate() {
        // SAFETY: just asserted.
        unsafe { T::product(a, &b[first * WIDTH..], WIDTH, c.as_mut_ptr().add(i * WIDTH), stride, add) };
    }
}

/// Rows of `k` elements, one after the other.
pub fn plain<T: Element>(data: &[T], k: usize, stride: usize) -> Rows<'_, T> {
    Rows { data, stride, group: T::GROUP, count: data.len() / stride, k }
}

/// `c += a · b` for `a` in tiles of `lines` rows, otherwise as [`times`].
pub fn tiles_times<T: Element>(c: &mut [f32], stride: usize, (a, lines): (&[T], usize), k: usize, b: &[T]) {
    for (i, data) in a.chunks_exact(TILE * k.next_multiple_of(T::GROUP)).enumerate() {
        let rows = (lines - i * TILE).min(TILE);
        let a = Rows { data, stride: T::GROUP, group: TILE * T::GROUP, count: rows, k };
        times(&mut c[i * TILE * stride..], stride, true, a, b, (k, 0));
    }
}
