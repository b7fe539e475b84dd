//! Attention over pages: which slots are written and read is worked out once a pass and not once a layer.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use burn::backend::LibTorch;
use burn::backend::libtorch::TchTensor;
use tch::{Device, Tensor};

use super::upload;
use crate::ops::{FusedOps, Three};
use crate::paged::{Span, gathered};
use crate::{Heads, Scores, Segments};

struct Plan {
    /// Slots of the new keys and values.
    writes: Tensor,
    /// Slots of all that is seen, one sequence after the other.
    reads: Tensor,
    segments: Arc<Segments>,
}

/// The plan of the spans that were last asked for.
struct Last {
    of: Weak<Vec<Span>>,
    device: Device,
    plan: Rc<Plan>,
}

thread_local! {
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

fn plan(spans: &Arc<Vec<Span>>, device: Device) -> Rc<Plan> {
    LAST.with_borrow_mut(|last| {
        if let Some(last) = last
            && last.device == device
            && last.of.upgrade().is_some_and(|known| Arc::ptr_eq(&known, spans))
        {
            return last.plan.clone();
        }
        let (writes, reads, segments) = gathered(spans);
        let put = |slots: Vec<u32>| {
            let slots: Vec<i64> = slots.into_iter().map(i64::from).collect();
            upload(&slots, &[slots.len()], device)
        };
        let plan = Rc::new(Plan { writes: put(writes), reads: put(reads), segments: Arc::new(segments) });
        *last = Some(Last { of: Arc::downgrade(spans), device, plan: plan.clone() });
        plan
    })
}

/// The rows at these slots, in place: a cache belongs to one generator alone.
pub fn write(mut cache: TchTensor, rows: &Tensor, slots: &Tensor) -> TchTensor {
    let rows = rows.to_kind(cache.tensor.kind());
    cache.tensor = cache.tensor.index_copy_(0, slots, &rows);
    cache
}

/// The output, and the keys and values with the new ones.
pub fn attention(
    [q, k, v]: [TchTensor; 3],
    [keys, values]: [TchTensor; 2],
    spans: &Arc<Vec<Span>>,
    heads: Heads,
    scores: Scores,
) -> Three<LibTorch> {
    let plan = plan(spans, q.tensor.device());
    let (keys, values) = (write(keys, &k.tensor, &plan.writes), write(values, &v.tensor, &plan.writes));
    let [k, v] = [&keys, &values].map(|cache| TchTensor::new(cache.tensor.index_select(0, &plan.reads)));
    let (out, _) = LibTorch::fused_attention(q, k, v, plan.segments.clone(), heads, scores);
    (out, keys, values)
}
