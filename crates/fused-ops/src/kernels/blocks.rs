//! What attention works on: operands, tasks, blocks of queries, and keys side by side.

use std::ops::Range;

use super::matrix::Mat;
use super::panel::Element;
use crate::{Heads, Scores, Segment, Segments};

/// Rows of a block, of all query heads that share a key head: scores of a thousand keys stay in a second-level cache.
const ROWS: usize = 48;

/// Queries of a task: long segments are taken apart, however many threads there are.
const QUERIES: usize = 1024;

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

/// A block of queries of a segment and the keys that any of them sees, counted from the segment's first prefix key.
#[derive(Clone, Copy)]
pub struct Block {
    /// First query, within the segment.
    pub first: usize,
    /// Number of queries.
    pub len: usize,
    /// First key and one past the last.
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
}

impl Task {
    pub fn all(segments: &Segments, heads: Heads) -> Vec<Self> {
        let parts = |&s: &Segment| {
            let starts = (0..s.len).step_by(QUERIES);
            starts.flat_map(move |start| {
                let end = (start + QUERIES).min(s.len);
                (0..heads.kv).map(move |kv| Self { s, kv, start, end })
            })
        };
        segments.segments().iter().flat_map(parts).collect()
    }

    /// Keys that any of the queries may see: the prefix, then the segment's own.
    pub fn keys(&self) -> impl Iterator<Item = usize> {
        let Segment { prefix, prefix_len, own, .. } = self.s;
        (prefix..prefix + prefix_len).chain(own..own + self.end)
    }
}

pub fn blocks(task: &Task, group: usize, window: Option<usize>) -> impl Iterator<Item = Block> {
    let (end, prefix) = (task.end, task.s.prefix_len);
    let (window, step) = (window.unwrap_or(usize::MAX), (ROWS / group).clamp(16, 64));
    (task.start..end).step_by(step).map(move |first| {
        let len = step.min(end - first);
        let position = prefix + first;
        // What the window hides from the first query it hides from all.
        let start = (position + 1).saturating_sub(window);
        Block { first, len, start, end: position + len, position, window }
    })
}

/// Keys and values of a run of tokens, `[keys, dim]`, and their transposes.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    pub k: Mat<'a>,
    pub kt: Mat<'a>,
    pub v: Mat<'a>,
    pub vt: Mat<'a>,
}

/// Copies of the keys and values of a segment for one key head: prefix and own side by side, and transposed.
#[derive(Default)]
pub struct Gathered {
    k: Vec<f32>,
    kt: Vec<f32>,
    v: Vec<f32>,
    vt: Vec<f32>,
}

impl Gathered {
    /// Returns the number of keys.
    pub fn fill<T: Element>(&mut self, x: &Operands<T>, task: &Task) -> usize {
        let (keys, dim) = (task.s.prefix_len + task.end, x.heads.dim);
        for (data, plain, transposed) in [(x.k, &mut self.k, &mut self.kt), (x.v, &mut self.v, &mut self.vt)]
        {
            plain.resize(keys * dim, 0.0);
            transposed.resize(keys * dim, 0.0);
            for (i, token) in task.keys().enumerate() {
                let row = &data[(token * x.heads.kv + task.kv) * dim..][..dim];
                for (j, value) in row.iter().map(|value| value.single()).enumerate() {
                    plain[i * dim + j] = value;
                    transposed[j * keys + i] = value;
                }
            }
        }
        keys
    }

    pub fn piece(&self, keys: usize, dim: usize) -> Piece<'_> {
        let [k, v] = [&self.k, &self.v].map(|data| Mat::rows(data, dim));
        let [kt, vt] = [&self.kt, &self.vt].map(|data| Mat::rows(data, keys));
        Piece { k, kt, v, vt }
    }
}
