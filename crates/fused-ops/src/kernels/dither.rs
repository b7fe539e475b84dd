//! Weights of 32 bits rounded to 16 without losing what training changes.
//!
//! A step of training moves a weight by much less than the distance between two 16-bit floats. Rounded to the
//! nearest, weights that came from a 16-bit checkpoint stay where they are, and products do not see the training at
//! all. Here each weight has a threshold of its own that says from which fraction on it is rounded up: the fraction
//! of the weights that are rounded up is the fraction of the distance, so that sums over many weights are right. The
//! threshold depends on the place of the weight alone: the same weights give the same results in every pass and run,
//! and a weight that is a 16-bit float already stays exactly that.

#![allow(unsafe_code)]

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::elementwise::cast;
use super::panel::Element;
use super::simd::{CHUNK, made, wide};

/// Threshold of element `i`, 16 bits (the finalizer of MurmurHash3).
#[inline(always)]
fn threshold(i: u32) -> u32 {
    let i = (i ^ (i >> 16)).wrapping_mul(0x85eb_ca6b);
    let i = (i ^ (i >> 13)).wrapping_mul(0xc2b2_ae35);
    i >> 16
}

/// A weight as it is held.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    Single(&'a [f32]),
    /// Of a model that is not trained.
    Narrow(&'a [bf16]),
}

/// Types that products are computed in.
pub trait Computed: Element {
    /// These elements of a weight.
    fn of_weight(weight: Weight<'_>, part: Range<usize>) -> Cow<'_, [Self]>;
}

impl Computed for f32 {
    fn of_weight(weight: Weight<'_>, part: Range<usize>) -> Cow<'_, [f32]> {
        match weight {
            Weight::Single(values) => Cow::Borrowed(&values[part]),
            Weight::Narrow(values) => Cow::Owned(cast(&values[part])),
        }
    }
}

impl Computed for bf16 {
    fn of_weight(weight: Weight<'_>, part: Range<usize>) -> Cow<'_, [bf16]> {
        match weight {
            Weight::Single(values) => {
                // SAFETY: every value is written.
                Cow::Owned(unsafe {
                    made(part.len(), |out| dithered(&values[part.clone()], part.start, out))
                })
            }
            Weight::Narrow(values) => Cow::Borrowed(&values[part]),
        }
    }
}

/// Rounds `values`, the elements from `first` on of a weight; writes all of `out`.
pub fn dithered(values: &[f32], first: usize, out: &mut [MaybeUninit<bf16>]) {
    assert_eq!(values.len(), out.len(), "a place for each value");
    out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (out, values))| {
        let first = (first + chunk * CHUNK) as u32;
        wide(
            #[inline(always)]
            || {
                for (i, (out, value)) in out.iter_mut().zip(values).enumerate() {
                    let bits = value.to_bits();
                    // The carry rounds away from zero; infinities and NaNs have nothing to round.
                    let special = bits & 0x7f80_0000 == 0x7f80_0000;
                    let up = if special { 0 } else { threshold(first.wrapping_add(i as u32)) };
                    // What is no number stays none without its lower half.
                    let quiet = if value.is_nan() { 0x40 } else { 0 };
                    out.write(bf16::from_bits((bits.wrapping_add(up) >> 16) as u16 | quiet));
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(values: &[f32]) -> Vec<f32> {
        bf16::of_weight(Weight::Single(values), 0..values.len()).iter().map(|v| v.to_f32()).collect()
    }

    #[test]
    fn brain_floats_stay_and_others_are_right_on_average() {
        let exact: Vec<f32> = (0..1000).map(|i| bf16::from_f32(i as f32 * 0.37 - 150.0).to_f32()).collect();
        assert_eq!(rounded(&exact), exact);
        // A hundredth of the distance to the next: nearest rounding would leave them all.
        let moved: Vec<f32> = vec![1.0 + 0.007_812_5 / 100.0; 1 << 20];
        let mean = rounded(&moved).iter().map(|&v| f64::from(v)).sum::<f64>() / f64::from(1 << 20);
        assert!((mean - f64::from(moved[0])).abs() < 2e-6, "{mean}");
        let negative: Vec<f32> = moved.iter().map(|v| -v).collect();
        let mean = rounded(&negative).iter().map(|&v| f64::from(v)).sum::<f64>() / f64::from(1 << 20);
        assert!((mean + f64::from(moved[0])).abs() < 2e-6, "{mean}");
        assert!(rounded(&[f32::NAN, f32::from_bits(0x7f80_0001)]).iter().all(|v| v.is_nan()));
        assert!(rounded(&[f32::INFINITY])[0].is_infinite());
    }
}
