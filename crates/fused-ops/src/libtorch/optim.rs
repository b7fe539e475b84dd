//! The optimizer step and norms: on the CPU kernels of this crate, on a CUDA device LibTorch's fused ones, which are
//! one call for all weights.

use burn::tensor::Tensor;

use super::{is_cpu, primitive, shim, tensor};
use crate::cpu;
use crate::host::Host;
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

/// One step of one parameter on the CPU.
fn kernel(opt: &AdamW, parameter: Parameter, scale: f32) -> (Tensor<2>, Moments) {
    let Parameter { value, gradient, moments, weight_decay } = parameter;
    let tensors = [value, gradient, moments.first, moments.second].map(primitive);
    let [value, first, second] = cpu::adamw(opt, tensors, weight_decay, scale).map(|out| tensor(out.tensor));
    (value, Moments { first, second })
}

/// See [`AdamW::update`].
pub fn adamw(
    opt: &AdamW,
    parameters: Vec<Parameter>,
    factor: Option<&Tensor<1>>,
) -> Vec<(Tensor<2>, Moments)> {
    if parameters.first().is_some_and(|p| is_cpu(&primitive(p.value.clone()))) {
        let scale = factor.map_or(1.0, |factor| primitive(factor.clone()).flat().storage()[0]);
        return parameters.into_iter().map(|parameter| kernel(opt, parameter, scale)).collect();
    }
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
    let all: Vec<_> = tensors.iter().map(|&t| primitive(t.clone())).collect();
    if is_cpu(&all[0]) {
        return tensor(cpu::norm_of(all.into_iter()).tensor);
    }
    let all: Vec<tch::Tensor> = all.into_iter().map(|t| t.tensor).collect();
    tensor(shim::norm(&all))
}

/// See [`crate::row_norms`].
pub fn row_norms(weight: &Tensor<2>) -> Tensor<2> {
    let held = primitive(weight.clone());
    if is_cpu(&held) {
        return tensor(cpu::row_norms(held).tensor);
    }
    weight.clone().square().sum_dim(1).sqrt()
}
