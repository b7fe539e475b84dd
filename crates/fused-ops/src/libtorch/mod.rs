//! Everything that is particular to LibTorch: devices, allocator thresholds, its tensors as this crate's kernels see
//! them, and what it does better on a device.
//!
//! `burn-tch` is deprecated and will not be part of Burn 0.23. What would take its place on NVIDIA devices is
//! `Device::cuda` with the generic operations of this crate (feature `cubecl-cuda`); nothing outside this module
//! and the `backend` crate would change.

#![allow(deprecated)]

mod attention;
mod head;
mod host;
mod ops;
mod optim;
mod paged;
mod rotary;
mod shim;

use burn::backend::DispatchDevice;
use burn::backend::LibTorch;
use burn::backend::libtorch::TchTensor;
use burn::tensor::{Device, Tensor};

pub use optim::{adamw, norm, row_norms};
pub use shim::version;

/// The CPU.
pub fn cpu() -> Device {
    Device::libtorch()
}

/// An NVIDIA device, whose kernels add in a fixed order where they can.
pub fn cuda(index: usize) -> Device {
    shim::deterministic();
    Device::libtorch_cuda(index)
}

/// Number of NVIDIA devices that LibTorch finds.
pub fn cuda_devices() -> usize {
    usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
}

/// Keeps freed memory for later use. LibTorch takes its buffers from the C library, which gives large ones back at
/// once: each step would pay for their pages again.
#[allow(unsafe_code)]
pub fn prepare() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1)] {
        // SAFETY: sets a number of the allocator; a value it does not take is ignored.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Bytes reserved at most so far on a CUDA device, and all of its memory.
pub fn memory(device: &Device) -> Option<(u64, u64)> {
    use burn::backend::libtorch::LibTorchDevice;
    match device.clone().inner().as_dispatch() {
        DispatchDevice::LibTorch(LibTorchDevice::Cuda(index)) => Some(shim::memory(*index)),
        _ => None,
    }
}

/// True when `tensor` is on LibTorch, without autodiff or with it.
pub fn holds<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.device().inner().as_dispatch(), DispatchDevice::LibTorch(_))
}

/// A tensor without autodiff as LibTorch has it.
fn primitive<const D: usize>(tensor: Tensor<D>) -> TchTensor {
    tensor.try_into_primitive::<LibTorch>().expect("asked before: a LibTorch tensor without autodiff")
}

fn tensor<const D: usize>(tensor: tch::Tensor) -> Tensor<D> {
    Tensor::from_primitive::<LibTorch>(TchTensor::new(tensor))
}

fn is_cpu(tensor: &TchTensor) -> bool {
    tensor.tensor.device() == tch::Device::Cpu
}

/// A new tensor of host values; on a CUDA device they are copied from pinned memory, which nothing waits for.
fn upload<T: tch::kind::Element>(values: &[T], shape: &[usize], device: tch::Device) -> tch::Tensor {
    let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
    let host = tch::Tensor::from_slice(values).reshape(&shape);
    match device {
        tch::Device::Cuda(index) => shim::upload(&host, index),
        _ => host,
    }
}
