//! Input of one forward pass, and what scoring returns.

use std::sync::Arc;

use fused_ops::Segments;

/// Packed tokens: no batch dimension, no padding.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Position of each token in its own sequence.
    pub positions: Vec<u32>,
    /// Who sees whom.
    pub segments: Arc<Segments>,
    /// Indices into `tokens` whose next token is scored; one index may stand several times.
    pub predictors: Vec<u32>,
    /// The token scored at each predictor.
    pub targets: Arc<Vec<u32>>,
}

impl Batch {
    /// Packed rows, each `(first token, shared tokens, tokens of the two tails)`.
    pub fn packed(
        tokens: &[u32],
        positions: &[u32],
        rows: impl IntoIterator<Item = (usize, usize, [usize; 2])>,
        predictors: &[u32],
        targets: &[u32],
    ) -> Self {
        let mut segments = Segments::default();
        for (start, shared, tails) in rows {
            segments.push_row(start, shared, &tails);
        }
        Self {
            tokens: tokens.to_vec(),
            positions: positions.to_vec(),
            segments: Arc::new(segments),
            predictors: predictors.to_vec(),
            targets: Arc::new(targets.to_vec()),
        }
    }

    /// One sequence by itself, every next token scored.
    pub fn of_sequence(tokens: &[u32]) -> Self {
        let mut segments = Segments::default();
        segments.push_row(0, tokens.len(), &[]);
        let last = tokens.len().saturating_sub(1);
        Self {
            tokens: tokens.to_vec(),
            positions: (0..tokens.len() as u32).collect(),
            segments: Arc::new(segments),
            predictors: (0..last as u32).collect(),
            targets: Arc::new(tokens.iter().skip(1).copied().collect()),
        }
    }
}

/// Per scored token, on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenScores {
    /// Log-probability of the target.
    pub logps: Vec<f32>,
    /// Entropy of the distribution, nats.
    pub entropy: Vec<f32>,
    /// Mean logit over the vocabulary.
    pub mean_logits: Vec<f32>,
    /// The target was the most likely token.
    pub top1: Vec<bool>,
    /// Log of the sum of the squared probabilities.
    pub log_squares: Vec<f32>,
}

impl TokenScores {
    /// Splits the head's `[n, 4]` statistics.
    pub fn new(logps: Vec<f32>, stats: &[f32]) -> Self {
        let column = |i: usize| stats.chunks_exact(4).map(move |row| row[i]);
        Self {
            logps,
            entropy: column(0).collect(),
            mean_logits: column(1).collect(),
            top1: column(2).map(|hit| hit > 0.5).collect(),
            log_squares: column(3).collect(),
        }
    }
}
