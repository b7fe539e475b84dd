//! What training costs, counted and not timed: floating-point operations and memory of a fixed model and batch. A change
//! that makes either grow fails here.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fs;

use burn::tensor::{DType, Device};
use decoder::{Batch, Config, Decoder, Lora, LoraSettings, Targets};
use peak_alloc::PeakAlloc;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const LAYERS: usize = 6;
const HIDDEN: usize = 192;
const INNER: usize = 512;
const VOCAB: usize = 2048;

fn model(adapter: bool) -> Decoder {
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 4096, "tie_word_embeddings": true,
        "rope_theta": 10000.0
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    let model = Decoder::random(Config::from_file(&path).unwrap(), &Device::flex(), 1);
    if !adapter {
        return model.tracked();
    }
    let settings = LoraSettings { rank: 8, alpha: 16.0, rank_stabilized: false, dora: false, dropout: 0.0 };
    let lora = Lora::new(&model, settings, &Targets::AllLinear, 1).unwrap();
    model.with_lora(Some(lora)).tracked()
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

/// An adapter is trained, type of products, blocks computed again, bytes, and operations as they were when last looked at.
const KNOWN: [(bool, DType, usize, usize, u64); 7] = [
    (false, DType::F32, 0, 109_252_896, 57_642_270_720),
    (false, DType::F32, 3, 67_663_464, 64_728_600_576),
    (false, DType::F32, 6, 41_688_576, 71_814_930_432),
    (false, DType::BF16, 0, 67_982_751, 57_642_270_720),
    (false, DType::BF16, 3, 44_819_431, 64_728_600_576),
    (true, DType::F32, 0, 109_434_464, 49_057_873_920),
    (true, DType::BF16, 3, 45_536_995, 56_451_403_776),
];

/// One test: what is counted is the whole process's.
#[test]
fn memory_and_operations_do_not_grow() {
    // Each thread has buffers of its own.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        let (models, batch) = ([false, true].map(model), batch());
        measure(&models[0], &batch, 0);
        let in_type = |adapter, dtype| models[usize::from(adapter)].clone().computing_in(dtype);
        // Elsewhere products of 16 bits are widened, which takes room.
        let counted = |dtype: DType| dtype == DType::F32 || fused_ops::has_narrow_products();
        let types = [DType::F32, DType::BF16].into_iter().filter(|&dtype| counted(dtype));
        for (adapter, dtype) in types.flat_map(|dtype| [(false, dtype), (true, dtype)]) {
            footprint_is_true(&in_type(adapter, dtype), &batch);
        }
        for (adapter, dtype, blocks, bytes, operations) in KNOWN.into_iter().filter(|known| counted(known.1))
        {
            let model = in_type(adapter, dtype);
            let useful = model.flops(&batch, true);
            let (got, flops) = measure(&model, &batch, blocks);
            println!("adapter {adapter}, {dtype:?}, {blocks}: {got} bytes, {flops} operations");
            assert!(got <= bytes + bytes / 50, "{blocks} blocks computed again: {got} bytes, were {bytes}");
            assert!(
                got >= bytes - bytes / 10,
                "{blocks} blocks computed again: {got} bytes, well done; were {bytes}"
            );
            assert!(
                (useful..=operations).contains(&flops),
                "{blocks}: {flops} operations, {useful} to {operations}"
            );
        }
    });
}

/// The trainer plans with it: what is kept for a token, and no more.
fn footprint_is_true(model: &Decoder, batch: &Batch) {
    let footprint = model.footprint();
    let width = model.compute().size();
    let one_block = batch.tokens.len() * (4 * footprint.stream + width * footprint.products);
    let [none, three] = [0, 3].map(|blocks| measure(model, batch, blocks).0);
    // Three blocks of which the inputs alone are kept.
    let saved = 3 * (one_block - 4 * batch.tokens.len() * HIDDEN);
    assert!((none - three).abs_diff(saved) < saved / 20, "{} bytes less, {saved} expected", none - three);
}
