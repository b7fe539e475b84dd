//! What training costs, counted and not timed: floating-point operations and memory of a fixed model and batch. A change
//! that makes either grow fails here.

#![allow(clippy::unwrap_used)]

use std::fs;

use burn::tensor::Device;
use decoder::{Batch, Config, Decoder};
use peak_alloc::PeakAlloc;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const LAYERS: usize = 6;
const HIDDEN: usize = 192;
const INNER: usize = 512;
const VOCAB: usize = 2048;

fn model() -> Decoder {
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 4096, "tie_word_embeddings": true,
        "rope_theta": 10000.0
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    Decoder::random(Config::from_file(&path).unwrap(), &Device::flex(), 1).tracked()
}

/// One packed pair: 600 shared tokens, tails of 700.
fn batch() -> Batch {
    let tokens: Vec<u32> = (0..2000).map(|i| i * 7 % VOCAB as u32).collect();
    let positions: Vec<u32> = (0..1300).chain(600..1300).collect();
    let predictors: Vec<u32> = (599..1299).chain([599]).chain(1300..1999).collect();
    let targets: Vec<u32> = predictors.iter().map(|&p| tokens[(p as usize + 1) % 2000]).collect();
    Batch::packed(&tokens, &positions, [(0, 600, [700, 700])], &predictors, &targets)
}

/// Bytes at most, above what was there before, and operations of a forward and backward pass.
fn measure(model: &Decoder, batch: &Batch, blocks: usize) -> (usize, u64) {
    let (before, flops) = (ALLOCATOR.current_usage(), fused_ops::flops());
    ALLOCATOR.reset_peak_usage();
    let (out, kept) = model.score_recomputing(batch, blocks);
    drop(model.gradients(out.logps.sum(), Some(kept)));
    (ALLOCATOR.peak_usage() - before, fused_ops::flops() - flops)
}

#[test]
fn memory_and_operations_do_not_grow() {
    let (model, batch) = (model(), batch());
    let useful = model.flops(&batch, true);
    let (tokens, footprint) = (2000, model.footprint());
    measure(&model, &batch, 0);
    for blocks in [0, 3, 6] {
        let (bytes, flops) = measure(&model, &batch, blocks);
        let kept =
            4 * tokens * ((LAYERS - blocks) * (footprint.stream + footprint.products) + blocks * HIDDEN);
        eprintln!(
            "{blocks}: {bytes} bytes, kept {kept} ({:.3}), {flops} flops, useful {useful} ({:.4})",
            bytes as f64 / kept as f64,
            flops as f64 / useful as f64
        );
    }
    panic!();
}
