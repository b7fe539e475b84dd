//! The operations of LibTorch: this crate's kernels on the CPU, and on a CUDA device what that library does better
//! than the generic composition.

use std::sync::Arc;

use burn::backend::LibTorch;
use burn::backend::libtorch::TchTensor;
use burn::tensor::FloatDType;
use tch::{Kind, Tensor};

use super::host::multiplies;
use super::{attention, head, is_cpu, paged, rotary, shim, upload};
use crate::cpu;
use crate::generic::{self, Value};
use crate::ops::{FusedOps, Three, Two, two};
use crate::paged::Span;
use crate::{Activation, Heads, Logits, Rotary, Scores, Segments};

/// Operations that are kernels of this crate where `$here` holds for their first tensor.
macro_rules! kernels {
    (if $here:ident; $(fn $name:ident($first:ident: $tensor:ty $(, $arg:ident: $type:ty)* $(,)?) -> $out:ty $other:block)*) => {
        $(fn $name($first: $tensor $(, $arg: $type)*) -> $out {
            if $here(&$first) {
                return cpu::$name($first $(, $arg)*);
            }
            $other
        })*
    };
}

impl FusedOps for LibTorch {
    fn upload_floats(like: TchTensor, values: Vec<f32>, shape: Vec<usize>) -> TchTensor {
        TchTensor::new(upload(&values, &shape, like.tensor.device()))
    }

    fn upload_indices(like: TchTensor, values: Vec<u32>, shape: Vec<usize>) -> TchTensor {
        let values: Vec<i64> = values.into_iter().map(i64::from).collect();
        TchTensor::new(upload(&values, &shape, like.tensor.device()))
    }

    fn head_products(hidden: TchTensor, w: TchTensor) -> TchTensor {
        let (hidden, w) = (hidden.tensor, w.tensor.tr());
        TchTensor::new(match hidden.kind() {
            Kind::Float => hidden.matmul(&w),
            // Products of 16 bits summed in 32, which only CUDA has.
            _ => hidden.mm_dtype(&w, Kind::Float),
        })
    }

    kernels! { if multiplies;
        fn fused_linear(x: TchTensor, w: TchTensor) -> TchTensor {
            generic::linear::<Self>(Value(x), Value(w)).0
        }

        fn linear_grad_input(grad: TchTensor, w: TchTensor) -> TchTensor {
            generic::linear_grad_input::<Self>(Value(grad), Value(w)).0
        }

        fn linear_grad_weight(grad: TchTensor, x: TchTensor) -> TchTensor {
            generic::linear_grad_weight::<Self>(Value(grad), Value(x)).0
        }

        fn linear_onto(base: TchTensor, x: TchTensor, w: TchTensor) -> TchTensor {
            (Value::<Self>(base) + Value(Self::fused_linear(x, w))).0
        }

        fn grad_input_onto(base: TchTensor, grad: TchTensor, w: TchTensor) -> TchTensor {
            (Value::<Self>(base) + Value(Self::linear_grad_input(grad, w))).0
        }
    }

