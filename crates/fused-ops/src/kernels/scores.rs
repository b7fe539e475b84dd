//! Scores of a block of queries: probabilities, and their gradients.

#![allow(unsafe_code)]

use std::ops::Range;

use super::blocks::Block;
use super::panel::{Element, WIDTH};
use super::simd::{exp, exps, max, softcap, softcap_slope, weighted_sums, wide};
use crate::Scores;

/// Products to scores, capped ones; others are scaled where they are read.
pub fn shape(products: &mut [f32], Scores { scale, softcap: cap, .. }: Scores) -> f32 {
    let Some(cap) = cap else { return scale };
    wide(
        #[inline(always)]
        || products.iter_mut().for_each(|s| *s = softcap(*s * scale, cap)),
    );
    1.0
}

/// Exponentials of each row over the keys it sees, scaled and shifted by their maximum, to `p`; 0 for the others. Returns
/// the sum and the log-sum-exp of each row.
pub fn softmax<T: Element>(
    scores: &[f32],
    scale: f32,
    block: Block,
    group: usize,
    p: &mut Vec<T>,
) -> Vec<(f32, f32)> {
    p.resize(scores.len(), T::default());
    let rows = scores.chunks_exact(block.width()).zip(p.chunks_exact_mut(block.width())).enumerate();
    let mut sums = Vec::with_capacity(block.len * group);
    wide(
        #[inline(always)]
        || {
            for (row, (scores, p)) in rows {
                let Range { start, end } = block.visible(row / group);
                p[..start].fill(T::default());
                p[end..].fill(T::default());
                let top = scale * max(&scores[start..end]);
                let sum = exps(&scores[start..end], (scale, top), &mut p[start..end], T::of);
                sums.push((sum, top + sum.ln()));
            }
        },
    );
    sums
}

/// What the rows of a block are turned into gradients with.
pub struct OfBlock<'a> {
    pub scores: Scores,
    /// What products are still to be multiplied by.
    pub of_products: f32,
    /// Query heads of a key head.
    pub group: usize,
    pub block: Block,
    pub lse: &'a [f32],
}

impl OfBlock<'_> {
    /// Turns scores and the gradients of the probabilities (`dp`) into probabilities (`p`), of the last rows, and
    /// gradients of the products (`ds`), both laid out in `panels` as well. As many rows at a time as lie side by side:
    /// with up to a thousand keys they stay in the first-level cache.
    pub fn gradients<T: Element>(
        &self,
        scores: &mut [f32],
        dp: &[f32],
        (p, ds): (&mut Vec<T>, &mut Vec<T>),
        panels: &mut [Vec<T>; 2],
    ) {
        let width = self.block.width();
        let groups = self.lse.len().div_ceil(T::GROUP);
        let all = groups * T::GROUP * width;
        p.resize(T::GROUP * width, T::default());
        ds.resize(all, T::default());
        panels.iter_mut().for_each(|panels| panels.resize(all, T::default()));
        for (at, ds) in ds.chunks_exact_mut(T::GROUP * width).enumerate() {
            wide(
                #[inline(always)]
                || {
                    let rows = p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width));
                    for (row, (p, ds)) in (at * T::GROUP..).zip(rows) {
                        let of_row = row * width..((row + 1) * width).min(scores.len());
                        if of_row.is_empty() {
                            // It fills up the last group.
                            [p, ds].into_iter().for_each(|none| none.fill(T::default()));
                        } else {
                            self.row(row, &mut scores[of_row.clone()], &dp[of_row], p, ds);
                        }
                    }
                    let [of_p, of_ds] = &mut *panels;
                    side_by_side(p, width, (at, groups), of_p);
                    side_by_side(ds, width, (at, groups), of_ds);
                },
            );
        }
    }

    /// What a row's gradients have in common is taken from these same numbers, and not from the output: so they add up to
    /// 0 as they should, to within the rounding of one sum.
    #[inline(always)]
    fn row<T: Element>(&self, row: usize, scores: &mut [f32], dp: &[f32], p: &mut [T], ds: &mut [T]) {
        let Scores { scale, softcap, .. } = self.scores;
        let Range { start, end } = self.block.visible(row / self.group);
        for hidden in [0..start, end..p.len()] {
            p[hidden.clone()].fill(T::default());
            ds[hidden].fill(T::default());
        }
        let (seen, dp, p, ds) =
            (&mut scores[start..end], &dp[start..end], &mut p[start..end], &mut ds[start..end]);
        let shift = self.lse[row];
        if let Some(cap) = softcap {
            let (sum, weighted) = weighted_sums(
                seen,
                dp,
                #[inline(always)]
                |s| exp(s - shift),
            );
            let delta = weighted / sum;
            for (((&mut s, &dp), p), ds) in seen.iter_mut().zip(dp).zip(p).zip(ds) {
                let value = exp(s - shift);
                *p = T::of(value);
                *ds = T::of(value * (dp - delta) * scale * softcap_slope(s, cap));
            }
        } else {
            for (s, p) in seen.iter_mut().zip(p) {
                *s = exp(*s * self.of_products - shift);
                *p = T::of(*s);
            }
            let (sum, weighted) = weighted_sums(seen, dp, |p| p);
            let delta = weighted / sum;
            for ((&mut p, &dp), ds) in seen.iter_mut().zip(dp).zip(ds) {
                *ds = T::of(p * (dp - delta) * scale);
            }
        }
    }
}

