//! Inputs and distances.

use backend::under_test;
use burn::tensor::{Device, Distribution, Tensor};

/// Made on Flex, whose generator is the same everywhere.
pub fn random(rows: usize, cols: usize) -> Tensor<2> {
    Tensor::<2>::random([rows, cols], Distribution::Normal(0.0, 1.0), &Device::flex())
        .to_device(&under_test().device)
        .autodiff()
        .require_grad()
}

/// Largest difference of two values; infinite where one is no number.
pub fn difference<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> f32 {
    let host = |t: &Tensor<D>| t.clone().inner().into_data().try_into_vec_as::<f32>().unwrap();
    let apart = host(a).into_iter().zip(host(b)).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, |top, d| if d.is_nan() { f32::INFINITY } else { top.max(d) })
}
