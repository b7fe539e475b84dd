//! The kernels as operations of tensors in the memory of this process, whichever backend they belong to.
//!
//! What they compute and their shapes are told at [`crate::ops::FusedOps`], whose names they have.

mod attention;
mod products;

use std::sync::Arc;

use burn::tensor::{DType, FloatDType};
use half::bf16;
use rayon::prelude::*;

pub use attention::{attention_backward, fused_attention, new_cache, paged_attention};
pub use products::{
    fused_linear, grad_input_onto, linear_grad_input, linear_grad_weight, linear_onto, packed, packed_linear,
};

use crate::host::Host;
use crate::kernels::dither::Weight;
use crate::kernels::panel::Element;
use crate::kernels::{adamw as optimizer, elementwise, head as lm_head, norm};
use crate::{Activation, AdamW, Logits, Rotary};
use products::whole;

/// The same without `t`: the last one to hold the values writes them in place.
fn owned<H: Host>(t: H) -> H {
    t.flat()
}

/// The values of a weight. One of 16 bits is never trained.
fn weight<H: Host>(w: &H) -> Weight<'_> {
    if w.dtype() == DType::BF16 { Weight::Narrow(w.storage()) } else { Weight::Single(w.storage()) }
}

/// Runs `body` for the element type of a tensor.
macro_rules! typed {
    ($tensor:expr, $t:ident => $body:expr) => {
        match $tensor.dtype() {
            DType::BF16 => {
                type $t = bf16;
                $body
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}
use typed;

fn in_type<H: Host>(x: &H, dtype: DType) -> H {
    let x = x.flat();
    match (x.dtype(), dtype) {
        (DType::F32, DType::BF16) => like(elementwise::cast::<f32, bf16>(x.storage()), &x),
        (DType::BF16, DType::F32) => like(elementwise::cast::<bf16, f32>(x.storage()), &x),
        (DType::F32, DType::F32) | (DType::BF16, DType::BF16) => x,
        (from, to) => unreachable!("activations are f32 or bf16: {from:?} to {to:?}"),
    }
}

/// A tensor of the shape of another.
fn like<T: Element, H: Host>(values: Vec<T>, other: &H) -> H {
    H::new(values, &other.shape().to_vec())
}

fn dims<H: Host>(t: &H) -> [usize; 2] {
    let shape = t.shape();
    [shape[0], shape[1]]
}

/// One step of a parameter with its gradient and two moments; returns what it has changed.
pub fn adamw<H: Host>(
    opt: &AdamW,
    [value, gradient, first, second]: [H; 4],
    weight_decay: f64,
    scale: f32,
) -> [H; 3] {
    let [mut p, mut m, mut v] = [value, first, second].map(owned);
    let g = gradient.flat();
    let (p_data, m_data, v_data) = (p.storage_mut(), m.storage_mut(), v.storage_mut());
    optimizer::step(opt, weight_decay, p_data, g.storage(), m_data, v_data, scale);
    [p, m, v]
}

/// Euclidean norm of all elements, `[1]`.
pub fn norm_of<H: Host>(tensors: impl Iterator<Item = H>) -> H {
    let squares = tensors.map(|tensor| optimizer::sum_of_squares(tensor.flat().storage()));
    H::new(vec![squares.sum::<f64>().sqrt() as f32], &[1])
}

/// That of each row, `[rows, 1]`.
pub fn row_norms<H: Host>(weight: H) -> H {
    let (weight, [rows, cols]) = (weight.flat(), dims(&weight));
    let squares = |row: &[f32]| row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
    let norms: Vec<f32> =
        weight.storage::<f32>().par_chunks(cols).map(|row| squares(row).sqrt() as f32).collect();
    H::new(norms, &[rows, 1])
}

pub fn weight_as<H: Host>(w: H, like_this: H) -> H {
    let w = w.flat();
    typed!(like_this, T => like(whole::<T, H>(&w).into_owned(), &w))
}

pub fn fused_cast<H: Host>(x: H, dtype: FloatDType) -> H {
    in_type(&x, dtype.into())
}

pub fn scaled<H: Host>(x: H, scale: f32) -> H {
    let x = x.flat();
    typed!(x, T => like(elementwise::scaled::<T>(x.storage(), scale), &x))
}

pub fn rows_added<H: Host>(base: H, rows: Arc<Vec<u32>>, values: H) -> H {
    let (mut base, values) = (owned(base), values.flat());
    let cols = dims(&base)[1];
    typed!(values, T => elementwise::add_rows::<T>(base.storage_mut(), &rows, values.storage(), cols));
    base
}

pub fn added<H: Host>(a: H, b: H) -> H {
    let (mut a, b) = (owned(a), b.flat());
    typed!(b, T => elementwise::add::<T>(a.storage_mut(), b.storage()));
    a
}

pub fn joined<H: Host>(x: H, update: H) -> H {
    let (x, update) = (x.flat(), update.flat());
    typed!(x, T => typed!(update, U => {
        like(elementwise::sum::<T, U>(x.storage(), update.storage()), &x)
    }))
}

pub fn fused_rms_norm<H: Host>(x: H, w: H, eps: f32) -> H {
    let (single, w) = (in_type(&x, DType::F32), w.flat());
    in_type(&like(norm::rms_forward(single.storage(), w.storage(), eps), &x), x.dtype())
}

pub fn rms_norm_backward<H: Host>(grad: H, x: H, w: H, eps: f32) -> (H, H) {
    let [grad, single] = [&grad, &x].map(|t| in_type(t, DType::F32));
    let w = w.flat();
    let (dx, dw) = norm::rms_backward(grad.storage(), single.storage(), w.storage(), eps);
    (in_type(&like(dx, &x), x.dtype()), like(dw, &w))
}

pub fn fused_layer_norm<H: Host>(x: H, w: H, b: H, eps: f32) -> H {
    let (single, w, b) = (in_type(&x, DType::F32), w.flat(), b.flat());
    in_type(&like(norm::layer_forward(single.storage(), w.storage(), b.storage(), eps), &x), x.dtype())
}

pub fn layer_norm_backward<H: Host>(grad: H, x: H, w: H, eps: f32) -> (H, H, H) {
    let [grad, single] = [&grad, &x].map(|t| in_type(t, DType::F32));
    let w = w.flat();
    let (dx, dw, db) = norm::layer_backward(grad.storage(), single.storage(), w.storage(), eps);
    (in_type(&like(dx, &x), x.dtype()), like(dw, &w), like(db, &w))
}

pub fn fused_rotary<H: Host>(x: H, table: Rotary, sign: f32) -> H {
    let x = x.flat();
    let features = dims(&x)[1];
    assert!(features.is_multiple_of(table.dim), "rotary: {features} features are not heads of {}", table.dim);
    typed!(x, T => like(elementwise::rotate::<T>(x.storage(), features, &table, sign), &x))
}

pub fn fused_gated<H: Host>(gate: H, up: H, kind: Activation) -> H {
    let (gate, up) = (gate.flat(), up.flat());
    typed!(gate, T => like(elementwise::gated_forward::<T>(gate.storage(), up.storage(), kind), &gate))
}

pub fn gated_backward<H: Host>(grad: H, gate: H, up: H, kind: Activation) -> (H, H) {
    let (grad, gate, up) = (grad.flat(), gate.flat(), up.flat());
    typed!(gate, T => {
        let (dg, du) = elementwise::gated_backward::<T>(grad.storage(), gate.storage(), up.storage(), kind);
        (like(dg, &gate), like(du, &up))
    })
}

pub fn fused_activate<H: Host>(x: H, kind: Activation) -> H {
    let x = x.flat();
    typed!(x, T => like(elementwise::activate_forward::<T>(x.storage(), kind), &x))
}

pub fn activate_backward<H: Host>(grad: H, x: H, kind: Activation) -> H {
    let (grad, x) = (grad.flat(), x.flat());
    typed!(x, T => like(elementwise::activate_backward::<T>(grad.storage(), x.storage(), kind), &x))
}

pub fn fused_sums<H: Host>(values: H, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> H {
    let values = values.flat();
    let data = values.storage::<f32>();
    let mut totals = vec![0.0_f64; sums];
    for &(value, sum) in plan.iter() {
        totals[sum as usize] += f64::from(data[value as usize]);
    }
    H::new(totals.into_iter().map(|total| total as f32).collect(), &[sums])
}

pub fn sums_backward<H: Host>(grad: H, plan: Arc<Vec<(u32, u32)>>, values: usize) -> H {
    let grad = grad.flat();
    let data = grad.storage::<f32>();
    let mut out = vec![0.0; values];
    for &(value, sum) in plan.iter() {
        out[value as usize] += data[sum as usize];
    }
    H::new(out, &[values])
}

pub fn fused_head<H: Host>(hidden: H, w: H, targets: Arc<Vec<u32>>, logits: Logits) -> (H, H, H) {
    let (hidden, w) = (hidden.flat(), w.flat());
    let (n, [vocab, dim]) = (targets.len(), dims(&w));
    let result = typed!(hidden, T => {
        lm_head::forward::<T>(hidden.storage(), weight(&w), (vocab, dim), &targets, logits)
    });
    (H::new(result.logps, &[n]), H::new(result.stats, &[n, 4]), H::new(result.lse, &[n]))
}

pub fn head_backward<H: Host>(
    grad: H,
    hidden: H,
    w: H,
    lse: H,
    targets: Arc<Vec<u32>>,
    logits: Logits,
    of_weight: bool,
) -> (H, H) {
    let [grad, hidden, w, lse] = [grad, hidden, w, lse].map(|t| t.flat());
    let ([vocab, dim], table) = (dims(&w), weight(&w));
    let (g, lse) = (grad.storage(), lse.storage());
    let (dh, dw) = typed!(hidden, T => {
        let h: &[T] = hidden.storage();
        lm_head::backward(g, h, table, (vocab, dim), &targets, lse, logits, of_weight)
    });
    let shape = [if of_weight { vocab } else { 0 }, dim];
    (in_type(&H::new(dh, &[targets.len(), dim]), hidden.dtype()), H::new(dw, &shape))
}
