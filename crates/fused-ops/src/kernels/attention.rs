//! Attention over packed segments: scores of a block of queries against all keys they see, never more.
//!
//! The query heads that share a key head are rows of one product. The forward pass keeps the log-sum-exp of each query
//! and head; the backward pass computes the scores again from it (Dao et al., FlashAttention-2, arXiv 2307.08691,
//! algorithms 1 and 2).

#![allow(unsafe_code)]

use std::ops::Range;

use rayon::prelude::*;

pub use super::blocks::Operands;
use super::blocks::{Block, Gathered, Task, blocks};
use super::elementwise::cast;
use super::matrix::{Mat, Shared, matmul_block};
use super::panel::Element;
use super::simd::{exp, exp_shifted, max, softcap, softcap_slope, weighted_sums, wide};
use crate::{Scores, Segment, Segments};

/// What one task needs besides its operands.
#[derive(Default)]
struct Buffers {
    gathered: Gathered,
    /// Scores, then probabilities, `[rows, keys]`.
    p: Vec<f32>,
    /// Gradients of the scores.
    ds: Vec<f32>,
    /// Queries, output and gradients of a block, `[rows, dim]`.
    q: Vec<f32>,
    out: Vec<f32>,
    grad: Vec<f32>,
}

/// Rows of a block, one after the other.
fn gather<T: Element>(
    x: &Operands<T>,
    data: &[T],
    s: &Segment,
    block: Block,
    kv: usize,
    into: &mut Vec<f32>,
) {
    into.clear();
    let first = s.query + block.first;
    (first..first + block.len)
        .for_each(|token| into.extend(data[x.of_query(token, kv)].iter().map(|value| value.single())));
}

fn cap(scores: &mut [f32], cap: Option<f32>) {
    if let Some(cap) = cap {
        wide(
            #[inline(always)]
            || scores.iter_mut().for_each(|s| *s = softcap(*s, cap)),
        );
    }
}

/// Attention output (query-shaped) and log-sum-exp, `[queries, heads.query]`.
pub fn forward<T: Element>(x: Operands<T>, segments: &Segments) -> (Vec<T>, Vec<f32>) {
    let (heads, group) = (x.heads, x.group());
    let dim = heads.dim;
    let mut out = vec![T::default(); x.q.len()];
    let mut lse = vec![0.0; x.q.len() / dim];
    let to = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tasks = Task::all(segments, heads).into_par_iter();
    tasks.for_each_init(Buffers::default, |buffers: &mut Buffers, task| {
        let Buffers { gathered, p, q, out, .. } = buffers;
        let Task { s, kv, .. } = task;
        let keys = gathered.fill(&x, &task);
        let piece = gathered.piece(keys, dim);
        for block in blocks(&task, group, x.scores.window) {
            let (rows, keys) = (block.len * group, block.keys());
            let (kt, v) = (piece.kt.skip_cols(block.start), piece.v.skip_rows(block.start));
            gather(&x, x.q, &s, block, kv, q);
            p.resize(rows * keys, 0.0);
            out.resize(rows * dim, 0.0);
            matmul_block(p, keys, false, (rows, keys, dim), Mat::rows(q, dim), kt, x.scores.scale);
            cap(p, x.scores.softcap);
            let sums = softmax(p, block, group);
            matmul_block(out, dim, false, (rows, dim, keys), Mat::rows(p, keys), v, 1.0);
            // SAFETY: queries of different segments and the features of different heads are disjoint, so no other
            // task writes these elements.
            unsafe { write_rows(&x, &s, block, kv, out, &sums, to) };
        }
    });
    (out, lse)
}

/// Divides the rows of a block's output by their sums, and puts them where they belong; the log-sum-exps as well.
///
/// # Safety
/// No other thread may touch the rows of this block within the features of this key head's queries.
unsafe fn write_rows<T: Element>(
    x: &Operands<T>,
    s: &Segment,
    block: Block,
    kv: usize,
    rows: &[f32],
    sums: &[(f32, f32)],
    (out, lse): (Shared<T>, Shared),
) {
    let (group, dim) = (x.group(), x.heads.dim);
    for (row, (from, &(sum, of_row))) in rows.chunks_exact(dim).zip(sums).enumerate() {
        let (token, head) = (s.query + block.first + row / group, row % group);
        let at = x.of_query(token, kv).start + head * dim;
        // SAFETY: the caller's promise.
        unsafe {
            for (j, &value) in from.iter().enumerate() {
                *out.get().add(at + j) = T::of(value / sum);
            }
            *lse.get().add(x.of_lse(token, kv).start + head) = of_row;
        }
    }
}

impl<T> Shared<T> {
    fn get(self) -> *mut T {
        self.0
    }
}

/// Exponentials of each row over the keys it sees, shifted by their maximum; the others become 0. Returns the sum and
/// the log-sum-exp of each row.
fn softmax(scores: &mut [f32], block: Block, group: usize) -> Vec<(f32, f32)> {
    let row = |(row, scores): (usize, &mut [f32])| {
        wide(
            #[inline(always)]
            || {
                let Range { start, end } = block.visible(row / group);
                scores[..start].fill(0.0);
                scores[end..].fill(0.0);
                let seen = &mut scores[start..end];
                let top = max(seen);
                let sum = exp_shifted(seen, top);
                (sum, top + sum.ln())
            },
        )
    };
    scores.chunks_exact_mut(block.keys()).enumerate().map(row).collect()
}

