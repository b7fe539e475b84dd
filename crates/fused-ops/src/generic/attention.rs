//! Attention over packed segments, a block of queries at a time.
//!
//! The query heads that share a key head are folded into the rows of one product, so that keys are never repeated.

use std::ops::Range;

use burn::tensor::DType;

use super::Value;
use crate::ops::FusedOps;
use crate::{Heads, Scores, Segment, Segments};

/// Scores held at a time: 64 MiB of `f32`.
const SCORES: usize = 16 << 20;

/// One block of a segment's queries with the keys that any of them sees: `0..end` of the segment's prefix and own
/// keys together, less those that the window hides from all.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

fn blocks(segment: &Segment, heads: Heads, scores: Scores) -> Vec<Block> {
    let all = segment.prefix_len + segment.len;
    let size = (SCORES / (heads.query * all)).max(16);
    let window = scores.window.unwrap_or(usize::MAX);
    let block = |first: usize| {
        let queries = first..(first + size).min(segment.len);
        let hidden = (segment.prefix_len + first + 1).saturating_sub(window);
        Block { keys: hidden..segment.prefix_len + queries.end, queries }
    };
    (0..segment.len).step_by(size).map(block).collect()
}

/// `[len, heads · dim]` to `[kv, group · len, dim]`.
fn fold<B: FusedOps>(x: Value<B>, kv: usize, dim: usize) -> Value<B> {
    let [len, features] = x.dims()[..] else { unreachable!("activations have two dimensions") };
    let group = features / (kv * dim);
    x.reshape(&[len, kv, group, dim]).permute(&[1, 2, 0, 3]).reshape(&[kv, group * len, dim])
}

/// The other way.
fn unfold<B: FusedOps>(x: Value<B>, len: usize) -> Value<B> {
    let [kv, rows, dim] = x.dims()[..] else { unreachable!("made by fold") };
    let group = rows / len;
    x.reshape(&[kv, group, len, dim]).permute(&[2, 0, 1, 3]).reshape(&[len, kv * group * dim])
}

/// Rows `from.prefix` and then `from.own` of keys or values.
fn seen<B: FusedOps>(x: &Value<B>, s: &Segment) -> Value<B> {
    let own = x.clone().narrow(0, s.own..s.own + s.len);
    if s.prefix_len == 0 {
        return own.wide();
    }
    Value::cat(vec![x.clone().narrow(0, s.prefix..s.prefix + s.prefix_len), own], 0).wide()
}

/// 0 where a query sees a key, and a large negative number elsewhere: `[1, 1, queries, keys]`.
fn mask<B: FusedOps>(segment: &Segment, block: &Block, scores: Scores, like: &Value<B>) -> Value<B> {
    let index = |range: Range<usize>, first: usize, shape: &[usize]| {
        Value::upload(range.map(|i| (first + i) as f32).collect(), shape, like)
    };
    let (len, n) = (block.queries.len(), block.keys.len());
    let query = index(block.queries.clone(), segment.prefix_len, &[1, 1, len, 1]);
    let distance = query - index(block.keys.clone(), 0, &[1, 1, 1, n]);
    let future = distance.clone().negative_part();
    let hidden = match scores.window {
        // The first key of the block may be seen by its first query only.
        Some(window) => future + (-distance + (window as f32 - 1.0)).negative_part(),
        None => future,
    };
    hidden * 1e30
}

/// Capped scores of a block, before and after masking: `[kv, group · queries, keys]`.
fn block_scores<B: FusedOps>(
    q: Value<B>,
    k: Value<B>,
    mask: Value<B>,
    scores: Scores,
) -> (Value<B>, Value<B>) {
    let capped = (q.matmul(k.t()) * scores.scale).softcapped(scores.softcap);
    let [kv, rows, n] = capped.dims()[..] else { unreachable!("products of folded tensors") };
    let len = mask.dims()[2];
    let masked = capped.clone().reshape(&[kv, rows / len, len, n]) + mask;
    (capped, masked.reshape(&[kv, rows, n]))
}

/// Pieces of rows, put together in the order of their first row; rows that none has are 0.
fn assemble<B: FusedOps>(mut pieces: Vec<(usize, Value<B>)>, shape: &[usize], like: &Value<B>) -> Value<B> {
    pieces.sort_by_key(|(start, _)| *start);
    let zeros = |rows: usize| Value::zeros(&[rows, shape[1]], DType::F32, like);
    let (mut parts, mut at) = (Vec::new(), 0);
    for (start, piece) in pieces {
        if start > at {
            parts.push(zeros(start - at));
        }
        at = start + piece.dims()[0];
        parts.push(piece);
    }
    if at < shape[0] || parts.is_empty() {
        parts.push(zeros(shape[0] - at));
    }
    Value::cat(parts, 0)
}

