//! Tests.

/// Two-sided exact sign test: the probability of counts at least this far apart where both sides are equally likely.
pub fn sign_test(better: usize, worse: usize) -> f64 {
    let n = better + worse;
    // Terms of the binomial distribution, each from the one before, in logarithms.
    let mut term = -(n as f64) * std::f64::consts::LN_2;
    let mut sum = 0.0;
    for k in 0..=better.min(worse) {
        if k > 0 {
            term += ((n - k + 1) as f64 / k as f64).ln();
        }
        sum += term.exp();
    }
    (2.0 * sum).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scipy.stats.binomtest(k, n, 0.5).pvalue`
    #[test]
    fn the_sign_test_is_exact() {
        for (better, worse, want) in [(8, 2, 0.109_375), (0, 5, 0.0625), (3, 3, 1.0), (0, 0, 1.0)] {
            assert!((sign_test(better, worse) - want).abs() < 1e-12, "{better} {worse}");
        }
        assert!((sign_test(620, 500) - 3.724_137_55e-4).abs() < 1e-10, "{}", sign_test(620, 500));
        assert!(sign_test(3000, 1000) < 1e-200);
    }
}