/// Gradients with respect to `q`, `k` and `v`, given that of the output.
pub fn backward<T: Element>(x: Operands<T>, segments: &Segments, grad: &[T], lse: &[f32]) -> [Vec<T>; 3] {
    let mut dq = vec![T::default(); x.q.len()];
    let dq_ptr = Shared(dq.as_mut_ptr());
    let tasks = Task::all(segments, x.heads);
    let shares: Vec<[Vec<f32>; 2]> = tasks
        .par_iter()
        .map_init(Buffers::default, |buffers: &mut Buffers, task| {
            // SAFETY: queries of different tasks and the features of different heads are disjoint.
            unsafe { task_backward(&x, task, (grad, lse), buffers, dq_ptr) }
        })
        .collect();
    let mut sums = [vec![0.0; x.k.len()], vec![0.0; x.v.len()]];
    // Keys are seen from several tasks: in their order, so that the sum is always the same.
    for (task, shares) in tasks.iter().zip(&shares) {
        for (i, token) in task.keys().enumerate() {
            let (at, dim) = ((token * x.heads.kv + task.kv) * x.heads.dim, x.heads.dim);
            for (sum, share) in sums.iter_mut().zip(shares) {
                let pairs = sum[at..at + dim].iter_mut().zip(&share[i * dim..(i + 1) * dim]);
                pairs.for_each(|(sum, share)| *sum += share);
            }
        }
    }
    let [dk, dv] = sums.map(|sums| cast(&sums));
    [dq, dk, dv]
}

/// Writes the gradients of a task's queries and returns those of its keys and values, in the order of [`Task::keys`].
///
/// # Safety
/// No other thread may touch the rows of this task in `dq` within the features of its key head's queries.
unsafe fn task_backward<T: Element>(
    x: &Operands<T>,
    task: &Task,
    (grad, lse): (&[T], &[f32]),
    buffers: &mut Buffers,
    dq: Shared<T>,
) -> [Vec<f32>; 2] {
    let (group, dim) = (x.group(), x.heads.dim);
    let (s, kv) = (&task.s, task.kv);
    let Buffers { gathered, p, ds, q, out: o, grad: g } = buffers;
    let all = gathered.fill(x, task);
    let piece = gathered.piece(all, dim);
    let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; all * dim]);
    for block in blocks(task, group, x.scores.window) {
        let (rows, keys) = (block.len * group, block.keys());
        let first = s.query + block.first;
        gather(x, x.q, s, block, kv, q);
        gather(x, grad, s, block, kv, g);
        p.resize(rows * keys, 0.0);
        ds.resize(rows * keys, 0.0);
        let (q, g) = (Mat::rows(q, dim), Mat::rows(g, dim));
        let k = piece.k.skip_rows(block.start);
        let [kt, vt] = [piece.kt, piece.vt].map(|all| all.skip_cols(block.start));
        matmul_block(p, keys, false, (rows, keys, dim), q, kt, x.scores.scale);
        cap(p, x.scores.softcap);
        matmul_block(ds, keys, false, (rows, keys, dim), g, vt, 1.0);
        let tokens = first..first + block.len;
        let shifts: Vec<f32> = tokens.clone().flat_map(|token| &lse[x.of_lse(token, kv)]).copied().collect();
        score_gradients(x.scores, group, block, &shifts, p, ds);
        let (p, ds) = (Mat::rows(p, keys), Mat::rows(ds, keys));
        let (dk, dv) = (&mut dk[block.start * dim..], &mut dv[block.start * dim..]);
        matmul_block(dv, dim, true, (keys, dim, rows), p.t(), g, 1.0);
        matmul_block(dk, dim, true, (keys, dim, rows), ds.t(), q, 1.0);
        o.resize(rows * dim, 0.0);
        matmul_block(o, dim, false, (rows, dim, keys), ds, k, 1.0);
        for (i, token) in tokens.enumerate() {
            let from = &o[i * group * dim..(i + 1) * group * dim];
            let to = x.of_query(token, kv).start;
            // SAFETY: the caller's promise.
            from.iter().enumerate().for_each(|(j, &value)| unsafe { *dq.get().add(to + j) = T::of(value) });
        }
    }
    [dk, dv]
}

/// Turns scores into probabilities (`p`) and `dp`, their gradient, into that of the unscaled scores; `lse` is of the
/// block's rows. What a row's gradients have in common is taken from these same numbers, and not from the output: so
/// they add up to 0 as they should, to within the rounding of one sum.
fn score_gradients(scores: Scores, group: usize, block: Block, lse: &[f32], p: &mut [f32], dp: &mut [f32]) {
    let keys = block.keys();
    let Scores { scale, softcap, .. } = scores;
    for (row, &shift) in lse.iter().enumerate() {
        let Range { start, end } = block.visible(row / group);
        let (p, dp) = (&mut p[row * keys..(row + 1) * keys], &mut dp[row * keys..(row + 1) * keys]);
        wide(
            #[inline(always)]
            || {
                let (seen, d) = (&mut p[start..end], &mut dp[start..end]);
                let (sum, weighted) = weighted_sums(seen, d, |s| exp(s - shift));
                let delta = weighted / sum;
                for (p, d) in seen.iter_mut().zip(d.iter_mut()) {
                    let slope = softcap.map_or(1.0, |cap| softcap_slope(*p, cap));
                    *p = exp(*p - shift);
                    *d = *p * (*d - delta) * scale * slope;
                }
                for hidden in [0..start, end..keys] {
                    p[hidden.clone()].fill(0.0);
                    dp[hidden].fill(0.0);
                }
            },
        );
    }
}
