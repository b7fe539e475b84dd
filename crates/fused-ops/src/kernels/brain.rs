//! Products of 16-bit brain floats with panels ([`super::panel`]), summed in 32 bits.

#![allow(unsafe_code)]
// Plain indices keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;

use super::panel::{Element, Rows, WIDTH, ahead, check};
use super::simd::{CHUNK, wide};

/// This processor multiplies pairs of 16-bit floats and sums them in 32 bits.
pub fn has_narrow_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// To the nearest, ties to even, in a form that vectorises. Not-a-number stays one.
#[inline(always)]
fn rounded(value: f32) -> bf16 {
    let bits = value.to_bits();
    let up = (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16;
    bf16::from_bits(if value.is_nan() { 0x7FC0 } else { up })
}

impl Element for bf16 {
    const GROUP: usize = 2;

    #[inline(always)]
    fn of(value: f32) -> Self {
        rounded(value)
    }

    #[inline(always)]
    fn single(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn has_panels() -> bool {
        has_narrow_products()
    }

    #[inline(always)]
    unsafe fn beside<const W: usize>(from: *const bf16, stride: usize, count: usize, to: *mut bf16) {
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.cast::<[bf16; 2]>();
            if count == W {
                let first = from.cast::<[bf16; W]>().read_unaligned();
                let second = from.add(stride).cast::<[bf16; W]>().read_unaligned();
                for i in 0..W {
                    to.add(i).write_unaligned([first[i], second[i]]);
                }
            } else {
                (0..count).for_each(|i| to.add(i).write_unaligned([*from.add(i), *from.add(stride + i)]));
            }
        }
    }

    fn rows(values: &[f32], k: usize) -> Cow<'_, [bf16]> {
        let inner = k.next_multiple_of(2);
        let mut out = vec![bf16::ZERO; values.len() / k * inner];
        let part = (CHUNK / k).max(1);
        let parts = out.par_chunks_mut(part * inner).zip(values.par_chunks(part * k));
        parts.for_each(|(to, from)| {
            wide(
                #[inline(always)]
                || {
                    for (to, from) in to.chunks_exact_mut(inner).zip(from.chunks_exact(k)) {
                        to.iter_mut().zip(from).for_each(|(to, &from)| *to = rounded(from));
                    }
                },
            );
        });
        Cow::Owned(out)
    }

    unsafe fn product(a: Rows<bf16>, b: &[bf16], b_stride: usize, c: *mut f32, stride: usize, add: bool) {
        check(&a, b, b_stride);
        #[cfg(target_arch = "x86_64")]
        if has_narrow_products() {
            // SAFETY: the processor has the instructions; `check` has seen to the operands.
            return unsafe { narrow::product(a, b.as_ptr().cast(), b_stride, c, stride, add) };
        }
        // SAFETY: as the caller's.
        unsafe { widened(a, b, b_stride, c, stride, add) }
    }

    unsafe fn rounded_product(a: Rows<bf16>, b: &[bf16], c: *mut bf16, stride: usize, add: bool) -> bool {
        check(&a, b, WIDTH);
        #[cfg(target_arch = "x86_64")]
        if has_narrow_products() {
            // SAFETY: as above; the places are the caller's.
            unsafe { narrow::product(a, b.as_ptr().cast(), WIDTH, c, stride, add) };
            return true;
        }
        false
    }
}

/// The same product in 32 bits.
unsafe fn widened(a: Rows<bf16>, b: &[bf16], b_stride: usize, c: *mut f32, stride: usize, add: bool) {
    let groups = a.k.div_ceil(2);
    let mut panel = vec![0.0; groups * 2 * WIDTH];
    for group in 0..groups {
        for column in 0..WIDTH {
            for i in 0..2 {
                panel[(2 * group + i) * WIDTH + column] = b[2 * (group * b_stride + column) + i].to_f32();
            }
        }
    }
    let of_row = |row| (0..groups).flat_map(move |i| &a.data[row * a.stride + i * a.group..][..2]);
    let wide: Vec<f32> = (0..a.count).flat_map(of_row).map(|value| value.to_f32()).collect();
    let a = Rows { data: &wide, stride: 2 * groups, group: 1, count: a.count, k: 2 * groups };
    // SAFETY: as the caller's.
    unsafe { f32::product(a, &panel, WIDTH, c, stride, add) }
}

