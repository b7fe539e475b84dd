//! Loops that the compiler vectorises for the instruction set found at run time.
//!
//! `pulp` picks the widest set the processor has; the loops are plain Rust, written so that they
//! vectorise: no branch, and sums kept in independent lanes.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// Lanes of a reduction. Wide enough for two AVX-512 registers.
const LANES: usize = 32;

/// Elements handled by one parallel task of an element-wise loop.
pub const CHUNK: usize = 16 * 1024;

/// Runs `body` compiled for the widest instruction set of this processor. `body` must be
/// `#[inline(always)]` down to the loops.
#[inline]
pub fn wide<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// A vector of `len` values that `fill` writes, without writing zeros first.
///
/// # Safety
/// `fill` must write every one of them.
pub unsafe fn made<T>(len: usize, fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    fill(&mut out.spare_capacity_mut()[..len]);
    // SAFETY: the caller's promise.
    unsafe { out.set_len(len) };
    out
}

/// `e^x` to 1 or 2 units in the last place over the finite range (Cephes `expf`); below -87 it is 0 to
/// within the smallest normal number.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    // Adding and subtracting 1.5·2²³ rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.0);
    let rounded = x * LOG2E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_1e-1;
    let e = p * r * r + r + 1.0;
    // The last bits of `rounded` are the integer: a conversion would not vectorise.
    let shift = rounded.to_bits().wrapping_sub(ROUND.to_bits()) << 23;
    f32::from_bits(e.to_bits().wrapping_add(shift))
}

/// `tanh(x)` to about 1e-7 relative: a series near zero, where the quotient would cancel.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let (a, s) = (x.abs(), x * x);
    let series = a * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))));
    let e = exp(-2.0 * a);
    let value = if a < 0.25 { series } else { (1.0 - e) / (1.0 + e) };
    value.copysign(x)
}

/// `cap · tanh(x / cap)`.
#[inline(always)]
pub fn softcap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// Derivative of [`softcap`], from its value.
#[inline(always)]
pub fn softcap_slope(value: f32, cap: f32) -> f32 {
    let t = value / cap;
    1.0 - t * t
}

/// Independent partial results, as one or two registers hold them.
type Lanes = [f32; LANES];

#[inline(always)]
fn each(mut a: Lanes, b: &Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    // Not `array::from_fn`, which is not inlined and so compiled for any processor.
    for i in 0..LANES {
        a[i] = f(a[i], b[i]);
    }
    a
}

/// Sum of `f(x)` in fixed lanes: the same result whatever the instruction set.
#[inline(always)]
pub fn sum_by(xs: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let [sum] = sums_by(xs, |x| [f(x)]);
    sum
}

/// Several such sums of one pass.
#[inline(always)]
pub fn sums_by<const K: usize>(xs: &[f32], f: impl Fn(f32) -> [f32; K]) -> [f32; K] {
    let mut lanes = [[0.0; LANES]; K];
    let (blocks, rest) = xs.as_chunks::<LANES>();
    for block in blocks {
        let mut values = [[0.0; LANES]; K];
        for i in 0..LANES {
            let value = f(block[i]);
            for k in 0..K {
                values[k][i] = value[k];
            }
        }
        for k in 0..K {
            lanes[k] = each(lanes[k], &values[k], |lane, value| lane + value);
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        let value = f(x);
        for k in 0..K {
            lanes[k][i] += value[k];
        }
    }
    lanes.map(|lanes| fold(lanes, |a, b| a + b))
}

/// Sum of `f(x, y)` over two slices of one length, in fixed lanes.
#[inline(always)]
pub fn sum_by2(xs: &[f32], ys: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, rest_a), (b, rest_b)) = (xs.as_chunks::<LANES>(), ys.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        lanes = each(lanes, &each(*a, b, &f), |lane, value| lane + value);
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(rest_a).zip(rest_b) {
        *lane += f(x, y);
    }
    fold(lanes, |a, b| a + b)
}

