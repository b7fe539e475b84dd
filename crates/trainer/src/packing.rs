//! Rows packed to be computed together, and the log-probabilities of their completions.

use std::ops::Range;
use std::sync::Arc;

use apo_loss::length_desensitized;
use burn::tensor::Tensor;
use decoder::{Batch, Decoder, Recompute};
use fused_ops::{HeadOutput, sum_into};
use pref_data::Packed;
use tracing::trace_span;

/// How rows are computed and what is summed for each, apart from the tokens themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// Weight of tokens beyond the shorter completion.
    pub ld_alpha: Option<f64>,
    /// Completions are mismatched within batches of this many rows.
    pub mismatched: Option<usize>,
    /// Rows are computed together while they have no more packed tokens than this.
    pub part: usize,
}

impl Scoring {
    /// Names what reference values depend on.
    pub fn key(&self) -> String {
        match self {
            Self { ld_alpha: None, mismatched: None, .. } => String::new(),
            Self { ld_alpha, mismatched, .. } => format!("{ld_alpha:?} {mismatched:?}"),
        }
    }
}

/// Rows that are computed together: one after the other while they have at most `bound` tokens, at least one.
pub fn divide(tokens: impl IntoIterator<Item = usize>, bound: usize) -> Vec<Range<usize>> {
    let (mut parts, mut total) = (Vec::<Range<usize>>::new(), 0);
    for (row, tokens) in tokens.into_iter().enumerate() {
        match parts.last_mut() {
            Some(part) if total + tokens <= bound => (part.end, total) = (row + 1, total + tokens),
            _ => {
                parts.push(row..row + 1);
                total = tokens;
            }
        }
    }
    parts
}

/// Packed sequences and how their tokens are summed.
pub struct Packing {
    pub packed: Packed,
    pub batch: Batch,
    sums: Arc<Vec<(u32, u32)>>,
    ld_alpha: Option<f64>,
}

/// Log-probabilities of the rows, on the device: `[rows]` twice, and of each token.
pub struct Scored {
    pub chosen: Tensor<1>,
    pub rejected: Tensor<1>,
    /// Of the chosen completions with every token counted in full.
    pub whole_chosen: Tensor<1>,
    pub tokens: Tensor<1>,
    pub stats: Tensor<2>,
    pub recompute: Option<Recompute>,
}

impl Packing {
    pub fn new(packed: Packed, ld_alpha: Option<f64>) -> Self {
        let rows = packed.rows.iter().map(|row| (row.start, row.shared, row.tails));
        let batch =
            Batch::packed(&packed.tokens, &packed.positions, rows, &packed.predictors, &packed.targets);
        let sums = if ld_alpha.is_some() { packed.sums_with_tails() } else { packed.sums() };
        Self { sums: Arc::new(sums), packed, batch, ld_alpha }
    }

    pub fn score(&self, model: &Decoder) -> Scored {
        self.sum(trace_span!("forward").in_scope(|| model.score(&self.batch)), None)
    }

    /// The same, keeping only the inputs of the first blocks for the backward pass.
    pub fn score_recomputing(&self, model: &Decoder, blocks: usize) -> Scored {
        let (out, kept) = trace_span!("forward").in_scope(|| model.score_recomputing(&self.batch, blocks));
        self.sum(out, Some(kept))
    }

    /// Scored tokens of the chosen completions.
    pub fn chosen_tokens(&self) -> usize {
        self.packed.sides.iter().filter(|side| side.chosen).count()
    }

    fn sum(&self, out: HeadOutput, recompute: Option<Recompute>) -> Scored {
        let rows = self.packed.rows.len();
        let (sums, whole) = match self.ld_alpha {
            None => {
                let sums = sum_into(out.logps.clone(), &self.sums, 2 * rows);
                (sums.clone(), sums)
            }
            Some(alpha) => {
                let sums = sum_into(out.logps.clone(), &self.sums, 4 * rows);
                let beyond = sums.clone().narrow(0, 2 * rows, 2 * rows);
                let common = sums.narrow(0, 0, 2 * rows);
                let whole = common.clone() + beyond.clone();
                (length_desensitized(common, beyond, alpha), whole)
            }
        };
        Scored {
            chosen: sums.clone().narrow(0, 0, rows),
            rejected: sums.narrow(0, rows, rows),
            whole_chosen: whole.narrow(0, 0, rows),
            tokens: out.logps.inner(),
            stats: out.stats,
            recompute,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_large_as_they_may_be() {
        assert_eq!(divide([10, 20, 30, 5, 100, 1, 2], 40), [0..2, 2..4, 4..5, 5..7]);
        assert_eq!(divide([usize::MAX / 2, 7], usize::MAX), [0..2]);
        assert!(divide([], 40).is_empty());
    }
}
