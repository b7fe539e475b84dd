//! SwiGLU and the rotary embedding.

use rayon::prelude::*;

use super::simd::{CHUNK, exp, wide};

/// `out = gate * sigmoid(gate) * up`.
pub fn swiglu_forward(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(
        |((out, gate), up)| {
            wide(
                #[inline(always)]
                || {
                    for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                        *out = g / (1.0 + exp(-g)) * u;
                    }
                },
            );
        },
    );
    out
}

/// Gradients of [`swiglu_forward`] with respect to `gate` and `up`.
pub fn swiglu_backward(grad: &[f32], gate: &[f32], up: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut dg, mut du) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
    dg.par_chunks_mut(CHUNK)
        .zip(du.par_chunks_mut(CHUNK))
        .zip(grad.par_chunks(CHUNK))
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .for_each(|((((dg, du), d), gate), up)| {
            wide(
                #[inline(always)]
                || {
                    for i in 0..d.len() {
                        let s = 1.0 / (1.0 + exp(-gate[i]));
                        du[i] = d[i] * gate[i] * s;
                        dg[i] = d[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                    }
                },
            );
        });
    (dg, du)
}

/// Rotates each pair `(x[i], x[i + half])` of every head by its token's angle; `sign` is 1 for the
/// forward pass and -1 for the backward pass (the inverse rotation).
pub fn rotate(x: &[f32], features: usize, cos: &[f32], sin: &[f32], half: usize, sign: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    let tokens = out.par_chunks_mut(features).zip(x.par_chunks(features));
    tokens.zip(cos.par_chunks(half)).zip(sin.par_chunks(half)).with_min_len(16).for_each(
        |(((out, x), cos), sin)| {
            wide(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                        let (out_a, out_b) = out.split_at_mut(half);
                        let (a, b) = x.split_at(half);
                        for i in 0..half {
                            let s = sign * sin[i];
                            out_a[i] = a[i] * cos[i] - b[i] * s;
                            out_b[i] = b[i] * cos[i] + a[i] * s;
                        }
                    }
                },
            );
        },
    );
    out
}
