//! The C++ functions of `shim.cpp`, made safe.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;

use burn::tensor::DType;
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::kernels::panel::Element;

unsafe extern "C" {
    fn shim_free(text: *mut c_char);
    fn shim_version() -> *const c_char;
    fn shim_adamw(
        parameters: *const *const C_tensor,
        gradients: *const *const C_tensor,
        first: *const *const C_tensor,
        second: *const *const C_tensor,
        count: usize,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        divisor: *const C_tensor,
    ) -> *mut c_char;
    fn shim_norm(tensors: *const *const C_tensor, count: usize, out: *mut *mut C_tensor) -> *mut c_char;
    fn shim_flash_forward(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        starts_q: *const C_tensor,
        starts_k: *const C_tensor,
        max_q: i64,
        max_k: i64,
        scale: f64,
        window: i64,
        out: *mut *mut C_tensor,
        lse: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn shim_flash_backward(
        grad: *const C_tensor,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        out: *const C_tensor,
        lse: *const C_tensor,
        starts_q: *const C_tensor,
        starts_k: *const C_tensor,
        max_q: i64,
        max_k: i64,
        scale: f64,
        window: i64,
        dq: *mut *mut C_tensor,
        dk: *mut *mut C_tensor,
        dv: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn shim_efficient_forward(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        starts_q: *const C_tensor,
        starts_k: *const C_tensor,
        max_q: i64,
        max_k: i64,
        scale: f64,
        window: i64,
        out: *mut *mut C_tensor,
        lse: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn shim_efficient_backward(
        grad: *const C_tensor,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        out: *const C_tensor,
        lse: *const C_tensor,
        starts_q: *const C_tensor,
        starts_k: *const C_tensor,
        max_q: i64,
        max_k: i64,
        scale: f64,
        window: i64,
        dq: *mut *mut C_tensor,
        dk: *mut *mut C_tensor,
        dv: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn shim_rms_norm(
        x: *const C_tensor,
        w: *const C_tensor,
        eps: f64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn shim_rms_norm_backward(
        grad: *const C_tensor,
        x: *const C_tensor,
        w: *const C_tensor,
        eps: f64,
        dx: *mut *mut C_tensor,
        dw: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn shim_adopt(
        data: *mut c_void,
        sizes: *const i64,
        dimensions: usize,
        narrow: bool,
        release: unsafe extern "C" fn(*mut c_void),
        owner: *mut c_void,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn shim_upload(host: *const C_tensor, device: c_int, out: *mut *mut C_tensor) -> *mut c_char;
    fn shim_dither(weight: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    fn shim_deterministic() -> *mut c_char;
    fn shim_memory(device: c_int, peak: *mut u64, total: *mut u64) -> *mut c_char;
}

/// Version of LibTorch that this was built with, such as 2.9.0.
pub fn version() -> String {
    // SAFETY: a constant of the program.
    unsafe { CStr::from_ptr(shim_version()) }.to_string_lossy().into_owned()
}

/// Panics with LibTorch's own words, as its Rust bindings do: a shape or a data type is wrong.
fn check(message: *mut c_char) {
    if message.is_null() {
        return;
    }
    // SAFETY: a string that the function has made for us.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: not used after this.
    unsafe { shim_free(message) };
    panic!("LibTorch: {text}");
}

fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

/// A tensor that a function has made.
fn owned(tensor: *mut C_tensor) -> Tensor {
    // SAFETY: made with `new` and given to us.
    unsafe { Tensor::from_ptr(tensor) }
}

/// Settings of [`adamw`].
pub struct AdamW {
    pub step: f64,
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub eps: f64,
}

/// One step in place of parameters with their gradients and two moments.
pub fn adamw(opt: &AdamW, [parameters, gradients, first, second]: [&[Tensor]; 4], divisor: Option<&Tensor>) {
    let all = [parameters, gradients, first, second].map(pointers);
    let divisor = divisor.map_or(std::ptr::null(), Tensor::as_ptr);
    // SAFETY: the four lists have `count` tensors each, which live as long as the call.
    check(unsafe {
        shim_adamw(
            all[0].as_ptr(),
            all[1].as_ptr(),
            all[2].as_ptr(),
            all[3].as_ptr(),
            parameters.len(),
            opt.step,
            opt.lr,
            opt.beta1,
            opt.beta2,
            opt.weight_decay,
            opt.eps,
            divisor,
        )
    });
}

/// Euclidean norm of all elements of all tensors, `[1]`.
pub fn norm(tensors: &[Tensor]) -> Tensor {
    let (all, mut out) = (pointers(tensors), null_mut());
    // SAFETY: the tensors live as long as the call.
    check(unsafe { shim_norm(all.as_ptr(), all.len(), &raw mut out) });
    owned(out)
}

/// Lengths of a batch of sequences for [`flash`].
pub struct Lengths {
    /// First query of each sequence and the number of all, `i32`.
    pub starts_q: Tensor,
    /// The same of keys.
    pub starts_k: Tensor,
    pub max_q: i64,
    pub max_k: i64,
}

/// Output and log-sum-exp of causal attention, aligned at the last key; `window` 0 has none. In 32 bits keys have as
/// many heads as queries.
pub fn flash([q, k, v]: [&Tensor; 3], lengths: &Lengths, scale: f64, window: i64) -> (Tensor, Tensor) {
    let kernel = if q.kind() == Kind::Float { shim_efficient_forward } else { shim_flash_forward };
    let (mut out, mut lse) = (null_mut(), null_mut());
    // SAFETY: the tensors live as long as the call.
    check(unsafe {
        kernel(
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            lengths.starts_q.as_ptr(),
            lengths.starts_k.as_ptr(),
            lengths.max_q,
            lengths.max_k,
            scale,
            window,
            &raw mut out,
            &raw mut lse,
        )
    });
    (owned(out), owned(lse))
}

/// Gradients of the operands of [`flash`].
pub fn flash_backward(
    grad: &Tensor,
    [q, k, v]: [&Tensor; 3],
    [out, lse]: [&Tensor; 2],
    lengths: &Lengths,
    scale: f64,
    window: i64,
) -> [Tensor; 3] {
    let [mut dq, mut dk, mut dv] = [null_mut(); 3];
    let kernel = if q.kind() == Kind::Float { shim_efficient_backward } else { shim_flash_backward };
    // SAFETY: the tensors live as long as the call.
    check(unsafe {
        kernel(
            grad.as_ptr(),
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            out.as_ptr(),
            lse.as_ptr(),
            lengths.starts_q.as_ptr(),
            lengths.starts_k.as_ptr(),
            lengths.max_q,
            lengths.max_k,
            scale,
            window,
            &raw mut dq,
            &raw mut dk,
            &raw mut dv,
        )
    });
    [dq, dk, dv].map(owned)
}

/// Root-mean-square norm of rows of 32 bits.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
    let mut out = null_mut();
    // SAFETY: the tensors live as long as the call.
    check(unsafe { shim_rms_norm(x.as_ptr(), w.as_ptr(), f64::from(eps), &raw mut out) });
    owned(out)
}

/// Its gradients of the rows and of the weight.
pub fn rms_norm_backward(grad: &Tensor, x: &Tensor, w: &Tensor, eps: f32) -> [Tensor; 2] {
    let [mut dx, mut dw] = [null_mut(); 2];
    let eps = f64::from(eps);
    // SAFETY: the tensors live as long as the call.
    check(unsafe {
        shim_rms_norm_backward(grad.as_ptr(), x.as_ptr(), w.as_ptr(), eps, &raw mut dx, &raw mut dw)
    });
    [dx, dw].map(owned)
}

/// A tensor of the CPU whose memory is that of these values, freed with it.
pub fn adopt<T: Element>(values: Vec<T>, shape: &[usize]) -> Tensor {
    unsafe extern "C" fn release<T>(owner: *mut c_void) {
        // SAFETY: the box that was made below, given back once.
        drop(unsafe { Box::from_raw(owner.cast::<Vec<T>>()) });
    }
    assert_eq!(values.len(), shape.iter().product::<usize>(), "a place for each value");
    let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
    let (mut owner, narrow, mut out) = (Box::new(values), T::dtype() == DType::BF16, null_mut());
    let data = owner.as_mut_ptr().cast();
    let owner = Box::into_raw(owner).cast();
    // SAFETY: the tensor has so many elements of this type, and owns them from now on.
    check(unsafe {
        shim_adopt(data, shape.as_ptr(), shape.len(), narrow, release::<T>, owner, &raw mut out)
    });
    owned(out)
}

/// A tensor of the host on a CUDA device, copied from pinned memory, which nothing waits for.
pub fn upload(host: &Tensor, device: usize) -> Tensor {
    let mut out = null_mut();
    // SAFETY: the tensor lives as long as the call; the copy keeps what it reads.
    check(unsafe { shim_upload(host.as_ptr(), device as c_int, &raw mut out) });
    owned(out)
}

/// A weight of 32 bits as [`crate::kernels::dither`] rounds it, on its device.
pub fn dither(weight: &Tensor) -> Tensor {
    let mut out = null_mut();
    // SAFETY: the tensor lives as long as the call.
    check(unsafe { shim_dither(weight.as_ptr(), &raw mut out) });
    owned(out)
}

/// Asks LibTorch for kernels whose results do not depend on the order of threads.
pub fn deterministic() {
    // SAFETY: sets a switch.
    check(unsafe { shim_deterministic() });
}

/// Bytes reserved at most on a CUDA device, and all of its memory; 0 where not known.
pub fn memory(device: usize) -> (u64, u64) {
    let (mut peak, mut total) = (0, 0);
    // SAFETY: two numbers are written.
    check(unsafe { shim_memory(device as c_int, &raw mut peak, &raw mut total) });
    (peak, total)
}
