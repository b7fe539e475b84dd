//! Attention over packed segments: scores of a block of queries against all keys they see, never more.
//!
//! The query heads that share a key head are rows of one product. The forward pass keeps the log-sum-exp of each query
//! and head; the backward pass computes the scores again from it (Dao et al., FlashAttention-2, arXiv 2307.08691,
//! algorithms 1 and 2). Scores are of 32 bits; probabilities and gradients are multiplied in the type of the operands.

#![allow(unsafe_code)]

use bytemuck::zeroed_vec;
use rayon::prelude::*;

pub use super::blocks::Operands;
use super::blocks::{Block, Laid, Task, blocks, plain, tiles_times, times};
use super::elementwise::cast;
use super::layout::beside;
use super::matrix::{Mat, Shared};
use super::panel::{Element, TILE, WIDTH};
use super::scores::{OfBlock, shape, softmax};
use super::simd::wide;
use crate::{Heads, Segment, Segments};

/// Tokens whose gradients are added up at a time.
const TOKENS: usize = 64;

/// What one task needs besides its operands.
#[derive(Default)]
struct Buffers<T> {
    k: Laid<T>,
    v: Laid<T>,
    /// Scores, `[rows, keys]`; after [`OfBlock::gradients`] probabilities in 32 bits, if scores are not capped.
    scores: Vec<f32>,
    /// Gradients of the probabilities.
    dp: Vec<f32>,
    /// Probabilities, `[rows, keys]`, in the backward pass of a group of rows at a time.
    p: Vec<T>,
    /// Gradients of the scores, `[rows, keys]`, whole groups of rows.
    ds: Vec<T>,
    /// Output or gradients of a block, `[rows, dim]`.
    out: Vec<f32>,
    /// Queries and gradients of a block, `[rows, dim]`.
    q: Vec<T>,
    grad: Vec<T>,
    /// Their features side by side.
    tiles: Vec<T>,
    /// Probabilities and gradients of the scores, keys side by side.
    panels: [Vec<T>; 2],
}

/// Rows of a block, one after the other, whole groups each; returns the elements from one to the next.
fn gather<T: Element>(
    x: &Operands<T>,
    data: &[T],
    s: &Segment,
    block: Block,
    kv: usize,
    into: &mut Vec<T>,
) -> usize {
    let (dim, first) = (x.heads.dim, s.query + block.first);
    let stride = dim.next_multiple_of(T::GROUP);
    into.clear();
    for token in first..first + block.len {
        let rows = &data[x.of_query(token, kv)];
        if stride == dim {
            // All heads at once.
            into.extend_from_slice(rows);
            continue;
        }
        for row in rows.chunks_exact(dim) {
            into.extend_from_slice(row);
            into.resize(into.len() + stride - dim, T::default());
        }
    }
    stride
}

/// Operands of 32 bits, where those of 16 gain nothing.
fn widened<T: Element, R>(x: Operands<T>, run: impl FnOnce(Operands<f32>) -> R) -> R {
    let [q, k, v] = [x.q, x.k, x.v].map(cast::<T, f32>);
    run(Operands { q: &q, k: &k, v: &v, heads: x.heads, scores: x.scores })
}

fn is_narrow<T: Element>() -> bool {
    T::GROUP > 1 && !T::has_panels()
}