/// Puts group `at` of `groups`, rows of `width` values one after the other, into its places of all panels.
#[inline(always)]
fn side_by_side<T: Element>(rows: &[T], width: usize, (at, groups): (usize, usize), panels: &mut [T]) {
    let size = WIDTH * T::GROUP;
    assert_eq!(rows.len(), T::GROUP * width, "a group of rows");
    for (column, panel) in (0..width).step_by(WIDTH).zip(panels.chunks_exact_mut(groups * size)) {
        let to = &mut panel[at * size..][..size];
        // SAFETY: each of the rows has `WIDTH` values from this column on, and `to` has a place for all.
        unsafe { T::beside::<WIDTH>(rows[column..].as_ptr(), width, WIDTH, to.as_mut_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::layout::beside;
    use super::super::matrix::Mat;
    use super::*;

    /// On any processor, with what an earlier block left in all buffers.
    fn check<T: Element>(softcap: Option<f32>) {
        let block = Block { first: 0, len: 9, start: 32, end: 69, position: 60, window: 20 };
        let (width, rows) = (block.width(), block.len);
        let value = |i: usize| ((i * 7 + 3) % 23) as f32 / 8.0 - 1.25;
        let (mut scores, mut dp) = (vec![f32::NAN; rows * width], vec![f32::NAN; rows * width]);
        for row in 0..rows {
            for key in block.visible(row) {
                (scores[row * width + key], dp[row * width + key]) = (value(row + key), value(row * key));
            }
        }
        let left = || vec![T::of(f32::NAN); 4096];
        let (mut p, mut ds, mut panels) = (left(), left(), [left(), left()]);
        let all = Scores { softcap, ..Scores::scaled(0.5) };
        let lse = vec![1.5; rows];
        let of = OfBlock { scores: all, of_products: 0.7, group: 1, block, lse: &lse };
        let (before, gradients) = (scores.clone(), dp.clone());
        of.gradients(&mut scores, &dp, (&mut p, &mut ds), &mut panels);
        let mut want = Vec::new();
        beside::<T, WIDTH>(Mat::rows(&ds, width).t(), width, rows, &mut want);
        let bits = |all: &[T]| all.iter().map(|v| v.single().to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&want), bits(&panels[1]), "gradients lie in rows as in panels");
        for row in 0..rows.next_multiple_of(T::GROUP) {
            let seen = if row < rows { block.visible(row) } else { 0..0 };
            let exponent = |s: f32| if softcap.is_some() { s - 1.5 } else { s * 0.7 - 1.5 };
            let e = |key: usize| f64::from(exponent(before[row * width + key])).exp();
            let d = |key: usize| f64::from(gradients[row * width + key]);
            let delta =
                seen.clone().map(|key| e(key) * d(key)).sum::<f64>() / seen.clone().map(e).sum::<f64>();
            for key in 0..width {
                let at = (key / WIDTH * rows.div_ceil(T::GROUP) + row / T::GROUP) * WIDTH + key % WIDTH;
                let p = f64::from(panels[0][at * T::GROUP + row % T::GROUP].single());
                let ds = f64::from(ds[row * width + key].single());
                let (want_p, want_ds) = if seen.contains(&key) {
                    let slope = softcap.map_or(1.0, |cap| softcap_slope(before[row * width + key], cap));
                    (e(key), e(key) * (d(key) - delta) * 0.5 * f64::from(slope))
                } else {
                    (0.0, 0.0)
                };
                let near = |got: f64, want: f64| (got - want).abs() <= 0.005 * want.abs() + 1e-6;
                assert!(near(p, want_p) && near(ds, want_ds), "{row} {key}: {p} {want_p}, {ds} {want_ds}");
            }
        }
    }

    #[test]
    fn rows_are_laid_out_whatever_was_there_before() {
        for softcap in [None, Some(3.0)] {
            check::<f32>(softcap);
            check::<bf16>(softcap);
        }
    }
}
