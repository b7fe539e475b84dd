//! Activations, gated or not, and the rotary embedding.

use rayon::prelude::*;

use super::simd::{CHUNK, exp, tanh, wide};
use crate::{Activation, Rotary};

/// Value and derivative of an activation.
trait Curve {
    fn at(x: f32) -> (f32, f32);
}

struct Silu;

impl Curve for Silu {
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        let s = 1.0 / (1.0 + exp(-x));
        (x * s, s * (1.0 + x * (1.0 - s)))
    }
}

struct GeluTanh;

impl Curve for GeluTanh {
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        // sqrt(2/π).
        const ROOT: f32 = 0.797_884_6;
        const CUBIC: f32 = 0.044_715;
        let t = tanh(ROOT * (x + CUBIC * x * x * x));
        let slope = ROOT * (1.0 + 3.0 * CUBIC * x * x);
        (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
    }
}

/// Calls a function generic over the curve.
macro_rules! with_curve {
    ($kind:expr, $function:ident($($argument:expr),*)) => {
        match $kind {
            Activation::Silu => $function::<Silu>($($argument),*),
            Activation::GeluTanh => $function::<GeluTanh>($($argument),*),
        }
    };
}

/// `out = activation(gate) * up`.
pub fn gated_forward(gate: &[f32], up: &[f32], kind: Activation) -> Vec<f32> {
    with_curve!(kind, gated_values(gate, up))
}

/// Gradients of [`gated_forward`] with respect to `gate` and `up`.
pub fn gated_backward(grad: &[f32], gate: &[f32], up: &[f32], kind: Activation) -> (Vec<f32>, Vec<f32>) {
    with_curve!(kind, gated_gradients(grad, gate, up))
}

/// `out = activation(x)`.
pub fn activate_forward(x: &[f32], kind: Activation) -> Vec<f32> {
    with_curve!(kind, values(x))
}

/// Gradient of [`activate_forward`].
pub fn activate_backward(grad: &[f32], x: &[f32], kind: Activation) -> Vec<f32> {
    with_curve!(kind, gradients(grad, x))
}

fn gated_values<C: Curve>(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(
        |((out, gate), up)| {
            wide(
                #[inline(always)]
                || {
                    for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                        *out = C::at(g).0 * u;
                    }
                },
            );
        },
    );
    out
}

fn gated_gradients<C: Curve>(grad: &[f32], gate: &[f32], up: &[f32]) -> (Vec<f32>, Vec<f32>) {
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
                        let (value, slope) = C::at(gate[i]);
                        du[i] = d[i] * value;
                        dg[i] = d[i] * up[i] * slope;
                    }
                },
            );
        });
    (dg, du)
}

fn values<C: Curve>(x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
        wide(
            #[inline(always)]
            || {
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = C::at(x).0;
                }
            },
        );
    });
    out
}

fn gradients<C: Curve>(grad: &[f32], x: &[f32]) -> Vec<f32> {
    let mut dx = vec![0.0; x.len()];
    dx.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)).zip(x.par_chunks(CHUNK)).for_each(|((dx, d), x)| {
        wide(
            #[inline(always)]
            || {
                for ((dx, &d), &x) in dx.iter_mut().zip(d).zip(x) {
                    *dx = d * C::at(x).1;
                }
            },
        );
    });
    dx
}

/// Rotates each pair `(x[i], x[i + half])` of every head by its token's angle; `sign` is 1 for the
/// forward pass and -1 for the backward pass (the transpose). Features beyond `2 · half` are copied.
pub fn rotate(x: &[f32], features: usize, table: &Rotary, sign: f32) -> Vec<f32> {
    let Rotary { half, dim, .. } = *table;
    let mut out = vec![0.0; x.len()];
    let tokens = out.par_chunks_mut(features).zip(x.par_chunks(features));
    tokens.zip(table.cos.par_chunks(half)).zip(table.sin.par_chunks(half)).with_min_len(16).for_each(
        |(((out, x), cos), sin)| {
            wide(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
                        out[2 * half..].copy_from_slice(&x[2 * half..]);
                        let (out_a, out_b) = out[..2 * half].split_at_mut(half);
                        let (a, b) = x[..2 * half].split_at(half);
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
