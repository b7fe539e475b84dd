//! The decoder: shared blocks over a flat list of weights.

use burn::tensor::{DType, Device, Tensor};
use fused_ops::{HeadOutput, Packed, Rotary, attention, head, layer_norm, linear, lookup, rms_norm, select};
use safetensors::Dtype;

use crate::layout::{Projection, Role, Structure, lay_out};
use crate::lora::{Dropout, Lora};
use crate::recompute::Uses;
use crate::{Batch, Config, Norm, Positions, TokenScores};

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
    /// What it is to the model.
    pub role: Role,
    /// The checkpoint holds the transpose of `tensor`.
    pub transposed: bool,
}

impl Weight {
    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.tensor.dtype().size()
    }
}

/// A decoder language model, with an adapter or without.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Config,
    weights: Vec<Weight>,
    structure: Structure,
    lora: Option<Lora>,
    dropout: Option<Dropout>,
    compute: DType,
    /// Matrices laid out for generation, in the order of the weights; none where the weight is used as it is.
    packed: Vec<Option<Packed>>,
}

impl Decoder {
    /// Puts weights, in the order of [`Config::weights`], together.
    pub(crate) fn assemble(config: Config, weights: Vec<Weight>) -> Self {
        let (specs, structure) = lay_out(&config);
        assert_eq!(specs.len(), weights.len(), "the list has every weight of the configuration");
        Self {
            config,
            weights,
            structure,
            lora: None,
            dropout: None,
            compute: DType::F32,
            packed: Vec::new(),
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn structure(&self) -> &Structure {
        &self.structure
    }

    /// All weights, in a fixed order, without those of an adapter.
    pub fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// The same, to be changed.
    pub fn weights_mut(&mut self) -> &mut [Weight] {
        &mut self.weights
    }

    /// The adapter, if there is one.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    /// The same weights with another adapter, or with none.
    #[must_use]
    pub fn with_lora(mut self, lora: Option<Lora>) -> Self {
        self.lora = lora;
        self
    }

    /// What training changes: the adapter's weights, or all where there is no adapter.
    pub fn trained(&self) -> &[Weight] {
        self.lora.as_ref().map_or(&self.weights, Lora::weights)
    }

    /// The same, to be replaced by the optimizer.
    pub fn trained_mut(&mut self) -> &mut [Weight] {
        match &mut self.lora {
            Some(lora) => lora.weights_mut(),
            None => &mut self.weights,
        }
    }

    /// Drops inputs of the adapter at random in the next passes, the same ones for the same `seed`.
    pub fn set_dropout(&mut self, seed: u64) {
        let rate = self.lora.as_ref().map_or(0.0, |lora| lora.settings().dropout);
        self.dropout = (rate > 0.0).then_some(Dropout { rate, seed });
    }

    /// The same model, its weights shared, for part `part` of a micro-batch: each part drops other elements.
    #[must_use]
    pub fn for_part(&self, part: usize) -> Self {
        let mut model = self.clone();
        if let Some(dropout) = &mut model.dropout {
            dropout.seed = dropout.seed.wrapping_add(part as u64);
        }
        model
    }

    /// The same model with matrix products, attention and activations in another data type: `BF16` where the
    /// backend has it. Weights, the residual stream, norms, softmax and losses stay `f32`.
    #[must_use]
    pub fn computing_in(mut self, compute: DType) -> Self {
        self.compute = compute;
        self
    }

    /// The same model with its matrices held in the data type that products are computed in: what they take of a
    /// weight of 32 bits, in half the memory. For models that are not trained.
    #[must_use]
    pub fn held_as_computed(mut self) -> Self {
        if self.compute == DType::BF16 {
            let matrices = self.weights.iter_mut().filter(|w| w.role != Role::Vector);
            matrices.for_each(|w| w.tensor = fused_ops::narrow(w.tensor.clone().inner()));
        }
        self
    }

    /// The same model with its matrices laid out for generation, without autodiff; an adapter must be merged. It
    /// cannot be trained or saved.
    pub(crate) fn packed(self, narrow: bool) -> Self {
        assert!(self.lora.is_none(), "an adapter is merged before generation");
        let mut model = self.frozen();
        // Each weight goes as soon as it is laid out, where nobody else holds it.
        drop(self);
        let (table, head) = (model.structure.embedding, model.structure.head);
        model.packed = vec![None; model.weights.len()];
        for (i, weight) in model.weights.iter_mut().enumerate() {
            let looked_up = i == table || Some(i) == model.structure.positions;
            if weight.role == Role::Vector || looked_up && i != head {
                continue;
            }
            let nothing = Tensor::zeros([1, 1], &weight.tensor.device());
            let whole = std::mem::replace(&mut weight.tensor, nothing);
            model.packed[i] = Some(Packed::new(whole.clone(), narrow));
            if looked_up {
                weight.tensor = if narrow { fused_ops::narrow(whole) } else { whole };
            }
        }
        model
    }

    /// A tensor on the model's device of the type of its activations.
    pub(crate) fn activation(&self) -> Tensor<2> {
        Tensor::zeros([1, 1], (&self.device(), self.compute))
    }

    /// Data type of the matrix products.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// The device of the weights, without autodiff.
    pub fn device(&self) -> Device {
        self.weights[0].tensor.device().inner()
    }

    /// The same model with every weight that is trained a leaf that keeps its gradient.
    #[must_use]
    pub fn tracked(mut self) -> Self {
        for weight in &mut self.weights {
            weight.tensor = weight.tensor.clone().inner().autodiff();
        }
        for weight in self.trained_mut() {
            weight.tensor = weight.tensor.clone().inner().autodiff().require_grad();
        }
        self
    }

    /// The same weights (shared, not copied) without autodiff and without dropout.
    #[must_use]
    pub fn frozen(&self) -> Self {
        let mut frozen = self.untracked();
        frozen.dropout = None;
        frozen
    }

    /// The same weights without autodiff.
    pub(crate) fn untracked(&self) -> Self {
        let mut frozen = self.clone();
        let adapter = frozen.lora.iter_mut().flat_map(Lora::weights_mut);
        for weight in frozen.weights.iter_mut().chain(adapter) {
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
        let Config { vocab, max_positions, ref positions, .. } = self.config;
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
        self.run(&batch.tokens, &batch.positions, None, |layer, q, k, v| {
            attention(q, k, v, &batch.segments, self.config.heads, self.config.scores(layer))
        })
    }

    /// The blocks, with attention left to the caller: `attend(layer, q, k, v)`. `lengths` are the tokens of each
    /// sequence, where they are not packed rows.
    pub(crate) fn run(
        &self,
        tokens: &[u32],
        positions: &[u32],
        lengths: Option<&[usize]>,
        mut attend: impl FnMut(usize, Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        let tables = self.tables(positions, lengths);
        let mut x = self.embed(tokens, positions);
        for layer in 0..self.structure.blocks.len() {
            x = self.block(layer, x, &tables, Uses::Value, |q, k, v| attend(layer, q, k, v));
        }
        self.normed(x, Some(self.structure.final_norm))
    }

    /// Input of the first block.
    pub(crate) fn embed(&self, tokens: &[u32], positions: &[u32]) -> Tensor<2> {
        let x = scaled(self.rows(self.structure.embedding, tokens), self.config.embedding_scale);
        match (&self.config.positions, self.structure.positions) {
            (Positions::Learned { offset, .. }, Some(table)) => {
                let rows: Vec<u32> = positions.iter().map(|&p| p + *offset as u32).collect();
                x + self.rows(table, &rows)
            }
            _ => x,
        }
    }

    /// Angles of the rotary embeddings.
    pub(crate) fn tables(&self, positions: &[u32], lengths: Option<&[usize]>) -> Vec<Rotary> {
        match &self.config.positions {
            Positions::Learned { .. } => Vec::new(),
            Positions::Rotary(ropes) => {
                ropes.iter().map(|rope| rope.table(positions, self.config.heads.dim, lengths)).collect()
            }
        }
    }

    fn weight(&self, index: usize) -> Tensor<2> {
        self.weights[index].tensor.clone()
    }

    pub(crate) fn project(&self, x: Tensor<2>, p: Projection, uses: Uses) -> Tensor<2> {
        let out = match &self.lora {
            Some(lora) => lora.project(x, self.weight(p.weight), p.weight, self.dropout, uses),
            None if uses == Uses::Gradient => uses.linear(x, self.weight(p.weight)),
            None => self.product(x, p.weight),
        };
        match p.bias {
            Some(bias) => {
                let bias = as_type(self.weight(bias), out.dtype());
                out + bias
            }
            None => out,
        }
    }

    fn product(&self, x: Tensor<2>, weight: usize) -> Tensor<2> {
        match self.packed.get(weight) {
            Some(Some(packed)) => packed.linear(x),
            _ => linear(x, self.weight(weight)),
        }
    }

    pub(crate) fn rms(&self, x: Tensor<2>, weight: usize) -> Tensor<2> {
        let weight = self.weight(weight);
        let weight = if self.config.norm == Norm::RmsPlusOne { weight + 1.0 } else { weight };
        rms_norm(x, weight, self.config.eps)
    }

    /// A norm, where the family has one.
    pub(crate) fn norm(&self, x: Tensor<2>, norm: Option<Projection>) -> Tensor<2> {
        match norm {
            None => x,
            Some(Projection { weight, bias: None }) => self.rms(x, weight),
            Some(Projection { weight, bias: Some(bias) }) => {
                layer_norm(x, self.weight(weight), self.weight(bias), self.config.eps)
            }
        }
    }

    /// A norm of the residual stream, as input of a projection.
    pub(crate) fn normed(&self, x: Tensor<2>, norm: Option<Projection>) -> Tensor<2> {
        as_type(self.norm(x, norm), self.compute)
    }

    fn rows(&self, table: usize, rows: &[u32]) -> Tensor<2> {
        single(lookup(self.weight(table), rows))
    }

    /// Log-probabilities of the batch's targets, differentiable, with their statistics.
    ///
    /// # Shapes
    /// One value for each entry of `batch.predictors`.
    pub fn score(&self, batch: &Batch) -> HeadOutput {
        self.head(self.forward(batch), batch)
    }

    fn head(&self, hidden: Tensor<2>, batch: &Batch) -> HeadOutput {
        let (rows, weight) = (select(hidden, &batch.predictors), self.weight(self.structure.head));
        head(rows, weight, &batch.targets, self.config.logits)
    }

    /// Final norm and head on what the last block returns.
    pub(crate) fn finish(&self, x: Tensor<2>, batch: &Batch) -> HeadOutput {
        self.head(self.normed(x, Some(self.structure.final_norm)), batch)
    }

    /// [`Decoder::score`] read back to the host, without autodiff.
    pub fn score_to_host(&self, batch: &Batch) -> TokenScores {
        let out = self.frozen().score(batch);
        TokenScores::new(to_vec(out.logps), &to_vec(out.stats))
    }

    /// Logits for the given rows of hidden states, `[rows, vocab]`.
    pub fn logits(&self, hidden: Tensor<2>, rows: &[u32]) -> Tensor<2> {
        let products = single(self.product(select(hidden, rows), self.structure.head));
        let logits = scaled(products, self.config.logits.scale);
        match self.config.logits.softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }
}

/// As 32-bit floats.
pub(crate) fn single(x: Tensor<2>) -> Tensor<2> {
    as_type(x, DType::F32)
}

/// In this data type.
pub(crate) fn as_type(x: Tensor<2>, dtype: DType) -> Tensor<2> {
    if x.dtype() == dtype { x } else { fused_ops::cast(x, dtype.into()) }
}

pub(crate) fn scaled(x: Tensor<2>, factor: f32) -> Tensor<2> {
    if factor == 1.0 { x } else { x * factor }
}

/// A float tensor's values, converted to `f32`.
pub(crate) fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as::<f32>().expect("a float tensor converts to f32")
}
