//! Log-probabilities of both completions of pairs under one model.

use decoder::{Batch, Decoder};
use pref_data::{Dataset, Packed, PairTokens};

/// Sums over one pair's completions.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PairScore {
    /// Log-probability of the chosen and of the rejected completion.
    pub logps: [f64; 2],
    /// Their scored tokens.
    pub tokens: [usize; 2],
}

/// Scores rows, `batch` pairs at a time. `progress` stops it by returning false; the result is then `None`.
pub fn score(
    model: &Decoder,
    data: &Dataset,
    batch: usize,
    mut progress: impl FnMut(usize) -> bool,
) -> Option<Vec<PairScore>> {
    let mut scores = Vec::with_capacity(data.len());
    let all: Vec<usize> = (0..data.len()).collect();
    for rows in all.chunks(batch.max(1)) {
        let rows: Vec<PairTokens> = rows.iter().map(|&i| data.row(i).tokens).collect();
        let packed = Packed::new(&rows);
        let tokens = model.score_to_host(&input(&packed));
        let mut part = vec![PairScore::default(); rows.len()];
        for (logp, side) in tokens.logps.iter().zip(&packed.sides) {
            let pair = &mut part[side.pair as usize];
            for (which, member) in [side.chosen, side.rejected].into_iter().enumerate() {
                if member {
                    pair.logps[which] += f64::from(*logp);
                    pair.tokens[which] += 1;
                }
            }
        }
        scores.extend(part);
        if !progress(rows.len()) {
            return None;
        }
    }
    Some(scores)
}

fn input(packed: &Packed) -> Batch {
    let rows = packed.rows.iter().map(|row| (row.start, row.shared, row.tails));
    Batch::packed(&packed.tokens, &packed.positions, rows, &packed.predictors, &packed.targets)
}
