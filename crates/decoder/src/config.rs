//! The shape of a model, independent of its family's spelling.

use fused_ops::Heads;

use crate::arch::Names;

/// Kind of normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// `x / rms(x) * w`.
    Rms,
    /// Mean and variance, with a bias.
    Layer,
}

/// How a token knows its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// Rotary embedding of queries and keys, half-split layout.
    Rotary {
        /// Base of the angles.
        theta: f32,
    },
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
    /// `down(silu(gate(x)) * up(x))`.
    SwiGlu,
    /// `down(relu(up(x)))`.
    Relu,
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
    /// Number of blocks.
    pub layers: usize,
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
    /// Queries and keys are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// The head is the embedding.
    pub tied: bool,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    pub(crate) names: Names,
}

impl Config {
    /// Names and shapes of all weights, in the order of [`crate::Decoder::weights`].
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        let n = &self.names;
        let (hidden, heads) = (self.hidden, self.heads);
        let root = |name: &str| format!("{}{name}", n.root);
        all.push((root(n.embed), vec![self.vocab, hidden]));
        if let Positions::Learned { rows, .. } = self.positions {
            all.push((root(n.positions), vec![rows, hidden]));
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("{}{}.{layer}.{part}", n.root, n.layers);
            let mut push = |part: &str, shape: &[usize]| all.push((name(part), shape.to_vec()));
            let linear =
                |push: &mut dyn FnMut(&str, &[usize]), part: &str, out: usize, inp: usize, bias: bool| {
                    push(&format!("{part}.weight"), &[out, inp]);
                    if bias {
                        push(&format!("{part}.bias"), &[out]);
                    }
                };
            let layer_norm = self.norm == Norm::Layer;
            let norm = |push: &mut dyn FnMut(&str, &[usize]), part: &str, dim: usize| {
                push(&format!("{part}.weight"), &[dim]);
                if layer_norm {
                    push(&format!("{part}.bias"), &[dim]);
                }
            };
            norm(&mut push, n.attention_norm, hidden);
            linear(&mut push, n.q, heads.query * heads.dim, hidden, self.qkv_bias);
            linear(&mut push, n.k, heads.kv * heads.dim, hidden, self.qkv_bias);
            linear(&mut push, n.v, heads.kv * heads.dim, hidden, self.qkv_bias);
            if self.qk_norm {
                push(&format!("{}.weight", n.q_norm), &[heads.dim]);
                push(&format!("{}.weight", n.k_norm), &[heads.dim]);
            }
            linear(&mut push, n.o, hidden, heads.query * heads.dim, self.out_bias);
            norm(&mut push, n.mlp_norm, hidden);
            if self.mlp == Mlp::SwiGlu {
                linear(&mut push, n.gate, self.intermediate, hidden, self.mlp_bias);
            }
            linear(&mut push, n.up, self.intermediate, hidden, self.mlp_bias);
            linear(&mut push, n.down, hidden, self.intermediate, self.mlp_bias);
        }
        all.push((root(&format!("{}.weight", n.final_norm)), vec![hidden]));
        if self.norm == Norm::Layer {
            all.push((root(&format!("{}.bias", n.final_norm)), vec![hidden]));
        }
        if !self.tied {
            all.push(("lm_head.weight".into(), vec![self.vocab, hidden]));
        }
        all
    }
}
