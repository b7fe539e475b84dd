//! Bootstrap intervals of means.

use std::collections::BTreeMap;

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
    let [low, high] = interval(n, RESAMPLES, |drawn| drawn.map(|i| values[i]).sum::<f64>() / n as f64);
    Some(Estimate { mean: values.iter().sum::<f64>() / n as f64, low, high })
}

/// The middle 95 % of what `of` makes of `units` units drawn with replacement, so many times; deterministic.
pub fn interval(
    units: usize,
    resamples: usize,
    of: impl Fn(&mut dyn Iterator<Item = usize>) -> f64,
) -> [f64; 2] {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut values: Vec<f64> =
        (0..resamples).map(|_| of(&mut (0..units).map(|_| rng.random_range(0..units)))).collect();
    values.sort_unstable_by(f64::total_cmp);
    [0.025, 0.975].map(|p: f64| values[(p * (resamples - 1) as f64).round() as usize])
}

/// The same for values of which some belong together: whole clusters are drawn, so that repeated items do not make an
/// interval narrower than they should.
pub fn clustered(values: &[f64], clusters: &[&str]) -> Option<Estimate> {
    assert_eq!(values.len(), clusters.len());
    let mut sums: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
    for (value, cluster) in values.iter().zip(clusters) {
        let (sum, count) = sums.entry(cluster).or_default();
        (*sum, *count) = (*sum + value, *count + 1);
    }
    let sums: Vec<(f64, usize)> = sums.into_values().collect();
    if sums.is_empty() {
        return None;
    }
    let [low, high] = interval(sums.len(), RESAMPLES, |drawn| {
        let (sum, count) =
            drawn.map(|i| sums[i]).fold((0.0, 0), |all, part| (all.0 + part.0, all.1 + part.1));
        sum / count as f64
    });
    Some(Estimate { mean: values.iter().sum::<f64>() / values.len() as f64, low, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_that_belong_together_widen_the_interval() {
        // 400 values of 100 clusters of four equal ones: as wide as 100 values by themselves.
        let values: Vec<f64> = (0..400).map(|i| f64::from(i / 4 % 2)).collect();
        let names: Vec<String> = (0..400).map(|i| (i / 4).to_string()).collect();
        let clusters: Vec<&str> = names.iter().map(String::as_str).collect();
        let estimate = clustered(&values, &clusters).unwrap();
        assert_eq!(estimate.mean, 0.5);
        // 1.96 · sqrt(0.25 / 100) = 0.098
        assert!(
            (estimate.high - 0.598).abs() < 0.012 && (estimate.low - 0.402).abs() < 0.012,
            "{estimate:?}"
        );
        assert_eq!(clustered(&[], &[]), None);
    }

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
