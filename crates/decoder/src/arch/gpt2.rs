//! GPT-2: learned positions, layer norm, one projection for queries, keys and values, weights stored `[in, out]`.

use fused_ops::{Activation, Heads, Logits};

use super::Names;
use super::keys::Keys;
use crate::{Config, Error, Layer, Mlp, Norm, Positions};

const NAMES: Names = Names {
    root: "transformer.",
    embed: "wte.weight",
    positions: "wpe.weight",
    layers: "h",
    final_norm: "ln_f",
    attention_norm: "ln_1",
    attention_post_norm: "",
    mlp_norm: "ln_2",
    mlp_post_norm: "",
    q: "",
    k: "",
    v: "",
    qkv: "attn.c_attn",
    o: "attn.c_proj",
    q_norm: "",
    k_norm: "",
    gate: "",
    up: "mlp.c_fc",
    gate_up: "",
    down: "mlp.c_proj",
};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    keys.only("scale_attn_weights", &true.into())?;
    keys.only("scale_attn_by_inverse_layer_idx", &false.into())?;
    keys.only("add_cross_attention", &false.into())?;
    let mlp = match keys.text_or("activation_function", "gelu_new")? {
        "gelu_new" | "gelu_pytorch_tanh" => Mlp::Plain(Activation::GeluTanh),
        "relu" => Mlp::Relu,
        other => return Err(keys.error(format!("activation_function = {other:?} is not supported"))),
    };
    let hidden = keys.size("n_embd")?;
    let query = keys.size("n_head")?;
    let dim = hidden / query;
    let max_positions = keys.size_or("n_positions", Some(1024))?;
    Ok(Config {
        model_type: "gpt2".into(),
        vocab: keys.size("vocab_size")?,
        hidden,
        layers: vec![Layer { window: None, rope: None }; keys.layer_count("n_layer")?],
        heads: Heads { query, kv: query, dim },
        intermediate: keys.size_or("n_inner", Some(4 * hidden))?,
        norm: Norm::Layer,
        eps: keys.number_or("layer_norm_epsilon", 1e-5)?,
        positions: Positions::Learned { offset: 0, rows: max_positions },
        mlp,
        qkv_bias: true,
        out_bias: true,
        mlp_bias: true,
        qk_norm: None,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        attention_scale: (dim as f32).sqrt().recip(),
        attention_softcap: None,
        logits: Logits::default(),
        tied: keys.flag_or("tie_word_embeddings", true)?,
        conv1d: true,
        max_positions,
        names: NAMES,
    })
}
