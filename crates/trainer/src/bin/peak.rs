//! Prints the GFLOP/s of large matrix products: what a training step could reach at most.

use std::time::Instant;

use anyhow::Result;
use backend::Backend;
use burn::tensor::{DType, Distribution, Tensor};
use clap::Parser;
use trainer::args::Dtype;

/// Measure the speed of matrix products.
#[derive(Debug, Parser)]
#[command(name = "peak", version)]
struct Args {
    /// Where to compute.
    #[arg(long, value_enum, default_value = "flex")]
    backend: Backend,
    /// Data type of the products.
    #[arg(long, value_enum, default_value = "float32")]
    dtype: Dtype,
    /// Rows and columns of the matrices.
    #[arg(long, default_value_t = 2048)]
    size: usize,
}

/// Products before the device is waited for.
const AT_ONCE: usize = 4;

#[allow(clippy::print_stdout)]
fn main() -> Result<()> {
    let Args { backend, dtype, size } = Args::parse();
    if dtype == Dtype::Bfloat16 {
        backend.check_bfloat16("--dtype bfloat16")?;
    }
    let device = backend.open(None)?.device;
    let dtype = if dtype == Dtype::Bfloat16 { DType::BF16 } else { DType::F32 };
    let random = || Tensor::<2>::random([size, size], Distribution::Normal(0.0, 1.0), &device).cast(dtype);
    let (a, b) = (random(), random());
    // Reading one value waits for the device, and the products before.
    let run = || {
        let product = |_| fused_ops::linear(a.clone(), b.clone());
        let last = (1..AT_ONCE).map(product).fold(product(0), |_, next| next);
        drop(last.slice([0..1, 0..1]).into_data());
    };
    run();
    let mut best = f64::MAX;
    for _ in 0..6 {
        let started = Instant::now();
        run();
        best = best.min(started.elapsed().as_secs_f64());
    }
    println!("{:.1}", AT_ONCE as f64 * 2.0 * (size as f64).powi(3) / best / 1e9);
    Ok(())
}
