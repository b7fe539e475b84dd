//! AdamW over all weights of a decoder, with clipping by the global norm.

use burn::tensor::Tensor;
use decoder::{Decoder, Weight};
use fused_ops::{AdamW, Moments, sum_of_squares};

use crate::settings::Settings;

/// Accumulated gradients and AdamW's moments, in the order of the weights.
pub struct Optimizer {
    gradients: Vec<Option<Tensor<2>>>,
    moments: Vec<Option<Moments>>,
}

impl Optimizer {
    /// No gradients, no moments.
    pub fn new(weights: usize) -> Self {
        Self {
            gradients: (0..weights).map(|_| None).collect(),
            moments: (0..weights).map(|_| None).collect(),
        }
    }

    /// Adds a micro-batch's gradients.
    pub fn accumulate(&mut self, gradients: Vec<Option<Tensor<2>>>) {
        for (total, gradient) in self.gradients.iter_mut().zip(gradients) {
            *total = match (total.take(), gradient) {
                (Some(total), Some(gradient)) => Some(total + gradient),
                (total, gradient) => total.or(gradient),
            };
        }
    }

    /// One step on every weight that has a gradient; returns the global norm before clipping
    /// (`torch.nn.utils.clip_grad_norm_`). Gradients are used up.
    pub fn step(&mut self, model: &mut Decoder, settings: &Settings, lr: f64, step: usize) -> f64 {
        let norm = self.gradients.iter().flatten().map(sum_of_squares).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return norm;
        }
        let limit = settings.max_grad_norm / (norm + 1e-6);
        let scale = if settings.max_grad_norm > 0.0 { limit.min(1.0) } else { 1.0 };
        for (i, weight) in model.weights_mut().iter_mut().enumerate() {
            let Some(gradient) = self.gradients[i].take() else { continue };
            let options = AdamW {
                lr,
                beta1: settings.adam_beta1 as f32,
                beta2: settings.adam_beta2 as f32,
                eps: settings.adam_epsilon as f32,
                // Biases and norms are not decayed, as in transformers' Trainer.
                weight_decay: if weight.is_vector() { 0.0 } else { settings.weight_decay },
                step: step as u32,
            };
            let parameter = take(weight);
            let moments = self.moments[i].take().unwrap_or_else(|| Moments::zeros(&parameter));
            let (parameter, moments) = options.update(parameter, gradient, moments, scale as f32);
            weight.tensor = parameter.autodiff().require_grad();
            self.moments[i] = Some(moments);
        }
        norm
    }

    /// The moments with their weights' names, for a checkpoint.
    pub fn state<'a>(&'a self, model: &'a Decoder) -> impl Iterator<Item = (&'a str, &'a Moments)> {
        model.weights().iter().zip(&self.moments).filter_map(|(w, m)| Some((w.name.as_str(), m.as_ref()?)))
    }

    /// Sets the moments of weight `index`.
    pub fn restore(&mut self, index: usize, moments: Moments) {
        self.moments[index] = Some(moments);
    }
}

/// Takes a weight's values out, leaving it without: the tensor then has one owner and is updated in
/// place.
fn take(weight: &mut Weight) -> Tensor<2> {
    let device = weight.tensor.device().inner();
    std::mem::replace(&mut weight.tensor, Tensor::zeros([1, 1], &device)).inner()
}
