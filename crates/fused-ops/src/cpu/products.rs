//! Products with weights.

use std::borrow::Cow;

use burn::tensor::DType;
use half::bf16;

use super::{dims, in_type, owned, typed, weight};
use crate::host::Host;
use crate::kernels::dither::Computed;
use crate::kernels::matrix::{Mat, matmul, product_of};
use crate::kernels::packed;
use crate::kernels::product::Output;

/// All of a weight's values in the type of products.
pub(super) fn whole<T: Computed, H: Host>(w: &H) -> Cow<'_, [T]> {
    let [rows, cols] = dims(w);
    T::of_weight(weight(w), 0..rows * cols)
}

/// `base + a · b`, in place where nothing else holds `base`.
fn onto<T: Output, H: Host>(base: H, size: (usize, usize, usize), a: Mat<T>, b: Mat<T>) -> H {
    let mut base = owned(base);
    matmul(base.storage_mut::<T>(), true, size, a, b);
    base
}

pub fn fused_linear<H: Host>(x: H, w: H) -> H {
    let (x, w) = (x.flat(), w.flat());
    let ([tokens, inner], [outer, inner_w]) = (dims(&x), dims(&w));
    assert_eq!(inner, inner_w, "linear: x has {inner} features, the weight takes {inner_w}");
    typed!(x, T => {
        let w = whole::<T, H>(&w);
        let (a, b) = (Mat::<T>::rows(x.storage(), inner), Mat::rows(&w, inner).t());
        H::new(product_of::<T, T>((tokens, outer, inner), a, b), &[tokens, outer])
    })
}

pub fn linear_grad_input<H: Host>(grad: H, w: H) -> H {
    let (grad, w) = (grad.flat(), w.flat());
    let ([tokens, outer], [_, inner]) = (dims(&grad), dims(&w));
    typed!(grad, T => {
        let w = whole::<T, H>(&w);
        let (g, w) = (Mat::<T>::rows(grad.storage(), outer), Mat::rows(&w, inner));
        H::new(product_of::<T, T>((tokens, inner, outer), g, w), &[tokens, inner])
    })
}

pub fn linear_grad_weight<H: Host>(grad: H, x: H) -> H {
    let (grad, x) = (grad.flat(), x.flat());
    let ([tokens, outer], [_, inner]) = (dims(&grad), dims(&x));
    typed!(grad, T => {
        let (g, x) = (Mat::<T>::rows(grad.storage(), outer), Mat::rows(x.storage(), inner));
        H::new(product_of::<T, f32>((outer, inner, tokens), g.t(), x), &[outer, inner])
    })
}

pub fn linear_onto<H: Host>(base: H, x: H, w: H) -> H {
    let (x, w) = (x.flat(), w.flat());
    let ([tokens, inner], [outer, _]) = (dims(&x), dims(&w));
    typed!(x, T => {
        let w = whole::<T, H>(&w);
        let (a, b) = (Mat::<T>::rows(x.storage(), inner), Mat::rows(&w, inner).t());
        onto::<T, H>(base, (tokens, outer, inner), a, b)
    })
}

pub fn grad_input_onto<H: Host>(base: H, grad: H, w: H) -> H {
    let (grad, w) = (grad.flat(), w.flat());
    let ([tokens, outer], [_, inner]) = (dims(&grad), dims(&w));
    typed!(grad, T => {
        let w = whole::<T, H>(&w);
        let (g, w) = (Mat::<T>::rows(grad.storage(), outer), Mat::rows(&w, inner));
        onto::<T, H>(base, (tokens, inner, outer), g, w)
    })
}

pub fn packed<H: Host>(w: H, narrow: bool) -> H {
    let w = w.flat();
    let [rows, k] = dims(&w);
    let values = whole::<f32, H>(&w);
    if narrow {
        H::new(packed::pack::<bf16>(&values, rows, k), &packed::shape::<bf16>(rows, k))
    } else {
        H::new(packed::pack::<f32>(&values, rows, k), &packed::shape::<f32>(rows, k))
    }
}

pub fn packed_linear<H: Host>(x: H, w: H, rows: usize) -> H {
    let (dtype, x) = (x.dtype(), in_type(&x, DType::F32));
    let ([tokens, k], [padded, inner]) = (dims(&x), dims(&w));
    assert!(
        rows <= padded && k <= inner && inner < k + 2,
        "packed linear: [{tokens}, {k}] with [{rows}, {inner}]"
    );
    let out = match w.dtype() {
        DType::BF16 => packed::linear::<bf16>(x.storage(), k, w.storage(), rows),
        _ => packed::linear::<f32>(x.storage(), k, w.storage(), rows),
    };
    in_type(&H::new(out, &[tokens, rows]), dtype)
}
