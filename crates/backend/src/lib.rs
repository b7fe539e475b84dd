//! The one place where a backend is chosen: which of them a binary was built with, the devices they find, and how
//! far their results may differ from the reference.

mod check;
mod devices;
mod tolerance;
#[cfg(feature = "wgpu")]
mod wgpu;

pub use check::self_check;
pub use devices::{Opened, devices};
pub use tolerance::{Tolerance, under_test};

use burn::tensor::DType;
use clap::ValueEnum;
use serde::Serialize;

/// Environment variable with the backend of commands that are not given one.
pub const ENV: &str = "CLAIR_BACKEND";

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Pure-Rust kernels on the CPU.
    Flex,
    /// LibTorch on the CPU.
    Tch,
    /// LibTorch on an NVIDIA device.
    Cuda,
    /// Vulkan, Metal or DirectX 12.
    Wgpu,
    /// Burn's own CUDA backend.
    CubeclCuda,
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binary lacks the backend.
    #[error("this binary was built with {}, not with {}; {}", built().join(", "), .0.name(), .0.how_to_build())]
    NotBuilt(Backend),
    /// No such device.
    #[error("--device {index}: {} has {count}; --list-devices names them", .backend.name())]
    NoDevice {
        /// Backend.
        backend: Backend,
        /// Asked for.
        index: usize,
        /// What there is, such as `1 device`.
        count: String,
    },
    /// Nothing to compute on.
    #[error("{}: {reason}", .backend.name())]
    Unusable {
        /// Backend.
        backend: Backend,
        /// What is missing and what to install.
        reason: String,
    },
    /// A data type that the backend does not compute in.
    #[error("{flag}: {} computes in float32 alone; flex, tch and cuda also in bfloat16", .backend.name())]
    Dtype {
        /// Backend.
        backend: Backend,
        /// That asks for it.
        flag: &'static str,
    },
    /// The device gives other results than the reference.
    #[error(
        "{}: the device computes wrongly: {what} is off by {difference:e} (at most {allowed:e} is rounding); update \
         its driver, or use --backend flex",
        .backend.name()
    )]
    Wrong {
        /// Backend.
        backend: Backend,
        /// What was computed.
        what: &'static str,
        /// Relative to the largest value.
        difference: f32,
        /// Bound.
        allowed: f32,
    },
}

impl Backend {
    /// As it is given to `--backend`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::Tch => "tch",
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
            Self::CubeclCuda => "cubecl-cuda",
        }
    }

    /// True where this binary has it.
    pub fn is_built(self) -> bool {
        match self {
            Self::Flex => cfg!(feature = "flex"),
            Self::Tch | Self::Cuda => cfg!(feature = "tch"),
            Self::Wgpu => cfg!(feature = "wgpu"),
            Self::CubeclCuda => cfg!(feature = "cubecl-cuda"),
        }
    }

    fn how_to_build(self) -> String {
        let feature = if self == Self::Cuda { "tch" } else { self.name() };
        format!(
            "`cargo xtask train` (or sample, or eval) with `--backend {}` builds one that has it (the cargo feature is \
             {feature})",
            self.name()
        )
    }

    /// Computes in 16-bit brain floats with 32-bit weights, losses and reductions.
    pub fn has_bfloat16(self) -> bool {
        matches!(self, Self::Flex | Self::Tch | Self::Cuda)
    }

    /// Data type of activations in generation, given that of products: on the CPU weights of 16 bits go with activations
    /// of 32.
    pub fn generates_in(self, compute: DType) -> DType {
        if self.is_on_host() { DType::F32 } else { compute }
    }

    /// Tensors are in the memory of this process.
    pub fn is_on_host(self) -> bool {
        matches!(self, Self::Flex | Self::Tch)
    }

    /// Errors where it does not, naming the flag that asks for it.
    pub fn check_bfloat16(self, flag: &'static str) -> Result<(), Error> {
        if self.has_bfloat16() { Ok(()) } else { Err(Error::Dtype { backend: self, flag }) }
    }
}

/// Names of the backends this binary was built with.
pub fn built() -> Vec<&'static str> {
    let of_build = |backend: &&Backend| backend.is_built();
    Backend::value_variants().iter().filter(of_build).map(|backend| backend.name()).collect()
}
