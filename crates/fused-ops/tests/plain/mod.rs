//! The same operations as plain compositions of Burn's own, differentiated by Burn: what every backend's are tested
//! against. Shapes are those of the functions in the crate root.

use std::sync::Arc;

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Int, Tensor, TensorData};

use fused_ops::{Activation, HeadOutput, Heads, Logits, Rotary, Scores, Segment, Segments};

/// See [`fused_ops::linear`].
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    let w = if w.dtype() == x.dtype() { w } else { w.cast(x.dtype()) };
    x.matmul(w.transpose())
}

/// See [`fused_ops::rms_norm`].
pub fn rms_norm(x: Tensor<2>, w: Tensor<2>, eps: f32) -> Tensor<2> {
    let [tokens, features] = x.dims();
    let dim = w.dims()[1];
    let x = x.reshape([tokens * features / dim, dim]);
    let rstd = (x.clone().square().mean_dim(1) + eps).sqrt().recip();
    (x * rstd * w).reshape([tokens, features])
}

/// See [`fused_ops::layer_norm`].
pub fn layer_norm(x: Tensor<2>, w: Tensor<2>, b: Tensor<2>, eps: f32) -> Tensor<2> {
    let x = x.clone() - x.mean_dim(1);
    let rstd = (x.clone().square().mean_dim(1) + eps).sqrt().recip();
    x * rstd * w + b
}

/// See [`fused_ops::rotary`].
pub fn rotary(x: Tensor<2>, table: &Rotary) -> Tensor<2> {
    let [tokens, features] = x.dims();
    let (half, dim, device) = (table.half, table.dim, x.device());
    let heads = features / dim;
    let dtype = x.dtype();
    let part = |values: &Arc<[f32]>| {
        Tensor::<3>::from_data(TensorData::new(values.to_vec(), [tokens, 1, half]), &device).cast(dtype)
    };
    let (cos, sin) = (part(&table.cos), part(&table.sin));
    let x = x.reshape([tokens, heads, dim]);
    let (a, b) = (x.clone().narrow(2, 0, half), x.clone().narrow(2, half, half));
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = b * cos + a * sin;
    let mut parts = vec![first, second];
    if dim > 2 * half {
        parts.push(x.narrow(2, 2 * half, dim - 2 * half));
    }
    Tensor::cat(parts, 2).reshape([tokens, features])
}

/// See [`fused_ops::gated`].
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    activate(gate, activation) * up
}

/// See [`fused_ops::activate`].
pub fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    match activation {
        Activation::Silu => silu(x),
        Activation::GeluTanh => {
            let inner =
                (x.clone() + x.clone().powi_scalar(3) * 0.044_715) * (2.0 / std::f64::consts::PI).sqrt();
            x * 0.5 * (inner.tanh() + 1.0)
        }
    }
}

/// `cap · tanh(x / cap)`.
fn softcapped<const D: usize>(x: Tensor<D>, softcap: Option<f32>) -> Tensor<D> {
    match softcap {
        Some(cap) => (x / cap).tanh() * cap,
        None => x,
    }
}

/// See [`fused_ops::attention`].
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    segments: &Arc<Segments>,
    heads: Heads,
    scores: Scores,
) -> Tensor<2> {
    let queries = q.dims()[0];
    let mut order: Vec<&Segment> = segments.segments().iter().collect();
    order.sort_by_key(|segment| segment.query);
    let mut parts = Vec::with_capacity(order.len());
    let mut at = 0;
    for segment in order {
        if segment.query > at {
            parts.push(q.clone().narrow(0, at, segment.query - at).zeros_like());
        }
        parts.push(attend(&q, &k, &v, segment, heads, scores));
        at = segment.query + segment.len;
    }
    if at < queries {
        parts.push(q.clone().narrow(0, at, queries - at).zeros_like());
    }
    Tensor::cat(parts, 0)
}

fn attend(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    s: &Segment,
    heads: Heads,
    scores: Scores,
) -> Tensor<2> {
    let device = q.device();
    let keys = |t: &Tensor<2>| {
        let own = t.clone().narrow(0, s.own, s.len);
        let all = if s.prefix_len == 0 {
            own
        } else {
            Tensor::cat(vec![t.clone().narrow(0, s.prefix, s.prefix_len), own], 0)
        };
        let n = s.prefix_len + s.len;
        let group = heads.query / heads.kv;
        // [n, kv, dim] -> [kv, group, n, dim] -> [query, n, dim]
        all.reshape([n, heads.kv, heads.dim])
            .swap_dims(0, 1)
            .reshape([heads.kv, 1, n, heads.dim])
            .expand([heads.kv, group, n, heads.dim])
            .reshape([heads.query, n, heads.dim])
    };
    let queries =
        q.clone().narrow(0, s.query, s.len).reshape([s.len, heads.query, heads.dim]).swap_dims(0, 1);
    let n = s.prefix_len + s.len;
    let mask: Vec<f32> = (0..s.len)
        .flat_map(|i| {
            let last = s.prefix_len + i;
            let first = (last + 1).saturating_sub(scores.window.unwrap_or(usize::MAX));
            (0..n).map(move |j| if (first..=last).contains(&j) { 0.0 } else { -1e30 })
        })
        .collect();
    let mask = Tensor::<3>::from_data(TensorData::new(mask, [1, s.len, n]), &device).cast(q.dtype());
    let products = queries.matmul(keys(k).swap_dims(1, 2)) * scores.scale;
    let weights = softmax(softcapped(products, scores.softcap) + mask, 2);
    weights.matmul(keys(v)).swap_dims(0, 1).reshape([s.len, heads.query * heads.dim])
}

/// See [`fused_ops::head`]. Holds all logits.
pub fn head(hidden: Tensor<2>, w: Tensor<2>, targets: &Arc<Vec<u32>>, logits: Logits) -> HeadOutput {
    let n = targets.len();
    let device = hidden.device();
    let ids: Vec<i64> = targets.iter().map(|&id| i64::from(id)).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, 1]), &device);
    let logits = softcapped(linear(hidden, w) * logits.scale, logits.softcap);
    let logps = log_softmax(logits.clone(), 1);
    let target = logps.clone().gather(1, ids.clone());
    let (logits, logps) = (logits.detach(), logps.detach());
    let probabilities = logps.clone().exp();
    let entropy = -(probabilities.clone() * logps).sum_dim(1);
    let squares = probabilities.square().sum_dim(1).log();
    let top1 = logits.clone().argmax(1).equal(ids).float().cast(logits.dtype());
    let stats = Tensor::cat(vec![entropy, logits.mean_dim(1), top1, squares], 1);
    HeadOutput { logps: target.reshape([n]), stats: stats.inner() }
}

/// See [`fused_ops::sum_into`]: a product with a 0/1 matrix.
pub fn sum_into(values: Tensor<1>, plan: &Arc<Vec<(u32, u32)>>, sums: usize) -> Tensor<1> {
    let n = values.dims()[0];
    let mut matrix = vec![0.0_f32; sums * n];
    for &(value, sum) in plan.iter() {
        matrix[sum as usize * n + value as usize] += 1.0;
    }
    let matrix = Tensor::<2>::from_data(TensorData::new(matrix, [sums, n]), &values.device());
    matrix.cast(values.dtype()).matmul(values.reshape([n, 1])).reshape([sums])
}
