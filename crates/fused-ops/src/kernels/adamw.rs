//! AdamW in place, and the sum of squares for the global norm.

use rayon::prelude::*;

use super::simd::{CHUNK, sum_by, wide};
use crate::AdamW;

/// One step on a parameter and its moments; `scale` multiplies the gradient first (clipping).
pub fn step(
    opt: &AdamW,
    weight_decay: f64,
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    scale: f32,
) {
    let AdamW { lr, beta1, beta2, eps, step } = *opt;
    // As torch.optim.AdamW does: corrections in f64, applied as one step size and one denominator.
    let correction1 = 1.0 - f64::from(beta1).powi(step as i32);
    let correction2 = 1.0 - f64::from(beta2).powi(step as i32);
    let step_size = (lr / correction1) as f32;
    let root = correction2.sqrt() as f32;
    let decay = (1.0 - lr * weight_decay) as f32;
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK))
        .for_each(|(((p, g), m), v)| {
            wide(
                #[inline(always)]
                || {
                    for i in 0..p.len() {
                        let g = g[i] * scale;
                        m[i] += (1.0 - beta1) * (g - m[i]);
                        v[i] = v[i] * beta2 + (1.0 - beta2) * g * g;
                        let denominator = v[i].sqrt() / root + eps;
                        p[i] = p[i] * decay - step_size * (m[i] / denominator);
                    }
                },
            );
        });
}

/// Sum of squares in f64 over fixed chunks, so that it does not depend on the number of threads.
pub fn sum_of_squares(xs: &[f32]) -> f64 {
    let parts: Vec<f64> = xs
        .par_chunks(CHUNK)
        .map(|xs| {
            wide(
                #[inline(always)]
                || f64::from(sum_by(xs, |x| x * x)),
            )
        })
        .collect();
    parts.into_iter().sum()
}
