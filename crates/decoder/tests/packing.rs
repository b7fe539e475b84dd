//! Packed, prefix-shared rows against each sequence run alone: log-probabilities and gradients.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use backend::under_test;
use burn::tensor::Tensor;
use decoder::{Batch, Decoder, Mlp};
use fused_ops::sum_into;
use pref_data::{Packed, PairTokens};
use proptest::prelude::*;

fn model(name: &str) -> Decoder {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name);
    Decoder::load(&dir, &under_test().device).unwrap().tracked()
}

fn pair() -> impl Strategy<Value = PairTokens> {
    let tokens = |n: std::ops::Range<usize>| prop::collection::vec(3_u32..700, n);
    (tokens(0..20), tokens(0..12), tokens(0..90), tokens(0..70)).prop_map(|(prompt, common, a, b)| {
        PairTokens {
            chosen: [common.clone(), a].concat(),
            rejected: [common, b].concat(),
            prompt,
            ..PairTokens::default()
        }
    })
}

fn packed_batch(packed: &Packed) -> Batch {
    let rows = packed.rows.iter().map(|row| (row.start, row.shared, row.tails));
    Batch::packed(&packed.tokens, &packed.positions, rows, &packed.predictors, &packed.targets)
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

/// Gradients of every weight, zeros where there is none.
fn gradients(model: &Decoder, loss: Tensor<1>) -> Vec<Vec<f32>> {
    let mut grads = loss.backward();
    let zeros = |dims: [usize; 2]| vec![0.0; dims[0] * dims[1]];
    let one = |weight: &decoder::Weight| {
        weight.tensor.grad_remove(&mut grads).map_or_else(|| zeros(weight.tensor.dims()), host)
    };
    model.weights().iter().map(one).collect()
}

/// Log-probability of a completion, its sequence run alone.
fn alone(model: &Decoder, prompt: &[u32], completion: &[u32]) -> Option<Tensor<1>> {
    let sequence = [prompt, completion].concat();
    let first = prompt.len().max(1);
    if first >= sequence.len() {
        return None;
    }
    let mut batch = Batch::of_sequence(&sequence);
    batch.predictors = (first as u32 - 1..sequence.len() as u32 - 1).collect();
    batch.targets = Arc::new(sequence[first..].to_vec());
    Some(model.score(&batch).logps.sum())
}

/// Weight of the loss on sum `i`, so that no two cancel.
fn factor(i: usize) -> f32 {
    [1.0, -0.7, 0.4, 1.3, -0.2, 0.9][i % 6]
}

/// The same pairs with ids of a smaller vocabulary.
fn within(pairs: &[PairTokens], vocab: usize) -> Vec<PairTokens> {
    let ids = |ids: &[u32]| ids.iter().map(|id| id % vocab as u32).collect();
    let one = |pair: &PairTokens| PairTokens {
        prompt: ids(&pair.prompt),
        chosen: ids(&pair.chosen),
        rejected: ids(&pair.rejected),
        ..PairTokens::default()
    };
    pairs.iter().map(one).collect()
}

fn check(model: &Decoder, pairs: &[PairTokens]) -> Result<(), TestCaseError> {
    let packed = Packed::new(pairs);
    if packed.targets.is_empty() {
        return Ok(());
    }
    let (n, noise) = (pairs.len(), under_test().backend.tolerance().models as f32);
    let sums = sum_into(model.score(&packed_batch(&packed)).logps, &Arc::new(packed.sums()), 2 * n);
    let factors: Vec<f32> = (0..2 * n).map(factor).collect();
    let factors = Tensor::<1>::from_floats(factors.as_slice(), &sums.device());
    let got = host(sums.clone().inner());
    let got_gradients = gradients(model, (sums * factors).sum());

    let mut want_gradients: Vec<Vec<f32>> = got_gradients.iter().map(|g| vec![0.0; g.len()]).collect();
    for (i, got) in got.iter().enumerate() {
        let pair = &pairs[i % n];
        let completion = if i < n { &pair.chosen } else { &pair.rejected };
        let Some(want) = alone(model, &pair.prompt, completion) else {
            prop_assert_eq!(*got, 0.0);
            continue;
        };
        let value = host(want.clone().inner())[0];
        prop_assert!(
            (got - value).abs() <= 2e-6 * noise * value.abs().max(100.0),
            "sum {} is {}, alone {}",
            i,
            got,
            value
        );
        for (total, gradient) in want_gradients.iter_mut().zip(gradients(model, want * factor(i))) {
            total.iter_mut().zip(gradient).for_each(|(t, g)| *t += g);
        }
    }
    // An input of ReLU within rounding of zero may fall on either side: then gradients jump.
    if model.config().mlp == Mlp::Relu {
        return Ok(());
    }
    for ((got, want), weight) in got_gradients.iter().zip(&want_gradients).zip(model.weights()) {
        let scale = want.iter().fold(1.0_f32, |a, b| a.max(b.abs()));
        let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        prop_assert!(
            worst <= 2e-5 * noise * scale,
            "gradient of {} differs by {} of {}",
            weight.name,
            worst,
            scale
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn packed_rows_are_their_sequences(pairs in prop::collection::vec(pair(), 1..5)) {
        for name in ["models/tiny-qwen2", "models/tiny-gemma2", "models/tiny-opt", "families/gpt2"] {
            let model = model(name);
            check(&model, &within(&pairs, model.config().vocab))?;
        }
    }
}
