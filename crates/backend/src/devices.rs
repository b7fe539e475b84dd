//! Devices of this machine.

use burn::tensor::Device;

#[cfg(feature = "wgpu")]
use crate::wgpu;
use crate::{Backend, Error};

/// A device that is ready, and how to speak of it.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Where tensors go.
    pub device: Device,
    /// Backend.
    pub backend: Backend,
    /// Backend and device in words.
    pub name: String,
    /// Largest tensor in bytes, where the device has a limit.
    pub largest_tensor: Option<u64>,
}

impl Opened {
    /// Errors where a tensor of so many bytes does not fit into one buffer of the device.
    pub fn check_tensor(&self, name: &str, bytes: u64) -> Result<(), Error> {
        match self.largest_tensor {
            Some(limit) if bytes > limit => Err(Error::Unusable {
                backend: self.backend,
                reason: format!(
                    "{name} needs {} MiB in one buffer, and {} binds {} MiB at most; use another device or backend",
                    bytes >> 20,
                    self.name,
                    limit >> 20
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Bytes of device memory in use at most so far, and of the whole device, where the device has memory of its own.
    pub fn memory(&self) -> Option<(u64, u64)> {
        match self.backend {
            #[cfg(feature = "tch")]
            Backend::Cuda => fused_ops::libtorch::memory(&self.device),
            _ => None,
        }
    }
}

impl Backend {
    /// Opens device `index` of this backend, or its default one.
    pub fn open(self, index: Option<usize>) -> Result<Opened, Error> {
        if !self.is_built() {
            return Err(Error::NotBuilt(self));
        }
        let opened = |device, name| Opened { device, backend: self, name, largest_tensor: None };
        match self {
            #[cfg(feature = "flex")]
            Self::Flex => {
                self.only_one(index)?;
                Ok(opened(Device::flex(), "flex (CPU)".into()))
            }
            #[cfg(feature = "tch")]
            Self::Tch => {
                self.only_one(index)?;
                fused_ops::libtorch::prepare();
                let name = format!("LibTorch {} (CPU)", fused_ops::libtorch::version());
                Ok(opened(fused_ops::libtorch::cpu(), name))
            }
            #[cfg(feature = "tch")]
            Self::Cuda => {
                let (index, count) = (index.unwrap_or(0), fused_ops::libtorch::cuda_devices());
                if count == 0 {
                    let reason = "LibTorch finds no CUDA device; it needs an NVIDIA driver of version 525 or newer and \
                                  a LibTorch with CUDA (`cargo xtask train --backend cuda` installs one)";
                    return Err(Error::Unusable { backend: self, reason: reason.into() });
                }
                self.in_range(index, count)?;
                fused_ops::libtorch::prepare();
                let device = fused_ops::libtorch::cuda(index);
                let version = fused_ops::libtorch::version();
                Ok(opened(device, format!("LibTorch {version} (CUDA device {index})")))
            }
            #[cfg(feature = "wgpu")]
            Self::Wgpu => wgpu::open(index),
            #[cfg(feature = "cubecl-cuda")]
            Self::CubeclCuda => {
                let (index, found) = (index.unwrap_or(0), cuda_devices());
                if found.is_empty() {
                    let reason = "no CUDA device; it needs an NVIDIA driver and the CUDA runtime libraries";
                    return Err(Error::Unusable { backend: self, reason: reason.into() });
                }
                self.in_range(index, found.len())?;
                let device = found.into_iter().nth(index).expect("in range");
                let name = device.identity().map_or_else(|| format!("device {index}"), |id| id.name);
                Ok(opened(device, format!("CubeCL CUDA ({name})")))
            }
            #[allow(unreachable_patterns)]
            _ => Err(Error::NotBuilt(self)),
        }
    }

    #[allow(dead_code)]
    fn only_one(self, index: Option<usize>) -> Result<(), Error> {
        index.map_or(Ok(()), |index| self.in_range(index, 1))
    }

    #[allow(dead_code)]
    pub(crate) fn in_range(self, index: usize, count: usize) -> Result<(), Error> {
        if index < count {
            return Ok(());
        }
        let count = if count == 1 { "1 device, 0".into() } else { format!("{count} devices, from 0") };
        Err(Error::NoDevice { backend: self, index, count })
    }
}

/// A line for each device of each backend of this binary: `backend index: what it is`.
pub fn devices() -> Vec<String> {
    let mut lines = Vec::new();
    #[cfg(feature = "flex")]
    lines.push(format!("flex 0: CPU, {} threads", threads()));
    #[cfg(feature = "tch")]
    {
        let version = fused_ops::libtorch::version();
        lines.push(format!("tch 0: CPU, {} threads, LibTorch {version}", threads()));
        let cuda = 0..fused_ops::libtorch::cuda_devices();
        lines.extend(cuda.map(|index| format!("cuda {index}: NVIDIA device, LibTorch {version}")));
    }
    #[cfg(feature = "wgpu")]
    lines.extend(
        wgpu::adapters().iter().enumerate().map(|(index, adapter)| format!("wgpu {index}: {adapter}")),
    );
    #[cfg(feature = "cubecl-cuda")]
    lines.extend(cuda_devices().iter().enumerate().map(|(index, device)| {
        let name = device.identity().map_or_else(|| "NVIDIA device".into(), |id| id.name);
        format!("cubecl-cuda {index}: {name}")
    }));
    lines
}

#[cfg(any(feature = "flex", feature = "tch"))]
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(feature = "cubecl-cuda")]
fn cuda_devices() -> Vec<Device> {
    // Without a driver the enumeration itself panics.
    let found = std::panic::catch_unwind(|| Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec());
    found.unwrap_or_default()
}
