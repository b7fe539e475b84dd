//! Optimizers over the trained weights of a decoder, with clipping by the global norm.

use burn::tensor::Tensor;
use decoder::{Decoder, Role, Weight, add_gradient};
use fused_ops::{AdamW, Moments, Parameter, clip_factor};
use serde::Serialize;

/// Which rule, with its own settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Decoupled weight decay (`torch.optim.AdamW`).
    AdamW {
        /// Decays of the two moments.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// Factored second moment, no first (`transformers.optimization.Adafactor` as the Trainer sets it up:
    /// `scale_parameter=False`, `relative_step=False`).
    Adafactor,
    /// `torch.optim.RMSprop` with its defaults.
    RmsProp,
    /// `torch.optim.SGD` without momentum.
    Sgd,
    /// Sign of an interpolated momentum (arXiv 2302.06675).
    Lion {
        /// Weights of the momentum in the step and in its own update.
        betas: [f64; 2],
    },
}

impl Rule {
    /// Names of what is kept for a weight between steps.
    fn slots(self, weight: &Weight) -> &'static [&'static str] {
        match self {
            Self::AdamW { .. } => &["first", "second"],
            Self::Adafactor if weight.shape.len() == 2 => &["rows", "columns"],
            Self::Adafactor | Self::RmsProp => &["second"],
            Self::Sgd => &[],
            Self::Lion { .. } => &["first"],
        }
    }

    /// Values kept for each value of a weight, about.
    pub fn states(self) -> usize {
        match self {
            Self::AdamW { .. } => 2,
            Self::RmsProp | Self::Lion { .. } => 1,
            Self::Adafactor | Self::Sgd => 0,
        }
    }
}

/// Settings that all rules share.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Rule.
    pub rule: Rule,
    /// Learning rate of this step.
    pub lr: f64,
    /// Weight decay of weights that are not biases or norms.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 does not clip.
    pub max_norm: f64,
    /// Number of this step, from 1.
    pub step: usize,
}

/// Accumulated gradients and what the rule keeps, in the order of the trained weights.
pub struct Optimizer {
    gradients: Vec<Option<Tensor<2>>>,
    slots: Vec<Vec<Tensor<2>>>,
}

impl Optimizer {
    /// Nothing accumulated, nothing kept.
    fn empty(weights: usize) -> Self {
        let none = |_| None;
        Self { gradients: (0..weights).map(none).collect(), slots: vec![Vec::new(); weights] }
    }

    /// For the trained weights of a model. AdamW's moments are there from the start: made in the first step they would
    /// lie between its activations, whose places later steps could not use as well.
    pub fn new(model: &Decoder, rule: Rule) -> Self {
        let mut optimizer = Self::empty(model.trained().len());
        if matches!(rule, Rule::AdamW { .. }) {
            let moments = |weight: &Weight| Moments::zeros(&weight.tensor.clone().inner());
            let both = |Moments { first, second }| vec![first, second];
            optimizer.slots = model.trained().iter().map(|weight| both(moments(weight))).collect();
        }
        optimizer
    }

    /// Adds a micro-batch's gradients.
    pub fn accumulate(&mut self, gradients: Vec<Option<Tensor<2>>>) {
        for (total, gradient) in self.gradients.iter_mut().zip(gradients) {
            add_gradient(total, gradient);
        }
    }

    /// One step on every weight that has a gradient; returns the global norm before clipping
    /// (`torch.nn.utils.clip_grad_norm_`), `[1]`, which is still on the device. Gradients are used up. Where the norm
    /// is not finite the weights are of no use afterwards.
    pub fn step(&mut self, model: &mut Decoder, options: Options) -> Tensor<1> {
        let all: Vec<&Tensor<2>> = self.gradients.iter().flatten().collect();
        if all.is_empty() {
            return Tensor::zeros([1], &model.device());
        }
        let norm = fused_ops::norm(&all);
        let factor = (options.max_norm > 0.0).then(|| clip_factor(&norm, options.max_norm));
        if let Rule::AdamW { betas, eps } = options.rule {
            self.adamw(model, options, betas, eps, factor.as_ref());
            return norm;
        }
        let factor = factor.map(|factor| factor.reshape([1, 1]));
        for (i, weight) in model.trained_mut().iter_mut().enumerate() {
            let Some(gradient) = self.gradients[i].take() else { continue };
            let gradient = match &factor {
                Some(factor) => gradient * factor.clone(),
                None => gradient,
            };
            let slots = std::mem::take(&mut self.slots[i]);
            let vector = weight.shape.len() == 1;
            let decay = decay(weight, options);
            let (parameter, slots) = update(options, decay, take(weight), gradient, slots, vector);
            weight.tensor = parameter.autodiff().require_grad();
            self.slots[i] = slots;
        }
        norm
    }

