//! The shape of a model, independent of its family's spelling.

use fused_ops::{Activation, Heads, Logits, Scores};

use crate::arch::Names;
use crate::layout::{self, Spec};
use crate::rope::Rope;

/// Kind of normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// `x / rms(x) * w`.
    Rms,
    /// `x / rms(x) * (1 + w)`, as the Gemma families store their weights.
    RmsPlusOne,
    /// Mean and variance, with a bias.
    Layer,
}

/// How a token knows its place.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Rotary embedding of queries and keys, half-split layout; layers choose among these.
    Rotary(Vec<Rope>),
    /// A learned vector added to the token embedding, looked up at `position + offset`.
    Learned {
        /// Rows before that of position 0.
        offset: usize,
        /// Rows of the table, the offset's included.
        rows: usize,
    },
}

/// Kind of feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mlp {
    /// `down(activation(gate(x)) * up(x))`.
    Gated(Activation),
    /// `down(activation(up(x)))`.
    Plain(Activation),
    /// `down(relu(up(x)))`.
    Relu,
}

/// Normalisation of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself (Qwen3, Gemma 3).
    PerHead,
    /// All heads together (OLMo 2).
    Whole,
}

/// What one block does differently from its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Positions a query sees; all before it where none.
    pub window: Option<usize>,
    /// Which of the rotary embeddings it uses, if any.
    pub rope: Option<usize>,
}

/// A decoder's shape. Made from `config.json` by the family's file in `arch`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `model_type` of the configuration file.
    pub model_type: String,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Features of the residual stream.
    pub hidden: usize,
    /// The blocks.
    pub layers: Vec<Layer>,
    /// Attention heads.
    pub heads: Heads,
    /// Inner features of the feed-forward block.
    pub intermediate: usize,
    /// Normalisation of the whole model.
    pub norm: Norm,
    /// Added to the variance.
    pub eps: f32,
    /// Position information.
    pub positions: Positions,
    /// Feed-forward block.
    pub mlp: Mlp,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The attention output projection has a bias.
    pub out_bias: bool,
    /// The feed-forward projections have biases.
    pub mlp_bias: bool,
    /// Normalisation of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Factor of the token embeddings.
    pub embedding_scale: f32,
    /// Factor of what a block adds to the residual stream.
    pub residual_scale: f32,
    /// Factor of the products of queries and keys.
    pub attention_scale: f32,
    /// Cap of the attention scores.
    pub attention_softcap: Option<f32>,
    /// How the head's products become logits.
    pub logits: Logits,
    /// The head is the embedding.
    pub tied: bool,
    /// Projections are stored `[in, out]` (GPT-2's Conv1D).
    pub conv1d: bool,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    pub(crate) names: Names,
}

impl Config {
    /// All weights, in the order of [`crate::Decoder::weights`].
    pub fn weights(&self) -> Vec<Spec> {
        layout::lay_out(self).0
    }

    /// Longest sequence that makes sense: that of the training, stretched where the rotary embedding is.
    pub fn longest(&self) -> usize {
        let stretch = match &self.positions {
            Positions::Rotary(ropes) => ropes.iter().map(Rope::stretch).fold(1.0, f64::max),
            Positions::Learned { .. } => 1.0,
        };
        (self.max_positions as f64 * stretch) as usize
    }

    /// Rotary embeddings depend on how long a sequence is, so that those of its beginning are not those of another
    /// sequence with the same beginning.
    pub fn depends_on_length(&self) -> bool {
        match &self.positions {
            Positions::Rotary(ropes) => ropes.iter().any(Rope::depends_on_length),
            Positions::Learned { .. } => false,
        }
    }

    /// Length beyond which the keys of a sequence are computed anew, as transformers does for LongRoPE.
    pub fn switches_after(&self) -> Option<usize> {
        match &self.positions {
            Positions::Rotary(ropes) => ropes.iter().find_map(Rope::switches_after),
            Positions::Learned { .. } => None,
        }
    }

    /// How block `layer` makes its attention scores.
    pub fn scores(&self, layer: usize) -> Scores {
        Scores {
            scale: self.attention_scale,
            softcap: self.attention_softcap,
            window: self.layers[layer].window,
        }
    }
}
