//! Flex: all of its operations are kernels.

use std::sync::Arc;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{DispatchDevice, Flex};
use burn::tensor::{Bytes, FloatDType, Shape, Tensor};

use crate::cpu;
use crate::host::Host;
use crate::kernels::panel::Element;
use crate::ops::{FusedOps, Three, Two};
use crate::paged::Span;
use crate::{Activation, AdamW, Heads, Logits, Moments, Parameter, Rotary, Scores, Segments};

impl Host for FlexTensor {
    fn flat(&self) -> Self {
        self.to_contiguous()
    }

    fn storage<T: Element>(&self) -> &[T] {
        FlexTensor::storage(self)
    }

    fn storage_mut<T: Element>(&mut self) -> &mut [T] {
        FlexTensor::storage_mut(self)
    }

    fn new<T: Element>(values: Vec<T>, shape: &[usize]) -> Self {
        let layout = Layout::contiguous(Shape::from(shape.to_vec()));
        FlexTensor::new(Bytes::from_elems(values), layout, T::dtype())
    }
}

/// True when `tensor` is on Flex, without autodiff or with it.
pub fn holds<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.device().inner().as_dispatch(), DispatchDevice::Flex(_))
}

fn primitive<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    tensor.try_into_primitive::<Flex>().expect("asked before: a Flex tensor without autodiff")
}

/// Values of a tensor without autodiff.
pub fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    Host::storage(&primitive(tensor.clone()).flat()).to_vec()
}

/// One AdamW step of one parameter, in place where nothing else holds its tensors.
pub fn adamw(opt: &AdamW, parameter: Parameter, scale: f32) -> (Tensor<2>, Moments) {
    let Parameter { value, gradient, moments, weight_decay } = parameter;
    let tensors = [value, gradient, moments.first, moments.second].map(primitive);
    let [value, first, second] =
        cpu::adamw(opt, tensors, weight_decay, scale).map(Tensor::from_primitive::<Flex>);
    (value, Moments { first, second })
}

/// See [`crate::norm`].
pub fn norm(tensors: &[&Tensor<2>]) -> Tensor<1> {
    Tensor::from_primitive::<Flex>(cpu::norm_of(tensors.iter().map(|&tensor| primitive(tensor.clone()))))
}

/// See [`crate::row_norms`].
pub fn row_norms(weight: &Tensor<2>) -> Tensor<2> {
    Tensor::from_primitive::<Flex>(cpu::row_norms(primitive(weight.clone())))
}

/// Operations that are kernels, with these signatures.
macro_rules! kernels {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $out:ty;)*) => {
        $(fn $name($($arg: $type),*) -> $out {
            cpu::$name($($arg),*)
        })*
    };
}

impl FusedOps for Flex {
    kernels! {
        fn weight_as(w: FlexTensor, like_this: FlexTensor) -> FlexTensor;
        fn fused_cast(x: FlexTensor, dtype: FloatDType) -> FlexTensor;
        fn fused_linear(x: FlexTensor, w: FlexTensor) -> FlexTensor;
        fn linear_grad_input(grad: FlexTensor, w: FlexTensor) -> FlexTensor;
        fn scaled(x: FlexTensor, scale: f32) -> FlexTensor;
        fn rows_added(base: FlexTensor, rows: Arc<Vec<u32>>, values: FlexTensor) -> FlexTensor;
        fn added(a: FlexTensor, b: FlexTensor) -> FlexTensor;
        fn joined(x: FlexTensor, update: FlexTensor) -> FlexTensor;
        fn linear_onto(base: FlexTensor, x: FlexTensor, w: FlexTensor) -> FlexTensor;
        fn grad_input_onto(base: FlexTensor, grad: FlexTensor, w: FlexTensor) -> FlexTensor;
        fn linear_grad_weight(grad: FlexTensor, x: FlexTensor) -> FlexTensor;
        fn fused_rms_norm(x: FlexTensor, w: FlexTensor, eps: f32) -> FlexTensor;
        fn rms_norm_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor, eps: f32) -> Two<Self>;
        fn fused_layer_norm(x: FlexTensor, w: FlexTensor, b: FlexTensor, eps: f32) -> FlexTensor;
        fn layer_norm_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor, eps: f32) -> Three<Self>;
        fn fused_rotary(x: FlexTensor, table: Rotary, sign: f32) -> FlexTensor;
        fn fused_gated(gate: FlexTensor, up: FlexTensor, kind: Activation) -> FlexTensor;
        fn gated_backward(grad: FlexTensor, gate: FlexTensor, up: FlexTensor, kind: Activation) -> Two<Self>;
        fn fused_activate(x: FlexTensor, kind: Activation) -> FlexTensor;
        fn activate_backward(grad: FlexTensor, x: FlexTensor, kind: Activation) -> FlexTensor;
        fn fused_attention(
            q: FlexTensor,
            k: FlexTensor,
            v: FlexTensor,
            segments: Arc<Segments>,
            heads: Heads,
            scores: Scores,
        ) -> Two<Self>;
        fn attention_backward(
            grad: FlexTensor,
            q: FlexTensor,
            k: FlexTensor,
            v: FlexTensor,
            out: FlexTensor,
            lse: FlexTensor,
            segments: Arc<Segments>,
            heads: Heads,
            scores: Scores,
        ) -> Three<Self>;
        fn packed(w: FlexTensor, narrow: bool) -> FlexTensor;
        fn packed_linear(x: FlexTensor, w: FlexTensor, rows: usize) -> FlexTensor;
        fn new_cache(like: FlexTensor, narrow: bool, slots: usize, heads: Heads) -> Two<Self>;
        fn paged_attention(
            q: FlexTensor,
            k: FlexTensor,
            v: FlexTensor,
            keys: FlexTensor,
            values: FlexTensor,
            spans: Arc<Vec<Span>>,
            heads: Heads,
            scores: Scores,
        ) -> Three<Self>;
        fn fused_sums(values: FlexTensor, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> FlexTensor;
        fn sums_backward(grad: FlexTensor, plan: Arc<Vec<(u32, u32)>>, values: usize) -> FlexTensor;
        fn fused_head(
            hidden: FlexTensor,
            w: FlexTensor,
            targets: Arc<Vec<u32>>,
            logits: Logits,
        ) -> Three<Self>;
        fn head_backward(
            grad: FlexTensor,
            hidden: FlexTensor,
            w: FlexTensor,
            lse: FlexTensor,
            targets: Arc<Vec<u32>>,
            logits: Logits,
            of_weight: bool,
        ) -> Two<Self>;
    }
}
