//! Rotary embedding on a device.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use burn::backend::libtorch::TchTensor;
use tch::{Device, Tensor};

use super::upload;
use crate::Rotary;

/// The table that was last asked for, on its device: every layer of a pass has the same.
struct Last {
    of: Weak<[f32]>,
    device: Device,
    tables: [Tensor; 3],
}

thread_local! {
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

/// Cosines, sines and the sines' opposites `[tokens, 1, half]` on a device.
fn on_device(table: &Rotary, tokens: usize, device: Device) -> [Tensor; 3] {
    LAST.with_borrow_mut(|last| {
        if let Some(last) = last
            && last.device == device
            && last.of.upgrade().is_some_and(|known| Arc::ptr_eq(&known, &table.cos))
        {
            return last.tables.each_ref().map(Tensor::shallow_clone);
        }
        let [cos, sin] =
            [&table.cos, &table.sin].map(|values| upload(values, &[tokens, 1, table.half], device));
        let opposite = -&sin;
        let tables = [cos, sin, opposite];
        let found = tables.each_ref().map(Tensor::shallow_clone);
        *last = Some(Last { of: Arc::downgrade(&table.cos), device, tables });
        found
    })
}

/// See [`crate::rotary`]; computed in `f32`.
pub fn rotary(x: &TchTensor, table: &Rotary, sign: f32) -> TchTensor {
    let (shape, half, dim) = (x.tensor.size(), table.half as i64, table.dim as i64);
    let [cos, sin, opposite] = on_device(table, shape[0] as usize, x.tensor.device());
    let heads = x.tensor.contiguous().view([shape[0], shape[1] / dim, dim]);
    let out = heads.empty_like();
    let (a, b) = (heads.narrow(2, 0, half), heads.narrow(2, half, half));
    let (of_first, of_second) = if sign > 0.0 { (&opposite, &sin) } else { (&sin, &opposite) };
    let rotated = |own: &Tensor, other: &Tensor, sin: &Tensor| (own * &cos).addcmul_(other, sin);
    out.narrow(2, 0, half).copy_(&rotated(&a, &b, of_first));
    out.narrow(2, half, half).copy_(&rotated(&b, &a, of_second));
    if dim > 2 * half {
        out.narrow(2, 2 * half, dim - 2 * half).copy_(&heads.narrow(2, 2 * half, dim - 2 * half));
    }
    TchTensor::new(out.view(shape.as_slice()))
}
