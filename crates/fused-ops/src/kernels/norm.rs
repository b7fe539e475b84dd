//! RMS norm and layer norm, forward and backward, a row of `dim` features at a time.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::simd::{made, sum_by, sum_by2, wide};

/// Rows handled by one parallel task.
const ROWS: usize = 64;

#[inline(always)]
fn rstd(row: &[f32], eps: f32) -> f32 {
    1.0 / (sum_by(row, |x| x * x) / row.len() as f32 + eps).sqrt()
}

/// `out = x * rstd(x) * w`.
pub fn rms_forward(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    rows_of(
        x,
        w.len(),
        #[inline(always)]
        |x, out| {
            let r = rstd(x, eps);
            out.iter_mut().zip(x).zip(w).for_each(|((out, x), w)| _ = out.write(x * r * w));
        },
    )
}

/// A row of results, all of which `row` writes, for each row of `x`.
fn rows_of(x: &[f32], dim: usize, row: impl Fn(&[f32], &mut [MaybeUninit<f32>]) + Send + Sync) -> Vec<f32> {
    assert!(x.len().is_multiple_of(dim), "rows of {dim} features");
    // SAFETY: every row is written.
    unsafe {
        made(x.len(), |out| {
            out.par_chunks_mut(dim * ROWS).zip(x.par_chunks(dim * ROWS)).for_each(|(out, x)| {
                wide(
                    #[inline(always)]
                    || {
                        out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).for_each(|(out, x)| row(x, out));
                    },
                );
            });
        })
    }
}

/// Gradients of [`rms_forward`] with respect to `x` and `w`, given that of its output.
pub fn rms_backward(grad: &[f32], x: &[f32], w: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let dim = w.len();
    assert!(x.len().is_multiple_of(dim) && x.len() == grad.len(), "rows of {dim} features");
    let mut partial = Vec::new();
    let task = |dx: &mut [MaybeUninit<f32>], x: &[f32], g: &[f32]| {
        let (mut dw, mut row) = (vec![0.0; dim], vec![0.0; dim]);
        wide(
            #[inline(always)]
            || {
                let rows = dx.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(g.chunks_exact(dim));
                for ((dx, x), g) in rows {
                    let r = rstd(x, eps);
                    for i in 0..dim {
                        row[i] = g[i] * w[i];
                        dw[i] += g[i] * x[i] * r;
                    }
                    let c = sum_by2(&row, x, |a, b| a * b) * r * r / dim as f32;
                    for i in 0..dim {
                        dx[i].write(r * (row[i] - x[i] * c));
                    }
                }
            },
        );
        dw
    };
    // SAFETY: every row is written.
    let dx = unsafe {
        made(x.len(), |dx| {
            let parts = dx.par_chunks_mut(dim * ROWS).zip(x.par_chunks(dim * ROWS));
            let parts = parts.zip(grad.par_chunks(dim * ROWS));
            parts.map(|((dx, x), g)| task(dx, x, g)).collect_into_vec(&mut partial);
        })
    };
    (dx, columns(dim, &partial))
}

#[inline(always)]
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = sum_by(row, |x| x) / n;
    let var = sum_by(row, |x| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (var + eps).sqrt())
}

/// `out = (x - mean) * rstd * w + b`.
pub fn layer_forward(x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Vec<f32> {
    assert_eq!(w.len(), b.len(), "a weight and a bias for each feature");
    rows_of(
        x,
        w.len(),
        #[inline(always)]
        |x, out| {
            let (mean, r) = moments(x, eps);
            let values = out.iter_mut().zip(x).zip(w).zip(b);
            values.for_each(|(((out, x), w), b)| _ = out.write((x - mean) * r * w + b));
        },
    )
}

/// Gradients of [`layer_forward`] with respect to `x`, `w` and `b`.
pub fn layer_backward(grad: &[f32], x: &[f32], w: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let dim = w.len();
    let mut dx = vec![0.0; x.len()];
    let (dw, db): (Vec<_>, Vec<_>) = dx
        .par_chunks_mut(dim * ROWS)
        .zip(x.par_chunks(dim * ROWS))
        .zip(grad.par_chunks(dim * ROWS))
        .map(|((dx, x), g)| {
            let (mut dw, mut db) = (vec![0.0; dim], vec![0.0; dim]);
            wide(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(g.chunks_exact(dim));
                    for ((dx, x), g) in rows {
                        let (mean, r) = moments(x, eps);
                        for i in 0..dim {
                            dx[i] = g[i] * w[i];
                            dw[i] += g[i] * (x[i] - mean) * r;
                            db[i] += g[i];
                        }
                        let a = sum_by(dx, |d| d) / dim as f32;
                        let c = sum_by2(dx, x, |d, x| d * (x - mean)) * r * r / dim as f32;
                        for i in 0..dim {
                            dx[i] = r * (dx[i] - a - (x[i] - mean) * c);
                        }
                    }
                },
            );
            (dw, db)
        })
        .unzip();
    (dx, columns(dim, &dw), columns(dim, &db))
}

/// Sums the partial column gradients in task order, so that the result does not depend on timing.
fn columns(dim: usize, parts: &[Vec<f32>]) -> Vec<f32> {
    let mut total = vec![0.0; dim];
    for part in parts {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
    total
}
