//! Activations, gated or not, the rotary embedding, and casts.

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::panel::Element;
use super::simd::{CHUNK, exp, made, tanh, wide};
use crate::{Activation, Rotary};

/// Value and derivative of an activation.
trait Curve {
    fn at(x: f32) -> (f32, f32);
}

struct Silu;

impl Curve for Silu {
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        let s = 1.0 / (1.0 + exp(-x));
        (x * s, s * (1.0 + x * (1.0 - s)))
    }
}

struct GeluTanh;

impl Curve for GeluTanh {
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        // sqrt(2/π).
        const ROOT: f32 = 0.797_884_6;
        const CUBIC: f32 = 0.044_715;
        let t = tanh(ROOT * (x + CUBIC * x * x * x));
        let slope = ROOT * (1.0 + 3.0 * CUBIC * x * x);
        (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
    }
}

/// Calls a function generic over the curve.
macro_rules! with_curve {
    ($kind:expr, $function:ident($($argument:expr),*)) => {
        match $kind {
            Activation::Silu => $function::<Silu, _>($($argument),*),
            Activation::GeluTanh => $function::<GeluTanh, _>($($argument),*),
        }
    };
}

/// `a + b` in the type of `a`.
pub fn sum<T: Element, U: Element>(a: &[T], b: &[U]) -> Vec<T> {
    assert_eq!(a.len(), b.len(), "both have one shape");
    // SAFETY: every chunk is written.
    unsafe {
        made(a.len(), |out| {
            let chunks = out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK));
            chunks.for_each(|((out, a), b)| {
                wide(
                    #[inline(always)]
                    || {
                        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                            out.write(T::of(a.single() + b.single()));
                        }
                    },
                );
            });
        })
    }
}

/// `a += b`.
pub fn add<T: Element>(a: &mut [T], b: &[T]) {
    assert_eq!(a.len(), b.len(), "both have one shape");
    a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
        wide(
            #[inline(always)]
            || add_to(a, b),
        );
    });
}

#[inline(always)]
fn add_to<T: Element>(a: &mut [T], b: &[T]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a = T::of(a.single() + b.single()));
}

/// Adds `values`, rows of `cols` elements, to the rows `rows` of `base`. Those of one row are summed in their order
/// before: a table with nothing but these sums, added to `base`, has the same bits.
pub fn add_rows<T: Element>(base: &mut [T], rows: &[u32], values: &[T], cols: usize) {
    assert_eq!(values.len(), rows.len() * cols, "values for each row");
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&i| rows[i]);
    let mut sum = vec![T::default(); cols];
    for same in order.chunk_by(|&a, &b| rows[a] == rows[b]) {
        let to = &mut base[rows[same[0]] as usize * cols..][..cols];
        wide(
            #[inline(always)]
            || {
                sum.copy_from_slice(&values[same[0] * cols..][..cols]);
                for &i in &same[1..] {
                    add_to(&mut sum, &values[i * cols..][..cols]);
                }
                add_to(to, &sum);
            },
        );
    }
}

/// `out = activation(gate) * up`.
pub fn gated_forward<T: Element>(gate: &[T], up: &[T], kind: Activation) -> Vec<T> {
    with_curve!(kind, gated_values(gate, up))
}

/// Gradients of [`gated_forward`] with respect to `gate` and `up`.
pub fn gated_backward<T: Element>(grad: &[T], gate: &[T], up: &[T], kind: Activation) -> (Vec<T>, Vec<T>) {
    with_curve!(kind, gated_gradients(grad, gate, up))
}

/// `out = activation(x)`.
pub fn activate_forward<T: Element>(x: &[T], kind: Activation) -> Vec<T> {
    with_curve!(kind, values(x))
}

/// Gradient of [`activate_forward`].
pub fn activate_backward<T: Element>(grad: &[T], x: &[T], kind: Activation) -> Vec<T> {
    with_curve!(kind, gradients(grad, x))
}

fn gated_values<C: Curve, T: Element>(gate: &[T], up: &[T]) -> Vec<T> {
    assert_eq!(gate.len(), up.len(), "gate and up have one shape");
    // SAFETY: every chunk is written, here and below.
    unsafe {
        made(gate.len(), |out| {
            let chunks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
            chunks.for_each(|((out, gate), up)| {
                wide(
                    #[inline(always)]
                    || {
                        for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                            out.write(T::of(C::at(g.single()).0 * u.single()));
                        }
                    },
                );
            });
        })
    }
}

