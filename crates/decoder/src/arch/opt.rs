//! OPT: learned positions, layer norm before each block, ReLU, biases everywhere.

use fused_ops::{Heads, Logits};

use super::Names;
use super::keys::Keys;
use crate::{Config, Error, Layer, Mlp, Norm, Positions};

/// Rows before position 0 in OPT's table (`OPTLearnedPositionalEmbedding.offset`).
const OFFSET: usize = 2;

const NAMES: Names = Names {
    root: "model.decoder.",
    embed: "embed_tokens.weight",
    positions: "embed_positions.weight",
    layers: "layers",
    final_norm: "final_layer_norm",
    attention_norm: "self_attn_layer_norm",
    attention_post_norm: "",
    mlp_norm: "final_layer_norm",
    mlp_post_norm: "",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    qkv: "",
    o: "self_attn.out_proj",
    q_norm: "",
    k_norm: "",
    gate: "",
    up: "fc1",
    gate_up: "",
    down: "fc2",
};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    keys.only("do_layer_norm_before", &true.into())?;
    keys.only("_remove_final_layer_norm", &false.into())?;
    keys.only("layer_norm_elementwise_affine", &true.into())?;
    keys.only("activation_function", &"relu".into())?;
    let bias = keys.flag_or("enable_bias", true)?;
    let hidden = keys.size("hidden_size")?;
    keys.only("word_embed_proj_dim", &hidden.into())?;
    let query = keys.size("num_attention_heads")?;
    let max_positions = keys.size_or("max_position_embeddings", Some(2048))?;
    Ok(Config {
        model_type: "opt".into(),
        vocab: keys.size("vocab_size")?,
        hidden,
        layers: vec![Layer { window: None, rope: None }; keys.layer_count("num_hidden_layers")?],
        heads: Heads { query, kv: query, dim: hidden / query },
        intermediate: keys.size("ffn_dim")?,
        norm: Norm::Layer,
        eps: 1e-5,
        positions: Positions::Learned { offset: OFFSET, rows: max_positions + OFFSET },
        mlp: Mlp::Relu,
        qkv_bias: bias,
        out_bias: bias,
        mlp_bias: bias,
        qk_norm: None,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        attention_scale: ((hidden / query) as f32).sqrt().recip(),
        attention_softcap: None,
        logits: Logits::default(),
        tied: keys.flag_or("tie_word_embeddings", true)?,
        conv1d: false,
        max_positions,
        names: NAMES,
    })
}
