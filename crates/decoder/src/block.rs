//! One block: attention and a feed-forward network, each added to the residual stream.

use burn::tensor::{Tensor, activation};
use fused_ops::{Rotary, activate, branches, gated, join, rotary};

use crate::layout::{Block, Inner, Projection, Qkv};
use crate::model::{scaled, single};
use crate::recompute::Uses;
use crate::{Decoder, Mlp};

impl Decoder {
    /// One block. Where its value is not used, what it returns is not its value.
    pub(crate) fn block(
        &self,
        layer: usize,
        x: Tensor<2>,
        tables: &[Rotary],
        uses: Uses,
        attend: impl FnOnce(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        let block = &self.structure().blocks[layer];
        let [x, to_attention] = branches(x);
        let [mut q, mut k, v] = self.qkv(self.normed(to_attention, block.attention_norm), block);
        if let Some([q_norm, k_norm]) = block.qk_norm {
            (q, k) = (self.rms(q, q_norm), self.rms(k, k_norm));
        }
        if let Some(rope) = self.config().layers[layer].rope {
            (q, k) = (rotary(q, &tables[rope]), rotary(k, &tables[rope]));
        }
        let attended = self.project(attend(q, k, v), block.out, Uses::Value);
        let [x, to_mlp] = branches(self.joined(x, attended, block.attention_post_norm));
        let inner = self.feed_forward(self.normed(to_mlp, block.mlp_norm), block);
        // The gradient of a norm takes its input.
        let uses = if block.mlp_post_norm.is_some() { Uses::Value } else { uses };
        self.joined(x, self.project(inner, block.down, uses), block.mlp_post_norm)
    }

    /// The residual stream with what a part of a block adds to it.
    fn joined(&self, x: Tensor<2>, part: Tensor<2>, norm: Option<Projection>) -> Tensor<2> {
        let part = self.norm(part, norm);
        match self.config().residual_scale {
            1.0 => join(x, part),
            scale => join(x, scaled(single(part), scale)),
        }
    }

    fn qkv(&self, x: Tensor<2>, block: &Block) -> [Tensor<2>; 3] {
        match block.qkv {
            Qkv::Separate([q, k, v]) => {
                let ([to_q, to_k, to_v], project) = (branches(x), |x, p| self.project(x, p, Uses::Value));
                [project(to_q, q), project(to_k, k), project(to_v, v)]
            }
            Qkv::Fused(all) => {
                let (all, heads) = (self.project(x, all, Uses::Value), self.config().heads);
                let (query, kv) = (heads.query * heads.dim, heads.kv * heads.dim);
                let part = |start, size| all.clone().narrow(1, start, size);
                [part(0, query), part(query, kv), part(query + kv, kv)]
            }
        }
    }

    /// Inner features of the feed-forward network.
    fn feed_forward(&self, x: Tensor<2>, block: &Block) -> Tensor<2> {
        let project = |x: Tensor<2>, p| self.project(x, p, Uses::Value);
        match (block.inner, self.config().mlp) {
            (Inner::Plain(up), Mlp::Plain(kind)) => activate(project(x, up), kind),
            (Inner::Gated([gate, up]), Mlp::Gated(kind)) => {
                let [to_gate, to_up] = branches(x);
                gated(project(to_gate, gate), project(to_up, up), kind)
            }
            (Inner::Fused(both), Mlp::Gated(kind)) => {
                let (both, width) = (project(x, both), self.config().intermediate);
                gated(both.clone().narrow(1, 0, width), both.narrow(1, width, width), kind)
            }
            (Inner::Plain(up) | Inner::Fused(up) | Inner::Gated([_, up]), _) => {
                activation::relu(project(x, up))
            }
        }
    }
}
