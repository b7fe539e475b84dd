//! How far results of a backend may differ from the reference: the one table that the tests use.

use clap::ValueEnum;

use crate::{Backend, ENV, Opened};

/// Factors of the tolerances that hold for Flex.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Of values and gradients of single operations.
    pub operations: f64,
    /// Of log-probabilities and logits of whole models.
    pub models: f64,
    /// Of losses, metrics and weights after several optimizer steps.
    pub training: f64,
}

impl Backend {
    /// The tolerances of this backend, computing in `f32`. Those of `tch` and `wgpu` are measured (`cargo xtask ci
    /// --backend tch,wgpu`); `cuda` passes at those of `wgpu` (on an H200); `cubecl-cuda` was never run.
    pub fn tolerance(self) -> Tolerance {
        let [operations, models, training] = match self {
            Self::Flex | Self::Tch => [1.0, 1.0, 1.0],
            // Sums in the order of the device, one after the other in 32 bits, and approximate exponentials.
            Self::Cuda | Self::Wgpu | Self::CubeclCuda => [4.0, 2.0, 2.0],
        };
        Tolerance { operations, models, training }
    }
}

/// The device that tests run on: the default one of the backend that the environment names ([`crate::ENV`]), or Flex.
///
/// # Panics
/// Where the variable names no backend, or one that cannot be opened.
pub fn under_test() -> Opened {
    let name = std::env::var(ENV).unwrap_or_else(|_| "flex".into());
    let backend = Backend::from_str(&name, false).unwrap_or_else(|_| panic!("{ENV}={name} names no backend"));
    backend.open(None).unwrap_or_else(|error| panic!("{ENV}={name}: {error}"))
}
