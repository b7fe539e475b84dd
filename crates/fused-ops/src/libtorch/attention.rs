//! LibTorch's flash attention over packed segments on CUDA devices.
//!
//! All segments are one call of variable lengths, whose causal mask is aligned at the last key: each query sees the
//! whole prefix. In 32 bits that is the memory-efficient kernel (arXiv 2112.05682), which flash attention is not made
//! for.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use burn::backend::libtorch::TchTensor;
use tch::{Kind, Tensor};

use super::shim::{self, Lengths};
use super::upload;
use crate::{Heads, Scores, Segments};

/// True where LibTorch has a kernel: they cap no scores, and take certain sizes of heads.
pub fn has_kernel(q: &TchTensor, segments: &Segments, heads: Heads, scores: Scores) -> bool {
    let fits = heads.dim.is_multiple_of(8) && heads.dim <= 256 && !segments.segments().is_empty();
    let longest = segments.segments().iter().map(|s| s.prefix_len + s.len).max().unwrap_or(0);
    let is_wide = q.tensor.kind() == Kind::Float;
    let windowed = scores.window.is_some_and(|window| window < longest);
    // The gradients of the kernel for 32 bits are wrong where a window hides keys (LibTorch 2.11).
    scores.softcap.is_none() && fits && !(is_wide && windowed) && covers(q, segments)
}

/// The segments are the queries, in order and without gaps.
fn covers(q: &TchTensor, segments: &Segments) -> bool {
    let mut at = 0;
    segments.segments().iter().all(|s| {
        let follows = s.query == at;
        at += s.len;
        follows
    }) && at as i64 == q.tensor.size()[0]
}

/// All segments as sequences of variable lengths on a device.
struct Plan {
    lengths: Lengths,
    /// Keys from the first to the last that is seen.
    total: i64,
    /// Keys of each segment, prefix and own, one after the other; nothing where that is how they lie.
    keys: Option<Tensor>,
    /// Which of those each key is in the backward pass, or one that is none of them: so many lists as a key stands in
    /// segments at most. Sums do not depend on the order in which the device adds.
    scatter: Vec<Tensor>,
}

impl Plan {
    fn new(segments: &Segments, device: tch::Device) -> Self {
        let (mut starts_q, mut starts_k, mut keys) = (vec![0_i32], vec![0_i32], Vec::new());
        let (mut max_q, mut max_k) = (0, 0);
        let mut lists: Vec<Vec<(usize, i64)>> = Vec::new();
        for row in segments.rows() {
            for (i, s) in row.iter().enumerate() {
                if lists.len() <= i {
                    lists.push(Default::default());
                }
                for key in (s.prefix..s.prefix + s.prefix_len).chain(s.own..s.own + s.len) {
                    lists[i].push((key, keys.len() as i64));
                    keys.push(key as i64);
                }
                starts_q.push(starts_q.last().copied().unwrap_or(0) + s.len as i32);
                starts_k.push(keys.len() as i32);
                max_q = max_q.max(s.len as i64);
                max_k = max_k.max((s.prefix_len + s.len) as i64);
            }
        }
        let total = segments.extent().1;
        let put = |values: &[i64]| upload(values, &[values.len()], device);
        let starts = |values: &[i32]| upload(values, &[values.len()], device);
        Self {
            total: total as i64,
            lengths: Lengths { starts_q: starts(&starts_q), starts_k: starts(&starts_k), max_q, max_k },
            keys: (!keys.iter().copied().eq(0..total as i64)).then(|| put(&keys)),
            scatter: lists.iter().map(|list| put(&places(list, total, keys.len()))).collect(),
        }
    }
}

/// For each of all keys its place in a list, or the one behind it.
fn places(list: &[(usize, i64)], all: usize, behind: usize) -> Vec<i64> {
    let mut places = vec![behind as i64; all];
    for &(key, place) in list {
        places[key] = place;
    }
    places
}

/// The plan of the segments that were last asked for: every layer of a pass has the same.
struct Last {
    of: Weak<Segments>,
    device: tch::Device,
    plan: Rc<Plan>,
}

