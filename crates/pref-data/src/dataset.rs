//! Rows for training or evaluation: chosen from token sets, in order, cut to a length.

use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Lengths, PairTokens, TokenSet};

/// Dropped rows whose ids are kept for reports.
const REPORTED: usize = 1000;

/// A row ready for packing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedRow {
    /// The record's id.
    pub id: String,
    /// Its place among all rows of the token sets, from 0.
    pub row: usize,
    /// Its label, where rows are unpaired.
    pub label: bool,
    /// Its tokens, truncated.
    pub tokens: PairTokens,
}

/// Which end of a sequence that is too long is kept (TRL's `truncation_mode`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keep {
    /// The start: completions are cut, and rows whose prompt alone is too long are dropped.
    #[default]
    Start,
    /// The end: prompts are cut, of the two sequences of a pair perhaps differently.
    End,
}

/// Rows of one or several token sets.
#[derive(Debug)]
pub struct Dataset {
    sets: Vec<Arc<TokenSet>>,
    /// First row of each set among all rows.
    starts: Vec<usize>,
    /// The rows, as places among all rows.
    rows: Vec<u32>,
    max_length: usize,
    keep: Keep,
    /// Rows whose prompt alone reaches the maximum length.
    pub dropped: usize,
    /// Ids of the first thousand of them.
    pub dropped_ids: Vec<String>,
    /// Rows of which a completion is cut.
    pub truncated: usize,
    /// Rows whose prompt does not tokenize as the start of prompt + completion.
    pub boundary: usize,
}

impl Dataset {
    /// Takes `rows` (places among the rows of all sets, in order) and cuts those beyond `max_length`; where the
    /// start is kept, those whose prompt alone reaches it are dropped.
    pub fn new(sets: Vec<Arc<TokenSet>>, rows: Vec<u32>, max_length: Option<usize>, keep: Keep) -> Self {
        let starts = starts(&sets);
        let max_length = max_length.unwrap_or(usize::MAX);
        let mut dataset = Self {
            sets,
            starts,
            rows: Vec::new(),
            max_length,
            keep,
            dropped: 0,
            dropped_ids: Vec::new(),
            truncated: 0,
            boundary: 0,
        };
        let mut kept = rows;
        kept.retain(|&row| {
            let (set, inner) = dataset.place(row as usize);
            let lengths = set.lengths(inner);
            let boundary = set.boundary(inner) > 0;
            let fits = lengths.prompt < max_length || keep == Keep::End;
            if !fits && dataset.dropped_ids.len() < REPORTED {
                let id = set.id(inner);
                dataset.dropped_ids.push(id);
            }
            dataset.boundary += usize::from(boundary);
            dataset.dropped += usize::from(!fits);
            dataset.truncated += usize::from(fits && lengths.longest() > max_length);
            fits
        });
        dataset.rows = kept;
        dataset
    }

    /// All rows of a token set.
    pub fn whole(set: TokenSet, max_length: Option<usize>) -> Self {
        let rows = (0..set.len() as u32).collect();
        Self::new(vec![Arc::new(set)], rows, max_length, Keep::Start)
    }

    fn place(&self, row: usize) -> (&TokenSet, usize) {
        let set = self.starts.partition_point(|&start| start <= row) - 1;
        (&self.sets[set], row - self.starts[set])
    }

