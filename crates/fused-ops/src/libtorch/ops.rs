//! The operations that LibTorch, or this crate on its buffers, does better than the generic composition.

use std::sync::Arc;

use burn::backend::LibTorch;
use burn::backend::libtorch::TchTensor;
use tch::{Kind, Tensor};

use super::{attention, halves_mut, head, is_cpu, paged, rotary, shim, upload, values, values_mut};
use crate::generic::{self, Value};
use crate::kernels::dither::{Weight, dithered};
use crate::kernels::head::{self as lm_head, Gradients};
use crate::kernels::matrix::{Mat, matmul};
use crate::ops::{FusedOps, Three, Two, two};
use crate::paged::Span;
use crate::{Activation, Heads, Logits, Rotary, Scores, Segments};

/// Logits that the head's backward pass holds at a time (64 MiB).
const LOGITS: usize = 16 << 20;

/// Terms of a sum that LibTorch's products are left to add one after the other.
const PART: i64 = 2048;

impl FusedOps for LibTorch {
    fn upload_floats(like: TchTensor, values: Vec<f32>, shape: Vec<usize>) -> TchTensor {
        TchTensor::new(upload(&values, &shape, like.tensor.device()))
    }

    fn upload_indices(like: TchTensor, values: Vec<u32>, shape: Vec<usize>) -> TchTensor {
        let values: Vec<i64> = values.into_iter().map(i64::from).collect();
        TchTensor::new(upload(&values, &shape, like.tensor.device()))
    }

    fn weight_as(w: TchTensor, like: TchTensor) -> TchTensor {
        TchTensor::new(narrowed(&w.tensor, like.tensor.kind()))
    }

    fn head_products(hidden: TchTensor, w: TchTensor) -> TchTensor {
        let (hidden, w) = (hidden.tensor, w.tensor.tr());
        TchTensor::new(match hidden.kind() {
            Kind::Float => hidden.matmul(&w),
            // Products of 16 bits summed in 32, which only CUDA has.
            _ => hidden.mm_dtype(&w, Kind::Float),
        })
    }

    fn write_rows(cache: TchTensor, rows: TchTensor, slots: Vec<u32>) -> TchTensor {
        let slots: Vec<i64> = slots.into_iter().map(i64::from).collect();
        let slots = upload(&slots, &[slots.len()], cache.tensor.device());
        paged::write(cache, &rows.tensor, &slots)
    }

    fn paged_attention(
        q: TchTensor,
        k: TchTensor,
        v: TchTensor,
        keys: TchTensor,
        values: TchTensor,
        spans: Arc<Vec<Span>>,
        heads: Heads,
        scores: Scores,
    ) -> Three<Self> {
        paged::attention([q, k, v], [keys, values], &spans, heads, scores)
    }

    fn fused_rms_norm(x: TchTensor, w: TchTensor, eps: f32) -> TchTensor {
        if is_cpu(&x) {
            return generic::rms_norm::<Self>(Value(x), Value(w), eps).0;
        }
        let [rows, weight] = [rows_of(&x.tensor, &w.tensor), w.tensor.to_kind(Kind::Float).flatten(0, -1)];
        let out = shim::rms_norm(&rows, &weight, eps);
        TchTensor::new(out.reshape_as(&x.tensor).to_kind(x.tensor.kind()))
    }

    fn rms_norm_backward(grad: TchTensor, x: TchTensor, w: TchTensor, eps: f32) -> Two<Self> {
        if is_cpu(&x) {
            return two(generic::rms_norm_backward::<Self>(Value(grad), Value(x), Value(w), eps));
        }
        let [grad, rows] = [&grad, &x].map(|x| rows_of(&x.tensor, &w.tensor));
        let [dx, dw] =
            shim::rms_norm_backward(&grad, &rows, &w.tensor.to_kind(Kind::Float).flatten(0, -1), eps);
        let dw = dw.reshape_as(&w.tensor).to_kind(w.tensor.kind());
        (TchTensor::new(dx.reshape_as(&x.tensor).to_kind(x.tensor.kind())), TchTensor::new(dw))
    }

    fn fused_rotary(x: TchTensor, table: Rotary, sign: f32) -> TchTensor {
        if is_cpu(&x) {
            return generic::rotary::<Self>(Value(x), &table, sign).0;
        }
        rotary::rotary(&x, &table, sign)
    }

    fn fused_gated(gate: TchTensor, up: TchTensor, kind: Activation) -> TchTensor {
        TchTensor::new(activated(&gate.tensor, kind) * up.tensor)
    }

    fn gated_backward(grad: TchTensor, gate: TchTensor, up: TchTensor, kind: Activation) -> Two<Self> {
        let (grad, gate, up) = (grad.tensor, gate.tensor, up.tensor);
        let dgate = slope(&(&grad * &up), &gate, kind);
        (TchTensor::new(dgate), TchTensor::new(grad * activated(&gate, kind)))
    }