    kernels! { if is_cpu;
        fn weight_as(w: TchTensor, like: TchTensor) -> TchTensor {
            TchTensor::new(narrowed(&w.tensor, like.tensor.kind()))
        }

        fn fused_cast(x: TchTensor, dtype: FloatDType) -> TchTensor {
            Value::<Self>(x).cast(dtype.into()).0
        }

        fn rows_added(base: TchTensor, rows: Arc<Vec<u32>>, values: TchTensor) -> TchTensor {
            generic::rows_added::<Self>(Value(base), &rows, Value(values)).0
        }

        fn added(a: TchTensor, b: TchTensor) -> TchTensor {
            (Value::<Self>(a) + Value(b)).0
        }

        fn joined(x: TchTensor, update: TchTensor) -> TchTensor {
            generic::joined::<Self>(Value(x), Value(update)).0
        }

        fn scaled(x: TchTensor, scale: f32) -> TchTensor {
            (Value::<Self>(x) * scale).0
        }

        fn fused_rms_norm(x: TchTensor, w: TchTensor, eps: f32) -> TchTensor {
            let [rows, weight] = [rows_of(&x.tensor, &w.tensor), w.tensor.to_kind(Kind::Float).flatten(0, -1)];
            let out = shim::rms_norm(&rows, &weight, eps);
            TchTensor::new(out.reshape_as(&x.tensor).to_kind(x.tensor.kind()))
        }

        fn rms_norm_backward(grad: TchTensor, x: TchTensor, w: TchTensor, eps: f32) -> Two<Self> {
            let [grad, rows] = [&grad, &x].map(|x| rows_of(&x.tensor, &w.tensor));
            let weight = w.tensor.to_kind(Kind::Float).flatten(0, -1);
            let [dx, dw] = shim::rms_norm_backward(&grad, &rows, &weight, eps);
            let dw = dw.reshape_as(&w.tensor).to_kind(w.tensor.kind());
            (TchTensor::new(dx.reshape_as(&x.tensor).to_kind(x.tensor.kind())), TchTensor::new(dw))
        }

        fn fused_layer_norm(x: TchTensor, w: TchTensor, b: TchTensor, eps: f32) -> TchTensor {
            generic::layer_norm::<Self>(Value(x), Value(w), Value(b), eps).0
        }

        fn layer_norm_backward(grad: TchTensor, x: TchTensor, w: TchTensor, eps: f32) -> Three<Self> {
            let (dx, dw, db) = generic::layer_norm_backward::<Self>(Value(grad), Value(x), Value(w), eps);
            (dx.0, dw.0, db.0)
        }

        fn fused_rotary(x: TchTensor, table: Rotary, sign: f32) -> TchTensor {
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
            if attention::has_kernel(&q, &segments, heads, scores) {
                return attention::flash([q, k, v], &segments, heads, scores);
            }
            two(generic::attention::<Self>(Value(q), Value(k), Value(v), &segments, heads, scores))
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
            if attention::has_kernel(&q, &segments, heads, scores) {
                let kept = [out, lse];
                return attention::flash_backward(grad, [q, k, v], kept, &segments, heads, scores).into();
            }
            let ([grad, out, lse], inputs) = ([grad, out, lse].map(Value), [q, k, v].map(Value));
            generic::attention_backward::<Self>(grad, inputs, out, lse, &segments, heads, scores)
                .map(|gradient| gradient.0)
                .into()
        }

        fn packed(w: TchTensor, narrow: bool) -> TchTensor {
            let _ = narrow;
            w
        }

        fn packed_linear(x: TchTensor, w: TchTensor, rows: usize) -> TchTensor {
            let _ = rows;
            Self::fused_linear(x, w)
        }

        fn new_cache(like: TchTensor, narrow: bool, slots: usize, heads: Heads) -> Two<Self> {
            let _ = narrow;
            two(generic::new_cache::<Self>(&Value(like), slots, heads))
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

        fn fused_sums(values: TchTensor, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> TchTensor {
            TchTensor::new(summed(&values.tensor, &plan, sums))
        }

        fn sums_backward(grad: TchTensor, plan: Arc<Vec<(u32, u32)>>, values: usize) -> TchTensor {
            generic::sums_backward::<Self>(Value(grad), &plan, values).0
        }

        fn fused_head(hidden: TchTensor, w: TchTensor, targets: Arc<Vec<u32>>, logits: Logits) -> Three<Self> {
            let [logps, stats, lse] = if targets.is_empty() {
                generic::head::<Self>(Value(hidden), Value(w), &targets, logits).map(|out| out.0)
            } else {
                head::forward(&hidden.tensor, &w.tensor, &targets, logits).map(TchTensor::new)
            };
            (logps, stats, lse)
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
            if targets.is_empty() {
                let inputs = [grad, hidden, w, lse].map(Value);
                return two(generic::head_backward::<Self>(inputs, &targets, logits, of_weight));
            }
            let inputs = [&grad, &hidden, &w, &lse].map(|x| &x.tensor);
            let (dh, dw) = head::backward(inputs, &targets, logits, of_weight);
            let dw = dw.unwrap_or_else(|| w.tensor.narrow(0, 0, 0).zeros_like());
            (TchTensor::new(dh), TchTensor::new(dw))
        }
    }
}

/// An activation as rows of `f32` that a weight `[1, dim]` norms.
fn rows_of(x: &Tensor, w: &Tensor) -> Tensor {
    x.to_kind(Kind::Float).contiguous().view([-1, w.size()[1]])
}

/// A weight in another data type; from 32 to 16 bits as [`crate::kernels::dither`] rounds it.
pub(super) fn narrowed(w: &Tensor, kind: Kind) -> Tensor {
    if w.kind() == Kind::Float && kind == Kind::BFloat16 { shim::dither(w) } else { w.to_kind(kind) }
}

/// Sums of values in `f64`.
fn summed(values: &Tensor, plan: &[(u32, u32)], sums: usize) -> Tensor {
    let index = |pick: fn(&(u32, u32)) -> u32| {
        let indices: Vec<i64> = plan.iter().map(|pair| i64::from(pick(pair))).collect();
        upload(&indices, &[plan.len()], values.device())
    };
    let picked = values.index_select(0, &index(|pair| pair.0)).to_kind(Kind::Double);
    let totals = Tensor::zeros([sums as i64], (Kind::Double, values.device()));
    totals.index_add(0, &index(|pair| pair.1), &picked).to_kind(Kind::Float)
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
    use crate::host::Host;

    /// Numbers of about size 1.
    fn numbers(rows: usize, cols: usize, seed: usize) -> TchTensor {
        let value = |i: usize| ((i * 37 + seed * 11) as f32 * 0.711).sin() * 1.4;
        <TchTensor as Host>::new((0..rows * cols).map(value).collect(), &[rows, cols])
    }

    fn narrow(x: &TchTensor) -> TchTensor {
        TchTensor::new(x.tensor.to_kind(Kind::BFloat16))
    }

    /// Largest difference, relative to the largest value.
    fn apart(a: &Tensor, b: &Tensor) -> f64 {
        let [a, b] = [a, b].map(|x| x.to_kind(Kind::Double));
        assert_eq!(a.size(), b.size());
        f64::try_from((a - &b).abs().max() / b.abs().max()).unwrap()
    }

    #[test]
    fn weights_are_dithered_alike_by_the_kernel_and_by_operations_of_a_device() {
        let w = numbers(50, 1000, 3).tensor.flatten(0, -1) * 2.0;
        let w = Tensor::cat(&[w, Tensor::from_slice(&[f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0])], 0);
        let kernel =
            |w: &Tensor| cpu::weight_as(TchTensor::new(w.reshape([1, -1])), narrow(&numbers(1, 1, 0))).tensor;
        let (w, operations) = (w.reshape([1, -1]), narrowed(&w.reshape([1, -1]), Kind::BFloat16));
        assert_eq!(operations.kind(), Kind::BFloat16);
        assert!(bool::try_from(kernel(&w).eq_tensor(&operations).all()).unwrap());
        let near = (&operations - &w).abs().le(0.02).masked_select(&w.isfinite()).all();
        assert!(bool::try_from(near).unwrap());
        let broken =
            Tensor::from_slice(&[0x7fff_ffff, 0xffff_ffff, 0x7fc0_0000, 0x7f80_0001_u32].map(f32::from_bits));
        for narrow in [kernel(&broken), shim::dither(&broken)] {
            assert!(bool::try_from(narrow.isnan().all()).unwrap(), "{narrow:?}");
        }
    }

    /// What multiplies depends on the processor.
    #[test]
    fn products_of_sixteen_bits_are_alike_by_either_library() {
        let (x, w, g) = (narrow(&numbers(37, 48, 1)), numbers(29, 48, 2), narrow(&numbers(37, 29, 3)));
        let [a, b, c] = [&x, &w, &g].map(|t| t.clone());
        let theirs = generic::linear::<LibTorch>(Value(a.clone()), Value(b.clone())).0;
        assert!(apart(&theirs.tensor, &cpu::fused_linear(a, b.clone()).tensor) < 0.01);
        let theirs = generic::linear_grad_input::<LibTorch>(Value(c.clone()), Value(b.clone())).0;
        assert!(apart(&theirs.tensor, &cpu::linear_grad_input(c.clone(), b).tensor) < 0.01);
        let theirs = generic::linear_grad_weight::<LibTorch>(Value(c.clone()), Value(x.clone())).0;
        assert!(apart(&theirs.tensor, &cpu::linear_grad_weight(c, x).tensor) < 0.01);
    }

    /// What a CUDA device does, done on the CPU.
    #[test]
    fn operations_of_a_device_are_the_kernels() {
        let (x, g) = (numbers(5, 48, 1), numbers(5, 48, 2));
        let angles = |f: fn(f32) -> f32| (0..5 * 8).map(|i| f(i as f32 * 0.37)).collect::<Arc<[f32]>>();
        let table = Rotary { cos: angles(f32::cos), sin: angles(f32::sin), half: 8, dim: 24 };
        for sign in [1.0, -1.0] {
            let kernel = cpu::fused_rotary(x.clone(), table.clone(), sign);
            assert!(apart(&rotary::rotary(&x, &table, sign).tensor, &kernel.tensor) < 1e-6);
        }
        for kind in [Activation::Silu, Activation::GeluTanh] {
            assert!(apart(&activated(&x.tensor, kind), &cpu::fused_activate(x.clone(), kind).tensor) < 1e-6);
            let kernel = cpu::activate_backward(g.clone(), x.clone(), kind);
            assert!(apart(&slope(&g.tensor, &x.tensor, kind), &kernel.tensor) < 1e-6);
        }
        let (values, plan) = (numbers(1, 9, 4).tensor.reshape([9]), vec![(0, 1), (8, 0), (3, 1), (3, 0)]);
        let kernel = cpu::fused_sums(TchTensor::new(values.shallow_clone()), Arc::new(plan.clone()), 2);
        assert!(apart(&summed(&values, &plan, 2), &kernel.tensor) < 1e-7);
    }
}
