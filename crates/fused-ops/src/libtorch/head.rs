//! The language-model head on a device, in chunks of rows: few passes over each chunk's logits.

use std::ops::Range;

use burn::backend::LibTorch;
use tch::{Kind, Tensor};

use super::ops::narrowed;
use super::upload;
use crate::Logits;
use crate::generic::{Value, logits_of};

/// Logits held at a time: 256 MiB of `f32`.
const LOGITS: usize = 64 << 20;

fn chunks(rows: usize, vocab: i64) -> impl Iterator<Item = Range<usize>> {
    let size = (LOGITS / vocab as usize).clamp(16, 8192);
    (0..rows).step_by(size).map(move |start| start..(start + size).min(rows))
}

/// Rows of the hidden states, their logits and targets.
struct Chunk {
    hidden: Tensor,
    logits: Tensor,
    ids: Tensor,
}

impl Chunk {
    fn new(hidden: &Tensor, w: &Tensor, targets: &[u32], rows: Range<usize>, logits: Logits) -> Self {
        let part = hidden.narrow(0, rows.start as i64, rows.len() as i64);
        let ids: Vec<i64> = targets[rows].iter().map(|&id| i64::from(id)).collect();
        let ids = upload(&ids, &[ids.len(), 1], hidden.device());
        let values =
            [&part, w].map(|x| Value::<LibTorch>(burn::backend::libtorch::TchTensor::new(x.shallow_clone())));
        let [part_value, w] = values;
        Self { hidden: part, logits: logits_of(part_value, w, logits).0.tensor, ids }
    }
}

/// Log-probabilities `[n]`, statistics `[n, 4]` and log-sum-exp `[n]`; see [`crate::head`].
pub fn forward(hidden: &Tensor, w: &Tensor, targets: &[u32], logits: Logits) -> [Tensor; 3] {
    let w = narrowed(w, hidden.kind());
    let (mut logps, mut stats, mut lses) = (Vec::new(), Vec::new(), Vec::new());
    for rows in chunks(targets.len(), w.size()[0]) {
        let Chunk { logits: z, ids, .. } = Chunk::new(hidden, &w, targets, rows, logits);
        let mut lp = z.log_softmax(1, None);
        let of_target = lp.gather(1, &ids, false);
        let lse = z.gather(1, &ids, false) - &of_target;
        let mean = z.mean_dim(1i64, true, None);
        drop(z);
        let hit = of_target.eq_tensor(&lp.amax(1i64, true)).to_kind(Kind::Float);
        let p = lp.exp();
        let squares = p.norm_scalaropt_dim(2, 1i64, true).log() * 2.0;
        let entropy = -lp.g_mul_(&p).sum_dim_intlist(1i64, true, None);
        logps.push(of_target.flatten(0, -1));
        stats.push(Tensor::cat(&[entropy, mean, hit, squares], 1));
        lses.push(lse.flatten(0, -1));
    }
    [logps, stats, lses].map(|parts| Tensor::cat(&parts, 0))
}

/// Gradients of the hidden states and, if wanted, of the weight, in its data type: `dz = grad · (onehot - softmax(z))`,
/// times the slope of cap and scale.
pub fn backward(
    [grad, hidden, w, lse]: [&Tensor; 4],
    targets: &[u32],
    logits: Logits,
    of_weight: bool,
) -> (Tensor, Option<Tensor>) {
    let kind = hidden.kind();
    let weight = narrowed(w, kind);
    let (mut dh, mut dw): (Vec<Tensor>, Option<Tensor>) = (Vec::new(), None);
    for rows in chunks(targets.len(), w.size()[0]) {
        let (at, len) = (rows.start as i64, rows.len() as i64);
        let Chunk { hidden: h, logits: mut z, ids } = Chunk::new(hidden, &weight, targets, rows, logits);
        let slope = logits.softcap.map(|cap| -(&z / f64::from(cap)).square() + 1.0);
        let column = |x: &Tensor| x.narrow(0, at, len).to_kind(Kind::Float).reshape([len, 1]);
        let g = column(grad);
        let mut dz = z.g_sub_(&column(lse)).exp_().g_mul_(&-&g);
        let of_target = dz.gather(1, &ids, false) + &g;
        let _ = dz.scatter_(1, &ids, &of_target);
        if let Some(slope) = slope {
            dz = dz.g_mul_(&slope);
        }
        if logits.scale != 1.0 {
            dz = dz.g_mul_scalar_(f64::from(logits.scale));
        }
        let dz = dz.to_kind(kind);
        dh.push(dz.matmul(&weight));
        if of_weight {
            let part = dz.tr().matmul(&h).to_kind(w.kind());
            dw = Some(match dw {
                Some(mut sum) => sum.g_add_(&part),
                None => part,
            });
        }
    }
    (Tensor::cat(&dh, 0), dw)
}
