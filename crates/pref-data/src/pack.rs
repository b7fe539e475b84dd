//! Packing: pairs become rows `shared ++ chosen tail ++ rejected tail`, concatenated without padding.

use crate::PairTokens;

/// One pair in a packed batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedRow {
    /// Index of its first token.
    pub start: usize,
    /// Tokens common to both sequences.
    pub shared: usize,
    /// Tokens of the chosen and of the rejected tail.
    pub tails: [usize; 2],
}

/// Which completions of which pair a scored token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    /// Pair within the batch.
    pub pair: u32,
    /// The token is part of the chosen completion.
    pub chosen: bool,
    /// The token is part of the rejected completion.
    pub rejected: bool,
}

/// A micro-batch of pairs: tokens once where both sequences agree, no pad token anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence; both tails continue from the shared part.
    pub positions: Vec<u32>,
    /// Where the pairs are.
    pub rows: Vec<PackedRow>,
    /// For each scored token, the index of the token that predicts it.
    pub predictors: Vec<u32>,
    /// The scored tokens: every completion token that has a predecessor.
    pub targets: Vec<u32>,
    /// Whose they are.
    pub sides: Vec<Side>,
    /// Tokens of both sequences of every pair, as a padded batch would count them.
    pub num_tokens: usize,
}