#[cfg(target_arch = "x86_64")]
mod narrow {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_castsi512_ps,
        _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_set1_epi32, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
    };
    use std::mem::transmute;

    use half::bf16;

    use super::{Rows, ahead};

    /// What sums are written as. Those of 16 bits are rounded by the processor, to the nearest like all others, but that
    /// it takes numbers below the smallest normal one for 0.
    pub trait Sums {
        /// Those of a row and a panel, or added to what is there.
        ///
        /// # Safety
        /// The processor has the instructions; all of them have a place.
        unsafe fn put(to: *mut Self, sums: [__m512; 2], add: bool);
    }

    impl Sums for f32 {
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn put(to: *mut f32, [left, right]: [__m512; 2], add: bool) {
            // SAFETY: the caller's promise.
            unsafe {
                for (to, sums) in [(to, left), (to.add(16), right)] {
                    let sums = if add { _mm512_add_ps(_mm512_loadu_ps(to), sums) } else { sums };
                    _mm512_storeu_ps(to, sums);
                }
            }
        }
    }

    impl Sums for bf16 {
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn put(to: *mut bf16, [mut left, mut right]: [__m512; 2], add: bool) {
            // SAFETY: the caller's promise.
            unsafe {
                if add {
                    for (from, sums) in [(to, &mut left), (to.add(16), &mut right)] {
                        let single = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                        *sums = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(single)), *sums);
                    }
                }
                _mm512_storeu_si512(
                    to.cast(),
                    transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(right, left)),
                );
            }
        }
    }

    /// Operands of [`tile`]; pairs of values are read as one number.
    struct Operands {
        a: *const i32,
        a_stride: usize,
        a_group: usize,
        groups: usize,
        b: *const i32,
        b_stride: usize,
        stride: usize,
        add: bool,
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn product<C: Sums>(
        a: Rows<bf16>,
        b: *const i32,
        b_stride: usize,
        c: *mut C,
        stride: usize,
        add: bool,
    ) {
        let mut row = 0;
        // SAFETY: the caller has checked that the operands hold what is read and written.
        unsafe {
            macro_rules! tiles {
                ($rows:literal) => {
                    while a.count - row >= $rows {
                        let first = a.data.as_ptr().add(row * a.stride).cast();
                        let groups = a.k.div_ceil(2);
                        let (a_stride, a_group) = (a.stride, a.group);
                        let x = Operands { a: first, a_stride, a_group, groups, b, b_stride, stride, add };
                        tile::<$rows, C>(&x, c.add(row * stride));
                        row += $rows;
                    }
                };
            }
            tiles!(12);
            tiles!(6);
            tiles!(4);
            tiles!(3);
            tiles!(2);
            tiles!(1);
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn tile<const M: usize, C: Sums>(x: &Operands, c: *mut C) {
        // SAFETY: as the caller's.
        unsafe {
            let mut sums: [[__m512; 2]; M] = [[_mm512_setzero_ps(); 2]; M];
            for i in 0..M {
                ahead(c.add(i * x.stride));
            }
            for k in 0..x.groups {
                let columns = x.b.add(k * x.b_stride);
                let left: __m512bh = transmute(_mm512_loadu_si512(columns.cast()));
                let right: __m512bh = transmute(_mm512_loadu_si512(columns.add(16).cast()));
                for i in 0..M {
                    // Rows start at any element.
                    let pair = x.a.byte_add(2 * (i * x.a_stride + k * x.a_group)).read_unaligned();
                    let pair: __m512bh = transmute(_mm512_set1_epi32(pair));
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], pair, left);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], pair, right);
                }
            }
            for i in 0..M {
                C::put(c.add(i * x.stride), sums[i], x.add);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::panel::tests::{panel, values};

    #[test]
    fn without_the_instructions_pairs_are_widened() {
        let (x, b) = (values(3 * 10, 1), values(10 * WIDTH, 2));
        let a: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
        let b = panel::<bf16>(&b, 10);
        let (mut plain, mut wide) = (vec![0.0; 3 * WIDTH], vec![0.0; 3 * WIDTH]);
        let a = Rows { data: &a, stride: 10, group: 2, count: 3, k: 10 };
        // SAFETY: both results have `WIDTH` columns.
        unsafe {
            bf16::product(a, &b, WIDTH, plain.as_mut_ptr(), WIDTH, false);
            widened(a, &b, WIDTH, wide.as_mut_ptr(), WIDTH, false);
        }
        plain.iter().zip(&wide).for_each(|(p, w)| assert!((p - w).abs() < 1e-5, "{p} {w}"));
    }

    #[test]
    fn the_processor_rounds_as_this_module_does() {
        if !has_narrow_products() {
            return;
        }
        // Sums of pairs: ties, numbers between, infinities and no number.
        let sums =
            [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.0 - 1.0 / 256.0, 3.1, -0.007, 0.0, 1e30, f32::INFINITY];
        for special in [1.0, f32::NAN] {
            let mut b = vec![bf16::ZERO; 2 * WIDTH];
            for column in 0..WIDTH {
                let sum = sums[column % sums.len()] * special;
                let high = bf16::from_f32(sum);
                let low = if high.is_finite() { sum - high.to_f32() } else { 0.0 };
                (b[2 * column], b[2 * column + 1]) = (high, bf16::from_f32(low));
            }
            let a = [bf16::ONE; 2 * 13];
            let a = Rows { data: &a, stride: 2, group: 2, count: 13, k: 2 };
            for add in [false, true] {
                let before: Vec<bf16> =
                    (0..13 * WIDTH).map(|i| bf16::from_f32(i as f32 / 7.0 - 20.0)).collect();
                let mut single: Vec<f32> = before.iter().map(|v| v.to_f32()).collect();
                let mut narrow = before;
                // SAFETY: both results have `WIDTH` columns.
                unsafe {
                    bf16::product(a, &b, WIDTH, single.as_mut_ptr(), WIDTH, add);
                    assert!(bf16::rounded_product(a, &b, narrow.as_mut_ptr(), WIDTH, add));
                }
                for (single, narrow) in single.iter().zip(&narrow) {
                    let want = rounded(*single);
                    assert!(want == *narrow || want.is_nan() && narrow.is_nan(), "{single} {narrow}");
                }
            }
        }
    }
}
