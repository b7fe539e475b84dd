//! What rewards and likelihoods of pairs tell beyond their means.

use serde::Serialize;

use super::metrics::rewards;
use crate::score::PairScore;

/// How likelihoods moved from the reference to the model (the paper's likelihood analysis, section 5 of arXiv
/// 2408.06266): shares of the pairs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Movement {
    /// The winner is more likely than before.
    pub winner_up: f64,
    /// The loser is less likely than before.
    pub loser_down: f64,
    /// Both are more likely.
    pub both_up: f64,
    /// Both are less likely.
    pub both_down: f64,
    /// The winner is more and the loser less likely.
    pub apart: f64,
    /// Pairs whose loser the reference finds more likely than the winner.
    pub loser_first: f64,
    /// Of these, those whose winner the model finds more likely.
    pub overturned: Option<f64>,
}

/// Whether rewards follow lengths.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LengthBias {
    /// Pearson correlation of the margin with how many tokens longer the winner is; none where all are the same.
    pub correlation: Option<f64>,
    /// Pairs whose winner is longer, and the share of them that is ranked right.
    pub winner_longer: (usize, Option<f64>),
    /// Pairs whose winner is shorter, and the share of them that is ranked right.
    pub winner_shorter: (usize, Option<f64>),
}

/// Whether `σ(margin)` is the probability that a pair is ranked right.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Calibration {
    /// Mean distance between the confidence `max(p, 1 - p)` and the share that is ranked right, over ten bins weighted
    /// with their pairs (expected calibration error).
    pub error: f64,
    /// Bins with pairs: mean confidence, share ranked right, pairs.
    pub bins: Vec<(f64, f64, usize)>,
}

fn share(count: usize, of: usize) -> f64 {
    count as f64 / of as f64
}

/// See [`Movement`].
pub fn movement(model: &[PairScore], reference: &[PairScore]) -> Movement {
    let n = model.len();
    let pairs = || model.iter().zip(reference).map(|(m, r)| (m.logps, r.logps));
    let count = |keep: &dyn Fn([f64; 2], [f64; 2]) -> bool| pairs().filter(|&(m, r)| keep(m, r)).count();
    let loser_first = count(&|_, r| r[1] > r[0]);
    let overturned = count(&|m, r| r[1] > r[0] && m[0] > m[1]);
    Movement {
        winner_up: share(count(&|m, r| m[0] > r[0]), n),
        loser_down: share(count(&|m, r| m[1] < r[1]), n),
        both_up: share(count(&|m, r| m[0] > r[0] && m[1] > r[1]), n),
        both_down: share(count(&|m, r| m[0] < r[0] && m[1] < r[1]), n),
        apart: share(count(&|m, r| m[0] > r[0] && m[1] < r[1]), n),
        loser_first: share(loser_first, n),
        overturned: (loser_first > 0).then(|| share(overturned, loser_first)),
    }
}

fn margins(model: &[PairScore], reference: &[PairScore], beta: f64) -> Vec<f64> {
    let margin = |(m, r): (&PairScore, &PairScore)| {
        let [winner, loser] = rewards(m, r, beta);
        winner - loser
    };
    model.iter().zip(reference).map(margin).collect()
}

/// See [`LengthBias`].
pub fn length_bias(model: &[PairScore], reference: &[PairScore], beta: f64) -> LengthBias {
    let margins = margins(model, reference, beta);
    let longer: Vec<f64> = model.iter().map(|pair| pair.tokens[0] as f64 - pair.tokens[1] as f64).collect();
    let right = |keep: &dyn Fn(f64) -> bool| {
        let of: Vec<f64> = margins.iter().zip(&longer).filter(|(_, d)| keep(**d)).map(|(m, _)| *m).collect();
        let hits = of.iter().filter(|margin| **margin > 0.0).count();
        (of.len(), (!of.is_empty()).then(|| share(hits, of.len())))
    };
    LengthBias {
        correlation: correlation(&margins, &longer),
        winner_longer: right(&|d| d > 0.0),
        winner_shorter: right(&|d| d < 0.0),
    }
}

fn correlation(xs: &[f64], ys: &[f64]) -> Option<f64> {
    let n = xs.len() as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n;
    let (mx, my) = (mean(xs), mean(ys));
    let sum = |f: &dyn Fn(f64, f64) -> f64| xs.iter().zip(ys).map(|(x, y)| f(x - mx, y - my)).sum::<f64>();
    let (xy, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

/// See [`Calibration`].
pub fn calibration(model: &[PairScore], reference: &[PairScore], beta: f64) -> Calibration {
    const BINS: usize = 10;
    let mut bins = [(0.0, 0_usize, 0_usize); BINS];
    for margin in margins(model, reference, beta) {
        let p = 1.0 / (1.0 + (-margin).exp());
        let confidence = p.max(1.0 - p);
        // From ½ to 1.
        let bin = (((confidence - 0.5) * 2.0 * BINS as f64) as usize).min(BINS - 1);
        let (sum, hits, count) = &mut bins[bin];
        (*sum, *hits, *count) = (*sum + confidence, *hits + usize::from(margin > 0.0), *count + 1);
    }
    let filled = bins.iter().filter(|bin| bin.2 > 0);
    let bins: Vec<(f64, f64, usize)> =
        filled.map(|&(sum, hits, count)| (sum / count as f64, share(hits, count), count)).collect();
    let apart =
        bins.iter().map(|(confidence, right, count)| (confidence - right).abs() * *count as f64).sum::<f64>();
    Calibration { error: apart / model.len() as f64, bins }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(winner: f64, loser: f64, tokens: [usize; 2]) -> PairScore {
        PairScore { logps: [winner, loser], tokens }
    }

    #[test]
    fn movements_are_shares_of_pairs() {
        let reference = [pair(-5.0, -4.0, [1, 1]), pair(-5.0, -6.0, [1, 1]), pair(-5.0, -4.0, [1, 1])];
        let model = [pair(-3.0, -5.0, [1, 1]), pair(-4.0, -5.0, [1, 1]), pair(-6.0, -5.0, [1, 1])];
        let moved = movement(&model, &reference);
        assert_eq!((moved.winner_up, moved.loser_down), (2.0 / 3.0, 2.0 / 3.0));
        assert_eq!((moved.apart, moved.both_up, moved.both_down), (1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0));
        assert_eq!((moved.loser_first, moved.overturned), (2.0 / 3.0, Some(0.5)));
    }

    #[test]
    fn margins_that_follow_length_are_seen() {
        let reference = vec![pair(0.0, 0.0, [0, 0]); 4];
        let model: Vec<PairScore> =
            [1.0, 2.0, -1.0, -2.0].map(|d: f64| pair(10.0 * d, 0.0, [(10.0 + d) as usize, 10])).to_vec();
        let bias = length_bias(&model, &reference, 0.1);
        assert!((bias.correlation.unwrap() - 1.0).abs() < 1e-12);
        assert_eq!((bias.winner_longer, bias.winner_shorter), ((2, Some(1.0)), (2, Some(0.0))));
    }

    #[test]
    fn confidence_that_is_not_earned_is_an_error() {
        let reference = vec![pair(0.0, 0.0, [1, 1]); 4];
        // σ(3) = 0.9526 on all, and three of four right.
        let model = [3.0, 3.0, 3.0, -3.0].map(|margin| pair(margin, 0.0, [1, 1]));
        let found = calibration(&model, &reference, 1.0);
        assert!((found.error - (0.952_574_126_8 - 0.75)).abs() < 1e-9, "{found:?}");
        assert_eq!(found.bins.len(), 1);
    }
}
