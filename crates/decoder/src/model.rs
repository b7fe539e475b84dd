//! The decoder: shared blocks over a flat list of weights.

use std::sync::Arc;

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData, activation};
use fused_ops::{HeadOutput, Rotary, attention, head, layer_norm, linear, rms_norm, rotary, swiglu};

use safetensors::Dtype;

use crate::{Batch, Config, Mlp, Norm, Positions, TokenScores};

/// One named weight. Vectors are held as a single row, so that every weight is a `Tensor<2>`.
#[derive(Debug, Clone)]
pub struct Weight {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// Values, `[rows, cols]` or `[1, n]`.
    pub tensor: Tensor<2>,
    /// Data type in the checkpoint it came from.
    pub stored: Dtype,
}

impl Weight {
    /// True for biases and norm weights.
    pub fn is_vector(&self) -> bool {
        self.shape.len() == 1
    }
}

/// Index of a projection's weight and bias in the list.
#[derive(Debug, Clone, Copy)]
struct Projection {
    weight: usize,
    bias: Option<usize>,
}

#[derive(Debug, Clone)]
struct Block {
    attention_norm: Projection,
    q: Projection,
    k: Projection,
    v: Projection,
    qk_norm: Option<(usize, usize)>,
    o: Projection,
    mlp_norm: Projection,
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
}

/// A decoder language model.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Config,
    weights: Vec<Weight>,
    blocks: Vec<Block>,
    positions: Option<usize>,
    final_norm: Projection,
    head: usize,
}

impl Decoder {
    /// Puts weights, in the order of [`Config::weights`], together.
    pub(crate) fn assemble(config: Config, weights: Vec<Weight>) -> Self {
        let mut next = 0..weights.len();
        let mut take = || next.next().expect("the list has every weight of the configuration");
        take();
        let positions = matches!(config.positions, Positions::Learned { .. }).then(&mut take);
        let mut projection = |bias: bool| Projection { weight: take(), bias: bias.then(&mut take) };
        let norm_bias = config.norm == Norm::Layer;
        let blocks = (0..config.layers)
            .map(|_| Block {
                attention_norm: projection(norm_bias),
                q: projection(config.qkv_bias),
                k: projection(config.qkv_bias),
                v: projection(config.qkv_bias),
                qk_norm: config.qk_norm.then(|| (projection(false).weight, projection(false).weight)),
                o: projection(config.out_bias),
                mlp_norm: projection(norm_bias),
                gate: (config.mlp == Mlp::SwiGlu).then(|| projection(config.mlp_bias)),
                up: projection(config.mlp_bias),
                down: projection(config.mlp_bias),
            })
            .collect();
        let final_norm = projection(norm_bias);
        let head = if config.tied { 0 } else { projection(false).weight };
        Self { config, weights, blocks, positions, final_norm, head }
    }

    /// A model of this shape with random weights: normal with standard deviation 0.02 (the output
    /// projections divided by `sqrt(2 · layers)`), norms 1, biases 0. Deterministic in `seed`.
    pub fn random(config: Config, device: &Device, seed: u64) -> Self {
        device.seed(seed);
        let residual = 0.02 / (2.0 * config.layers as f64).sqrt();
        let (out, down) = (config.names.o, config.names.down);
        let weights = config
            .weights()
            .into_iter()
            .map(|(name, shape)| {
                let dims = if shape.len() == 1 { [1, shape[0]] } else { [shape[0], shape[1]] };
                let part = name.rsplit('.').next().unwrap_or_default();
                let tensor = if part == "bias" {
                    Tensor::zeros(dims, device)
                } else if shape.len() == 1 {
                    Tensor::ones(dims, device)
                } else {
                    let output = [out, down].iter().any(|part| name.ends_with(&format!("{part}.weight")));
                    let std = if output { residual } else { 0.02 };
                    Tensor::random(dims, Distribution::Normal(0.0, std), device)
                };
                Weight { name, shape, tensor, stored: Dtype::F32 }
            })
            .collect();
        Self::assemble(config, weights)
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// All weights, in a fixed order.
    pub fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// All weights, to be replaced by the optimizer.
    pub fn weights_mut(&mut self) -> &mut [Weight] {
        &mut self.weights
    }

    /// The device of the weights, without autodiff.
    pub fn device(&self) -> Device {
        self.weights[0].tensor.device().inner()
    }

    /// The same model with every weight a leaf that keeps its gradient.
    #[must_use]
    pub fn tracked(mut self) -> Self {
        for weight in &mut self.weights {
            let tensor = weight.tensor.clone().inner();
            weight.tensor = tensor.autodiff().require_grad();
        }
        self
    }

    /// The same weights (shared, not copied) without autodiff.
    #[must_use]
    pub fn frozen(&self) -> Self {
        let mut frozen = self.clone();
        for weight in &mut frozen.weights {
            weight.tensor = weight.tensor.clone().inner();
        }
        frozen
    }

    /// Errors when a sequence of `len` tokens with these ids cannot be run: an id beyond the vocabulary, or
    /// more tokens than a learned position table has.
    pub fn check_sequence<'a>(
        &self,
        ids: impl IntoIterator<Item = &'a u32>,
        len: usize,
    ) -> Result<(), String> {
        let Config { vocab, max_positions, positions, .. } = self.config;
        if let Some(id) = ids.into_iter().find(|&&id| id as usize >= vocab) {
            return Err(format!("token id {id} is beyond the model's vocabulary of {vocab}"));
        }
        if matches!(positions, Positions::Learned { .. }) && len > max_positions {
            return Err(format!("{len} tokens, but the model has {max_positions} positions"));
        }
        Ok(())
    }

