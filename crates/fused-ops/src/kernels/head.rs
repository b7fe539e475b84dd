//! Language-model head: logits of all rows for a part of the vocabulary at a time, so that each part of the weight is
//! read once and its logits stay in the cache.

#![allow(unsafe_code)]

use std::ops::Range;

use rayon::prelude::*;

use super::dither::{Computed, Weight};
use super::matrix::{Mat, append, matmul};
use super::panel::{Element, TILE, WIDTH};
use super::product::{Finish, Output, finished};
use super::simd::{exp, max, softcap, softcap_slope, sum_by, sums_by, wide};
use crate::Logits;

/// Logits held at a time (about 8 MiB; their gradients in 16 bits half as much; more where there are more than 5,000
/// rows), the one large temporary of the head.
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
        let [sum, weighted, squares] = sums_by(
            z,
            #[inline(always)]
            |z| {
                let (shifted, e) = (z - top, exp(z - top));
                [e, e * shifted, e * e]
            },
        );
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
            wide(
                #[inline(always)]
                || {
                    shape(z, logits_of);
                    row.add(z, tile.start, target as usize);
                },
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
pub fn backward<T: Computed + Output>(
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
        let part = tile.start * dim..tile.end * dim;
        let w = T::of_weight(w, part.clone());
        let (h, w) = (Mat::rows(hidden, dim), Mat::rows(&w, dim));
        let finish = Gradients { part: tile, targets, lse, grad, logits_of };
        let z = if T::has_panels() && len.is_multiple_of(T::GROUP) {
            narrow.resize(n * len, T::default());
            // SAFETY: there is room for the products.
            unsafe { finished(narrow.as_mut_ptr(), false, (n, len, dim), h, w.t(), &finish) };
            Mat::rows(&narrow, len)
        } else {
            logits.resize(n * len, 0.0);
            matmul(&mut logits, false, (n, len, dim), h, w.t());
            narrow_gradients(&mut logits, &mut narrow, &finish)
        };
        matmul(&mut dh, add, (n, dim, len), z, w);
        if of_weight {
            append(&mut dw, (len, dim, n), z.t(), h);
        }
    }
    (dh, dw)
}

/// Turns the products of all rows and a part of the vocabulary into their gradients.
pub struct Gradients<'a> {
    /// Of the vocabulary.
    pub part: Range<usize>,
    pub targets: &'a [u32],
    /// Log-sum-exp of the rows.
    pub lse: &'a [f32],
    /// Gradients of the log-probabilities.
    pub grad: &'a [f32],
    pub logits_of: Logits,
}

impl Gradients<'_> {
    /// Of the whole part, `[rows, part]`.
    pub fn all(&self, z: &mut [f32]) {
        z.par_chunks_mut(self.part.len()).enumerate().for_each(|(row, z)| self.row(row, z));
    }

    fn row(&self, row: usize, z: &mut [f32]) {
        wide(
            #[inline(always)]
            || self.of(row, 0, z),
        );
    }

    /// Of one row, from a column of the part on.
    #[inline(always)]
    fn of(&self, row: usize, column: usize, z: &mut [f32]) {
        let Self { lse, grad, logits_of: Logits { scale, softcap: cap }, .. } = *self;
        let (lse, g) = (lse[row], grad[row]);
        shape(z, self.logits_of);
        let target = (self.targets[row] as usize).checked_sub(self.part.start + column);
        let target = target.filter(|&at| at < z.len());
        let of_target = target.map_or(0.0, |at| cap.map_or(1.0, |cap| softcap_slope(z[at], cap)) * scale);
        for z in z.iter_mut() {
            let slope = cap.map_or(1.0, |cap| softcap_slope(*z, cap));
            *z = -g * exp(*z - lse) * scale * slope;
        }
        if let Some(at) = target {
            z[at] += g * of_target;
        }
    }
}

impl<T: Element> Finish<T> for Gradients<'_> {
    const PLAIN: bool = false;

    #[inline(always)]
    unsafe fn put(&self, row: usize, column: usize, values: &[f32], to: *mut T, _: bool) {
        let mut z = [0.0; WIDTH];
        let z = &mut z[..values.len()];
        z.copy_from_slice(values);
        self.of(row, column, z);
        for (i, &z) in z.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(i).write(T::of(z)) };
        }
    }
}

/// The gradients of products, `[rows, part]`, in the type of products; in `into` where that is another.
fn narrow_gradients<'a, T: Element>(z: &'a mut [f32], into: &'a mut Vec<T>, of: &Gradients) -> Mat<'a, T> {
    let len = of.part.len();
    if T::GROUP == 1 {
        of.all(z);
        // Only numbers of 32 bits have groups of one.
        return Mat::rows(bytemuck::cast_slice(z), len);
    }
    let width = len.next_multiple_of(T::GROUP);
    into.resize(z.len() / len * width, T::default());
    z.par_chunks_mut(len).zip(into.par_chunks_mut(width)).enumerate().for_each(|(row, (z, narrow))| {
        of.row(row, z);
        wide(
            #[inline(always)]
            || narrow.iter_mut().zip(z.iter()).for_each(|(to, &from)| *to = T::of(from)),
        );
    });
    Mat::rows(into, width)
}

/// Products to logits: scaled, then capped.
#[inline(always)]
fn shape(z: &mut [f32], logits: Logits) {
    if logits.scale != 1.0 {
        z.iter_mut().for_each(|z| *z *= logits.scale);
    }
    if let Some(cap) = logits.softcap {
        z.iter_mut().for_each(|z| *z = softcap(*z, cap));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare<T: Element + Output>((n, len, dim): (usize, usize, usize), logits_of: Logits) {
        if !T::has_panels() {
            return;
        }
        let value = |i: usize| ((i * 7 + 3) % 23) as f32 / 64.0 - 0.16;
        let [h, w]: [Vec<T>; 2] = [n, len].map(|rows| (0..rows * dim).map(|i| T::of(value(i * i))).collect());
        let (h, w) = (Mat::rows(&h, dim), Mat::rows(&w, dim));
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 5 % 90).collect();
        let (lse, grad): (Vec<f32>, Vec<f32>) = (0..n).map(|i| (4.0 + value(i), value(i + 5))).unzip();
        let of = Gradients { part: 20..20 + len, targets: &targets, lse: &lse, grad: &grad, logits_of };
        let mut at_once = vec![T::default(); n * len];
        // SAFETY: there is room for all.
        unsafe { finished(at_once.as_mut_ptr(), false, (n, len, dim), h, w.t(), &of) };
        let mut after = vec![0.0_f32; n * len];
        matmul(&mut after, false, (n, len, dim), h, w.t());
        of.all(&mut after);
        for (i, (a, b)) in at_once.iter().zip(&after).enumerate() {
            let allowed = 1e-5 + b.abs() * if T::GROUP == 1 { 1e-4 } else { 0.01 };
            assert!((a.single() - b).abs() <= allowed, "{n}x{len}x{dim} at {i}: {a:?} {b}");
        }
        assert!(after.iter().any(|z| z.abs() > 1e-3));
    }

    #[test]
    fn gradients_are_the_same_with_their_products_as_after_them() {
        // Sums in one part and in several, columns that fill no panel, several tasks.
        for size in [(3, 5, 7), (250, 130, 40), (40, 66, 1700)] {
            for logits in [Logits::default(), Logits { scale: 0.5, softcap: Some(3.0) }] {
                compare::<f32>(size, logits);
                compare::<half::bf16>(size, logits);
            }
        }
    }
}
