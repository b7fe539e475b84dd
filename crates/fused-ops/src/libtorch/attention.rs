//! LibTorch's flash attention over packed segments.
//!
//! On the CPU each segment is two calls, one over the prefix and a causal one over its own keys, put together by
//! their log-sum-exps; the backward pass of each part is exact when it is given the output and the log-sum-exp of
//! the whole (FlashAttention-2, arXiv 2307.08691, section 2.3). On CUDA all segments are one call of variable
//! lengths, whose causal mask is aligned at the last key: each query sees the whole prefix. In 32 bits that is the
//! memory-efficient kernel (arXiv 2112.05682), which flash attention is not made for.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use burn::backend::libtorch::TchTensor;
use tch::{Kind, Tensor};

use super::shim::{self, Lengths};
use super::{is_cpu, upload};
use crate::{Heads, Scores, Segment, Segments};

/// Which kernels a call can use.
pub enum Path {
    Cpu,
    Flash,
    Generic,
}

/// These kernels cap no scores; that of the CPU has no window, those of CUDA only certain sizes of heads.
pub fn path(q: &TchTensor, segments: &Segments, heads: Heads, scores: Scores) -> Path {
    let fits = heads.dim.is_multiple_of(8) && heads.dim <= 256 && !segments.segments().is_empty();
    let longest = segments.segments().iter().map(|s| s.prefix_len + s.len).max().unwrap_or(0);
    let is_wide = q.tensor.kind() == Kind::Float;
    let windowed = scores.window.is_some_and(|window| window < longest);
    match (scores.softcap, is_cpu(q)) {
        (None, true) if !windowed => Path::Cpu,
        // The gradients of the kernel for 32 bits are wrong where a window hides keys (LibTorch 2.11).
        (None, false) if fits && !(is_wide && windowed) && covers(q, segments) => Path::Flash,
        _ => Path::Generic,
    }
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

/// Rows of an activation as `[kv, group, rows, dim]`; keys and values have one head a group, seen `group` times.
fn heads_of(x: &Tensor, rows: Range<usize>, heads: Heads) -> Tensor {
    let (len, dim) = (rows.len() as i64, heads.dim as i64);
    let (kv, group) = (heads.kv as i64, (heads.query / heads.kv) as i64);
    let rows = x.narrow(0, rows.start as i64, len);
    if x.size()[1] == kv * dim {
        return rows.view([len, kv, 1, dim]).permute([1, 2, 0, 3]).expand([kv, group, len, dim], false);
    }
    rows.view([len, kv, group, dim]).permute([1, 2, 0, 3])
}

/// Runs of keys that a segment sees, and whether causally.
fn parts(s: &Segment) -> Vec<(Range<usize>, bool)> {
    let (prefix, own) = (s.prefix..s.prefix + s.prefix_len, s.own..s.own + s.len);
    if s.prefix_len == 0 {
        return vec![(own, true)];
    }
    // A single query sees all keys of both.
    if s.len == 1 && prefix.end == own.start {
        return vec![(prefix.start..own.end, false)];
    }
    vec![(prefix, false), (own, true)]
}

/// Output and log-sum-exp `[queries, heads.query]`.
pub fn cpu(
    inputs: [TchTensor; 3],
    segments: &Segments,
    heads: Heads,
    scores: Scores,
) -> (TchTensor, TchTensor) {
    let [q, k, v] = inputs.map(|x| x.tensor.contiguous());
    let scale = f64::from(scores.scale);
    let out = q.zeros_like();
    let lse = Tensor::zeros([q.size()[0], heads.query as i64], (Kind::Float, q.device()));
    let of_lse = Heads { dim: 1, ..heads };
    for s in segments.segments() {
        let rows = s.query..s.query + s.len;
        let queries = heads_of(&q, rows.clone(), heads);
        let mut whole: Option<(Tensor, Tensor)> = None;
        for (keys, causal) in parts(s) {
            let [k, v] = [&k, &v].map(|x| heads_of(x, keys.clone(), heads));
            let part = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                &queries,
                &k,
                &v,
                0.0,
                causal,
                None::<&Tensor>,
                Some(scale),
            );
            whole = Some(match whole {
                None => part,
                Some(other) => merged(&other, &part),
            });
        }
        if let Some((o, l)) = whole {
            // With one head a group the keys have the shape of the queries.
            query_view(&out, rows.clone(), heads).copy_(&o);
            query_view(&lse, rows, of_lse).copy_(&l.unsqueeze(-1));
        }
    }
    (TchTensor::new(out), TchTensor::new(lse))
}

fn query_view(x: &Tensor, rows: Range<usize>, heads: Heads) -> Tensor {
    let (len, dim) = (rows.len() as i64, heads.dim as i64);
    let (kv, group) = (heads.kv as i64, (heads.query / heads.kv) as i64);
    x.narrow(0, rows.start as i64, len).view([len, kv, group, dim]).permute([1, 2, 0, 3])
}

/// Attention over two runs of keys, from that over each.
fn merged((o1, l1): &(Tensor, Tensor), (o2, l2): &(Tensor, Tensor)) -> (Tensor, Tensor) {
    let lse = l1.logaddexp(l2);
    let weighted = |o: &Tensor, l: &Tensor| o * (l - &lse).exp().unsqueeze(-1);
    let out = weighted(o1, l1) + weighted(o2, l2);
    (out.to_kind(o1.kind()), lse)
}

/// Gradients of the three inputs.
pub fn cpu_backward(
    grad: TchTensor,
    inputs: [TchTensor; 3],
    [out, lse]: [TchTensor; 2],
    segments: &Segments,
    heads: Heads,
    scores: Scores,
) -> [TchTensor; 3] {
    let scale = f64::from(scores.scale);
    let [q, k, v] = inputs.map(|x| x.tensor.contiguous());
    let grad = grad.tensor.contiguous();
    let zeros = |x: &Tensor| x.zeros_like().to_kind(Kind::Float);
    let [dq, dk, dv] = [&q, &k, &v].map(zeros);
    let of_lse = Heads { dim: 1, ..heads };
    let (kv, dim) = (heads.kv as i64, heads.dim as i64);
    for s in segments.segments() {
        let rows = s.query..s.query + s.len;
        let [queries, g, o] = [&q, &grad, &out.tensor].map(|x| query_view(x, rows.clone(), heads));
        let l = query_view(&lse.tensor, rows.clone(), of_lse).squeeze_dim(-1).contiguous();
        for (keys, causal) in parts(s) {
            let [k, v] = [&k, &v].map(|x| heads_of(x, keys.clone(), heads));
            let (q_part, k_part, v_part) =
                Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                    &g,
                    &queries,
                    &k,
                    &v,
                    &o,
                    &l,
                    0.0,
                    causal,
                    None::<&Tensor>,
                    Some(scale),
                );
            let _ = query_view(&dq, rows.clone(), heads).g_add_(&q_part);
            for (total, part) in [(&dk, k_part), (&dv, v_part)] {
                // [kv, group, keys, dim], summed over the group.
                let part = part.sum_dim_intlist(1i64, false, Kind::Float).permute([1, 0, 2]);
                let len = keys.len() as i64;
                let _ = total.narrow(0, keys.start as i64, len).view([len, kv, dim]).g_add_(&part);
            }
        }
    }
    [(dq, &q), (dk, &k), (dv, &v)].map(|(gradient, x)| TchTensor::new(gradient.to_kind(x.kind())))
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