    fn at(&self, i: usize) -> (&TokenSet, usize) {
        self.place(self.rows[i] as usize)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// There are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows are completions with labels.
    pub fn is_unpaired(&self) -> bool {
        self.sets.first().is_some_and(|set| set.is_unpaired())
    }

    /// Id of row `i`.
    pub fn id(&self, i: usize) -> String {
        let (set, row) = self.at(i);
        set.id(row)
    }

    /// Lengths of row `i` after truncation.
    pub fn lengths(&self, i: usize) -> Lengths {
        let (set, row) = self.at(i);
        match self.keep {
            Keep::Start => set.lengths(row).cut(self.max_length),
            Keep::End => set.lengths(row).cut_start(self.max_length),
        }
    }

    /// The label of row `i`, where rows are unpaired.
    pub fn label(&self, i: usize) -> bool {
        let (set, row) = self.at(i);
        set.label(row)
    }

    /// Row `i`, truncated.
    pub fn row(&self, i: usize) -> PreparedRow {
        let (set, row) = self.at(i);
        let mut tokens = set.tokens(row);
        match self.keep {
            Keep::Start => {
                let room = self.max_length.saturating_sub(tokens.prompt.len());
                tokens.chosen.truncate(room);
                tokens.rejected.truncate(room);
            }
            Keep::End => cut_start(&mut tokens, self.max_length),
        }
        PreparedRow { id: set.id(row), row: self.rows[i] as usize, label: set.label(row), tokens }
    }

    /// The prompt of row `i` with the completion of row `of` (KTO's mismatched completions): the whole completion,
    /// cut only where the new sequence is too long.
    pub fn mismatched(&self, i: usize, of: usize) -> PairTokens {
        let ((set, row), (other, other_row)) = (self.at(i), self.at(of));
        let mut tokens = set.tokens(row);
        tokens.chosen = other.tokens(other_row).chosen;
        tokens.chosen.truncate(self.max_length.saturating_sub(tokens.prompt.len()));
        tokens
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = PreparedRow> + '_ {
        (0..self.len()).map(|i| self.row(i))
    }

    /// Tokens that a sequence has at most.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// No token id is larger.
    pub fn largest_id(&self) -> u32 {
        self.sets.iter().map(|set| set.largest_id()).max().unwrap_or(0)
    }

    /// Hash of what the rows hold: tokens, choice, order and truncation.
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for set in &self.sets {
            hasher.update(&set.hash());
        }
        hasher.update(&(self.max_length as u64).to_le_bytes());
        if self.keep == Keep::End {
            hasher.update(b"end");
        }
        for row in &self.rows {
            hasher.update(&row.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// Keeps the last `max` tokens of both sequences.
fn cut_start(tokens: &mut PairTokens, max: usize) {
    let prompt = tokens.prompt.len();
    let excess = |completion: &[u32]| (prompt + completion.len()).saturating_sub(max);
    let [chosen, rejected] = [excess(&tokens.chosen), excess(&tokens.rejected)];
    if chosen == rejected {
        let beyond = chosen.saturating_sub(prompt);
        tokens.prompt.drain(..chosen.min(prompt));
        tokens.chosen.drain(..beyond.min(tokens.chosen.len()));
        tokens.rejected.drain(..beyond.min(tokens.rejected.len()));
        return;
    }
    let own = |completion: &[u32], excess: usize| {
        let sequence = [tokens.prompt.as_slice(), completion].concat();
        (sequence[excess..].to_vec(), prompt.saturating_sub(excess))
    };
    let (chosen, rejected) = (own(&tokens.chosen, chosen), own(&tokens.rejected, rejected));
    *tokens = PairTokens {
        prompt: Vec::new(),
        chosen: chosen.0,
        rejected: rejected.0,
        boundary: tokens.boundary,
        context: [chosen.1, rejected.1],
    };
}

fn starts(sets: &[Arc<TokenSet>]) -> Vec<usize> {
    let mut next = 0;
    sets.iter()
        .map(|set| {
            next += set.len();
            next - set.len()
        })
        .collect()
}

/// Chooses rows from sets of these sizes. With weights the shares of the sets are in their proportion, as
/// many rows as the smallest allows (`trl.scripts.utils.get_dataset`, `fraction`): set `i` gives
/// `round(w_i * N)` rows with `w = weights / sum(weights)` and `N = min(size / w)`. `most` then bounds the
/// rows of each set in the same proportion. The first rows of each set are taken, or, with a seed, random
/// ones in random order.
pub fn mix(sizes: &[usize], weights: Option<&[f64]>, most: Option<usize>, seed: Option<u64>) -> Vec<u32> {
    let total: usize = sizes.iter().sum();
    let (shares, all): (Vec<f64>, f64) = if let Some(weights) = weights {
        let sum: f64 = weights.iter().sum();
        let shares: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
        let fits = sizes.iter().zip(&shares).filter(|(_, share)| **share > 0.0);
        let all = fits.map(|(&size, share)| size as f64 / share).fold(f64::INFINITY, f64::min);
        (shares, if all.is_finite() { all } else { 0.0 })
    } else {
        (sizes.iter().map(|&size| size as f64 / total.max(1) as f64).collect(), total as f64)
    };
    let wanted: Vec<f64> =
        shares.iter().map(|share| share * most.map_or(all, |most| all.min(most as f64))).collect();
    let taken = match most.filter(|&most| (most as f64) < all) {
        None => wanted.iter().map(|share| share.round_ties_even() as usize).collect(),
        Some(most) => exactly(&wanted, most),
    };
    let (mut rows, mut start) = (Vec::new(), 0);
    for (set, (&size, taken)) in sizes.iter().zip(taken).enumerate() {
        let taken = taken.min(size);
        let mut of_set: Vec<u32> = (start..start + size as u32).collect();
        if let Some(seed) = seed {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(1000 + set as u64);
            of_set.shuffle(&mut rng);
        }
        rows.extend(&of_set[..taken]);
        start += size as u32;
    }
    rows
}

/// Whole numbers near `shares` with the sum `total`: the largest remainders are rounded up.
fn exactly(shares: &[f64], total: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = shares.iter().map(|share| share.floor() as usize).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|&a, &b| shares[b].fract().total_cmp(&shares[a].fract()));
    let missing = total.saturating_sub(counts.iter().sum());
    order.into_iter().take(missing).for_each(|i| counts[i] += 1);
    counts
}

/// Sets rows aside: a share of them below 1, or a count. Returns the rest and those set aside, each in its
/// given order; which ones depends on the seed alone.
pub fn hold_out(rows: Vec<u32>, size: f64, seed: u64) -> (Vec<u32>, Vec<u32>) {
    let n = rows.len();
    let count = if size < 1.0 { (size * n as f64).ceil() } else { size } as usize;
    let mut places: Vec<usize> = (0..n).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(999);
    places.shuffle(&mut rng);
    let mut aside = vec![false; n];
    places.iter().take(count).for_each(|&i| aside[i] = true);
    let (held, rest): (Vec<(u32, bool)>, Vec<_>) = rows.into_iter().zip(aside).partition(|(_, aside)| *aside);
    let rows = |pairs: Vec<(u32, bool)>| pairs.into_iter().map(|(row, _)| row).collect();
    (rows(rest), rows(held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_proportions_as_in_trl() {
        // w = (2/3, 1/3), N = min(10 / (2/3), 10 / (1/3)) = 15
        let rows = mix(&[10, 10], Some(&[2.0, 1.0]), None, None);
        assert_eq!(rows, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(mix(&[3, 2], None, None, None), [0, 1, 2, 3, 4]);
        assert_eq!(mix(&[4, 4], None, Some(4), None), [0, 1, 4, 5]);
        assert_eq!(mix(&[10, 10, 10], None, Some(2), None), [0, 10]);
        assert_eq!(mix(&[10, 10], None, Some(1), None), [0]);
        assert_eq!(mix(&[3, 2], None, Some(50), None).len(), 5);
        assert_eq!(mix(&[4, 4], Some(&[0.0, 1.0]), None, None), [4, 5, 6, 7]);
        let random = mix(&[100, 100], None, Some(20), Some(7));
        assert_eq!(random, mix(&[100, 100], None, Some(20), Some(7)));
        assert_ne!(random, mix(&[100, 100], None, Some(20), Some(8)));
        assert_eq!(random.iter().filter(|&&row| row < 100).count(), 10);
    }

    #[test]
    fn rows_are_held_out_by_share_or_count() {
        let (rest, held) = hold_out((0..10).collect(), 0.25, 1);
        assert_eq!((rest.len(), held.len()), (7, 3));
        let mut all = [rest.clone(), held.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert!(rest.is_sorted() && held.is_sorted());
        assert_ne!(held, hold_out((0..10).collect(), 0.25, 2).1);
        assert_eq!(hold_out((0..10).collect(), 4.0, 1).1.len(), 4);
    }
}
