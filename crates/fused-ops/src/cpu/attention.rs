//! Attention over segments and over pages.

use std::sync::Arc;

use burn::tensor::DType;
use half::bf16;

use super::{dims, in_type, like, typed};
use crate::host::Host;
use crate::kernels::attention::{self as attn, Operands};
use crate::kernels::brain::has_narrow_products;
use crate::kernels::paged;
use crate::kernels::panel::Element;
use crate::paged::Span;
use crate::{Heads, Scores, Segments};

pub fn fused_attention<H: Host>(
    q: H,
    k: H,
    v: H,
    segments: Arc<Segments>,
    heads: Heads,
    scores: Scores,
) -> (H, H) {
    let (q, k, v) = (q.flat(), k.flat(), v.flat());
    typed!(q, T => {
        let x = Operands::<T> { q: q.storage(), k: k.storage(), v: v.storage(), heads, scores };
        let (out, lse) = attn::forward(x, &segments);
        (like(out, &q), H::new(lse, &[dims(&q)[0], heads.query]))
    })
}

pub fn attention_backward<H: Host>(
    grad: H,
    q: H,
    k: H,
    v: H,
    _: H,
    lse: H,
    segments: Arc<Segments>,
    heads: Heads,
    scores: Scores,
) -> (H, H, H) {
    let (grad, q, k, v) = (grad.flat(), q.flat(), k.flat(), v.flat());
    typed!(q, T => {
        let x = Operands::<T> { q: q.storage(), k: k.storage(), v: v.storage(), heads, scores };
        let [dq, dk, dv] = attn::backward(x, &segments, grad.storage(), lse.storage());
        (like(dq, &q), like(dk, &k), like(dv, &v))
    })
}

pub fn new_cache<H: Host>(_: H, narrow: bool, slots: usize, heads: Heads) -> (H, H) {
    let (width, size) = (heads.kv * heads.dim, slots * heads.kv * heads.dim);
    // Keys and values of 16 bits are multiplied as they are, or not at all.
    if narrow && has_narrow_products() && heads.dim.is_multiple_of(2) {
        let new = || H::new(vec![bf16::ZERO; size], &[slots, width]);
        return (new(), new());
    }
    let new = || H::new(vec![0.0_f32; size], &[slots, width]);
    (new(), new())
}

fn paged_step<T: Element, H: Host>(
    [q, k, v]: [&H; 3],
    [keys, values]: [&mut H; 2],
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

pub fn paged_attention<H: Host>(
    q: H,
    k: H,
    v: H,
    mut keys: H,
    mut values: H,
    spans: Arc<Vec<Span>>,
    heads: Heads,
    scores: Scores,
) -> (H, H, H) {
    let dtype = q.dtype();
    let [q, k, v] = [q, k, v].map(|x| in_type(&x, DType::F32));
    let out = match keys.dtype() {
        DType::BF16 => paged_step::<bf16, H>([&q, &k, &v], [&mut keys, &mut values], &spans, heads, scores),
        _ => paged_step::<f32, H>([&q, &k, &v], [&mut keys, &mut values], &spans, heads, scores),
    };
    (in_type(&like(out, &q), dtype), keys, values)
}