thread_local! {
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

fn plan(segments: &Arc<Segments>, device: tch::Device) -> Rc<Plan> {
    LAST.with_borrow_mut(|last| {
        if let Some(last) = last
            && last.device == device
            && last.of.upgrade().is_some_and(|known| Arc::ptr_eq(&known, segments))
        {
            return last.plan.clone();
        }
        let plan = Rc::new(Plan::new(segments, device));
        *last = Some(Last { of: Arc::downgrade(segments), device, plan: plan.clone() });
        plan
    })
}

/// `[tokens, heads, dim]`, and for keys those of the plan; in 32 bits once for each query head.
fn operands([q, k, v]: [&Tensor; 3], plan: &Plan, heads: Heads) -> [Tensor; 3] {
    let (kv, group, dim) = (heads.kv as i64, (heads.query / heads.kv) as i64, heads.dim as i64);
    let keys = |x: &Tensor| {
        let keys = match &plan.keys {
            Some(keys) => x.index_select(0, keys),
            None => x.narrow(0, 0, plan.total).contiguous(),
        };
        let keys = keys.view([-1, kv, dim]);
        if x.kind() != Kind::Float || group == 1 {
            return keys;
        }
        keys.unsqueeze(2).expand([-1, kv, group, dim], false).reshape([-1, kv * group, dim])
    };
    [q.contiguous().view([-1, heads.query as i64, dim]), keys(k), keys(v)]
}

fn window(scores: Scores) -> i64 {
    scores.window.map_or(0, |window| window as i64)
}

/// Output, and the log-sum-exp as the kernel lays it out.
pub fn flash(
    inputs: [TchTensor; 3],
    segments: &Arc<Segments>,
    heads: Heads,
    scores: Scores,
) -> (TchTensor, TchTensor) {
    let plan = plan(segments, inputs[0].tensor.device());
    let operands = operands(inputs.each_ref().map(|x| &x.tensor), &plan, heads);
    let scale = f64::from(scores.scale);
    let (out, lse) = shim::flash(operands.each_ref(), &plan.lengths, scale, window(scores));
    (TchTensor::new(out.reshape_as(&inputs[0].tensor)), TchTensor::new(lse))
}

/// Gradients of the three inputs.
pub fn flash_backward(
    grad: TchTensor,
    inputs: [TchTensor; 3],
    [out, lse]: [TchTensor; 2],
    segments: &Arc<Segments>,
    heads: Heads,
    scores: Scores,
) -> [TchTensor; 3] {
    let plan = plan(segments, inputs[0].tensor.device());
    let operands = operands(inputs.each_ref().map(|x| &x.tensor), &plan, heads);
    let shaped = |x: &TchTensor| x.tensor.contiguous().view_as(&operands[0]);
    let [dq, dk, dv] = shim::flash_backward(
        &shaped(&grad),
        operands.each_ref(),
        [&shaped(&out), &lse.tensor],
        &plan.lengths,
        f64::from(scores.scale),
        window(scores),
    );
    let (kv, dim) = (heads.kv as i64, heads.dim as i64);
    let scattered = |gradient: Tensor, x: &Tensor| {
        let heads = gradient.size()[1];
        let gradient = match heads / kv {
            1 => gradient,
            group => gradient.view([-1, kv, group, dim]).sum_dim_intlist(2i64, false, Kind::Float),
        };
        let gradient = gradient.reshape([-1, kv * dim]);
        let padded = Tensor::cat(
            &[&gradient, &gradient.new_zeros([1, kv * dim], (gradient.kind(), gradient.device()))],
            0,
        );
        let parts = plan.scatter.iter().map(|places| padded.index_select(0, places).to_kind(Kind::Float));
        let total = parts.reduce(|sum, part| sum + part);
        let total = total.unwrap_or_else(|| x.zeros_like().to_kind(Kind::Float));
        // Keys behind the last segment have none.
        let behind = x.size()[0] - total.size()[0];
        let total = if behind > 0 { total.constant_pad_nd([0, 0, 0, behind]) } else { total };
        TchTensor::new(total.to_kind(x.kind()))
    };
    let [q, k, v] = inputs.map(|x| x.tensor);
    [TchTensor::new(dq.reshape_as(&q)), scattered(dk, &k), scattered(dv, &v)]
}
