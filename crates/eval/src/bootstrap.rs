//! Bootstrap intervals of means.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

const RESAMPLES: usize = 2000;
const SEED: u64 = 20_240_806;

/// A mean with its 95 % percentile interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// Mean.
    pub mean: f64,
    /// 2.5th percentile of the resampled means.
    pub low: f64,
    /// 97.5th percentile.
    pub high: f64,
}

/// Resamples rows; deterministic. `None` for no values.
pub fn mean(values: &[f64]) -> Option<Estimate> {
    if values.is_empty() {
        return None;
    }
    let n = values.len();
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| (0..n).map(|_| values[rng.random_range(0..n)]).sum::<f64>() / n as f64)
        .collect();
    means.sort_unstable_by(f64::total_cmp);
    let at = |p: f64| means[(p * (RESAMPLES - 1) as f64).round() as usize];
    Some(Estimate { mean: values.iter().sum::<f64>() / n as f64, low: at(0.025), high: at(0.975) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_has_the_width_theory_gives() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let estimate = mean(&values).unwrap();
        assert_eq!(estimate.mean, 0.5);
        // 1.96 · sqrt(0.25 / 400) = 0.049
        assert!(
            (estimate.high - 0.549).abs() < 0.006 && (estimate.low - 0.451).abs() < 0.006,
            "{estimate:?}"
        );
        assert_eq!(mean(&values), mean(&values));
        assert_eq!(mean(&[]), None);
    }
}
