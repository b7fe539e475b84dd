//! Which weights a configuration has, and where each part of the model finds its own: one walk for both.

use crate::{Config, Mlp, Norm, Positions, QkNorm};

/// What a weight is to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Token or position embedding.
    Embedding,
    /// Weight of a projection inside a block: what LoRA can adapt.
    Linear,
    /// Bias or norm.
    Vector,
    /// The head, where it is not the embedding.
    Head,
}

/// One weight of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: Role,
    /// The checkpoint holds it `[in, out]`.
    pub transposed: bool,
}

impl Spec {
    /// `[rows, cols]` of the tensor that the model computes with; vectors are one row.
    pub fn dims(&self) -> [usize; 2] {
        match (self.shape.as_slice(), self.transposed) {
            (&[rows, cols], false) | (&[cols, rows], true) => [rows, cols],
            (shape, _) => [1, shape[0]],
        }
    }
}

/// Index of a projection's weight and bias in the list.
#[derive(Debug, Clone, Copy)]
pub struct Projection {
    pub weight: usize,
    pub bias: Option<usize>,
}

/// Queries, keys and values from one input.
#[derive(Debug, Clone, Copy)]
pub enum Qkv {
    Separate([Projection; 3]),
    /// One product, cut into three.
    Fused(Projection),
}

/// The inner features of a feed-forward block.
#[derive(Debug, Clone, Copy)]
pub enum Inner {
    Plain(Projection),
    Gated([Projection; 2]),
    /// One product, cut into gate and up.
    Fused(Projection),
}

/// One block.
#[derive(Debug, Clone)]
pub struct Block {
    pub attention_norm: Option<Projection>,
    pub qkv: Qkv,
    pub qk_norm: Option<[usize; 2]>,
    pub out: Projection,
    pub attention_post_norm: Option<Projection>,
    pub mlp_norm: Option<Projection>,
    pub inner: Inner,
    pub down: Projection,
    pub mlp_post_norm: Option<Projection>,
}

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Structure {
    pub embedding: usize,
    pub positions: Option<usize>,
    pub blocks: Vec<Block>,
    pub final_norm: Projection,
    pub head: usize,
}

struct Builder<'a> {
    config: &'a Config,
    specs: Vec<Spec>,
}

impl Builder<'_> {
    fn add(&mut self, name: String, shape: &[usize], role: Role) -> usize {
        let transposed = self.config.conv1d && role == Role::Linear;
        self.specs.push(Spec { name, shape: shape.to_vec(), role, transposed });
        self.specs.len() - 1
    }

    fn linear(&mut self, name: &str, out: usize, inner: usize, bias: bool) -> Projection {
        let shape = if self.config.conv1d { [inner, out] } else { [out, inner] };
        let weight = self.add(format!("{name}.weight"), &shape, Role::Linear);
        let bias = bias.then(|| self.add(format!("{name}.bias"), &[out], Role::Vector));
        Projection { weight, bias }
    }

    fn norm(&mut self, name: &str) -> Projection {
        let hidden = [self.config.hidden];
        let weight = self.add(format!("{name}.weight"), &hidden, Role::Vector);
        let with_bias = self.config.norm == Norm::Layer;
        let bias = with_bias.then(|| self.add(format!("{name}.bias"), &hidden, Role::Vector));
        Projection { weight, bias }
    }

    fn block(&mut self, layer: usize) -> Block {
        let c = self.config;
        let n = &c.names;
        let prefix = format!("{}{}.{layer}.", n.root, n.layers);
        let name = |part: &str| format!("{prefix}{part}");
        let (query, kv) = (c.heads.query * c.heads.dim, c.heads.kv * c.heads.dim);
        let optional_norm =
            |builder: &mut Self, part: &str| (!part.is_empty()).then(|| builder.norm(&name(part)));
        let attention_norm = optional_norm(self, n.attention_norm);
        let qkv = if n.qkv.is_empty() {
            let mut one = |part, out| self.linear(&name(part), out, c.hidden, c.qkv_bias);
            Qkv::Separate([one(n.q, query), one(n.k, kv), one(n.v, kv)])
        } else {
            Qkv::Fused(self.linear(&name(n.qkv), query + 2 * kv, c.hidden, c.qkv_bias))
        };
        let qk_norm = c.qk_norm.map(|kind| {
            let sizes = match kind {
                QkNorm::PerHead => [c.heads.dim; 2],
                QkNorm::Whole => [query, kv],
            };
            let mut one = |part, size| self.add(format!("{}.weight", name(part)), &[size], Role::Vector);
            [one(n.q_norm, sizes[0]), one(n.k_norm, sizes[1])]
        });
        let out = self.linear(&name(n.o), c.hidden, query, c.out_bias);
        let attention_post_norm = optional_norm(self, n.attention_post_norm);
        let mlp_norm = optional_norm(self, n.mlp_norm);
        let mut one = |part, width| self.linear(&name(part), width, c.hidden, c.mlp_bias);
        let inner = match c.mlp {
            Mlp::Gated(_) if !n.gate_up.is_empty() => Inner::Fused(one(n.gate_up, 2 * c.intermediate)),
            Mlp::Gated(_) => Inner::Gated([one(n.gate, c.intermediate), one(n.up, c.intermediate)]),
            Mlp::Plain(_) | Mlp::Relu => Inner::Plain(one(n.up, c.intermediate)),
        };
        let down = self.linear(&name(n.down), c.hidden, c.intermediate, c.mlp_bias);
        let mlp_post_norm = optional_norm(self, n.mlp_post_norm);
        Block { attention_norm, qkv, qk_norm, out, attention_post_norm, mlp_norm, inner, down, mlp_post_norm }
    }
}

/// Walks a configuration.
pub fn lay_out(config: &Config) -> (Vec<Spec>, Structure) {
    let mut builder = Builder { config, specs: Vec::new() };
    let n = &config.names;
    let root = |name: &str| format!("{}{name}", n.root);
    let embedding = builder.add(root(n.embed), &[config.vocab, config.hidden], Role::Embedding);
    let positions = match config.positions {
        Positions::Learned { rows, .. } => {
            Some(builder.add(root(n.positions), &[rows, config.hidden], Role::Embedding))
        }
        Positions::Rotary(_) => None,
    };
    let blocks = (0..config.layers.len()).map(|layer| builder.block(layer)).collect();
    let final_norm = builder.norm(&root(n.final_norm));
    let head = if config.tied {
        embedding
    } else {
        builder.add("lm_head.weight".into(), &[config.vocab, config.hidden], Role::Head)
    };
    (builder.specs, Structure { embedding, positions, blocks, final_norm, head })
}
