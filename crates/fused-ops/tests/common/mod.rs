//! Inputs, distances, and the comparison with plain operations.

// Not every test takes all of them.
#![allow(dead_code)]

use std::cell::RefCell;
use std::f32::consts::TAU;

use backend::under_test;
use burn::tensor::{Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

thread_local! {
    /// Each test has a thread, so its numbers are the same in every run.
    static NUMBERS: RefCell<ChaCha8Rng> = RefCell::new(ChaCha8Rng::seed_from_u64(0));
}

/// Normally distributed numbers (Box and Muller).
pub fn normal(rows: usize, cols: usize) -> TensorData {
    let values = NUMBERS.with_borrow_mut(|numbers| {
        let mut one =
            || (-2.0 * (1.0 - numbers.random::<f32>()).ln()).sqrt() * (TAU * numbers.random::<f32>()).cos();
        (0..rows * cols).map(|_| one()).collect::<Vec<f32>>()
    });
    TensorData::new(values, [rows, cols])
}

/// The same as a leaf of a graph.
pub fn random(rows: usize, cols: usize) -> Tensor<2> {
    Tensor::<2>::from_data(normal(rows, cols), &under_test().device).autodiff().require_grad()
}

/// Largest difference of two values; infinite where one is no number.
pub fn difference<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> f32 {
    let host = |t: &Tensor<D>| t.clone().inner().into_data().try_into_vec_as::<f32>().unwrap();
    let apart = host(a).into_iter().zip(host(b)).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, |top, d| if d.is_nan() { f32::INFINITY } else { top.max(d) })
}

/// Runs `op` on both paths and compares the value and the gradient of every input under a random
/// weighting of the output. The tolerance is Flex's.
pub fn check(
    inputs: &[Tensor<2>],
    tolerance: f32,
    fused: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    plain: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    let tolerance = tolerance * under_test().backend.tolerance().operations as f32;
    let on_flex: Vec<Tensor<2>> = inputs.iter().map(flex).collect();
    let (a, b) = (fused(inputs), plain(&on_flex));
    assert_eq!(a.dims(), b.dims());
    assert!(difference(&a, &b) < tolerance, "values differ by {:e}", difference(&a, &b));
    let weights = random(a.dims()[0], a.dims()[1]);
    let grads_a = (a * weights.clone()).sum().backward();
    let grads_b = (b * flex(&weights)).sum().backward();
    for (i, (input, on_flex)) in inputs.iter().zip(&on_flex).enumerate() {
        let (ga, gb) = (input.grad(&grads_a).unwrap(), on_flex.grad(&grads_b).unwrap());
        let scale = gb.clone().abs().max().into_scalar::<f32>().max(1.0);
        let worst = difference(&ga, &gb) / scale;
        assert!(worst < tolerance, "gradient {i} differs by {worst:e} (relative)");
    }
}

/// A leaf of its own with the same values on Flex, where the plain formulas are computed.
pub fn flex(tensor: &Tensor<2>) -> Tensor<2> {
    tensor.clone().inner().to_device(&Device::flex()).autodiff().require_grad()
}