impl Packed {
    /// Packs pairs in the given order.
    pub fn new<'a>(pairs: impl IntoIterator<Item = &'a PairTokens>) -> Self {
        let mut packed = Self::default();
        for (pair, tokens) in pairs.into_iter().enumerate() {
            packed.push(pair as u32, tokens);
        }
        packed
    }

    /// Packs completions with labels (rows without a rejected side) in the given order.
    pub fn unpaired<'a>(rows: impl IntoIterator<Item = &'a PairTokens>) -> Self {
        let mut packed = Self::default();
        for (row, tokens) in rows.into_iter().enumerate() {
            packed.push(row as u32, tokens);
            // There is one sequence, not two.
            packed.num_tokens -= tokens.prompt.len();
        }
        packed
    }

    fn push(&mut self, pair: u32, tokens: &PairTokens) {
        let prompt = tokens.prompt.len();
        let common = tokens.common();
        let (shared, start) = (prompt + common, self.tokens.len());
        self.tokens.extend(&tokens.prompt);
        self.tokens.extend(&tokens.chosen[..common]);
        self.positions.extend(0..shared as u32);
        for i in prompt.max(1)..shared {
            let side = Side { pair, chosen: true, rejected: true };
            self.score(start + i - 1, tokens.chosen[i - prompt], side);
        }
        let mut tails = [0; 2];
        for (which, completion) in [&tokens.chosen, &tokens.rejected].into_iter().enumerate() {
            let tail = &completion[common..];
            let first = self.tokens.len();
            self.tokens.extend(tail);
            self.positions.extend(shared as u32..(shared + tail.len()) as u32);
            let side = Side { pair, chosen: which == 0, rejected: which == 1 };
            for (i, &target) in tail.iter().enumerate().skip(tokens.context[which]) {
                // The first token of a tail follows the last shared one.
                let predictor = if i > 0 { Some(first + i - 1) } else { (start + shared).checked_sub(1) };
                if let Some(predictor) = predictor.filter(|&p| p >= start) {
                    self.score(predictor, target, side);
                }
            }
            tails[which] = tail.len();
        }
        self.rows.push(PackedRow { start, shared, tails });
        self.num_tokens += 2 * prompt + tokens.chosen.len() + tokens.rejected.len();
    }

    fn score(&mut self, predictor: usize, target: u32, side: Side) {
        self.predictors.push(predictor as u32);
        self.targets.push(target);
        self.sides.push(side);
    }

    /// Scored tokens and the sum they are added to: the chosen sum of pair `p` is `p`, its rejected sum
    /// is `pairs + p`.
    pub fn sums(&self) -> Vec<(u32, u32)> {
        let pairs = self.rows.len() as u32;
        let mut sums = Vec::with_capacity(self.sides.len() * 2);
        for (token, side) in self.sides.iter().enumerate() {
            if side.chosen {
                sums.push((token as u32, side.pair));
            }
            if side.rejected {
                sums.push((token as u32, pairs + side.pair));
            }
        }
        sums
    }

    /// [`Packed::sums`] with the tokens beyond the length of the pair's shorter completion apart: theirs are the
    /// sums from `2 * pairs` on (LD-DPO, as `DPOTrainer` counts with `ld_alpha`).
    pub fn sums_with_tails(&self) -> Vec<(u32, u32)> {
        let pairs = self.rows.len();
        let shorter: Vec<usize> =
            self.completion_tokens().iter().map(|count| count[0].min(count[1])).collect();
        let mut seen = vec![0_usize; 2 * pairs];
        let apart = |(token, sum): (u32, u32)| {
            let place = &mut seen[sum as usize];
            *place += 1;
            let tail = *place > shorter[sum as usize % pairs];
            (token, if tail { sum + 2 * pairs as u32 } else { sum })
        };
        self.sums().into_iter().map(apart).collect()
    }

    /// Scored tokens of the chosen and of the rejected completion of each pair.
    pub fn completion_tokens(&self) -> Vec<[usize; 2]> {
        let mut counts = vec![[0; 2]; self.rows.len()];
        for side in &self.sides {
            counts[side.pair as usize][0] += usize::from(side.chosen);
            counts[side.pair as usize][1] += usize::from(side.rejected);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> PairTokens {
        PairTokens {
            prompt: prompt.into(),
            chosen: chosen.into(),
            rejected: rejected.into(),
            ..PairTokens::default()
        }
    }

    #[test]
    fn the_start_of_the_answers_is_shared() {
        let packed = Packed::new([&pair(&[1, 2], &[3, 4, 5], &[3, 6])]);
        assert_eq!(packed.tokens, [1, 2, 3, 4, 5, 6]);
        assert_eq!(packed.positions, [0, 1, 2, 3, 4, 3]);
        assert_eq!(packed.rows, [PackedRow { start: 0, shared: 3, tails: [2, 1] }]);
        assert_eq!(packed.predictors, [1, 2, 3, 2]);
        assert_eq!(packed.targets, [3, 4, 5, 6]);
        assert_eq!(packed.sums(), [(0, 0), (0, 1), (1, 0), (2, 0), (3, 1)]);
        assert_eq!(
            packed.sums_with_tails(),
            [(0, 0), (0, 1), (1, 0), (2, 2), (3, 1)],
            "5 is beyond two tokens"
        );
        assert_eq!(packed.num_tokens, 9);
        assert_eq!(packed.completion_tokens(), [[3, 2]]);
    }

    #[test]
    fn prompts_that_differ_are_context_of_their_own_completion() {
        let tokens = PairTokens { context: [2, 0], ..pair(&[], &[1, 2, 3], &[1, 2]) };
        let packed = Packed::new([&tokens]);
        assert_eq!(packed.rows, [PackedRow { start: 0, shared: 0, tails: [3, 2] }]);
        assert_eq!(
            (packed.targets.as_slice(), packed.predictors.as_slice()),
            ([3, 2].as_slice(), [1, 3].as_slice())
        );
        assert_eq!(packed.completion_tokens(), [[1, 1]], "the first token of a sequence has no predecessor");
    }

    #[test]
    fn nothing_predicts_the_first_token_of_a_row_without_prompt() {
        let packed = Packed::new([&pair(&[9], &[1], &[2]), &pair(&[], &[3, 4], &[5])]);
        assert_eq!(packed.rows[1], PackedRow { start: 3, shared: 0, tails: [2, 1] });
        assert_eq!(packed.targets, [1, 2, 4], "3 and 5 start their sequences");
        assert_eq!(packed.predictors, [0, 0, 3]);
    }

    #[test]
    fn an_unpaired_row_is_one_sequence() {
        let packed = Packed::unpaired([&pair(&[1, 2], &[3, 4], &[])]);
        assert_eq!((packed.tokens.as_slice(), packed.num_tokens), ([1, 2, 3, 4].as_slice(), 4));
        assert_eq!(packed.rows, [PackedRow { start: 0, shared: 2, tails: [2, 0] }]);
        assert_eq!(packed.completion_tokens(), [[2, 0]]);
    }

    #[test]
    fn identical_completions_have_no_tails() {
        let packed = Packed::new([&pair(&[1], &[2, 3], &[2, 3])]);
        assert_eq!(packed.rows[0].tails, [0, 0]);
        assert_eq!(packed.completion_tokens(), [[2, 2]]);
    }
}
