//! Low-rank adapters (LoRA, arXiv 2106.09685) on the projections of a model, with PEFT's definitions.

use burn::tensor::{DType, Device, Tensor, TensorData};
use fused_ops::{linear, lora, lora_unused, row_norms, upload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::Decoder;
use crate::layout::Role;
use crate::model::{Weight, as_type, single, to_vec};
use crate::recompute::Uses;

/// Which projections are adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// PEFT's choice for the family: queries and values, or the one projection that makes both.
    Default,
    /// Every projection of every block.
    AllLinear,
    /// Those whose name ends in one of these (`q_proj`, `self_attn.q_proj`).
    Named(Vec<String>),
}

/// Settings of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSettings {
    /// Rank of the update.
    pub rank: usize,
    /// The update is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// By `alpha / sqrt(rank)` instead (arXiv 2312.03732).
    pub rank_stabilized: bool,
    /// Weights are decomposed into magnitude and direction (DoRA, arXiv 2402.09353).
    pub dora: bool,
    /// Share of the adapter's inputs dropped in training.
    pub dropout: f64,
}

impl LoraSettings {
    /// Factor of an update of this rank.
    pub(crate) fn scale(&self, rank: usize) -> f64 {
        let rank = rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }
}

/// Indices of one projection's adapter, and its factor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adapter {
    pub a: usize,
    pub b: usize,
    pub magnitude: Option<usize>,
    pub scale: f64,
}

/// An adapter of a model.
#[derive(Debug, Clone)]
pub struct Lora {
    settings: LoraSettings,
    weights: Vec<Weight>,
    /// By index of the adapted weight.
    adapters: Vec<Option<Adapter>>,
}

/// Which inputs a pass drops.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    pub rate: f64,
    pub seed: u64,
}

impl Dropout {
    /// `x` with elements zeroed and the rest scaled up; `stream` is the projection.
    fn apply(self, x: Tensor<2>, stream: usize) -> Tensor<2> {
        const CHUNK: usize = 1 << 14;
        let [rows, cols] = x.dims();
        let mut mask = vec![0.0_f32; rows * cols];
        let keep = (1.0 / (1.0 - self.rate)) as f32;
        mask.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(((stream as u64) << 32) | i as u64);
            for value in chunk {
                *value = if rng.random::<f64>() < self.rate { 0.0 } else { keep };
            }
        });
        let mask = as_type(upload(mask, [rows, cols], &x), x.dtype());
        x * mask
    }
}

/// Name of the module of a weight.
pub(crate) fn module(weight: &Weight) -> &str {
    weight.name.strip_suffix(".weight").unwrap_or(&weight.name)
}

impl Targets {
    /// Indices of the weights that are meant; an error names what fits nothing.
    pub(crate) fn choose(&self, model: &Decoder) -> Result<Vec<usize>, String> {
        let linear: Vec<usize> =
            (0..model.weights().len()).filter(|&i| model.weights()[i].role == Role::Linear).collect();
        let names = model.config().names;
        let default;
        let wanted = match self {
            Self::AllLinear => return Ok(linear),
            Self::Named(names) => names,
            Self::Default => {
                let parts = if names.qkv.is_empty() { vec![names.q, names.v] } else { vec![names.qkv] };
                default = parts.into_iter().map(str::to_string).collect();
                &default
            }
        };
        let ends = |module: &str, name: &String| {
            module == name || module.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'))
        };
        for name in wanted {
            if !linear.iter().any(|&i| ends(module(&model.weights()[i]), name)) {
                let mut known: Vec<&str> =
                    linear.iter().filter_map(|&i| module(&model.weights()[i]).rsplit('.').next()).collect();
                known.sort_unstable();
                known.dedup();
                return Err(format!("no projection is called {name:?}; the model has {}", known.join(", ")));
            }
        }
        Ok(linear
            .into_iter()
            .filter(|&i| wanted.iter().any(|name| ends(module(&model.weights()[i]), name)))
            .collect())
    }
}

impl Lora {
    /// A new adapter, as PEFT makes it: `A` uniform in `±1/sqrt(in)`, `B` zero, so that the model is unchanged.
    pub fn new(
        model: &Decoder,
        settings: LoraSettings,
        targets: &Targets,
        seed: u64,
    ) -> Result<Self, String> {
        let device = model.device();
        let mut lora = Self::empty(model, settings);
        let rank = lora.settings.rank;
        for (n, index) in targets.choose(model)?.into_iter().enumerate() {
            let base = &model.weights()[index];
            let [out, inner] = base.tensor.dims();
            let bound = (inner as f32).sqrt().recip();
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(n as u64);
            let a = (0..rank * inner).map(|_| rng.random_range(-bound..bound)).collect();
            let parts = [(a, [rank, inner]), (vec![0.0; out * rank], [out, rank])];
            let magnitude =
                lora.settings.dora.then(|| to_vec(row_norms(&single(base.tensor.clone().inner()))));
            lora.push(index, module(base).to_string(), parts, magnitude, &device);
        }
        Ok(lora)
    }