    /// All weights in one go, which backends with a kernel for that use.
    fn adamw(
        &mut self,
        model: &mut Decoder,
        options: Options,
        betas: [f64; 2],
        eps: f64,
        factor: Option<&Tensor<1>>,
    ) {
        let weights = || self.gradients.iter().enumerate().filter(|(_, gradient)| gradient.is_some());
        let chosen: Vec<usize> = weights().map(|(i, _)| i).collect();
        let mut parameters = Vec::with_capacity(chosen.len());
        for &i in &chosen {
            let weight = &mut model.trained_mut()[i];
            let weight_decay = decay(weight, options);
            let value = take(weight);
            let moments = match <[Tensor<2>; 2]>::try_from(std::mem::take(&mut self.slots[i])) {
                Ok([first, second]) => Moments { first, second },
                Err(_) => Moments::zeros(&value),
            };
            let Some(gradient) = self.gradients[i].take() else { continue };
            parameters.push(Parameter { value, gradient, moments, weight_decay });
        }
        let adamw = AdamW {
            lr: options.lr,
            beta1: betas[0] as f32,
            beta2: betas[1] as f32,
            eps: eps as f32,
            step: options.step as u32,
        };
        for (i, (value, moments)) in chosen.into_iter().zip(adamw.update(parameters, factor)) {
            model.trained_mut()[i].tensor = value.autodiff().require_grad();
            self.slots[i] = vec![moments.first, moments.second];
        }
    }

    /// What is kept, under `slot.weight` names, for a checkpoint.
    pub fn state<'a>(
        &'a self,
        model: &'a Decoder,
        rule: Rule,
    ) -> impl Iterator<Item = (String, &'a Tensor<2>)> {
        model.trained().iter().zip(&self.slots).flat_map(move |(weight, slots)| {
            let names = rule.slots(weight).iter().map(|slot| format!("{slot}.{}", weight.name));
            names.zip(slots)
        })
    }

    /// Reads back what was kept; `read` finds a tensor by name.
    pub fn restore<E>(
        model: &Decoder,
        rule: Rule,
        read: impl Fn(&str) -> Result<Tensor<2>, E>,
    ) -> Result<Self, E> {
        let mut optimizer = Self::empty(model.trained().len());
        for (slots, weight) in optimizer.slots.iter_mut().zip(model.trained()) {
            let names = rule.slots(weight).iter().map(|slot| format!("{slot}.{}", weight.name));
            *slots = names.map(|name| read(&name)).collect::<Result<_, E>>()?;
        }
        Ok(optimizer)
    }
}

/// Biases and norms are not decayed, as in transformers' Trainer.
fn decay(weight: &Weight, options: Options) -> f64 {
    let decayed = weight.role != Role::Vector || weight.name.ends_with("magnitude_vector");
    if decayed { options.weight_decay } else { 0.0 }
}