    /// Hidden states after the final norm.
    ///
    /// # Shapes
    /// Returns `[tokens, hidden]`.
    pub fn forward(&self, batch: &Batch) -> Tensor<2> {
        let heads = self.config.heads;
        let scale = self.scale();
        self.run(&batch.tokens, &batch.positions, |_, q, k, v| {
            attention(q, k, v, &batch.segments, heads, scale)
        })
    }

    /// Factor of the attention scores.
    pub(crate) fn scale(&self) -> f32 {
        (self.config.heads.dim as f32).sqrt().recip()
    }

    /// The blocks, with attention left to the caller: `attend(layer, q, k, v)`.
    pub(crate) fn run(
        &self,
        tokens: &[u32],
        positions: &[u32],
        mut attend: impl FnMut(usize, Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        let mut x = self.rows(0, tokens);
        if let (Some(table), Positions::Learned { offset, .. }) = (self.positions, self.config.positions) {
            let rows: Vec<u32> = positions.iter().map(|&p| p + offset as u32).collect();
            x = x + self.rows(table, &rows);
        }
        let table = self.angles(positions);
        for (layer, block) in self.blocks.iter().enumerate() {
            let normed = self.norm(x.clone(), block.attention_norm);
            let mut q = self.project(normed.clone(), block.q);
            let mut k = self.project(normed.clone(), block.k);
            let v = self.project(normed, block.v);
            if let Some((q_norm, k_norm)) = block.qk_norm {
                q = rms_norm(q, self.weight(q_norm), self.config.eps);
                k = rms_norm(k, self.weight(k_norm), self.config.eps);
            }
            if let Some(table) = &table {
                (q, k) = (rotary(q, table), rotary(k, table));
            }
            x = x + self.project(attend(layer, q, k, v), block.o);
            let normed = self.norm(x.clone(), block.mlp_norm);
            x = x + self.feed_forward(normed, block);
        }
        self.norm(x, self.final_norm)
    }

    fn feed_forward(&self, x: Tensor<2>, block: &Block) -> Tensor<2> {
        let up = self.project(x.clone(), block.up);
        let inner = match block.gate {
            Some(gate) => swiglu(self.project(x, gate), up),
            None => activation::relu(up),
        };
        self.project(inner, block.down)
    }

    fn weight(&self, index: usize) -> Tensor<2> {
        self.weights[index].tensor.clone()
    }

    fn project(&self, x: Tensor<2>, p: Projection) -> Tensor<2> {
        let out = linear(x, self.weight(p.weight));
        p.bias.map_or(out.clone(), |bias| out + self.weight(bias))
    }

    fn norm(&self, x: Tensor<2>, p: Projection) -> Tensor<2> {
        match p.bias {
            None => rms_norm(x, self.weight(p.weight), self.config.eps),
            Some(bias) => layer_norm(x, self.weight(p.weight), self.weight(bias), self.config.eps),
        }
    }

    fn rows(&self, table: usize, rows: &[u32]) -> Tensor<2> {
        let table = self.weight(table);
        select(table, rows)
    }

    /// Angles of the rotary embedding, computed in `f32` as transformers does.
    fn angles(&self, positions: &[u32]) -> Option<Rotary> {
        let Positions::Rotary { theta } = self.config.positions else { return None };
        let half = self.config.heads.dim / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| 1.0 / theta.powf((2 * i) as f32 / self.config.heads.dim as f32)).collect();
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos(), a.sin())).unzip();
        Some(Rotary { cos: Arc::from(cos), sin: Arc::from(sin), half })
    }

    /// Log-probabilities of the batch's targets, differentiable, with their statistics.
    ///
    /// # Shapes
    /// One value for each entry of `batch.predictors`.
    pub fn score(&self, batch: &Batch) -> HeadOutput {
        let hidden = self.forward(batch);
        head(select(hidden, &batch.predictors), self.weight(self.head), &batch.targets)
    }

    /// [`Decoder::score`] read back to the host, without autodiff.
    pub fn score_to_host(&self, batch: &Batch) -> TokenScores {
        let out = self.frozen().score(batch);
        TokenScores::new(to_vec(out.logps), &to_vec(out.stats))
    }

    /// Logits for the given rows of hidden states, `[rows, vocab]`.
    pub fn logits(&self, hidden: Tensor<2>, rows: &[u32]) -> Tensor<2> {
        linear(select(hidden, rows), self.weight(self.head))
    }
}

/// Rows of a table, `[rows.len(), cols]`.
fn select(table: Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let ids: Vec<i64> = rows.iter().map(|&row| i64::from(row)).collect();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [rows.len()]), &table.device());
    table.select(0, ids)
}

/// A float tensor's values, converted to `f32`.
pub(crate) fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as::<f32>().expect("a float tensor converts to f32")
}
