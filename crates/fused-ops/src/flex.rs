//! The kernels as operations of the Flex backend.

use std::borrow::Cow;
use std::sync::Arc;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{DispatchDevice, Flex};
use burn::tensor::{Bytes, DType, FloatDType, Shape, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::kernels::brain::has_narrow_products;
use crate::kernels::dither::{Computed, Weight};
use crate::kernels::matrix::{Mat, matmul, product_of};
use crate::kernels::panel::Element;
use crate::kernels::product::Output;
use crate::kernels::{self, attention::Operands};
use crate::kernels::{attention as attn, elementwise, head as lm_head, norm, packed, paged};
use crate::ops::{FusedOps, Three, Two};
use crate::paged::Span;
use crate::{Activation, AdamW, Heads, Logits, Moments, Parameter, Rotary, Scores, Segments};

fn flat(t: &FlexTensor) -> FlexTensor {
    t.to_contiguous()
}

/// The same without `t`: the last one to hold the values writes them in place.
fn owned(t: FlexTensor) -> FlexTensor {
    flat(&t)
}

/// The values of a weight. One of 16 bits is never trained.
fn weight(w: &FlexTensor) -> Weight<'_> {
    if w.dtype() == DType::BF16 { Weight::Narrow(w.storage()) } else { Weight::Single(w.storage()) }
}

/// All of a weight's values in the type of products.
fn whole<T: Computed>(w: &FlexTensor) -> Cow<'_, [T]> {
    let [rows, cols] = dims(w);
    T::of_weight(weight(w), 0..rows * cols)
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

fn in_type(x: &FlexTensor, dtype: DType) -> FlexTensor {
    let x = flat(x);
    match (x.dtype(), dtype) {
        (DType::F32, DType::BF16) => like(elementwise::cast::<f32, bf16>(x.storage()), &x),
        (DType::BF16, DType::F32) => like(elementwise::cast::<bf16, f32>(x.storage()), &x),
        (DType::F32, DType::F32) | (DType::BF16, DType::BF16) => x,
        (from, to) => unreachable!("activations are f32 or bf16: {from:?} to {to:?}"),
    }
}

fn new<T: Element>(values: Vec<T>, shape: &[usize]) -> FlexTensor {
    let layout = Layout::contiguous(Shape::from(shape.to_vec()));
    FlexTensor::new(Bytes::from_elems(values), layout, T::dtype())
}

fn like<T: Element>(values: Vec<T>, other: &FlexTensor) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(other.layout().shape().clone()), T::dtype())
}

fn dims(t: &FlexTensor) -> [usize; 2] {
    let shape = t.layout().shape();
    [shape[0], shape[1]]
}

/// `base + a · b`, in place where nothing else holds `base`.
fn onto<T: Output>(base: FlexTensor, size: (usize, usize, usize), a: Mat<T>, b: Mat<T>) -> FlexTensor {
    let mut base = owned(base);
    matmul(base.storage_mut::<T>(), true, size, a, b);
    base
}

/// True when `tensor` is on Flex, without autodiff or with it.
pub fn holds<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.device().inner().as_dispatch(), DispatchDevice::Flex(_))
}

/// The tensor without gaps.
fn primitive<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let tensor = tensor.try_into_primitive::<Flex>().expect("asked before: a Flex tensor without autodiff");
    if tensor.is_contiguous() && tensor.layout().start_offset() == 0 {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// Values of a tensor without autodiff.
pub fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    primitive(tensor.clone()).storage().to_vec()
}

/// One AdamW step of one parameter, in place where nothing else holds its tensors.
pub fn adamw(opt: &AdamW, parameter: Parameter, scale: f32) -> (Tensor<2>, Moments) {
    let Parameter { value, gradient, moments, weight_decay } = parameter;
    let (mut p, g) = (primitive(value), primitive(gradient));
    let (mut m, mut v) = (primitive(moments.first), primitive(moments.second));
    let (p_data, m_data, v_data) = (p.storage_mut(), m.storage_mut(), v.storage_mut());
    kernels::adamw::step(opt, weight_decay, p_data, g.storage(), m_data, v_data, scale);
    let tensor = Tensor::from_primitive::<Flex>;
    (tensor(p), Moments { first: tensor(m), second: tensor(v) })
}

/// See [`crate::norm`].
pub fn norm(tensors: &[&Tensor<2>]) -> Tensor<1> {
    let squares =
        |tensor: &&Tensor<2>| kernels::adamw::sum_of_squares(primitive((*tensor).clone()).storage());
    let norm = tensors.iter().map(squares).sum::<f64>().sqrt();
    Tensor::from_primitive::<Flex>(new(vec![norm as f32], &[1]))
}