    pub(crate) fn empty(model: &Decoder, settings: LoraSettings) -> Self {
        Self { settings, weights: Vec::new(), adapters: vec![None; model.weights().len()] }
    }

    /// Adds the adapter of weight `index`: `A`, `B` and DoRA's magnitude.
    pub(crate) fn push(
        &mut self,
        index: usize,
        module: String,
        [(a, a_dims), (b, b_dims)]: [(Vec<f32>, [usize; 2]); 2],
        magnitude: Option<Vec<f32>>,
        device: &Device,
    ) {
        let name = |part: &str| format!("base_model.model.{module}.{part}");
        let mut add = |name: String, values: Vec<f32>, dims: [usize; 2], shape: Vec<usize>| {
            let tensor = Tensor::from_data(TensorData::new(values, dims), device);
            let role = if shape.len() == 1 { Role::Vector } else { Role::Linear };
            self.weights.push(Weight { name, shape, tensor, stored: Dtype::F32, role, transposed: false });
            self.weights.len() - 1
        };
        let scale = self.settings.scale(a_dims[0]);
        let a = add(name("lora_A.weight"), a, a_dims, a_dims.to_vec());
        let b = add(name("lora_B.weight"), b, b_dims, b_dims.to_vec());
        let out = b_dims[0];
        let magnitude = magnitude.map(|m| add(name("lora_magnitude_vector"), m, [1, out], vec![out]));
        self.adapters[index] = Some(Adapter { a, b, magnitude, scale });
    }

    /// Settings.
    pub fn settings(&self) -> &LoraSettings {
        &self.settings
    }

    /// Sets the dropout of training.
    pub fn set_dropout(&mut self, rate: f64) {
        self.settings.dropout = rate;
    }

    /// `A`, `B` and magnitudes, under PEFT's names.
    pub fn weights(&self) -> &[Weight] {
        &self.weights
    }

    pub(crate) fn weights_mut(&mut self) -> &mut [Weight] {
        &mut self.weights
    }

    /// Names of the adapted modules.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().flatten().filter_map(|adapter| {
            self.weights[adapter.a].name.strip_prefix("base_model.model.")?.strip_suffix(".lora_A.weight")
        })
    }

    fn tensor(&self, index: usize) -> Tensor<2> {
        self.weights[index].tensor.clone()
    }

    /// `x · Wᵀ` of weight `index`, with its adapter where it has one.
    pub(crate) fn project(
        &self,
        x: Tensor<2>,
        weight: Tensor<2>,
        index: usize,
        dropout: Option<Dropout>,
        uses: Uses,
    ) -> Tensor<2> {
        let Some(adapter) = self.adapters[index] else { return uses.linear(x, weight) };
        let (a, b) = (self.tensor(adapter.a), self.tensor(adapter.b));
        // The gradient of a magnitude takes what it scales.
        if uses == Uses::Gradient && dropout.is_none() && adapter.magnitude.is_none() {
            return lora_unused(x, weight, a, b, adapter.scale as f32);
        }
        let Some(dropout) = dropout else {
            let out = lora(x, weight.clone(), a, b, adapter.scale as f32);
            return match self.factor(adapter, &weight, out.dtype()) {
                None => out,
                Some(factor) => out * factor,
            };
        };
        let input = dropout.apply(x.clone(), index);
        let update = linear(linear(input.clone(), a), b) * adapter.scale;
        let base = linear(x, weight.clone());
        match self.factor(adapter, &weight, base.dtype()) {
            None => base + update,
            Some(factor) => base + linear(input, weight) * (factor.clone() - 1.0) + update * factor,
        }
    }

    /// DoRA's magnitudes over the norms of the rows they belong to, which are constants of the gradient (section 4.3 of
    /// its paper).
    fn factor(&self, adapter: Adapter, weight: &Tensor<2>, dtype: DType) -> Option<Tensor<2>> {
        let magnitude = self.tensor(adapter.magnitude?);
        let norms = row_norms(&(single(weight.clone().inner()) + self.update(adapter)));
        let norms = norms.reshape(magnitude.dims());
        let norms = if magnitude.device().is_autodiff() { Tensor::from_inner(norms) } else { norms };
        Some(as_type(magnitude / norms, dtype))
    }

    /// `scale · B · A`, without autodiff.
    fn update(&self, adapter: Adapter) -> Tensor<2> {
        self.tensor(adapter.b).inner().matmul(self.tensor(adapter.a).inner()) * adapter.scale
    }
}

impl Decoder {
    /// The same model with the adapter added into its weights.
    #[must_use]
    pub fn merged(self) -> Self {
        let Some(lora) = self.lora().cloned() else { return self };
        let mut model = self.frozen().with_lora(None);
        for (index, adapter) in lora.adapters.iter().enumerate() {
            let Some(adapter) = *adapter else { continue };
            let weight = &mut model.weights_mut()[index];
            let mut tensor = single(weight.tensor.clone()) + lora.update(adapter);
            if let Some(magnitude) = adapter.magnitude {
                let norms = row_norms(&tensor);
                tensor = tensor * (lora.tensor(magnitude).inner().reshape(norms.dims()) / norms);
            }
            weight.tensor = tensor;
        }
        model
    }
}
