//! LibTorch's tensors on the CPU, which this crate's kernels read and write as they are.

#![allow(unsafe_code)]

use std::slice::{from_raw_parts, from_raw_parts_mut};
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

use burn::backend::TensorMetadata;
use burn::backend::libtorch::TchTensor;
use tch::Kind;

use super::shim;
use crate::host::Host;
use crate::kernels::brain::has_narrow_products;
use crate::kernels::panel::Element;

/// Panics unless kernels can walk the tensor's memory.
fn check<T: Element>(tensor: &TchTensor) {
    let plain = tensor.tensor.device() == tch::Device::Cpu && tensor.tensor.is_contiguous();
    assert!(
        plain && tensor.dtype() == T::dtype(),
        "kernels take tensors of the CPU without gaps, of {:?}",
        T::dtype()
    );
}

impl Host for TchTensor {
    fn flat(&self) -> Self {
        TchTensor::from_existing(self.tensor.contiguous(), self.storage.clone())
    }

    fn storage<T: Element>(&self) -> &[T] {
        check::<T>(self);
        match self.tensor.numel() {
            0 => &[],
            // SAFETY: without gaps, of this type and length, and borrowed as long as the slice.
            len => unsafe { from_raw_parts(self.tensor.data_ptr().cast(), len) },
        }
    }

    fn storage_mut<T: Element>(&mut self) -> &mut [T] {
        check::<T>(self);
        if self.can_mut() {
            // What another thread has read before it let go comes before what is written now.
            fence(Ordering::Acquire);
        } else {
            *self = Self::new(self.tensor.copy());
        }
        match self.tensor.numel() {
            0 => &mut [],
            // SAFETY: as above, and nothing else holds it.
            len => unsafe { from_raw_parts_mut(self.tensor.data_ptr().cast(), len) },
        }
    }

    fn new<T: Element>(values: Vec<T>, shape: &[usize]) -> Self {
        TchTensor::new(shim::adopt(values, shape))
    }
}

/// True where this crate multiplies tensors like this one, and not LibTorch: on the CPU, unless LibTorch has faster
/// units for 16-bit floats (AMX), or this crate has none.
pub fn multiplies(x: &TchTensor) -> bool {
    let theirs = || x.tensor.kind() == Kind::BFloat16 && (has_tiles() || !has_narrow_products());
    x.tensor.device() == tch::Device::Cpu && !theirs()
}

/// This processor multiplies tiles of 16-bit floats (AMX-BF16).
fn has_tiles() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{__cpuid, __cpuid_count};
            const FEATURES: u32 = 7;
            const AMX_BF16: u32 = 1 << 22;
            __cpuid(0).eax >= FEATURES && __cpuid_count(FEATURES, 0).edx & AMX_BF16 != 0
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            false
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_shared_until_they_are_changed() {
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let mut a = <TchTensor as Host>::new(values.clone(), &[2, 3]);
        let at = a.tensor.data_ptr();
        a.storage_mut::<f32>()[0] = 7.0;
        assert_eq!(a.tensor.data_ptr(), at, "nothing else holds it");
        let b = a.clone();
        a.flat().storage_mut::<f32>()[1] = 8.0;
        a.storage_mut::<f32>()[2] = 9.0;
        assert_eq!(b.storage::<f32>(), [7.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(a.storage::<f32>(), [7.0, 1.0, 9.0, 3.0, 4.0, 5.0]);
        let turned = TchTensor::from_existing(b.tensor.tr(), b.storage.clone());
        assert_eq!(turned.flat().storage::<f32>(), [7.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let second = TchTensor::from_existing(b.tensor.narrow(0, 1, 1), b.storage.clone());
        assert_eq!(second.flat().storage::<f32>(), [3.0, 4.0, 5.0]);
        let empty = <TchTensor as Host>::new(Vec::<f32>::new(), &[0, 3]);
        assert!(empty.storage::<f32>().is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn values_are_freed_with_their_tensor() {
        let resident = || {
            let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux tells it");
            pages.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a number") << 12
        };
        let before = resident();
        // A gigabyte in all.
        for i in 0..64 {
            let tensor = <TchTensor as Host>::new(vec![i as f32 + 1.0; 1 << 22], &[1 << 11, 1 << 11]);
            assert_eq!(tensor.clone().flat().storage::<f32>()[1 << 21], i as f32 + 1.0);
        }
        assert!(resident() < before + (512 << 20), "{} of {before} before", resident());
    }
}
