//! A small forward and backward pass on a device, held against Flex: drivers exist that compute wrongly.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use fused_ops::{Activation, Heads, Logits, Scores, Segments};

use crate::{Error, Opened};

/// Relative difference beyond which results of the same formula in `f32` are wrong, not rounded.
const ALLOWED: f32 = 1e-3;

/// The same in 16 bits, whose products have two to three digits.
const ALLOWED_NARROW: f32 = 0.05;

/// Runs every fused operation forward and backward on the device, in each of its data types, and compares with Flex.
/// Nothing to do on Flex.
#[cfg(feature = "flex")]
pub fn self_check(opened: &Opened) -> Result<(), Error> {
    if opened.backend == crate::Backend::Flex {
        return Ok(());
    }
    let want = run(&Device::flex(), DType::F32);
    compare(opened, DType::F32, &want, ALLOWED)?;
    if opened.backend.has_bfloat16() { compare(opened, DType::BF16, &want, ALLOWED_NARROW) } else { Ok(()) }
}

#[cfg(feature = "flex")]
fn compare(
    opened: &Opened,
    dtype: DType,
    want: &[(&'static str, Vec<f32>)],
    allowed: f32,
) -> Result<(), Error> {
    for ((what, got), (_, want)) in run(&opened.device, dtype).into_iter().zip(want) {
        let scale = want.iter().fold(1e-6_f32, |top, v| top.max(v.abs()));
        let difference = got.iter().zip(want).fold(0.0_f32, |top, (a, b)| {
            // A value that is not a number is the largest difference of all.
            let difference = (a - b).abs() / scale;
            if difference.is_nan() { f32::INFINITY } else { top.max(difference) }
        });
        if difference > allowed {
            return Err(Error::Wrong { backend: opened.backend, what, difference, allowed });
        }
    }
    Ok(())
}

/// Without Flex there is nothing to compare with.
#[cfg(not(feature = "flex"))]
pub fn self_check(_: &Opened) -> Result<(), Error> {
    let _ = (run as fn(&Device, DType) -> _, ALLOWED, ALLOWED_NARROW);
    Ok(())
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as::<f32>().expect("a float tensor converts to f32")
}

/// Numbers that are the same on every machine.
fn numbers(rows: usize, cols: usize, seed: usize, device: &Device) -> Tensor<2> {
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0;
    let data = TensorData::new((0..rows * cols).map(value).collect::<Vec<f32>>(), [rows, cols]);
    Tensor::from_data(data, device)
}

/// A block and a head on two packed rows, products in `dtype`: the log-probabilities and the gradients of every weight.
fn run(device: &Device, dtype: DType) -> Vec<(&'static str, Vec<f32>)> {
    let heads = Heads { query: 4, kv: 2, dim: 8 };
    let (tokens, hidden, inner, vocab) = (40, 32, 48, 61);
    let mut segments = Segments::default();
    segments.push_row(0, 10, &[7, 5]);
    segments.push_row(22, 0, &[9, 9]);
    let segments = Arc::new(segments);
    let weight = |rows, cols, seed| (numbers(rows, cols, seed, device) * 0.3).autodiff().require_grad();
    let names = ["x", "norm", "q", "k", "v", "gate", "up", "down", "head"];
    let x = numbers(tokens, hidden, 1, device).autodiff().require_grad();
    let (norm, q, k) = (weight(1, hidden, 2), weight(32, hidden, 3), weight(16, hidden, 4));
    let (v, gate, up) = (weight(16, hidden, 5), weight(inner, hidden, 6), weight(inner, hidden, 7));
    let (down, head) = (weight(hidden, inner, 8), weight(vocab, hidden, 9));
    let h = fused_ops::rms_norm(x.clone(), norm.clone(), 1e-5).cast(dtype);
    let project = |w: &Tensor<2>| fused_ops::linear(h.clone(), w.clone());
    let scores = Scores::scaled(0.35);
    let attended = fused_ops::attention(project(&q), project(&k), project(&v), &segments, heads, scores);
    let gated = fused_ops::gated(project(&gate), project(&up), Activation::Silu);
    let inner = fused_ops::linear(gated, down.clone());
    let out = (x.clone() + attended.cast(DType::F32) + inner.cast(DType::F32)).cast(dtype);
    let targets = Arc::new((0..tokens as u32).map(|i| i % vocab as u32).collect::<Vec<_>>());
    let logps = fused_ops::head(out, head.clone(), &targets, Logits::default()).logps;
    let gradients = logps.clone().mean().backward();
    let mut results = vec![("a log-probability", values(logps.inner()))];
    for (name, weight) in names.into_iter().zip([x, norm, q, k, v, gate, up, down, head]) {
        results.push((name, values(weight.grad(&gradients).expect("every weight is used"))));
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backend_under_test_passes() {
        self_check(&crate::under_test()).unwrap_or_else(|error| panic!("{error}"));
    }

    #[cfg(feature = "flex")]
    #[test]
    fn flex_computes_in_16_bits_what_it_does_in_32() {
        let opened = crate::Backend::Flex.open(None).unwrap_or_else(|error| panic!("{error}"));
        let want = run(&opened.device, DType::F32);
        compare(&opened, DType::BF16, &want, ALLOWED_NARROW).unwrap_or_else(|error| panic!("{error}"));
    }

    #[cfg(feature = "flex")]
    #[test]
    fn a_wrong_result_is_named() {
        let mut opened = crate::under_test();
        opened.backend = crate::Backend::Tch;
        let mut want = run(&opened.device, DType::F32);
        want[3].1[0] += 1.0;
        let error = compare(&opened, DType::F32, &want, ALLOWED).unwrap_err().to_string();
        assert!(error.contains('k') && error.contains("computes wrongly"), "{error}");
    }
}
