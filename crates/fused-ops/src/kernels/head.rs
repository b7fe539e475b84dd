//! Chunked language-model head: logits of a few rows at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::matrix::{Mat, matmul};
use super::simd::{exp, exp_shifted, max, softcap, softcap_slope, sum_by, sum_by2, wide};
use crate::Logits;

/// Logits held at a time (64 MiB), the one large temporary of the head.
const LOGITS: usize = 16 << 20;

/// Rows of a chunk for this vocabulary.
pub fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab).clamp(16, 1024)
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

/// `hidden`: `[n, dim]`, `w`: `[vocab, dim]`.
pub fn forward(hidden: &[f32], w: &[f32], dim: usize, targets: &[u32], logits_of: Logits) -> Forward {
    let (n, vocab) = (targets.len(), w.len() / dim);
    let mut out = Forward::new(n);
    let chunk = chunk_rows(vocab).min(n.max(1));
    let mut logits = vec![0.0; chunk * vocab];
    for start in (0..n).step_by(chunk) {
        let len = chunk.min(n - start);
        let z = &mut logits[..len * vocab];
        let h = &hidden[start * dim..(start + len) * dim];
        matmul(z, false, (len, vocab, dim), Mat::rows(h, dim), Mat::rows(w, dim).t());
        let span = start..start + len;
        out.rows(z, span, targets, logits_of);
    }
    out
}

impl Forward {
    /// Room for `n` rows.
    pub fn new(n: usize) -> Self {
        Self { logps: vec![0.0; n], stats: vec![0.0; 4 * n], lse: vec![0.0; n] }
    }

    /// Fills in a range of rows from their products, `[rows, vocab]`, which it overwrites.
    pub fn rows(&mut self, z: &mut [f32], rows: Range<usize>, targets: &[u32], logits_of: Logits) {
        z.par_chunks_mut(z.len() / rows.len())
            .zip(&targets[rows.clone()])
            .zip(&mut self.logps[rows.clone()])
            .zip(&mut self.lse[rows.clone()])
            .zip(self.stats[4 * rows.start..4 * rows.end].par_chunks_mut(4))
            .for_each(|((((z, &target), logp), lse), stats)| {
                shape(z, logits_of);
                (*logp, *lse) = row(z, target as usize, stats);
            });
    }
}

/// Turns products of some rows, `[rows, vocab]`, into their gradients; `targets`, `lse` and `grad` are of these rows.
pub fn gradient_rows(z: &mut [f32], targets: &[u32], lse: &[f32], grad: &[f32], logits_of: Logits) {
    z.par_chunks_mut(z.len() / targets.len()).zip(targets).zip(lse).zip(grad).for_each(
        |(((z, &target), &lse), &g)| {
            shape(z, logits_of);
            row_gradient(z, target as usize, lse, g, logits_of);
        },
    );
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

/// Log-probability and log-sum-exp of one row of logits, which it overwrites.
fn row(z: &mut [f32], target: usize, stats: &mut [f32]) -> (f32, f32) {
    wide(
        #[inline(always)]
        || {
            let top = max(z);
            let z_target = z[target];
            let mean = sum_by(z, |z| z) / z.len() as f32;
            // The entropy is lse - Σ p z; shifted by the maximum nothing overflows.
            let weighted = sum_by(z, |z| exp(z - top) * (z - top));
            let first_top = z.iter().position(|&z| z == top);
            let sum = exp_shifted(z, top);
            let log_sum = sum.ln();
            let squares = sum_by(z, |e| e * e);
            stats.copy_from_slice(&[
                log_sum - weighted / sum,
                mean,
                f32::from(u8::from(first_top == Some(target))),
                squares.ln() - 2.0 * log_sum,
            ]);
            (z_target - top - log_sum, top + log_sum)
        },
    )
}

/// Gradients with respect to `hidden` and (if `of_weight`) `w`, given that of the log-probabilities:
/// `dz = grad · (onehot - softmax(z))`, times the slope of cap and scale.
pub fn backward(
    grad: &[f32],
    hidden: &[f32],
    w: &[f32],
    dim: usize,
    targets: &[u32],
    lse: &[f32],
    logits_of: Logits,
    of_weight: bool,
) -> (Vec<f32>, Vec<f32>) {
    let (n, vocab) = (targets.len(), w.len() / dim);
    let (mut dh, mut dw) = (vec![0.0; n * dim], vec![0.0; if of_weight { w.len() } else { 0 }]);
    let chunk = chunk_rows(vocab).min(n.max(1));
    let mut logits = vec![0.0; chunk * vocab];
    for start in (0..n).step_by(chunk) {
        let len = chunk.min(n - start);
        let span = start..start + len;
        let z = &mut logits[..len * vocab];
        let h = &hidden[start * dim..(start + len) * dim];
        matmul(z, false, (len, vocab, dim), Mat::rows(h, dim), Mat::rows(w, dim).t());
        gradient_rows(z, &targets[span.clone()], &lse[span.clone()], &grad[span], logits_of);
        let z = &logits[..len * vocab];
        let rows_of_dh = &mut dh[start * dim..(start + len) * dim];
        matmul(rows_of_dh, false, (len, dim, vocab), Mat::rows(z, vocab), Mat::rows(w, dim));
        if of_weight {
            matmul(&mut dw, start > 0, (vocab, dim, len), Mat::rows(z, vocab).t(), Mat::rows(h, dim));
        }
    }
    (dh, dw)
}

/// Turns one row of logits into the gradient of its products.
fn row_gradient(z: &mut [f32], target: usize, lse: f32, g: f32, logits: Logits) {
    let of_target = logits.softcap.map_or(1.0, |cap| softcap_slope(z[target], cap)) * logits.scale;
    wide(
        #[inline(always)]
        || {
            for z in z.iter_mut() {
                let slope = logits.softcap.map_or(1.0, |cap| softcap_slope(*z, cap));
                *z = -g * exp(*z - lse) * logits.scale * slope;
            }
        },
    );
    z[target] += g * of_target;
}

/// Dot product, for callers that need one row of a product.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    wide(
        #[inline(always)]
        || sum_by2(a, b, |a, b| a * b),
    )
}