/// See [`crate::row_norms`].
pub fn row_norms(weight: &Tensor<2>) -> Tensor<2> {
    let cols = weight.dims()[1];
    let squares = |row: &[f32]| row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
    let weight = primitive(weight.clone());
    let norms: Vec<f32> =
        weight.storage::<f32>().par_chunks(cols).map(|row| squares(row).sqrt() as f32).collect();
    let rows = norms.len();
    Tensor::from_primitive::<Flex>(new(norms, &[rows, 1]))
}

fn panels<T: Element>(values: Vec<T>, shape: [usize; 2]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::from(shape)), T::dtype())
}

fn paged_step<T: Element>(
    [q, k, v]: [&FlexTensor; 3],
    [keys, values]: [&mut FlexTensor; 2],
    spans: &[Span],
    heads: Heads,
    scores: Scores,
) -> Vec<f32> {
    paged::write(
        [k.storage(), v.storage()],
        [keys.storage_mut::<T>(), values.storage_mut::<T>()],
        spans,
        heads,
    );
    let cache = paged::Cache { keys: keys.storage::<T>(), values: values.storage::<T>(), heads, scores };
    paged::attend(q.storage(), cache, spans)
}

impl FusedOps for Flex {
    fn weight_as(w: FlexTensor, like_this: FlexTensor) -> FlexTensor {
        let w = flat(&w);
        typed!(like_this, T => like(whole::<T>(&w).into_owned(), &w))
    }

    fn fused_cast(x: FlexTensor, dtype: FloatDType) -> FlexTensor {
        in_type(&x, dtype.into())
    }

    fn fused_linear(x: FlexTensor, w: FlexTensor) -> FlexTensor {
        let (x, w) = (flat(&x), flat(&w));
        let ([tokens, inner], [outer, inner_w]) = (dims(&x), dims(&w));
        assert_eq!(inner, inner_w, "linear: x has {inner} features, the weight takes {inner_w}");
        typed!(x, T => {
            let w = whole::<T>(&w);
            let (a, b) = (Mat::<T>::rows(x.storage(), inner), Mat::rows(&w, inner).t());
            new(product_of::<T, T>((tokens, outer, inner), a, b), &[tokens, outer])
        })
    }

    fn linear_grad_input(grad: FlexTensor, w: FlexTensor) -> FlexTensor {
        let (grad, w) = (flat(&grad), flat(&w));
        let ([tokens, outer], [_, inner]) = (dims(&grad), dims(&w));
        typed!(grad, T => {
            let w = whole::<T>(&w);
            let (g, w) = (Mat::<T>::rows(grad.storage(), outer), Mat::rows(&w, inner));
            new(product_of::<T, T>((tokens, inner, outer), g, w), &[tokens, inner])
        })
    }

    fn scaled(x: FlexTensor, scale: f32) -> FlexTensor {
        let x = flat(&x);
        typed!(x, T => like(elementwise::scaled::<T>(x.storage(), scale), &x))
    }

    fn rows_added(base: FlexTensor, rows: Arc<Vec<u32>>, values: FlexTensor) -> FlexTensor {
        let (mut base, values) = (owned(base), flat(&values));
        let cols = dims(&base)[1];
        typed!(values, T => elementwise::add_rows::<T>(base.storage_mut(), &rows, values.storage(), cols));
        base
    }

    fn added(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        let (mut a, b) = (owned(a), flat(&b));
        typed!(b, T => elementwise::add::<T>(a.storage_mut(), b.storage()));
        a
    }

    fn joined(x: FlexTensor, update: FlexTensor) -> FlexTensor {
        let (x, update) = (flat(&x), flat(&update));
        typed!(x, T => typed!(update, U => {
            like(elementwise::sum::<T, U>(x.storage(), update.storage()), &x)
        }))
    }

    fn linear_onto(base: FlexTensor, x: FlexTensor, w: FlexTensor) -> FlexTensor {
        let (x, w) = (flat(&x), flat(&w));
        let ([tokens, inner], [outer, _]) = (dims(&x), dims(&w));
        typed!(x, T => {
            let w = whole::<T>(&w);
            let (a, b) = (Mat::<T>::rows(x.storage(), inner), Mat::rows(&w, inner).t());
            onto::<T>(base, (tokens, outer, inner), a, b)
        })
    }

    fn grad_input_onto(base: FlexTensor, grad: FlexTensor, w: FlexTensor) -> FlexTensor {
        let (grad, w) = (flat(&grad), flat(&w));
        let ([tokens, outer], [_, inner]) = (dims(&grad), dims(&w));
        typed!(grad, T => {
            let w = whole::<T>(&w);
            let (g, w) = (Mat::<T>::rows(grad.storage(), outer), Mat::rows(&w, inner));
            onto::<T>(base, (tokens, inner, outer), g, w)
        })
    }

