//! How often one side would win if both wrote as much.

/// Logistic regression of wins `y` (0 to 1) on how much longer an answer is: `p = σ(θ + φ · tanh(d / s))`, with `d` the
/// difference of the lengths and `s` its standard deviation. Returns θ and φ.
///
/// AlpacaEval 2's length-controlled win-rate (Dubois et al., arXiv 2404.04475, equation 3) without its term for how hard
/// an instruction is, which needs the results of other models.
pub fn fit(lengths: &[f64], wins: &[f64]) -> [f64; 2] {
    /// Keeps φ finite where lengths alone decide.
    const RIDGE: f64 = 1e-2;
    let n = lengths.len() as f64;
    let mean = lengths.iter().sum::<f64>() / n;
    let spread = (lengths.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n).sqrt();
    let x = |d: f64| if spread > 0.0 { (d / spread).tanh() } else { 0.0 };
    let [mut theta, mut phi] = [0.0, 0.0];
    for _ in 0..50 {
        // Newton's method: gradient and Hessian of the log-likelihood.
        let (mut g, mut h) = ([-RIDGE * theta, -RIDGE * phi], [RIDGE, 0.0, RIDGE]);
        for (&d, &y) in lengths.iter().zip(wins) {
            let x = x(d);
            let p = sigmoid(theta + phi * x);
            (g[0], g[1]) = (g[0] + y - p, g[1] + (y - p) * x);
            let w = p * (1.0 - p);
            (h[0], h[1], h[2]) = (h[0] + w, h[1] + w * x, h[2] + w * x * x);
        }
        let determinant = h[0] * h[2] - h[1] * h[1];
        let step = [(g[0] * h[2] - g[1] * h[1]) / determinant, (g[1] * h[0] - g[0] * h[1]) / determinant];
        // Far from the optimum a whole step may go too far.
        let scale = 1.0 / (step[0].abs().max(step[1].abs()) / 2.0).max(1.0);
        (theta, phi) = (theta + scale * step[0], phi + scale * step[1]);
        if step[0].abs().max(step[1].abs()) < 1e-10 {
            break;
        }
    }
    [theta, phi]
}

/// `1 / (1 + e^-z)`.
pub fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preference_for_length_is_taken_out() {
        // Wins that follow length alone, of a side that writes more: not better at equal length.
        let lengths: Vec<f64> = (0..2000).map(|i| f64::from(i % 41) * 10.0 - 100.0).collect();
        let spread = {
            let mean = lengths.iter().sum::<f64>() / 2000.0;
            (lengths.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / 2000.0).sqrt()
        };
        let by_length: Vec<f64> = lengths.iter().map(|d| sigmoid(2.0 * (d / spread).tanh())).collect();
        let raw = by_length.iter().sum::<f64>() / 2000.0;
        let [theta, phi] = fit(&lengths, &by_length);
        assert!(raw > 0.6 && sigmoid(theta) - 0.5 < 1e-3 && (phi - 2.0).abs() < 0.02, "{raw} {theta} {phi}");
    }

    #[test]
    fn what_is_decided_stays_finite() {
        let [theta, phi] = fit(&[5.0; 30], &[1.0; 30]);
        assert!(theta.is_finite() && phi.is_finite() && sigmoid(theta) > 0.9);
        assert!(fit(&[0.0, 10.0, -10.0], &[0.5, 1.0, 0.0]).iter().all(|value| value.is_finite()));
    }
}
