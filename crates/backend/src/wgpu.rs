//! Adapters of Vulkan, Metal or DirectX 12.

use std::collections::HashMap;
use std::fmt::{Display, Formatter};
use std::future::Future;
use std::pin::pin;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};

use burn::tensor::wgpu::wgpu;
use burn::tensor::{Device, DeviceKind};
use wgpu::{AdapterInfo, Backends, DeviceType, Instance, InstanceDescriptor};

use crate::devices::Opened;
use crate::{Backend, Error};

/// What an adapter says of itself, and how it is asked for.
pub struct Adapter {
    info: AdapterInfo,
    kind: DeviceKind,
    /// Largest buffer that can be bound, in bytes.
    largest: u64,
}

impl Display for Adapter {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        let AdapterInfo { name, backend, .. } = &self.info;
        write!(
            f,
            "{name} ({:?}, {backend:?}), tensors of up to {} MiB",
            self.info.device_type,
            self.largest >> 20
        )
    }
}

/// Devices that were opened: the runtime opens each once.
static OPENED: Mutex<Option<HashMap<usize, Opened>>> = Mutex::new(None);

/// All adapters, discrete ones first and software last.
pub fn adapters() -> Vec<Adapter> {
    let apis = if cfg!(target_vendor = "apple") { Backends::METAL } else { Backends::VULKAN };
    let found = of_api(apis);
    if found.is_empty() && cfg!(windows) { of_api(Backends::DX12) } else { found }
}

fn of_api(backends: Backends) -> Vec<Adapter> {
    let instance =
        Instance::new(InstanceDescriptor { backends, ..InstanceDescriptor::new_without_display_handle() });
    let mut all = Vec::new();
    let found = block_on(instance.enumerate_adapters(backends));
    let order = [DeviceType::DiscreteGpu, DeviceType::IntegratedGpu, DeviceType::VirtualGpu, DeviceType::Cpu];
    for device_type in order {
        let of_type = found.iter().filter(|adapter| adapter.get_info().device_type == device_type);
        all.extend(of_type.enumerate().map(|(index, adapter)| {
            let limits = adapter.limits();
            Adapter {
                info: adapter.get_info(),
                kind: match device_type {
                    DeviceType::DiscreteGpu => DeviceKind::DiscreteGpu(index),
                    DeviceType::IntegratedGpu => DeviceKind::IntegratedGpu(index),
                    DeviceType::VirtualGpu => DeviceKind::VirtualGpu(index),
                    _ => DeviceKind::Cpu,
                },
                largest: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
            }
        }));
    }
    // There is only one way to ask for a software adapter.
    let software = all.iter().position(|adapter| adapter.kind == DeviceKind::Cpu);
    all.truncate(software.map_or(all.len(), |first| first + 1));
    all
}

/// Native adapters are enumerated without waiting for anything.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::yield_now();
    }
}

/// Opens adapter `index`, or the first.
pub fn open(index: Option<usize>) -> Result<Opened, Error> {
    let index = index.unwrap_or(0);
    let mut opened = OPENED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let opened = opened.get_or_insert_default();
    if let Some(known) = opened.get(&index) {
        return Ok(known.clone());
    }
    let unusable = |reason: String| Error::Unusable { backend: Backend::Wgpu, reason };
    let all = adapters();
    if all.is_empty() {
        return Err(unusable(
            "no Vulkan, Metal or DirectX 12 adapter is found; install the graphics driver, or Debian's \
             mesa-vulkan-drivers for a software adapter"
                .into(),
        ));
    }
    Backend::Wgpu.in_range(index, all.len())?;
    let adapter = &all[index];
    let (device, setup) = Device::wgpu_options()
        .device_kind(adapter.kind.clone())
        .init_with_setup()
        .map_err(|error| unusable(format!("{adapter} cannot be opened: {error}")))?;
    let limits = setup.device.limits();
    let largest = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
    let name = format!("wgpu ({}, {:?})", adapter.info.name, adapter.info.backend);
    let new = Opened { device, backend: Backend::Wgpu, name, largest_tensor: Some(largest) };
    Ok(opened.entry(index).or_insert(new).clone())
}