/// Attention output (query-shaped) and log-sum-exp, `[queries, heads.query]`.
pub fn forward<T: Element>(x: Operands<T>, segments: &Segments) -> (Vec<T>, Vec<f32>) {
    if is_narrow::<T>() {
        let (out, lse) = widened(x, |x| forward(x, segments));
        return (cast(&out), lse);
    }
    let (group, dim) = (x.group(), x.heads.dim);
    let mut out = zeroed_vec::<T>(x.q.len());
    let mut lse = vec![0.0; x.q.len() / dim];
    let to = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tasks = Task::all(segments, x.heads, x.scores.window).into_par_iter();
    tasks.for_each_init(Buffers::default, |buffers: &mut Buffers<T>, task| {
        let Buffers { k, v, scores, p, q, out, .. } = buffers;
        let keys = k.fill(&x, x.k, &task, [true, false]);
        v.fill(&x, x.v, &task, [false, true]);
        for block in blocks(&task, group, x.scores.window) {
            let (rows, width, columns) = (block.len * group, block.width(), dim.next_multiple_of(WIDTH));
            let stride = gather(&x, x.q, &task.s, block, task.kv, q);
            scores.resize(rows * width, 0.0);
            times(scores, width, false, plain(q, dim, stride), seen(&k.of_keys, dim, block), (dim, 0));
            let scale = shape(scores, x.scores);
            let sums = softmax(scores, scale, block, group, p);
            out.resize(rows * columns, 0.0);
            times(out, columns, false, plain(p, block.keys(), width), &v.of_features, (keys, block.start));
            // SAFETY: queries of different segments and the features of different heads are disjoint, so no other
            // task writes these elements.
            unsafe { write_rows(&x, &task.s, block, task.kv, out, &sums, to) };
        }
    });
    (out, lse)
}

/// The panels of a block's keys.
fn seen<T: Element>(of_keys: &[T], dim: usize, block: Block) -> &[T] {
    let depth = dim.next_multiple_of(T::GROUP);
    &of_keys[block.start * depth..(block.start + block.width()) * depth]
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
    let rows = rows.chunks_exact(dim.next_multiple_of(WIDTH)).zip(sums).enumerate();
    wide(
        #[inline(always)]
        || {
            for (row, (from, &(sum, of_row))) in rows {
                let (token, head) = (s.query + block.first + row / group, row % group);
                let at = x.of_query(token, kv).start + head * dim;
                // SAFETY: the caller's promise.
                unsafe {
                    (0..dim).for_each(|j| out.get().add(at + j).write(T::of(from[j] / sum)));
                    *lse.get().add(x.of_lse(token, kv).start + head) = of_row;
                }
            }
        },
    );
}

impl<T> Shared<T> {
    fn get(self) -> *mut T {
        self.0
    }
}

/// Gradients of the keys and values of a task, `[dim, keys]`.
type Shares = [Vec<f32>; 2];

/// Gradients with respect to `q`, `k` and `v`, given that of the output.
pub fn backward<T: Element>(x: Operands<T>, segments: &Segments, grad: &[T], lse: &[f32]) -> [Vec<T>; 3] {
    if is_narrow::<T>() {
        let grad = cast::<T, f32>(grad);
        return widened(x, |x| backward(x, segments, &grad, lse)).map(|gradient| cast(&gradient));
    }
    let mut dq = zeroed_vec::<T>(x.q.len());
    let dq_ptr = Shared(dq.as_mut_ptr());
    let tasks = Task::all(segments, x.heads, x.scores.window);
    let shares: Vec<Shares> = tasks
        .par_iter()
        .map_init(Buffers::default, |buffers: &mut Buffers<T>, task| {
            // SAFETY: queries of different tasks and the features of different heads are disjoint.
            unsafe { task_backward(&x, task, (grad, lse), buffers, dq_ptr) }
        })
        .collect();
    let [dk, dv] = [(x.k.len(), 0), (x.v.len(), 1)].map(|(len, which)| {
        let mut sums = zeroed_vec::<T>(len);
        let width = x.heads.kv * x.heads.dim;
        let parts = sums.par_chunks_mut(TOKENS * width).enumerate();
        parts.for_each(|(i, part)| add_shares(i * TOKENS, part, (&tasks, &shares, which), x.heads));
        sums
    });
    [dq, dk, dv]
}

