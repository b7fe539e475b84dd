//! Inputs and distances.

// Not every test takes all of them.
#![allow(dead_code)]

use std::cell::RefCell;
use std::f32::consts::TAU;

use backend::under_test;
use burn::tensor::{Tensor, TensorData};
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