    fn fused_activate(x: TchTensor, kind: Activation) -> TchTensor {
        TchTensor::new(activated(&x.tensor, kind))
    }

    fn activate_backward(grad: TchTensor, x: TchTensor, kind: Activation) -> TchTensor {
        TchTensor::new(slope(&grad.tensor, &x.tensor, kind))
    }

    fn fused_attention(
        q: TchTensor,
        k: TchTensor,
        v: TchTensor,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> Two<Self> {
        match attention::path(&q, &segments, heads, scores) {
            attention::Path::Cpu => attention::cpu([q, k, v], &segments, heads, scores),
            attention::Path::Flash => attention::flash([q, k, v], &segments, heads, scores),
            attention::Path::Generic => {
                two(generic::attention::<Self>(Value(q), Value(k), Value(v), &segments, heads, scores))
            }
        }
    }

    fn attention_backward(
        grad: TchTensor,
        q: TchTensor,
        k: TchTensor,
        v: TchTensor,
        out: TchTensor,
        lse: TchTensor,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> Three<Self> {
        let inputs = [q, k, v];
        let [dq, dk, dv] = match attention::path(&inputs[0], &segments, heads, scores) {
            attention::Path::Cpu => {
                attention::cpu_backward(grad, inputs, [out, lse], &segments, heads, scores)
            }
            attention::Path::Flash => {
                attention::flash_backward(grad, inputs, [out, lse], &segments, heads, scores)
            }
            attention::Path::Generic => {
                let (grad, out, lse) = (Value(grad), Value(out), Value(lse));
                let inputs = inputs.map(Value);
                generic::attention_backward::<Self>(grad, inputs, out, lse, &segments, heads, scores)
                    .map(|gradient| gradient.0)
            }
        };
        (dq, dk, dv)
    }

    fn fused_sums(values: TchTensor, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> TchTensor {
        let values = values.tensor;
        let index = |pick: fn(&(u32, u32)) -> u32| {
            let indices: Vec<i64> = plan.iter().map(|pair| i64::from(pick(pair))).collect();
            upload(&indices, &[plan.len()], values.device())
        };
        let picked = values.index_select(0, &index(|pair| pair.0)).to_kind(Kind::Double);
        let totals = Tensor::zeros([sums as i64], (Kind::Double, values.device()));
        TchTensor::new(totals.index_add(0, &index(|pair| pair.1), &picked).to_kind(Kind::Float))
    }

    fn fused_head(hidden: TchTensor, w: TchTensor, targets: Arc<Vec<u32>>, logits: Logits) -> Three<Self> {
        if !is_cpu(&hidden) && !targets.is_empty() {
            let [logps, stats, lse] = head::forward(&hidden.tensor, &w.tensor, &targets, logits);
            return (TchTensor::new(logps), TchTensor::new(stats), TchTensor::new(lse));
        }
        if targets.is_empty() {
            let [logps, stats, lse] = generic::head::<Self>(Value(hidden), Value(w), &targets, logits);
            return (logps.0, stats.0, lse.0);
        }
        // In f32, with this crate's product: see `logits_of`.
        let [hidden, weight] = [hidden.tensor, w.tensor].map(|x| x.to_kind(Kind::Float).contiguous());
        let (n, shape) = (targets.len(), (weight.size()[0] as usize, weight.size()[1] as usize));
        let out = lm_head::forward(values(&hidden), Weight::Single(values(&weight)), shape, &targets, logits);
        let new = |values: &[f32], shape: &[i64]| TchTensor::new(Tensor::from_slice(values).reshape(shape));
        let n = n as i64;
        (new(&out.logps, &[n]), new(&out.stats, &[n, 4]), new(&out.lse, &[n]))
    }

    fn head_backward(
        grad: TchTensor,
        hidden: TchTensor,
        w: TchTensor,
        lse: TchTensor,
        targets: Arc<Vec<u32>>,
        logits: Logits,
        of_weight: bool,
    ) -> Two<Self> {
        if !is_cpu(&hidden) && !targets.is_empty() {
            let inputs = [&grad, &hidden, &w, &lse].map(|x| &x.tensor);
            let (dh, dw) = head::backward(inputs, &targets, logits, of_weight);
            let dw = dw.unwrap_or_else(|| w.tensor.narrow(0, 0, 0).zeros_like());
            return (TchTensor::new(dh), TchTensor::new(dw));
        }
        if targets.is_empty() {
            let inputs = [grad, hidden, w, lse].map(Value);
            return two(generic::head_backward::<Self>(inputs, &targets, logits, of_weight));
        }
        let hidden = hidden.tensor;
        let kind = hidden.kind();
        let (n, vocab, dim) = (targets.len(), w.tensor.size()[0], w.tensor.size()[1]);
        let (grad, lse) = (grad.tensor.contiguous(), lse.tensor.contiguous());
        let (grad, lse) = (values(&grad), values(&lse));
        let weight = narrowed(&w.tensor, kind);
        let wide = w.tensor.to_kind(Kind::Float).contiguous();
        let dh = hidden.empty_like();
        let float = (Kind::Float, hidden.device());
        let mut dw = Tensor::zeros([if of_weight { vocab } else { 0 }, dim], float);
        let chunk = (LOGITS / vocab as usize).clamp(16, 1024);
        for start in (0..n).step_by(chunk) {
            let rows = start..(start + chunk).min(n);
            let (at, len) = (start as i64, rows.len() as i64);
            let mut z = logits_of(&hidden, &wide, start, rows.len());
            let gradients = Gradients {
                part: 0..vocab as usize,
                targets: &targets[rows.clone()],
                lse: &lse[rows.clone()],
                grad: &grad[rows.clone()],
                logits_of: logits,
            };
            gradients.all(values_mut(&mut z));
            let dz = z.to_kind(kind);
            let mut rows_of_dh = dh.narrow(0, at, len);
            if kind == Kind::Float {
                // In parts: summed in one go, 140,000 terms are off by 4e-4.
                let _ = rows_of_dh.zero_();
                for first in (0..vocab).step_by(PART as usize) {
                    let width = PART.min(vocab - first);
                    rows_of_dh += dz.narrow(1, first, width).matmul(&weight.narrow(0, first, width));
                }
            } else {
                rows_of_dh.copy_(&dz.matmul(&weight));
            }
            if of_weight && kind == Kind::Float {
                let _ = dw.addmm_(&dz.tr(), &hidden.narrow(0, at, len));
            } else if of_weight {
                dw += dz.tr().matmul(&hidden.narrow(0, at, len));
            }
        }
        let dw = dw.to_kind(w.tensor.kind());
        (TchTensor::new(dh), TchTensor::new(dw))
    }
}

/// An activation as rows of `f32` that a weight `[1, dim]` norms.
fn rows_of(x: &Tensor, w: &Tensor) -> Tensor {
    x.to_kind(Kind::Float).contiguous().view([-1, w.size()[1]])
}

/// A weight in another data type; from 32 to 16 bits by [`dithered`].
pub(super) fn narrowed(w: &Tensor, kind: Kind) -> Tensor {
    if w.kind() != Kind::Float || kind != Kind::BFloat16 {
        return w.to_kind(kind);
    }
    if w.device() != tch::Device::Cpu {
        return shim::dither(w);
    }
    let w = w.contiguous();
    let mut out = Tensor::empty(w.size(), (kind, w.device()));
    dithered(values(&w), 0, halves_mut(&mut out));
    out
}

/// Products of some rows in a buffer of their own, in `f32`: rounded to 16 bits each logit would be off by up to a
/// tenth, and their sums over a completion by more than a step of training changes. By this crate's product, which
/// LibTorch's library only matches on Intel's processors.
fn logits_of(hidden: &Tensor, weight: &Tensor, start: usize, rows: usize) -> Tensor {
    let hidden = hidden.narrow(0, start as i64, rows as i64).to_kind(Kind::Float).contiguous();
    let (vocab, dim) = (weight.size()[0] as usize, weight.size()[1] as usize);
    let mut out = Tensor::empty([rows as i64, vocab as i64], (Kind::Float, hidden.device()));
    let (a, b) = (Mat::rows(values(&hidden), dim), Mat::rows(values(weight), dim).t());
    matmul(values_mut(&mut out), false, (rows, vocab, dim), a, b);
    out
}

fn activated(x: &Tensor, kind: Activation) -> Tensor {
    match kind {
        Activation::Silu => x.silu(),
        Activation::GeluTanh => x.gelu("tanh"),
    }
}

fn slope(grad: &Tensor, x: &Tensor, kind: Activation) -> Tensor {
    match kind {
        Activation::Silu => x.silu_backward(grad),
        Activation::GeluTanh => x.gelu_backward(grad, "tanh"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_dithered_alike_by_the_kernel_and_by_operations_of_a_device() {
        let w = Tensor::from_slice(&(0..50_000).map(|i| (i as f32 * 0.711).sin() * 3.0).collect::<Vec<_>>());
        let w = Tensor::cat(&[w, Tensor::from_slice(&[f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0])], 0);
        let (kernel, operations) = (narrowed(&w, Kind::BFloat16), shim::dither(&w));
        assert_eq!(operations.kind(), Kind::BFloat16);
        assert!(bool::try_from(kernel.eq_tensor(&operations).all()).unwrap_or(false));
        let near = (&kernel - &w).abs().le(0.02).masked_select(&w.isfinite()).all();
        assert!(bool::try_from(near).unwrap_or(false));
        let broken =
            Tensor::from_slice(&[0x7fff_ffff, 0xffff_ffff, 0x7fc0_0000, 0x7f80_0001_u32].map(f32::from_bits));
        for narrow in [narrowed(&broken, Kind::BFloat16), shim::dither(&broken)] {
            assert!(bool::try_from(narrow.isnan().all()).unwrap_or(false), "{narrow:?}");
        }
    }
}