    fn linear_grad_weight(grad: FlexTensor, x: FlexTensor) -> FlexTensor {
        let (grad, x) = (flat(&grad), flat(&x));
        let ([tokens, outer], [_, inner]) = (dims(&grad), dims(&x));
        typed!(grad, T => {
            let (g, x) = (Mat::<T>::rows(grad.storage(), outer), Mat::rows(x.storage(), inner));
            new(product_of::<T, f32>((outer, inner, tokens), g.t(), x), &[outer, inner])
        })
    }

    fn fused_rms_norm(x: FlexTensor, w: FlexTensor, eps: f32) -> FlexTensor {
        let (single, w) = (in_type(&x, DType::F32), flat(&w));
        in_type(&like(norm::rms_forward(single.storage(), w.storage(), eps), &x), x.dtype())
    }

    fn rms_norm_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor, eps: f32) -> Two<Self> {
        let [grad, single] = [&grad, &x].map(|t| in_type(t, DType::F32));
        let w = flat(&w);
        let (dx, dw) = norm::rms_backward(grad.storage(), single.storage(), w.storage(), eps);
        (in_type(&like(dx, &x), x.dtype()), like(dw, &w))
    }

    fn fused_layer_norm(x: FlexTensor, w: FlexTensor, b: FlexTensor, eps: f32) -> FlexTensor {
        let (single, w, b) = (in_type(&x, DType::F32), flat(&w), flat(&b));
        in_type(&like(norm::layer_forward(single.storage(), w.storage(), b.storage(), eps), &x), x.dtype())
    }

    fn layer_norm_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor, eps: f32) -> Three<Self> {
        let [grad, single] = [&grad, &x].map(|t| in_type(t, DType::F32));
        let w = flat(&w);
        let (dx, dw, db) = norm::layer_backward(grad.storage(), single.storage(), w.storage(), eps);
        (in_type(&like(dx, &x), x.dtype()), like(dw, &w), like(db, &w))
    }

    fn fused_rotary(x: FlexTensor, table: Rotary, sign: f32) -> FlexTensor {
        let x = flat(&x);
        let features = dims(&x)[1];
        assert!(
            features.is_multiple_of(table.dim),
            "rotary: {features} features are not heads of {}",
            table.dim
        );
        typed!(x, T => like(elementwise::rotate::<T>(x.storage(), features, &table, sign), &x))
    }

    fn fused_gated(gate: FlexTensor, up: FlexTensor, kind: Activation) -> FlexTensor {
        let (gate, up) = (flat(&gate), flat(&up));
        typed!(gate, T => like(elementwise::gated_forward::<T>(gate.storage(), up.storage(), kind), &gate))
    }

    fn gated_backward(grad: FlexTensor, gate: FlexTensor, up: FlexTensor, kind: Activation) -> Two<Self> {
        let (grad, gate, up) = (flat(&grad), flat(&gate), flat(&up));
        typed!(gate, T => {
            let (dg, du) = elementwise::gated_backward::<T>(grad.storage(), gate.storage(), up.storage(), kind);
            (like(dg, &gate), like(du, &up))
        })
    }

    fn fused_activate(x: FlexTensor, kind: Activation) -> FlexTensor {
        let x = flat(&x);
        typed!(x, T => like(elementwise::activate_forward::<T>(x.storage(), kind), &x))
    }

    fn activate_backward(grad: FlexTensor, x: FlexTensor, kind: Activation) -> FlexTensor {
        let (grad, x) = (flat(&grad), flat(&x));
        typed!(x, T => like(elementwise::activate_backward::<T>(grad.storage(), x.storage(), kind), &x))
    }

    fn fused_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> Two<Self> {
        let (q, k, v) = (flat(&q), flat(&k), flat(&v));
        typed!(q, T => {
            let x = Operands::<T> { q: q.storage(), k: k.storage(), v: v.storage(), heads, scores };
            let (out, lse) = attn::forward(x, &segments);
            (like(out, &q), new(lse, &[dims(&q)[0], heads.query]))
        })
    }

    fn attention_backward(
        grad: FlexTensor,
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        _: FlexTensor,
        lse: FlexTensor,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> Three<Self> {
        let (grad, q, k, v) = (flat(&grad), flat(&q), flat(&k), flat(&v));
        typed!(q, T => {
            let x = Operands::<T> { q: q.storage(), k: k.storage(), v: v.storage(), heads, scores };
            let [dq, dk, dv] = attn::backward(x, &segments, grad.storage(), lse.storage());
            (like(dq, &q), like(dk, &k), like(dv, &v))
        })
    }

    fn packed(w: FlexTensor, narrow: bool) -> FlexTensor {
        let w = flat(&w);
        let [rows, k] = dims(&w);
        let values = whole::<f32>(&w);
        if narrow {
            panels(packed::pack::<bf16>(&values, rows, k), packed::shape::<bf16>(rows, k))
        } else {
            panels(packed::pack::<f32>(&values, rows, k), packed::shape::<f32>(rows, k))
        }
    }

    fn packed_linear(x: FlexTensor, w: FlexTensor, rows: usize) -> FlexTensor {
        let (dtype, x) = (x.dtype(), in_type(&x, DType::F32));
        let ([tokens, k], [padded, inner]) = (dims(&x), dims(&w));
        assert!(
            rows <= padded && k <= inner && inner < k + 2,
            "packed linear: [{tokens}, {k}] with [{rows}, {inner}]"
        );
        let out = match w.dtype() {
            DType::BF16 => packed::linear::<bf16>(x.storage(), k, w.storage(), rows),
            _ => packed::linear::<f32>(x.storage(), k, w.storage(), rows),
        };
        in_type(&new(out, &[tokens, rows]), dtype)
    }

    fn new_cache(_: FlexTensor, narrow: bool, slots: usize, heads: Heads) -> Two<Self> {
        let shape = [slots, heads.kv * heads.dim];
        // Keys and values of 16 bits are multiplied as they are, or not at all.
        if narrow && has_narrow_products() && heads.dim.is_multiple_of(2) {
            let new = || panels(vec![bf16::ZERO; shape[0] * shape[1]], shape);
            return (new(), new());
        }
        let new = || panels(vec![0.0_f32; shape[0] * shape[1]], shape);
        (new(), new())
    }

    fn paged_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        mut keys: FlexTensor,
        mut values: FlexTensor,
        spans: Arc<Vec<Span>>,
        heads: Heads,
        scores: Scores,
    ) -> Three<Self> {
        let dtype = q.dtype();
        let [q, k, v] = [q, k, v].map(|x| in_type(&x, DType::F32));
        let out = match keys.dtype() {
            DType::BF16 => paged_step::<bf16>([&q, &k, &v], [&mut keys, &mut values], &spans, heads, scores),
            _ => paged_step::<f32>([&q, &k, &v], [&mut keys, &mut values], &spans, heads, scores),
        };
        (in_type(&like(out, &q), dtype), keys, values)
    }

    fn fused_sums(values: FlexTensor, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> FlexTensor {
        let values = flat(&values);
        let data = values.storage::<f32>();
        let mut totals = vec![0.0_f64; sums];
        for &(value, sum) in plan.iter() {
            totals[sum as usize] += f64::from(data[value as usize]);
        }
        new(totals.into_iter().map(|total| total as f32).collect(), &[sums])
    }

    fn sums_backward(grad: FlexTensor, plan: Arc<Vec<(u32, u32)>>, values: usize) -> FlexTensor {
        let grad = flat(&grad);
        let data = grad.storage::<f32>();
        let mut out = vec![0.0; values];
        for &(value, sum) in plan.iter() {
            out[value as usize] += data[sum as usize];
        }
        new(out, &[values])
    }

    fn fused_head(hidden: FlexTensor, w: FlexTensor, targets: Arc<Vec<u32>>, logits: Logits) -> Three<Self> {
        let (hidden, w) = (flat(&hidden), flat(&w));
        let (n, [vocab, dim]) = (targets.len(), dims(&w));
        let result = typed!(hidden, T => {
            lm_head::forward::<T>(hidden.storage(), weight(&w), (vocab, dim), &targets, logits)
        });
        (new(result.logps, &[n]), new(result.stats, &[n, 4]), new(result.lse, &[n]))
    }

    fn head_backward(
        grad: FlexTensor,
        hidden: FlexTensor,
        w: FlexTensor,
        lse: FlexTensor,
        targets: Arc<Vec<u32>>,
        logits: Logits,
        of_weight: bool,
    ) -> Two<Self> {
        let (grad, hidden, w) = (flat(&grad), flat(&hidden), flat(&w));
        let ([vocab, dim], table) = (dims(&w), weight(&w));
        let (g, lse) = (grad.storage(), lse.storage());
        let (dh, dw) = typed!(hidden, T => {
            let h: &[T] = hidden.storage();
            lm_head::backward(g, h, table, (vocab, dim), &targets, lse, logits, of_weight)
        });
        let shape = [if of_weight { vocab } else { 0 }, dim];
        (in_type(&new(dh, &[targets.len(), dim]), hidden.dtype()), new(dw, &shape))
    }
}
