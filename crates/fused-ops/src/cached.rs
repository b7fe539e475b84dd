//! What generation keeps: weights laid out for few rows, and keys and values of what was seen.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::Tensor;
use tracing::trace_span;

use crate::ops::{FusedOps, dispatch};
use crate::paged::{PAGE, Span, check};
use crate::{Heads, Scores};

/// A weight laid out for products with few rows, which is not trained. A row's result does not depend on the rows
/// beside it on the CPU.
#[derive(Debug, Clone)]
pub struct Packed {
    tensor: Tensor<2>,
    rows: usize,
}

impl Packed {
    /// Of a weight `[out, in]`. `narrow` holds and multiplies it in 16 bits, sums in 32, where the backend holds
    /// models in 32 otherwise.
    pub fn new(weight: Tensor<2>, narrow: bool) -> Self {
        let rows = weight.dims()[0];
        let tensor = dispatch(<Dispatch as FusedOps>::packed(weight.into_dispatch(), narrow));
        Self { tensor, rows }
    }

    /// `x · wᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`; returns `[tokens, out]`.
    pub fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        let _span = trace_span!("PackedLinear").entered();
        let (x, w) = (x.into_dispatch(), self.tensor.clone().into_dispatch());
        dispatch(<Dispatch as FusedOps>::packed_linear(x, w, self.rows))
    }
}

/// Keys and values of one layer, in pages of [`PAGE`] tokens. How they lie in there is the backend's own.
#[derive(Debug)]
pub struct Cache {
    keys: Tensor<2>,
    values: Tensor<2>,
    pages: usize,
}

impl Cache {
    /// Room for `pages` pages. `like` is an activation of the model: queries are of its type. `narrow` as for
    /// [`Packed::new`].
    pub fn new(like: &Tensor<2>, narrow: bool, pages: usize, heads: Heads) -> Self {
        let like = like.clone().into_dispatch();
        let (keys, values) = <Dispatch as FusedOps>::new_cache(like, narrow, pages * PAGE, heads);
        Self { keys: dispatch(keys), values: dispatch(values), pages }
    }
}

/// Writes the keys and values of new tokens into a cache and attends to all that it holds of their sequences.
///
/// # Shapes
/// - `q`: `[tokens, heads.query · dim]`; `k` and `v`: `[tokens, heads.kv · dim]`; returns the shape of `q`. `spans`
///   cover all tokens, one after the other.
pub fn cached_attention(
    [q, k, v]: [Tensor<2>; 3],
    cache: Cache,
    spans: &Arc<Vec<Span>>,
    heads: Heads,
    scores: Scores,
) -> (Tensor<2>, Cache) {
    let _span = trace_span!("CachedAttention").entered();
    check(spans, q.dims()[0], cache.pages);
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    let (keys, values) = (cache.keys.into_dispatch(), cache.values.into_dispatch());
    let (out, keys, values) =
        <Dispatch as FusedOps>::paged_attention(q, k, v, keys, values, spans.clone(), heads, scores);
    (dispatch(out), Cache { keys: dispatch(keys), values: dispatch(values), pages: cache.pages })
}
