//! AdamW with decoupled weight decay, in place where the tensor is not shared, and norms. Nothing is read back
//! from the device.

use burn::tensor::Tensor;

/// Settings of one AdamW step (Loshchilov & Hutter, arXiv 1711.05101; `torch.optim.AdamW`).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Number of this step, from 1.
    pub step: u32,
}

/// First and second moment of one parameter, of its shape.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Tensor<2>,
    /// Running mean of its square.
    pub second: Tensor<2>,
}

impl Moments {
    /// Zeros of the parameter's shape.
    pub fn zeros(parameter: &Tensor<2>) -> Self {
        // Two tensors: one that is shared would be copied before it can be updated in place.
        let zeros = || Tensor::zeros(parameter.dims(), &parameter.device().inner());
        Self { first: zeros(), second: zeros() }
    }
}

/// One parameter on its way through a step, without autodiff association.
pub struct Parameter {
    /// Values.
    pub value: Tensor<2>,
    /// Their gradient.
    pub gradient: Tensor<2>,
    /// What is kept between steps.
    pub moments: Moments,
    /// Decoupled weight decay; the values are multiplied by `1 - lr · weight_decay`.
    pub weight_decay: f64,
}

impl AdamW {
    /// One step of all parameters; their gradients are multiplied by `factor`, `[1]`, first. Works in place where a
    /// tensor has no other owner.
    pub fn update(
        &self,
        parameters: Vec<Parameter>,
        factor: Option<&Tensor<1>>,
    ) -> Vec<(Tensor<2>, Moments)> {
        #[cfg(feature = "tch")]
        if parameters.first().is_some_and(|p| crate::libtorch::holds(&p.value)) {
            return crate::libtorch::adamw(self, parameters, factor);
        }
        #[cfg(feature = "flex")]
        if parameters.first().is_some_and(|p| crate::flex::holds(&p.value)) {
            let scale = factor.map_or(1.0, |factor| crate::flex::values(factor)[0]);
            return parameters.into_iter().map(|p| crate::flex::adamw(self, p, scale)).collect();
        }
        let factor = factor.map(|factor| factor.clone().reshape([1, 1]));
        parameters.into_iter().map(|parameter| self.composed(parameter, factor.as_ref())).collect()
    }

    /// Of one parameter, by Burn's own operations.
    fn composed(&self, parameter: Parameter, factor: Option<&Tensor<2>>) -> (Tensor<2>, Moments) {
        let Parameter { value, gradient, moments, weight_decay } = parameter;
        let gradient = match factor {
            Some(factor) => gradient * factor.clone(),
            None => gradient,
        };
        let first = moments.first * self.beta1 + gradient.clone() * (1.0 - self.beta1);
        let second = moments.second * self.beta2 + gradient.square() * (1.0 - self.beta2);
        let correction1 = 1.0 - f64::from(self.beta1).powi(self.step as i32);
        let correction2 = 1.0 - f64::from(self.beta2).powi(self.step as i32);
        let denominator = second.clone().sqrt() / correction2.sqrt() + self.eps;
        let step = first.clone() / denominator * (self.lr / correction1);
        let value = value * (1.0 - self.lr * weight_decay) - step;
        (value, Moments { first, second })
    }
}

/// Euclidean norm of all elements of all tensors together, `[1]`; on the CPU summed in `f64`.
pub fn norm(tensors: &[&Tensor<2>]) -> Tensor<1> {
    assert!(!tensors.is_empty(), "the norm of no tensor has no device");
    #[cfg(feature = "tch")]
    if crate::libtorch::holds(tensors[0]) {
        return crate::libtorch::norm(tensors);
    }
    #[cfg(feature = "flex")]
    if crate::flex::holds(tensors[0]) {
        return crate::flex::norm(tensors);
    }
    let squares = tensors.iter().map(|&tensor| tensor.clone().square().sum()).collect();
    Tensor::cat(squares, 0).sum().sqrt()
}

/// What gradients of this norm, `[1]`, are multiplied by so that theirs is `max_norm` at most
/// (`torch.nn.utils.clip_grad_norm_`).
pub fn clip_factor(norm: &Tensor<1>, max_norm: f64) -> Tensor<1> {
    ((norm.clone() + 1e-6).recip() * max_norm).clamp_max(1.0)
}

/// Euclidean norm of each row, `[rows, 1]`; on the CPU summed in `f64`. Not differentiated.
pub fn row_norms(weight: &Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "tch")]
    if crate::libtorch::holds(weight) {
        return crate::libtorch::row_norms(weight);
    }
    #[cfg(feature = "flex")]
    if crate::flex::holds(weight) {
        return crate::flex::row_norms(weight);
    }
    weight.clone().square().sum_dim(1).sqrt()
}
