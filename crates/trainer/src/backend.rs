//! The one place where a backend is chosen.

use anyhow::bail;
use burn::tensor::Device;

use crate::args::Backend;

/// A usage error where the binary was built without a backend.
pub fn check(backend: Backend) -> Result<(), String> {
    match backend {
        #[cfg(feature = "flex")]
        Backend::Flex => Ok(()),
        other => Err(format!("--backend: this binary was built with {BUILT:?} and has no {other:?}")),
    }
}

/// Opens the device, or says how to get a binary that has it.
pub fn open(backend: Backend) -> anyhow::Result<(Device, &'static str)> {
    match backend {
        #[cfg(feature = "flex")]
        Backend::Flex => Ok((Device::flex(), "flex (CPU)")),
        other => bail!("this binary was built with the backends {BUILT:?} and has no {other:?}"),
    }
}

const BUILT: &[&str] = &[
    #[cfg(feature = "flex")]
    "flex",
];
