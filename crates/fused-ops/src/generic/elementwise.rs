//! Norms, rotary embedding and activations.

use super::Value;
use crate::ops::FusedOps;
use crate::{Activation, Rotary};

/// `x` as rows of `dim` features, in `f32`.
fn rows<B: FusedOps>(x: Value<B>, dim: usize) -> Value<B> {
    let elements: usize = x.dims().iter().product();
    x.wide().reshape(&[elements / dim, dim])
}

fn rstd<B: FusedOps>(x: Value<B>, eps: f32) -> Value<B> {
    (x.square().mean(1) + eps).sqrt().recip()
}

/// See [`crate::rms_norm`].
pub fn rms_norm<B: FusedOps>(x: Value<B>, w: Value<B>, eps: f32) -> Value<B> {
    let (shape, dtype, dim) = (x.dims(), x.dtype(), w.dims()[1]);
    let x = rows(x, dim);
    let scale = rstd(x.clone(), eps);
    (x * scale * w.wide()).reshape(&shape).cast(dtype)
}

/// Gradients of `x` and `w`.
pub fn rms_norm_backward<B: FusedOps>(
    grad: Value<B>,
    x: Value<B>,
    w: Value<B>,
    eps: f32,
) -> (Value<B>, Value<B>) {
    let (shape, dtype, dim) = (x.dims(), x.dtype(), w.dims()[1]);
    let (grad, x) = (rows(grad, dim), rows(x, dim));
    let scale = rstd(x.clone(), eps);
    let normed = x * scale.clone();
    let dw = (grad.clone() * normed.clone()).sum(0).cast(w.dtype());
    let weighted = grad * w.wide();
    let along = (weighted.clone() * normed.clone()).mean(1);
    (((weighted - normed * along) * scale).reshape(&shape).cast(dtype), dw)
}

fn standardised<B: FusedOps>(x: Value<B>, eps: f32) -> (Value<B>, Value<B>) {
    let centred = x.clone() - x.mean(1);
    let scale = rstd(centred.clone(), eps);
    (centred * scale.clone(), scale)
}

/// See [`crate::layer_norm`].
pub fn layer_norm<B: FusedOps>(x: Value<B>, w: Value<B>, b: Value<B>, eps: f32) -> Value<B> {
    let dtype = x.dtype();
    let (normed, _) = standardised(x.wide(), eps);
    (normed * w.wide() + b.wide()).cast(dtype)
}

/// Gradients of `x`, `w` and `b`.
pub fn layer_norm_backward<B: FusedOps>(
    grad: Value<B>,
    x: Value<B>,
    w: Value<B>,
    eps: f32,
) -> (Value<B>, Value<B>, Value<B>) {
    let (dtype, weight_dtype) = (x.dtype(), w.dtype());
    let grad = grad.wide();
    let (normed, scale) = standardised(x.wide(), eps);
    let dw = (grad.clone() * normed.clone()).sum(0).cast(weight_dtype);
    let db = grad.clone().sum(0).cast(weight_dtype);
    let weighted = grad * w.wide();
    let (mean, along) = (weighted.clone().mean(1), (weighted.clone() * normed.clone()).mean(1));
    (((weighted - mean - normed * along) * scale).cast(dtype), dw, db)
}

/// See [`crate::rotary`]; `sign` -1 rotates back, which is the gradient.
pub fn rotary<B: FusedOps>(x: Value<B>, table: &Rotary, sign: f32) -> Value<B> {
    let (shape, dtype) = (x.dims(), x.dtype());
    let (half, dim) = (table.half, table.dim);
    let (tokens, heads) = (shape[0], shape[1] / dim);
    let part = |values: &[f32]| Value::upload(values.to_vec(), &[tokens, 1, half], &x);
    let (cos, sin) = (part(&table.cos), part(&table.sin) * sign);
    let x = x.wide().reshape(&[tokens, heads, dim]);
    let (a, b) = (x.clone().narrow(2, 0..half), x.clone().narrow(2, half..2 * half));
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let mut parts = vec![first, b * cos + a * sin];
    if dim > 2 * half {
        parts.push(x.narrow(2, 2 * half..dim));
    }
    Value::cat(parts, 2).reshape(&shape).cast(dtype)
}

/// `sigmoid(x)`, which is finite for every `x`.
fn sigmoid<B: FusedOps>(x: Value<B>) -> Value<B> {
    ((x * 0.5).tanh() + 1.0) * 0.5
}

/// `sqrt(2 / π)` and the factor of the cube in the approximation of GELU.
const GELU: (f32, f32) = (0.797_884_56, 0.044_715);

/// The activation and its derivative.
fn curve<B: FusedOps>(x: Value<B>, kind: Activation) -> (Value<B>, Value<B>) {
    match kind {
        Activation::Silu => {
            let s = sigmoid(x.clone());
            let value = x.clone() * s.clone();
            let slope = s.clone() + value.clone() * (-s + 1.0);
            (value, slope)
        }
        Activation::GeluTanh => {
            let square = x.clone().square();
            let inner = x.clone() * (square.clone() * GELU.1 + 1.0) * GELU.0;
            let t = inner.tanh();
            let gate = (t.clone() + 1.0) * 0.5;
            let inner_slope = (square * (3.0 * GELU.1) + 1.0) * GELU.0;
            let slope = gate.clone() + x.clone() * 0.5 * (-t.square() + 1.0) * inner_slope;
            (x * gate, slope)
        }
    }
}

/// See [`crate::activate`].
pub fn activate<B: FusedOps>(x: Value<B>, kind: Activation) -> Value<B> {
    let dtype = x.dtype();
    let x = x.wide();
    let value = match kind {
        Activation::Silu => x.clone() * sigmoid(x),
        Activation::GeluTanh => curve(x, kind).0,
    };
    value.cast(dtype)
}

/// Gradient of [`activate`].
pub fn activate_backward<B: FusedOps>(grad: Value<B>, x: Value<B>, kind: Activation) -> Value<B> {
    let dtype = x.dtype();
    (grad.wide() * curve(x.wide(), kind).1).cast(dtype)
}

/// See [`crate::gated`].
pub fn gated<B: FusedOps>(gate: Value<B>, up: Value<B>, kind: Activation) -> Value<B> {
    let dtype = gate.dtype();
    (activate(gate.wide(), kind) * up.wide()).cast(dtype)
}

/// Gradients of `gate` and `up`.
pub fn gated_backward<B: FusedOps>(
    grad: Value<B>,
    gate: Value<B>,
    up: Value<B>,
    kind: Activation,
) -> (Value<B>, Value<B>) {
    let dtype = gate.dtype();
    let (value, slope) = curve(gate.wide(), kind);
    let grad = grad.wide();
    ((grad.clone() * up.wide() * slope).cast(dtype), (grad * value).cast(dtype))
}
