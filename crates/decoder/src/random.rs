//! Models without training.

use burn::tensor::{Device, Distribution, Tensor};
use safetensors::Dtype;

use crate::layout::Role;
use crate::{Config, Decoder, Norm, Weight};

impl Decoder {
    /// A model of this shape with random weights: normal with standard deviation 0.02 (the output
    /// projections divided by `sqrt(2 · layers)`), norms 1, biases 0. Deterministic in `seed`.
    pub fn random(config: Config, device: &Device, seed: u64) -> Self {
        device.seed(seed);
        let residual = 0.02 / (2.0 * config.layers.len() as f64).sqrt();
        let (out, down) = (config.names.o, config.names.down);
        let norm = if config.norm == Norm::RmsPlusOne { 0.0 } else { 1.0 };
        let weights = config
            .weights()
            .into_iter()
            .map(|spec| {
                let dims = spec.dims();
                let part = spec.name.rsplit('.').next().unwrap_or_default();
                let tensor = if part == "bias" {
                    Tensor::zeros(dims, device)
                } else if spec.role == Role::Vector {
                    Tensor::full(dims, norm, device)
                } else {
                    let ends = |part: &&str| spec.name.ends_with(&format!("{part}.weight"));
                    let std = if [out, down].iter().any(ends) { residual } else { 0.02 };
                    Tensor::random(dims, Distribution::Normal(0.0, std), device)
                };
                Weight {
                    name: spec.name,
                    shape: spec.shape,
                    tensor,
                    stored: Dtype::F32,
                    role: spec.role,
                    transposed: spec.transposed,
                }
            })
            .collect();
        Self::assemble(config, weights)
    }
}
