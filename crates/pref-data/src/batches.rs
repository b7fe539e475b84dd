//! Which rows each micro-batch holds: a function of the lengths, the seed and the epoch.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Order in which an epoch visits the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they stand.
    Sequential,
    /// At random.
    Random,
    /// At random, but rows of similar length together: within stretches of 50 batches the longest first, and
    /// the longest row of all in the first batch (transformers' `LengthGroupedSampler`).
    GroupByLength,
}

/// What bounds a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// This many rows, the last batch perhaps fewer (TRL).
    Rows(usize),
    /// As many rows as have at most this many packed tokens; a longer row stands alone.
    Tokens(usize),
}

/// Micro-batches of an epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batches {
    rows: Vec<u32>,
    ends: Vec<u32>,
}

impl Batches {
    /// Batches of rows with these packed lengths. Every epoch has the same number of batches.
    pub fn new(
        lengths: &dyn Fn(usize) -> usize,
        rows: usize,
        order: Order,
        bound: Bound,
        seed: u64,
        epoch: usize,
    ) -> Self {
        match bound {
            Bound::Rows(size) => {
                let rows = ordered(lengths, rows, order, size, seed, epoch);
                let ends = (1..=rows.len().div_ceil(size.max(1))).map(|i| (i * size).min(rows.len()) as u32);
                Self { ends: ends.collect(), rows }
            }
            Bound::Tokens(most) => {
                // The batches of the first epoch stay together: their number must not change.
                let first = Self::by_tokens(lengths, ordered(lengths, rows, order, 8, seed, 0), most);
                if order == Order::Sequential || epoch == 0 { first } else { first.shuffled(seed, epoch) }
            }
        }
    }

    fn by_tokens(lengths: &dyn Fn(usize) -> usize, rows: Vec<u32>, most: usize) -> Self {
        let (mut ends, mut tokens) = (Vec::new(), 0);
        for (i, &row) in rows.iter().enumerate() {
            let length = lengths(row as usize);
            if tokens > 0 && tokens + length > most {
                ends.push(i as u32);
                tokens = 0;
            }
            tokens += length;
        }
        if !rows.is_empty() {
            ends.push(rows.len() as u32);
        }
        Self { rows, ends }
    }

    fn shuffled(&self, seed: u64, epoch: usize) -> Self {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.shuffle(&mut generator(seed, epoch));
        let mut shuffled = Self::default();
        for i in order {
            shuffled.rows.extend(self.get(i));
            shuffled.ends.push(shuffled.rows.len() as u32);
        }
        shuffled
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Rows of batch `i`.
    pub fn get(&self, i: usize) -> &[u32] {
        let from = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        &self.rows[from..self.ends[i] as usize]
    }

    /// All batches in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        (0..self.len()).map(|i| self.get(i))
    }
}

fn generator(seed: u64, epoch: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch as u64);
    rng
}

fn ordered(
    lengths: &dyn Fn(usize) -> usize,
    rows: usize,
    order: Order,
    batch: usize,
    seed: u64,
    epoch: usize,
) -> Vec<u32> {
    let mut all: Vec<u32> = (0..rows as u32).collect();
    if order == Order::Sequential {
        return all;
    }
    all.shuffle(&mut generator(seed, epoch));
    if order == Order::GroupByLength {
        let length = |row: &u32| std::cmp::Reverse(lengths(*row as usize));
        for stretch in all.chunks_mut(50 * batch.max(1)) {
            stretch.sort_by_key(length);
        }
        // Memory runs out in the first batch or never.
        if let Some(longest) = (0..all.len()).min_by_key(|&i| length(&all[i])) {
            all.swap(0, longest);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(row: usize) -> usize {
        (row * 7) % 31 + 1
    }

    fn batches(order: Order, bound: Bound, epoch: usize) -> Vec<Vec<u32>> {
        Batches::new(&length, 1003, order, bound, 1, epoch).iter().map(<[u32]>::to_vec).collect()
    }

    const ORDERS: [Order; 3] = [Order::Sequential, Order::Random, Order::GroupByLength];

    #[test]
    fn an_epoch_visits_every_row_once_and_epochs_differ() {
        for order in ORDERS {
            for bound in [Bound::Rows(4), Bound::Tokens(100)] {
                let [first, second] = [0, 1].map(|epoch| batches(order, bound, epoch));
                for epoch in [&first, &second] {
                    let mut rows = epoch.concat();
                    rows.sort_unstable();
                    assert_eq!(rows, (0..1003).collect::<Vec<_>>(), "{order:?} {bound:?}");
                }
                assert_eq!(first.len(), second.len());
                assert_eq!(first == second, order == Order::Sequential, "{order:?} {bound:?}");
                assert_eq!(first, batches(order, bound, 0));
            }
        }
        assert_eq!(batches(Order::Sequential, Bound::Rows(1000), 0).concat().len(), 1003);
    }

    #[test]
    fn a_token_budget_is_kept() {
        for order in ORDERS {
            for batch in batches(order, Bound::Tokens(64), 3) {
                let tokens: usize = batch.iter().map(|&row| length(row as usize)).sum();
                assert!(tokens <= 64 || batch.len() == 1);
            }
        }
        assert!(batches(Order::Random, Bound::Tokens(5), 0).iter().any(|batch| batch.len() == 1));
    }

    #[test]
    fn rows_of_similar_length_stand_together() {
        let grouped = batches(Order::GroupByLength, Bound::Rows(4), 0);
        let spread = |batch: &Vec<u32>| {
            let all = batch.iter().map(|&row| length(row as usize));
            all.clone().max().unwrap() - all.min().unwrap()
        };
        let mean = |all: &[Vec<u32>]| all.iter().map(spread).sum::<usize>() / all.len();
        assert!(mean(&grouped) <= 2);
        assert!(mean(&batches(Order::Random, Bound::Rows(4), 0)) > 10);
        assert_eq!(length(grouped[0][0] as usize), 31);
    }
}