/// Sum of `f(x)` and of `f(x) · y` over two slices of one length, in fixed lanes.
#[inline(always)]
pub fn weighted_sums(xs: &[f32], ys: &[f32], f: impl Fn(f32) -> f32) -> (f32, f32) {
    let (mut sums, mut weighted) = ([0.0; LANES], [0.0; LANES]);
    let ((a, rest_a), (b, rest_b)) = (xs.as_chunks::<LANES>(), ys.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        let mut values = *a;
        for value in &mut values {
            *value = f(*value);
        }
        sums = each(sums, &values, |sum, value| sum + value);
        weighted = each(weighted, &each(values, b, |x, y| x * y), |sum, value| sum + value);
    }
    for (i, (&x, &y)) in rest_a.iter().zip(rest_b).enumerate() {
        let value = f(x);
        sums[i] += value;
        weighted[i] += value * y;
    }
    (fold(sums, |a, b| a + b), fold(weighted, |a, b| a + b))
}

/// Largest element; negative infinity for an empty slice. NaNs are ignored.
#[inline(always)]
pub fn max(xs: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = xs.as_chunks::<LANES>();
    for block in blocks {
        lanes = each(lanes, block, larger);
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, x);
    }
    fold(lanes, larger)
}

/// Puts `of(e^(scale · x - shift))` of each `x` into `to` and returns the sum of the exponentials, in fixed lanes.
#[inline(always)]
pub fn exps<T>(xs: &[f32], (scale, shift): (f32, f32), to: &mut [T], of: impl Fn(f32) -> T) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((blocks, rest), (to, to_rest)) = (xs.as_chunks::<LANES>(), to.as_chunks_mut::<LANES>());
    for (block, to) in blocks.iter().zip(to) {
        let mut values = *block;
        for i in 0..LANES {
            values[i] = exp(scale * values[i] - shift);
            to[i] = of(values[i]);
        }
        lanes = each(lanes, &values, |lane, value| lane + value);
    }
    for ((lane, &x), to) in lanes.iter_mut().zip(rest).zip(to_rest) {
        let value = exp(scale * x - shift);
        *to = of(value);
        *lane += value;
    }
    fold(lanes, |a, b| a + b)
}

#[inline(always)]
fn fold(mut lanes: Lanes, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulps() {
        let mut worst = 0.0_f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - want) / want).abs());
        }
        assert!(worst < 2.4e-7, "worst relative error {worst:e}");
        assert!(exp(f32::NAN).is_nan() && exp(f32::NEG_INFINITY) < 1.3e-38 && exp(100.0) > 1e38);
    }

    #[test]
    fn exponentials_are_put_where_they_belong() {
        for count in [5, 64, 1003] {
            let xs: Vec<f32> = (0..count).map(|i| ((i * 37) % 101) as f32 * 0.7 - 7.0).collect();
            let top = max(&xs);
            let mut to = vec![0.0; count];
            let sum = exps(&xs, (0.3, 0.3 * top), &mut to, |e| 2.0 * e);
            let mut want = 0.0;
            for (&x, &to) in xs.iter().zip(&to) {
                let e = exp(0.3 * x - 0.3 * top);
                want += f64::from(e);
                assert_eq!(to, 2.0 * e, "{x} of {count}");
                assert!(x < top || to == 2.0, "the largest is 1");
            }
            assert!((f64::from(sum) - want).abs() < 1e-5 * want, "{sum} {want}");
        }
    }

    #[test]
    fn reductions_match_a_plain_loop() {
        let xs: Vec<f32> = (0..1003).map(|i| ((i * 37) % 101) as f32 * 0.25 - 7.0).collect();
        assert_eq!(max(&xs), 18.0);
        let want: f32 = xs.iter().sum();
        assert!((sum_by(&xs, |x| x) - want).abs() < 1e-2);
        assert!((sum_by2(&xs, &xs, |a, b| a - b)).abs() < 1e-6);
        let (sum, squares) = weighted_sums(&xs, &xs, |x| x);
        let want_squares: f32 = xs.iter().map(|x| x * x).sum();
        assert!((sum - want).abs() < 1e-2 && (squares - want_squares).abs() < 0.1);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