/// One step of one weight by another rule than AdamW: the new values and what is kept.
fn update(
    options: Options,
    decay: f64,
    parameter: Tensor<2>,
    gradient: Tensor<2>,
    slots: Vec<Tensor<2>>,
    vector: bool,
) -> (Tensor<2>, Vec<Tensor<2>>) {
    let Options { rule, lr, step, .. } = options;
    let mut slots = slots.into_iter();
    let zeros = |dims: [usize; 2]| Tensor::<2>::zeros(dims, &parameter.device());
    let dims = parameter.dims();
    match rule {
        Rule::Sgd => (parameter.clone() - (gradient + parameter * decay) * lr, Vec::new()),
        Rule::RmsProp => {
            let gradient = gradient + parameter.clone() * decay;
            let second = slots.next().unwrap_or_else(|| zeros(dims));
            let second = second * 0.99 + gradient.clone().square() * 0.01;
            (parameter - gradient / (second.clone().sqrt() + 1e-8) * lr, vec![second])
        }
        Rule::Lion { betas: [beta1, beta2] } => {
            let first = slots.next().unwrap_or_else(|| zeros(dims));
            let direction = (first.clone() * beta1 + gradient.clone() * (1.0 - beta1)).sign();
            let first = first * beta2 + gradient * (1.0 - beta2);
            (parameter * (1.0 - lr * decay) - direction * lr, vec![first])
        }
        Rule::AdamW { .. } => unreachable!("all weights together, in Optimizer::adamw"),
        Rule::Adafactor => {
            let kept = 1.0 - (step as f64).powf(-0.8);
            let blend = |old: Tensor<2>, new: Tensor<2>| old * kept + new * (1.0 - kept);
            let squares = gradient.clone().square() + 1e-30;
            let (update, slots) = if vector {
                let second = blend(slots.next().unwrap_or_else(|| zeros(dims)), squares);
                (gradient / second.clone().sqrt(), vec![second])
            } else {
                let rows = slots.next().unwrap_or_else(|| zeros([dims[0], 1]));
                let columns = slots.next().unwrap_or_else(|| zeros([1, dims[1]]));
                let rows = blend(rows, squares.clone().mean_dim(1));
                let columns = blend(columns, squares.mean_dim(0));
                let factor = (rows.clone() / rows.clone().mean_dim(0)).sqrt() * columns.clone().sqrt();
                (gradient / factor, vec![rows, columns])
            };
            // Updates of a root mean square above 1 are scaled down to it.
            let rms = fused_ops::norm(&[&update]) / ((dims[0] * dims[1]) as f64).sqrt();
            let update = update * (rms.clamp_min(1.0).recip() * lr).reshape([1, 1]);
            (parameter * (1.0 - lr * decay) - update, slots)
        }
    }
}

/// Takes a weight's values out, leaving it without: the tensor then has one owner and is updated in
/// place.
fn take(weight: &mut Weight) -> Tensor<2> {
    let device = weight.tensor.device().inner();
    std::mem::replace(&mut weight.tensor, Tensor::zeros([1, 1], &device)).inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    /// Three steps of a rule on a vector with a weight decay, against its formula in `f64`.
    fn check(rule: Rule, formula: impl Fn(&mut [f64; 3], &mut [f64; 3], [f64; 3])) {
        let device = Device::flex();
        let options = Options { rule, lr: 0.1, weight_decay: 0.01, max_norm: 0.0, step: 1 };
        let (mut got, mut slots) = (Tensor::<2>::from_floats([[1.0, -2.0, 3.0]], &device), Vec::new());
        let (mut want, mut kept) = ([1.0, -2.0, 3.0], [0.0; 3]);
        for gradient in [[0.5, -1.0, 2.0], [1.0, 1.0, -1.0], [-3.0, 0.25, 0.25]] {
            let tensor = Tensor::<2>::from_floats([gradient], &device);
            (got, slots) = update(options, 0.01, got, tensor, slots, true);
            formula(&mut want, &mut kept, gradient);
        }
        let got: Vec<f32> = got.into_data().try_into_vec().unwrap();
        for (got, want) in got.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} is not {want}");
        }
    }

    /// `optimizer.py` of lion-pytorch: decay, sign of the interpolation, then the momentum.
    #[test]
    fn lion_takes_the_sign_and_decays_apart_from_it() {
        check(Rule::Lion { betas: [0.9, 0.99] }, |p, m, g| {
            for i in 0..3 {
                p[i] *= 1.0 - 0.1 * 0.01;
                p[i] -= 0.1 * (0.9 * m[i] + 0.1 * g[i]).signum();
                m[i] = 0.99 * m[i] + 0.01 * g[i];
            }
        });
    }

    #[test]
    fn sgd_and_rmsprop_decay_through_the_gradient() {
        check(Rule::Sgd, |p, _, g| (0..3).for_each(|i| p[i] -= 0.1 * (g[i] + 0.01 * p[i])));
        check(Rule::RmsProp, |p, v, g| {
            for i in 0..3 {
                let g = g[i] + 0.01 * p[i];
                v[i] = 0.99 * v[i] + 0.01 * g * g;
                p[i] -= 0.1 * g / (v[i].sqrt() + 1e-8);
            }
        });
    }
}
