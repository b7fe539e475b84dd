//! The language-model head in chunks of rows, so that the `[n, vocab]` logits are never held.

use std::ops::Range;

use burn::backend::tensor::IntTensor;
use burn::tensor::DType;

use super::Value;
use crate::Logits;
use crate::ops::FusedOps;

/// Logits held at a time: 64 MiB of `f32`.
const LOGITS: usize = 16 << 20;

/// Ranges of rows that are computed together.
fn chunks(rows: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let size = (LOGITS / vocab).clamp(16, 4096);
    (0..rows).step_by(size).map(move |start| start..(start + size).min(rows))
}

/// Logits of some rows, in `f32`.
pub fn logits_of<B: FusedOps>(hidden: Value<B>, w: Value<B>, logits: Logits) -> Value<B> {
    let products = Value(B::head_products(hidden.0, w.0));
    let scaled = if logits.scale == 1.0 { products } else { products * logits.scale };
    scaled.softcapped(logits.softcap)
}

fn column<B: FusedOps>(targets: &[u32], rows: Range<usize>, like: &Value<B>) -> IntTensor<B> {
    let n = rows.len();
    Value::<B>::indices(targets[rows].to_vec(), &[n, 1], like)
}

/// Log-probabilities `[n]`, statistics `[n, 4]` and log-sum-exp `[n]`; see [`crate::head`].
pub fn head<B: FusedOps>(hidden: Value<B>, w: Value<B>, targets: &[u32], logits: Logits) -> [Value<B>; 3] {
    let (n, vocab) = (targets.len(), w.dims()[0]);
    if n == 0 {
        return [&[0][..], &[0, 4], &[0]].map(|shape| Value::zeros(shape, DType::F32, &hidden));
    }
    let w = w.weight_for(&hidden);
    let (mut logps, mut stats, mut lses) = (Vec::new(), Vec::new(), Vec::new());
    for rows in chunks(n, vocab) {
        let len = rows.len();
        let z = logits_of(hidden.clone().narrow(0, rows.clone()), w.clone(), logits);
        let ids = column(targets, rows, &hidden);
        let top = z.clone().max(1);
        let of_target = z.clone().gather(1, ids);
        let mean = z.clone().mean(1);
        // 1 where the target is the arg-max: equal, as logits of 32 bits hardly ever are by chance.
        let hit = (of_target.clone() - top.clone()).sign() + 1.0;
        let shifted = z - top.clone();
        let e = shifted.clone().exp();
        let sum = e.clone().sum(1);
        let log_sum = sum.clone().ln();
        let entropy = log_sum.clone() - (e.clone() * shifted).sum(1) / sum;
        let squares = e.square().sum(1).ln() - log_sum.clone() * 2.0;
        let lse = top + log_sum;
        logps.push((of_target - lse.clone()).reshape(&[len]));
        stats.push(Value::cat(vec![entropy, mean, hit, squares], 1));
        lses.push(lse.reshape(&[len]));
    }
    [Value::cat(logps, 0), Value::cat(stats, 0), Value::cat(lses, 0)]
}

/// Gradients of `hidden` and, if wanted, of `w`, otherwise empty: `dz = grad · (onehot - softmax(z))`, times the slope of cap and
/// scale.
pub fn head_backward<B: FusedOps>(
    [grad, hidden, w, lse]: [Value<B>; 4],
    targets: &[u32],
    logits: Logits,
    of_weight: bool,
) -> (Value<B>, Value<B>) {
    let (vocab, dtype, weight_dtype) = (w.dims()[0], hidden.dtype(), w.dtype());
    let zeros = |rows: usize| Value::zeros(&[rows, w.dims()[1]], weight_dtype, &w);
    if targets.is_empty() {
        return (hidden * 0.0, zeros(if of_weight { vocab } else { 0 }));
    }
    let empty = zeros(0);
    let w = w.weight_for(&hidden);
    let (mut dh, mut dw) = (Vec::new(), None);
    for rows in chunks(targets.len(), vocab) {
        let len = rows.len();
        let h = hidden.clone().narrow(0, rows.clone());
        let z = logits_of(h.clone(), w.clone(), logits);
        let slope = z.clone().softcap_slope(logits.softcap);
        let g = grad.clone().narrow(0, rows.clone()).wide().reshape(&[len, 1]);
        let p = (z - lse.clone().narrow(0, rows.clone()).reshape(&[len, 1])).exp();
        let dz = (p * -g.clone()).scatter_add(1, column(targets, rows, &hidden), g);
        let dz = slope.map_or(dz.clone(), |slope| dz * slope);
        let dz = if logits.scale == 1.0 { dz } else { dz * logits.scale }.cast(dtype);
        dh.push(dz.clone().matmul(w.clone()));
        if of_weight {
            let part = dz.t().matmul(h).cast(weight_dtype);
            dw = Some(match dw {
                Some(sum) => sum + part,
                None => part,
            });
        }
    }
    (Value::cat(dh, 0), dw.unwrap_or(empty))
}