/// Adds what tasks found for the tokens from `first` on. Keys are seen from several tasks: in their order, so that the
/// sum is always the same.
fn add_shares<T: Element>(
    first: usize,
    part: &mut [T],
    (tasks, shares, which): (&[Task], &[Shares], usize),
    Heads { kv, dim, .. }: Heads,
) {
    let tokens = first..first + part.len() / (kv * dim);
    let (mut sums, mut rows) = (vec![0.0; part.len()], Vec::new());
    for (task, shares) in tasks.iter().zip(shares) {
        let share = &shares[which];
        let width = share.len() / dim;
        for (run, at) in task.runs() {
            let (start, end) = (run.start.max(tokens.start), run.end.min(tokens.end));
            if start >= end {
                continue;
            }
            // Features of a token side by side, as they are in the sums.
            let of_features = Mat::rows(&share[at + start - run.start..], width);
            beside::<f32, WIDTH>(of_features, dim, end - start, &mut rows);
            let panels = rows.chunks_exact(WIDTH * (end - start)).zip((0..dim).step_by(WIDTH));
            for (panel, feature) in panels {
                let features = WIDTH.min(dim - feature);
                for (token, row) in (start..end).zip(panel.as_chunks::<WIDTH>().0) {
                    let to = &mut sums[((token - first) * kv + task.kv) * dim + feature..][..features];
                    to.iter_mut().zip(row).for_each(|(sum, share)| *sum += share);
                }
            }
        }
    }
    part.iter_mut().zip(sums).for_each(|(to, sum)| *to = T::of(sum));
}

/// Writes the gradients of a task's queries and returns those of its keys and values.
///
/// # Safety
/// No other thread may touch the rows of this task in `dq` within the features of its key head's queries.
unsafe fn task_backward<T: Element>(
    x: &Operands<T>,
    task: &Task,
    (grad, lse): (&[T], &[f32]),
    buffers: &mut Buffers<T>,
    dq: Shared<T>,
) -> Shares {
    let (group, dim, s) = (x.group(), x.heads.dim, &task.s);
    let Buffers { k, v, out, q, grad: g, tiles, .. } = buffers;
    let keys = k.fill(x, x.k, task, [true, true]);
    v.fill(x, x.v, task, [true, false]);
    let (all, columns) = (keys.next_multiple_of(WIDTH), dim.next_multiple_of(WIDTH));
    let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; all * dim]);
    for block in blocks(task, group, x.scores.window) {
        let (rows, width) = (block.len * group, block.width());
        let stride = gather(x, x.q, s, block, task.kv, q);
        gather(x, grad, s, block, task.kv, g);
        let Buffers { scores, dp, p, ds, panels, .. } = buffers;
        scores.resize(rows * width, 0.0);
        dp.resize(rows * width, 0.0);
        times(scores, width, false, plain(q, dim, stride), seen(&k.of_keys, dim, block), (dim, 0));
        let scale = shape(scores, x.scores);
        times(dp, width, false, plain(g, dim, stride), seen(&v.of_keys, dim, block), (dim, 0));
        let tokens = s.query + block.first..s.query + block.first + block.len;
        let lse: Vec<f32> =
            tokens.clone().flat_map(|token| &lse[x.of_lse(token, task.kv)]).copied().collect();
        let of = OfBlock { scores: x.scores, of_products: scale, group, block, lse: &lse };
        of.gradients(scores, dp, (p, ds), panels);
        for (panels, of_rows, sum) in [(&panels[0], &*g, &mut dv), (&panels[1], &*q, &mut dk)] {
            beside::<T, TILE>(Mat::rows(of_rows, stride).t(), dim, rows, tiles);
            tiles_times(&mut sum[block.start..], all, (tiles, dim), rows, panels);
        }
        out.resize(rows * columns, 0.0);
        // Without the row that fills up the last group.
        let a = plain(&ds[..rows * width], block.keys(), width);
        times(out, columns, false, a, &k.of_features, (keys, block.start));
        let of_rows = out.chunks_exact(columns).enumerate();
        wide(
            #[inline(always)]
            || {
                for (row, from) in of_rows {
                    let to = x.of_query(tokens.start + row / group, task.kv).start + row % group * dim;
                    // SAFETY: the caller's promise.
                    (0..dim).for_each(|j| unsafe { dq.get().add(to + j).write(T::of(from[j])) });
                }
            },
        );
    }
    [dk, dv]
}
