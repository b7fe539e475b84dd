//! The one place where a backend is chosen.

use anyhow::{Result, bail};
use burn::tensor::Device;

use crate::args::Backend;

/// Opens the device, or says how to get a binary that has it.
pub fn open(backend: Backend) -> Result<(Device, &'static str)> {
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