fn gated_gradients<C: Curve, T: Element>(grad: &[T], gate: &[T], up: &[T]) -> (Vec<T>, Vec<T>) {
    assert!(gate.len() == up.len() && grad.len() == up.len(), "gate, up and gradient have one shape");
    let mut dg = Vec::new();
    let chunks = grad.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    // SAFETY: as above.
    let du = unsafe {
        made(gate.len(), |du| {
            dg = made(gate.len(), |dg| {
                let out = du.par_chunks_mut(CHUNK).zip(dg.par_chunks_mut(CHUNK));
                out.zip(chunks).for_each(|((du, dg), ((d, gate), up))| {
                    wide(
                        #[inline(always)]
                        || {
                            for i in 0..d.len() {
                                let (value, slope) = C::at(gate[i].single());
                                let d = d[i].single();
                                du[i].write(T::of(d * value));
                                dg[i].write(T::of(d * up[i].single() * slope));
                            }
                        },
                    );
                });
            });
        })
    };
    (dg, du)
}

/// Applies `f` to each element.
fn map<T: Element, O: Copy + Send>(x: &[T], f: impl Fn(T) -> O + Copy + Send + Sync) -> Vec<O> {
    // SAFETY: as above.
    unsafe {
        made(x.len(), |out| {
            out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
                wide(
                    #[inline(always)]
                    || out.iter_mut().zip(x).for_each(|(out, &x)| _ = out.write(f(x))),
                );
            });
        })
    }
}

/// Values of another type.
pub fn cast<T: Element, O: Element>(x: &[T]) -> Vec<O> {
    map(
        x,
        #[inline(always)]
        |x| O::of(x.single()),
    )
}

/// `scale · x`.
pub fn scaled<T: Element>(x: &[T], scale: f32) -> Vec<T> {
    map(
        x,
        #[inline(always)]
        |x| T::of(scale * x.single()),
    )
}

fn values<C: Curve, T: Element>(x: &[T]) -> Vec<T> {
    map(
        x,
        #[inline(always)]
        |x| T::of(C::at(x.single()).0),
    )
}

fn gradients<C: Curve, T: Element>(grad: &[T], x: &[T]) -> Vec<T> {
    assert_eq!(grad.len(), x.len(), "an activation and its gradient have one shape");
    // SAFETY: as above.
    unsafe {
        made(x.len(), |dx| {
            let chunks = dx.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)).zip(x.par_chunks(CHUNK));
            chunks.for_each(|((dx, d), x)| {
                wide(
                    #[inline(always)]
                    || {
                        for ((dx, &d), &x) in dx.iter_mut().zip(d).zip(x) {
                            dx.write(T::of(d.single() * C::at(x.single()).1));
                        }
                    },
                );
            });
        })
    }
}

/// Rotates each pair `(x[i], x[i + half])` of every head by its token's angle; `sign` is 1 for the
/// forward pass and -1 for the backward pass (the transpose). Features beyond `2 · half` are copied.
pub fn rotate<T: Element>(x: &[T], features: usize, table: &Rotary, sign: f32) -> Vec<T> {
    let Rotary { half, dim, .. } = *table;
    let tokens = x.len() / features;
    assert!(
        features.is_multiple_of(dim) && table.cos.len() >= tokens * half && table.sin.len() >= tokens * half,
        "whole heads, and an angle for each token"
    );
    // SAFETY: every token has its angles, and every feature of it belongs to a head.
    unsafe {
        made(x.len(), |out| {
            let tokens = out.par_chunks_mut(features).zip(x.par_chunks(features)).with_min_len(16);
            tokens.zip(table.cos.par_chunks(half)).zip(table.sin.par_chunks(half)).for_each(
                |(((out, x), cos), sin)| {
                    wide(
                        #[inline(always)]
                        || {
                            for (out, x) in out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
                                let (turned, rest) = out.split_at_mut(2 * half);
                                rest.iter_mut()
                                    .zip(&x[2 * half..])
                                    .for_each(|(to, &from)| _ = to.write(from));
                                let (out_a, out_b) = turned.split_at_mut(half);
                                let (a, b) = x[..2 * half].split_at(half);
                                for i in 0..half {
                                    let s = sign * sin[i];
                                    let (a, b) = (a[i].single(), b[i].single());
                                    out_a[i].write(T::of(a * cos[i] - b * s));
                                    out_b[i].write(T::of(b * cos[i] + a * s));
                                }
                            }
                        },
                    );
                },
            );
        })
    }
}