/// Output (query-shaped) and log-sum-exp, `[queries, heads.query]` in `f32`; see [`crate::attention`].
pub fn attention<B: FusedOps>(
    q: Value<B>,
    k: Value<B>,
    v: Value<B>,
    segments: &Segments,
    heads: Heads,
    scores: Scores,
) -> (Value<B>, Value<B>) {
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for segment in segments.segments() {
        let [keys, values] = [&k, &v].map(|x| fold(seen(x, segment), heads.kv, heads.dim));
        for block in blocks(segment, heads, scores) {
            let start = segment.query + block.queries.start;
            let len = block.queries.len();
            let rows = start..start + len;
            let folded = fold(q.clone().narrow(0, rows).wide(), heads.kv, heads.dim);
            let of_block = |x: &Value<B>| x.clone().narrow(1, block.keys.clone());
            let mask = mask(segment, &block, scores, &keys);
            let (_, s) = block_scores(folded, of_block(&keys), mask, scores);
            let top = s.clone().max(2);
            let e = (s - top.clone()).exp();
            let sum = e.clone().sum(2);
            outs.push((start, unfold(e.matmul(of_block(&values)) / sum.clone(), len)));
            lses.push((start, unfold(top + sum.ln(), len)));
        }
    }
    let (shape, dtype) = (q.dims(), q.dtype());
    (assemble(outs, &shape, &q).cast(dtype), assemble(lses, &[shape[0], heads.query], &q))
}

/// Gradients of `q`, `k` and `v`.
pub fn attention_backward<B: FusedOps>(
    grad: Value<B>,
    [q, k, v]: [Value<B>; 3],
    out: Value<B>,
    lse: Value<B>,
    segments: &Segments,
    heads: Heads,
    scores: Scores,
) -> [Value<B>; 3] {
    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Pieces::default(), Pieces::default());
    for segment in segments.segments() {
        let [keys, values] = [&k, &v].map(|x| fold(seen(x, segment), heads.kv, heads.dim));
        let (mut dk, mut dv) = (None, None);
        for block in blocks(segment, heads, scores) {
            let start = segment.query + block.queries.start;
            let len = block.queries.len();
            let rows = |x: &Value<B>| x.clone().narrow(0, start..start + len).wide();
            let folded = |x: &Value<B>| fold(rows(x), heads.kv, heads.dim);
            let of_block = |x: &Value<B>| x.clone().narrow(1, block.keys.clone());
            let (queries, g) = (folded(&q), folded(&grad));
            let mask = mask(segment, &block, scores, &keys);
            let (capped, s) = block_scores(queries.clone(), of_block(&keys), mask, scores);
            let p = (s - fold(rows(&lse), heads.kv, 1)).exp();
            let delta = (g.clone() * folded(&out)).sum(2);
            let ds = p.clone() * (g.clone().matmul(of_block(&values).t()) - delta) * scores.scale;
            let ds = match capped.softcap_slope(scores.softcap) {
                Some(slope) => ds * slope,
                None => ds,
            };
            dqs.push((start, unfold(ds.clone().matmul(of_block(&keys)), len)));
            add_keys(&mut dk, ds.t().matmul(queries), &block, &keys);
            add_keys(&mut dv, p.t().matmul(g), &block, &keys);
        }
        let n = segment.prefix_len + segment.len;
        for (pieces, total) in [(&mut dks, dk), (&mut dvs, dv)] {
            if let Some(total) = total {
                pieces.add(segment, unfold(total, n));
            }
        }
    }
    [(assemble(dqs, &q.dims(), &q), &q), (dks.assemble(&k), &k), (dvs.assemble(&v), &v)]
        .map(|(gradient, of)| gradient.cast(of.dtype()))
}

/// Adds a block's share to a segment's `[kv, keys, dim]` gradient.
fn add_keys<B: FusedOps>(total: &mut Option<Value<B>>, part: Value<B>, block: &Block, keys: &Value<B>) {
    let [kv, n, dim] = keys.dims()[..] else { unreachable!("made by fold") };
    let pad = |len: usize| (len > 0).then(|| Value::zeros(&[kv, len, dim], DType::F32, keys));
    let parts = [pad(block.keys.start), Some(part), pad(n - block.keys.end)];
    let padded = Value::cat(parts.into_iter().flatten().collect(), 1);
    *total = Some(match total.take() {
        Some(sum) => sum + padded,
        None => padded,
    });
}

/// Gradients of runs of keys; a run that several segments see is added up.
struct Pieces<B: FusedOps>(Vec<(usize, Value<B>)>);

impl<B: FusedOps> Default for Pieces<B> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<B: FusedOps> Pieces<B> {
    fn add(&mut self, s: &Segment, gradient: Value<B>) {
        let all = s.prefix_len + s.len;
        if s.prefix_len > 0 {
            self.add_run(s.prefix, gradient.clone().narrow(0, 0..s.prefix_len));
        }
        self.add_run(s.own, gradient.narrow(0, s.prefix_len..all));
    }

    fn add_run(&mut self, start: usize, gradient: Value<B>) {
        match self.0.iter_mut().find(|(known, _)| *known == start) {
            Some((_, sum)) => {
                assert_eq!(sum.dims(), gradient.dims(), "segments share a run of keys whole or not at all");
                *sum = sum.clone() + gradient;
            }
            None => self.0.push((start, gradient)),
        }
    }

    fn assemble(self, like: &Value<B>) -> Value<B> {
        assemble(self.0, &like.dims(), like)
    }
}
