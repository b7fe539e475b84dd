//! Language-model head: logits of all rows for a part of the vocabulary at a time, so that each part of the weight is
//! read once and its logits stay in the cache.

use std::ops::Range;

use rayon::prelude::*;

use super::dither::{Computed, Weight};
use super::matrix::{Mat, append, matmul};
use super::panel::{Element, TILE, WIDTH};
use super::simd::{exp, max, softcap, softcap_slope, sum_by, sums_by, wide};
use crate::Logits;

/// Logits held at a time (about 8 MiB, in 16 bits half as much again; more where there are more than 5,000 rows), the one
/// large temporary of the head.
const LOGITS: usize = 2 << 20;

const _: () = assert!((8 * TILE).is_multiple_of(WIDTH), "parts are whole panels");

/// Parts of the vocabulary for `n` rows.
fn tiles(n: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    // Whole panels, and whole tiles of the transpose.
    let width = (LOGITS / n.max(1)).next_multiple_of(8 * TILE).clamp(32 * TILE, 336 * TILE);
    (0..vocab).step_by(width).map(move |start| start..(start + width).min(vocab))
}

/// Results of [`forward`] for `n` rows.
pub struct Forward {
    /// Log-probability of the target, `[n]`.
    pub logps: Vec<f32>,
    /// Entropy, mean logit, target is arg-max, log of the sum of squared probabilities: `[n, 4]`.
    pub stats: Vec<f32>,
    /// Log-sum-exp of the logits, `[n]`, kept for the backward pass.
    pub lse: Vec<f32>,
}

/// What is known of a row after some of the vocabulary. Sums of exponentials are of logits less `top`.
#[derive(Clone)]
struct Row {
    top: f32,
    /// No logit before the target is as large as `of_target`.
    leads: bool,
    of_target: f32,
    total: f32,
    sum: f32,
    weighted: f32,
    squares: f32,
}

impl Row {
    const EMPTY: Self = Self {
        top: f32::NEG_INFINITY,
        leads: false,
        of_target: 0.0,
        total: 0.0,
        sum: 0.0,
        weighted: 0.0,
        squares: 0.0,
    };

    /// Takes in the logits of a part of the vocabulary that starts at `start`.
    #[inline(always)]
    fn add(&mut self, z: &[f32], start: usize, target: usize) {
        let top = max(z);
        if let Some(&of_target) = target.checked_sub(start).and_then(|at| z.get(at)) {
            self.of_target = of_target;
            self.leads = of_target > self.top && !z[..target - start].iter().any(|&z| z >= of_target);
        }
        if top > self.top {
            let shift = self.top - top;
            let factor = if self.sum == 0.0 { 0.0 } else { exp(shift) };
            // Σ e^(z - new top) (z - new top), from the sums around the old one.
            let moved = if self.sum == 0.0 { 0.0 } else { self.weighted + shift * self.sum };
            (self.sum, self.weighted) = (self.sum * factor, moved * factor);
            self.squares *= factor * factor;
            self.top = top;
        }
        let top = self.top;
        self.total += sum_by(z, |z| z);
        let [sum, weighted, squares] = sums_by(z, |z| {
            let (shifted, e) = (z - top, exp(z - top));
            [e, e * shifted, e * e]
        });
        self.sum += sum;
        self.weighted += weighted;
        self.squares += squares;
    }

    /// Log-probability, log-sum-exp and statistics.
    fn finish(&self, vocab: usize) -> (f32, f32, [f32; 4]) {
        let log_sum = self.sum.ln();
        // The entropy is lse - Σ p z; shifted by the maximum nothing overflows.
        let entropy = log_sum - self.weighted / self.sum;
        let is_first_top = self.leads && self.of_target == self.top;
        let stats = [
            entropy,
            self.total / vocab as f32,
            f32::from(u8::from(is_first_top)),
            self.squares.ln() - 2.0 * log_sum,
        ];
        (self.of_target - self.top - log_sum, self.top + log_sum, stats)
    }
}

/// `hidden`: `[n, dim]`, `w`: `[vocab, dim]`.
pub fn forward<T: Computed>(
    hidden: &[T],
    w: Weight,
    (vocab, dim): (usize, usize),
    targets: &[u32],
    logits_of: Logits,
) -> Forward {
    let n = targets.len();
    let mut rows = vec![Row::EMPTY; n];
    let mut logits = Vec::new();
    for tile in tiles(n, vocab) {
        logits.resize(n * tile.len(), 0.0);
        let w = T::of_weight(w, tile.start * dim..tile.end * dim);
        matmul(&mut logits, false, (n, tile.len(), dim), Mat::rows(hidden, dim), Mat::rows(&w, dim).t());
        let per_row = logits.par_chunks_mut(tile.len()).zip(&mut rows).zip(targets);
        per_row.for_each(|((z, row), &target)| {
            shape(z, logits_of);
            wide(
                #[inline(always)]
                || row.add(z, tile.start, target as usize),
            );
        });
    }
    let mut out = Forward {
        logps: Vec::with_capacity(n),
        stats: Vec::with_capacity(4 * n),
        lse: Vec::with_capacity(n),
    };
    for (logp, lse, stats) in rows.iter().map(|row| row.finish(vocab)) {
        out.logps.push(logp);
        out.lse.push(lse);
        out.stats.extend_from_slice(&stats);
    }
    out
}

