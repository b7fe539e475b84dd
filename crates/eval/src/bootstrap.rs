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
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| (0..n).map(|_| values[rng.random_range(0..n)]).sum::<f64>() / n as f64)
        .collect();
    means.sort_unstable_by(f64::total_cmp);
    let at = |p: f64| means[(p * (RESAMPLES - 1) as f64).round() as usize];
    Some(Estimate { mean: values.iter().sum::<f64>() / n as f64, low: at(0.025), high: at(0.975) })
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
    let total = |parts: &mut dyn Iterator<Item = (f64, usize)>| {
        let (sum, count) = parts.fold((0.0, 0), |all, part| (all.0 + part.0, all.1 + part.1));
        sum / count as f64
    };
    if sums.is_empty() {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| total(&mut (0..sums.len()).map(|_| sums[rng.random_range(0..sums.len())])))
        .collect();
    means.sort_unstable_by(f64::total_cmp);
    let at = |p: f64| means[(p * (RESAMPLES - 1) as f64).round() as usize];
    Some(Estimate { mean: values.iter().sum::<f64>() / values.len() as f64, low: at(0.025), high: at(0.975) })
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
