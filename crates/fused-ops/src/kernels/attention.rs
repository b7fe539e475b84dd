//! Attention over packed segments: scores of a block of queries against all keys they see, never more.
//!
//! The forward pass keeps the log-sum-exp of each query and head; the backward pass computes the
//! scores again from it (Dao et al., FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).

#![allow(unsafe_code)]

use std::ops::Range;

use rayon::prelude::*;

use super::head::dot;
use super::matrix::{Mat, Shared, accumulate, matmul_block};
use super::simd::{exp, exp_shifted, max, softcap, softcap_slope, wide};
use crate::{Heads, Scores, Segment, Segments};

/// Queries of a block.
const BLOCK: usize = 64;

/// Operands of one attention call; activations are `[tokens, heads * dim]`.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// Queries.
    pub q: &'a [f32],
    /// Keys.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// Head layout.
    pub heads: Heads,
    /// How scores are made.
    pub scores: Scores,
}

impl<'a> Operands<'a> {
    fn query_stride(&self) -> usize {
        self.heads.query * self.heads.dim
    }

    fn key_stride(&self) -> usize {
        self.heads.kv * self.heads.dim
    }

    /// Rows from `token` on of head `head` of a query-shaped activation.
    fn of_query(&self, data: &'a [f32], token: usize, head: usize) -> Mat<'a> {
        Mat::rows(&data[token * self.query_stride() + head * self.heads.dim..], self.query_stride())
    }

    /// Rows from `token` on of the key or value head that query head `head` uses.
    fn of_key(&self, data: &'a [f32], token: usize, head: usize) -> Mat<'a> {
        let kv = head / (self.heads.query / self.heads.kv);
        Mat::rows(&data[(token * self.heads.kv + kv) * self.heads.dim..], self.key_stride())
    }
}

/// A block of queries of a segment, and the prefix and own keys that any of them sees.
#[derive(Clone, Copy)]
struct Block {
    /// First query, within the segment.
    first: usize,
    /// Number of queries.
    len: usize,
    /// First prefix key and number of prefix keys.
    prefix_start: usize,
    prefix: usize,
    /// First own key and number of own keys.
    own_start: usize,
    own: usize,
    /// Position of the first query, and the window.
    position: usize,
    window: usize,
}

impl Block {
    fn keys(self) -> usize {
        self.prefix + self.own
    }

    /// Those of the block's keys that query `row` sees.
    fn visible(self, row: usize) -> Range<usize> {
        let end = self.position + row + 1;
        let skipped = self.prefix_start + self.own_start;
        end.saturating_sub(self.window).max(skipped) - skipped..end - skipped
    }
}

fn blocks(segment: &Segment, window: Option<usize>) -> impl Iterator<Item = Block> {
    let (total, prefix) = (segment.len, segment.prefix_len);
    let window = window.unwrap_or(usize::MAX);
    (0..total).step_by(BLOCK).map(move |first| {
        let len = BLOCK.min(total - first);
        let position = prefix + first;
        // What the window hides from the first query it hides from all.
        let hidden = (position + 1).saturating_sub(window);
        let prefix_start = hidden.min(prefix);
        let own_start = hidden - prefix_start;
        let (prefix, own) = (prefix - prefix_start, first + len - own_start);
        Block { first, len, prefix_start, prefix, own_start, own, position, window }
    })
}

/// `scores[len, keys] = scale · q · kᵀ` of a block, for any two query- and key-shaped activations.
fn products(
    x: &Operands,
    left: &[f32],
    right: &[f32],
    scale: f32,
    s: &Segment,
    b: Block,
    head: usize,
    out: &mut [f32],
) {
    let (keys, dim) = (b.keys(), x.heads.dim);
    let q = x.of_query(left, s.query + b.first, head);
    if b.prefix > 0 {
        let k = x.of_key(right, s.prefix + b.prefix_start, head);
        matmul_block(out, keys, false, (b.len, b.prefix, dim), q, k.t(), scale);
    }
    let k = x.of_key(right, s.own + b.own_start, head);
    matmul_block(&mut out[b.prefix..], keys, false, (b.len, b.own, dim), q, k.t(), scale);
}

/// Attention output (query-shaped) and log-sum-exp, `[queries, heads.query]`.
pub fn forward(x: Operands, segments: &Segments) -> (Vec<f32>, Vec<f32>) {
    let queries = x.q.len() / x.query_stride();
    let mut out = vec![0.0; x.q.len()];
    let mut lse = vec![0.0; queries * x.heads.query];
    let (out_ptr, lse_ptr) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tasks: Vec<(Segment, usize)> = segments
        .segments()
        .iter()
        .flat_map(|&segment| (0..x.heads.query).map(move |head| (segment, head)))
        .collect();
    tasks.into_par_iter().for_each_init(Vec::new, |scores: &mut Vec<f32>, (segment, head)| {
        for block in blocks(&segment, x.scores.window) {
            scores.resize(block.len * block.keys(), 0.0);
            products(&x, x.q, x.k, x.scores.scale, &segment, block, head, scores);
            cap(scores, x.scores.softcap);
            let first = segment.query + block.first;
            // SAFETY: queries of different segments and the features of different heads are disjoint,
            // so no other task writes these elements.
            unsafe {
                softmax(scores, block, |row, value| {
                    *lse_ptr.get().add((first + row) * x.heads.query + head) = value;
                });
                let at = first * x.query_stride() + head * x.heads.dim;
                let weights = Mat::rows(scores, block.keys());
                if block.prefix > 0 {
                    let size = (block.len, x.heads.dim, block.prefix);
                    let v = x.of_key(x.v, segment.prefix + block.prefix_start, head);
                    accumulate(out_ptr, at, x.query_stride(), size, weights, v);
                }
                let weights = Mat::rows(&scores[block.prefix..], block.keys());
                let size = (block.len, x.heads.dim, block.own);
                let v = x.of_key(x.v, segment.own + block.own_start, head);
                accumulate(out_ptr, at, x.query_stride(), size, weights, v);
            }
        }
    });
    (out, lse)
}

impl Shared {
    fn get(self) -> *mut f32 {
        self.0
    }
}

fn cap(scores: &mut [f32], cap: Option<f32>) {
    if let Some(cap) = cap {
        wide(
            #[inline(always)]
            || scores.iter_mut().for_each(|s| *s = softcap(*s, cap)),
        );
    }
}

/// Softmax of each row over the keys it sees; the others become 0. Reports each log-sum-exp.
fn softmax(scores: &mut [f32], block: Block, mut report: impl FnMut(usize, f32)) {
    wide(
        #[inline(always)]
        || {
            for (row, scores) in scores.chunks_exact_mut(block.keys()).enumerate() {
                let Range { start, end } = block.visible(row);
                scores[..start].fill(0.0);
                scores[end..].fill(0.0);
                let seen = &mut scores[start..end];
                let top = max(seen);
                let sum = exp_shifted(seen, top);
                let scale = 1.0 / sum;
                seen.iter_mut().for_each(|p| *p *= scale);
                report(row, top + sum.ln());
            }
        },
    );
}

/// Gradients with respect to `q`, `k` and `v`, given that of the output.
pub fn backward(x: Operands, segments: &Segments, grad: &[f32], out: &[f32], lse: &[f32]) -> [Vec<f32>; 3] {
    let mut grads = [vec![0.0; x.q.len()], vec![0.0; x.k.len()], vec![0.0; x.v.len()]];
    let [dq, dk, dv] = grads.each_mut().map(|g| Shared(g.as_mut_ptr()));
    let tasks: Vec<(&[Segment], usize)> =
        segments.rows().flat_map(|row| (0..x.heads.kv).map(move |kv| (row, kv))).collect();
    let group = x.heads.query / x.heads.kv;
    tasks.into_par_iter().for_each_init(Default::default, |(p, dp): &mut (Vec<f32>, Vec<f32>), (row, kv)| {
        for segment in row {
            for head in kv * group..(kv + 1) * group {
                for block in blocks(segment, x.scores.window) {
                    let size = block.len * block.keys();
                    p.resize(size, 0.0);
                    dp.resize(size, 0.0);
                    products(&x, x.q, x.k, x.scores.scale, segment, block, head, p);
                    cap(p, x.scores.softcap);
                    products(&x, grad, x.v, 1.0, segment, block, head, dp);
                    score_gradients(&x, segment, block, head, grad, out, lse, p, dp);
                    // SAFETY: keys of different rows, and the features of different key heads, are
                    // disjoint; all query heads of a key head are in this task.
                    unsafe { scatter(&x, segment, block, head, grad, p, dp, [dq, dk, dv]) };
                }
            }
        }
    });
    grads
}

/// Turns scores into probabilities (`p`) and `dp` into the gradient of the unscaled scores.
fn score_gradients(
    x: &Operands,
    s: &Segment,
    block: Block,
    head: usize,
    grad: &[f32],
    out: &[f32],
    lse: &[f32],
    p: &mut [f32],
    dp: &mut [f32],
) {
    let (keys, dim) = (block.keys(), x.heads.dim);
    let Scores { scale, softcap, .. } = x.scores;
    for row in 0..block.len {
        let token = s.query + block.first + row;
        let at = token * x.query_stride() + head * dim;
        let delta = dot(&grad[at..at + dim], &out[at..at + dim]);
        let shift = lse[token * x.heads.query + head];
        let Range { start, end } = block.visible(row);
        let (p, dp) = (&mut p[row * keys..(row + 1) * keys], &mut dp[row * keys..(row + 1) * keys]);
        wide(
            #[inline(always)]
            || {
                for (p, dp) in p[start..end].iter_mut().zip(&mut dp[start..end]) {
                    let slope = softcap.map_or(1.0, |cap| softcap_slope(*p, cap));
                    *p = exp(*p - shift);
                    *dp = *p * (*dp - delta) * scale * slope;
                }
                for hidden in [0..start, end..keys] {
                    p[hidden.clone()].fill(0.0);
                    dp[hidden].fill(0.0);
                }
            },
        );
    }
}

/// Adds a block's share to the three gradients.
///
/// # Safety
/// No other thread may touch the rows of this segment in `dq`, or of its row in `dk` and `dv`, within
/// the features of this head.
unsafe fn scatter(
    x: &Operands,
    s: &Segment,
    block: Block,
    head: usize,
    grad: &[f32],
    p: &[f32],
    ds: &[f32],
    [dq, dk, dv]: [Shared; 3],
) {
    let (keys, dim) = (block.keys(), x.heads.dim);
    let kv = head / (x.heads.query / x.heads.kv);
    let first = s.query + block.first;
    let (q, g) = (x.of_query(x.q, first, head), x.of_query(grad, first, head));
    let prefix = (0, block.prefix, s.prefix + block.prefix_start);
    let parts = [prefix, (block.prefix, block.own, s.own + block.own_start)];
    for (column, len, token) in parts.into_iter().filter(|part| part.1 > 0) {
        let (p, ds) = (Mat::rows(&p[column..], keys), Mat::rows(&ds[column..], keys));
        let key_at = (token * x.heads.kv + kv) * dim;
        let query_at = first * x.query_stride() + head * dim;
        // SAFETY: the caller's promise.
        unsafe {
            accumulate(dv, key_at, x.key_stride(), (len, dim, block.len), p.t(), g);
            accumulate(dk, key_at, x.key_stride(), (len, dim, block.len), ds.t(), q);
            let k = x.of_key(x.k, token, head);
            accumulate(dq, query_at, x.query_stride(), (block.len, dim, len), ds, k);
        }
    }
}