/// Gradients with respect to `hidden` and (if `of_weight`) `w`, given that of the log-probabilities:
/// `dz = grad · (onehot - softmax(z))`, times the slope of cap and scale.
pub fn backward<T: Computed>(
    grad: &[f32],
    hidden: &[T],
    w: Weight,
    (vocab, dim): (usize, usize),
    targets: &[u32],
    lse: &[f32],
    logits_of: Logits,
    of_weight: bool,
) -> (Vec<f32>, Vec<f32>) {
    let n = targets.len();
    let (mut dh, mut dw) = (vec![0.0; n * dim], Vec::with_capacity(if of_weight { vocab * dim } else { 0 }));
    let (mut logits, mut narrow) = (Vec::new(), Vec::new());
    if n == 0 {
        dw.resize(dw.capacity(), 0.0);
        return (dh, dw);
    }
    for tile in tiles(n, vocab) {
        let (len, add) = (tile.len(), tile.start > 0);
        logits.resize(n * len, 0.0);
        let part = tile.start * dim..tile.end * dim;
        let w = T::of_weight(w, part.clone());
        let (h, w) = (Mat::rows(hidden, dim), Mat::rows(&w, dim));
        matmul(&mut logits, false, (n, len, dim), h, w.t());
        let z = narrow_gradients(&mut logits, &mut narrow, (tile, targets, lse, grad, logits_of));
        matmul(&mut dh, add, (n, dim, len), z, w);
        if of_weight {
            append(&mut dw, (len, dim, n), z.t(), h);
        }
    }
    (dh, dw)
}

/// What [`gradient_rows`] takes besides the products.
type OfRows<'a> = (Range<usize>, &'a [u32], &'a [f32], &'a [f32], Logits);

/// [`gradient_rows`] in the type of products, in `into` where that is another.
fn narrow_gradients<'a, T: Element>(z: &'a mut [f32], into: &'a mut Vec<T>, of: OfRows) -> Mat<'a, T> {
    let len = of.0.len();
    if T::GROUP == 1 {
        let (part, targets, lse, grad, logits_of) = of;
        gradient_rows(z, part, targets, lse, grad, logits_of);
        return Mat::rows(T::of_all(z, into), len);
    }
    let width = len.next_multiple_of(T::GROUP);
    into.resize(z.len() / len * width, T::default());
    let (part, targets, lse, grad, logits_of) = of;
    let rows = z.par_chunks_mut(len).zip(into.par_chunks_mut(width));
    rows.zip(targets).zip(lse).zip(grad).for_each(|((((z, narrow), &target), &lse), &g)| {
        gradient_row(z, part.start, (target, lse, g), logits_of);
        wide(
            #[inline(always)]
            || narrow.iter_mut().zip(z.iter()).for_each(|(to, &from)| *to = T::of(from)),
        );
    });
    Mat::rows(into, width)
}

/// Turns the products of all rows and a part of the vocabulary, `[rows, part]`, into their gradients.
pub fn gradient_rows(
    z: &mut [f32],
    part: Range<usize>,
    targets: &[u32],
    lse: &[f32],
    grad: &[f32],
    logits_of: Logits,
) {
    z.par_chunks_mut(part.len()).zip(targets).zip(lse).zip(grad).for_each(|(((z, &target), &lse), &g)| {
        gradient_row(z, part.start, (target, lse, g), logits_of);
    });
}

fn gradient_row(z: &mut [f32], start: usize, (target, lse, g): (u32, f32, f32), logits_of: Logits) {
    shape(z, logits_of);
    let target = (target as usize).checked_sub(start).filter(|&at| at < z.len());
    row_gradient(z, target, lse, g, logits_of);
}

/// Products to logits: scaled, then capped.
fn shape(z: &mut [f32], logits: Logits) {
    wide(
        #[inline(always)]
        || {
            if logits.scale != 1.0 {
                z.iter_mut().for_each(|z| *z *= logits.scale);
            }
            if let Some(cap) = logits.softcap {
                z.iter_mut().for_each(|z| *z = softcap(*z, cap));
            }
        },
    );
}

/// Turns logits of one row into the gradient of its products; `target` is there if it is among them.
fn row_gradient(z: &mut [f32], target: Option<usize>, lse: f32, g: f32, logits: Logits) {
    let slope_at = |z: f32| logits.softcap.map_or(1.0, |cap| softcap_slope(z, cap));
    let of_target = target.map_or(0.0, |target| slope_at(z[target]) * logits.scale);
    wide(
        #[inline(always)]
        || {
            for z in z.iter_mut() {
                let slope = logits.softcap.map_or(1.0, |cap| softcap_slope(*z, cap));
                *z = -g * exp(*z - lse) * logits.scale * slope;
            }
        },
    );
    if let Some(target) = target {
        z[target] += g * of_target;
    }
}
