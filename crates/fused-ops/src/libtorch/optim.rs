//! LibTorch's fused optimizer step and norm: one call for all weights.

use burn::tensor::Tensor;

use super::{primitive, shim, tensor};
use crate::{AdamW, Moments, Parameter};

/// Takes the tensor for itself, without gaps and with the strides of its shape: the kernel walks plain memory. What
/// others hold too is copied first.
fn own(value: Tensor<2>) -> tch::Tensor {
    let value = primitive(value);
    let shape = value.tensor.size();
    let alone = value.can_mut() && value.tensor.is_contiguous();
    let tensor = if alone { value.tensor } else { value.tensor.contiguous().copy() };
    tensor.view(shape.as_slice())
}

/// See [`AdamW::update`].
pub fn adamw(
    opt: &AdamW,
    parameters: Vec<Parameter>,
    factor: Option<&Tensor<1>>,
) -> Vec<(Tensor<2>, Moments)> {
    let divisor = factor.map(|factor| primitive(factor.clone().recip()).tensor);
    let decays: Vec<f64> = parameters.iter().map(|p| p.weight_decay).collect();
    let [mut values, mut gradients, mut first, mut second] = [const { Vec::new() }; 4];
    for Parameter { value, gradient, moments, .. } in parameters {
        values.push(own(value));
        gradients.push(own(gradient));
        first.push(own(moments.first));
        second.push(own(moments.second));
    }
    let mut kinds = decays.clone();
    kinds.sort_by(f64::total_cmp);
    kinds.dedup();
    for weight_decay in kinds {
        let of_kind = |all: &[tch::Tensor]| -> Vec<tch::Tensor> {
            let chosen = all.iter().zip(&decays).filter(|(_, decay)| **decay == weight_decay);
            chosen.map(|(tensor, _)| tensor.shallow_clone()).collect()
        };
        let settings = shim::AdamW {
            step: f64::from(opt.step),
            lr: opt.lr,
            beta1: f64::from(opt.beta1),
            beta2: f64::from(opt.beta2),
            weight_decay,
            eps: f64::from(opt.eps),
        };
        let [values, gradients, first, second] =
            [&values, &gradients, &first, &second].map(|all| of_kind(all));
        shim::adamw(&settings, [&values, &gradients, &first, &second], divisor.as_ref());
    }
    let moments = first.into_iter().zip(second);
    let moments = moments.map(|(first, second)| Moments { first: tensor(first), second: tensor(second) });
    values.into_iter().map(tensor).zip(moments).collect()
}

/// See [`crate::norm`].
pub fn norm(tensors: &[&Tensor<2>]) -> Tensor<1> {
    let all: Vec<tch::Tensor> = tensors.iter().map(|&t| primitive(t.clone()).tensor).collect();
    tensor(shim::norm(&all))
}
