//! Choosing the next token from logits, as `transformers` does: penalty for repetitions, temperature, `top_k`, `top_p`,
//! `min_p`, in that order.

use std::collections::HashSet;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Draws from so many of the most likely tokens; 0 draws from all.
    pub top_k: usize,
    /// Draws from the smallest set of tokens whose probability reaches this; 1 draws from all.
    pub top_p: f32,
    /// Draws from tokens that are at least so likely, compared with the most likely one; 0 draws from all.
    pub min_p: f32,
    /// Positive logits of tokens that the prompt or the completion holds are divided by it, negative ones multiplied;
    /// 1 leaves them.
    pub repetition_penalty: f32,
}

/// Tokens that stand in a prompt and its completion, as far as the sampling looks at them.
#[derive(Debug, Clone, Default)]
pub struct History(Option<HashSet<u32>>);

impl History {
    /// Of a prompt.
    pub fn of(prompt: &[u32], sampling: &Sampling) -> Self {
        Self((sampling.repetition_penalty != 1.0).then(|| prompt.iter().copied().collect()))
    }

    /// One more.
    pub fn add(&mut self, token: u32) {
        if let Some(tokens) = &mut self.0 {
            tokens.insert(token);
        }
    }
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 };

    /// The next token for one row of logits.
    pub fn choose(&self, logits: &[f32], history: &History, rng: &mut ChaCha8Rng) -> u32 {
        let penalised;
        let logits = match &history.0 {
            Some(tokens) => {
                penalised = self.penalised(logits, tokens);
                &penalised
            }
            None => logits,
        };
        if self.temperature <= 0.0 { argmax(logits) } else { self.draw(logits, rng) }
    }

    fn penalised(&self, logits: &[f32], tokens: &HashSet<u32>) -> Vec<f32> {
        let mut all = logits.to_vec();
        for &token in tokens {
            if let Some(z) = all.get_mut(token as usize) {
                *z = if *z < 0.0 { *z * self.repetition_penalty } else { *z / self.repetition_penalty };
            }
        }
        all
    }

    fn draw(&self, logits: &[f32], rng: &mut ChaCha8Rng) -> u32 {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut weights: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .map(|(id, &z)| (id as u32, f64::from((z - top) / self.temperature).exp()))
            .collect();
        self.keep_likely(&mut weights);
        let mass: f64 = weights.iter().map(|w| w.1).sum();
        let mut draw = rng.random::<f64>() * mass;
        for &(id, weight) in &weights {
            draw -= weight;
            if draw <= 0.0 {
                return id;
            }
        }
        // Rounding has left a little of the mass.
        weights.last().map_or(0, |w| w.0)
    }

    /// Leaves the tokens that may be drawn, the most likely first where some are left out.
    fn keep_likely(&self, weights: &mut Vec<(u32, f64)>) {
        if self.top_k > 0 && self.top_k < weights.len() {
            first(weights, self.top_k);
            weights.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            let total: f64 = weights.iter().map(|w| w.1).sum();
            let wanted = f64::from(self.top_p) * total;
            // Few tokens are enough as a rule; sorting all of them would cost more than the model's step.
            let mut sorted = 64.min(weights.len());
            let count = loop {
                first(weights, sorted);
                let mut kept = 0.0;
                let inside = weights[..sorted].iter().take_while(|w| {
                    let inside = kept < wanted;
                    kept += w.1;
                    inside
                });
                let count = inside.count();
                if count < sorted || sorted == weights.len() {
                    break count.max(1);
                }
                sorted = (8 * sorted).min(weights.len());
            };
            weights.truncate(count);
        }
        if self.min_p > 0.0 {
            let most = weights.iter().map(|w| w.1).fold(0.0, f64::max);
            weights.retain(|w| w.1 >= f64::from(self.min_p) * most);
        }
    }
}

/// Puts the `count` most likely tokens first, in order; of equally likely ones that with the smaller id.
fn first(weights: &mut [(u32, f64)], count: usize) {
    let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < weights.len() {
        weights.select_nth_unstable_by(count, order);
    }
    weights[..count].sort_unstable_by(order);
}

fn argmax(logits: &[f32]) -> u32 {
    // The largest value first, in a form that vectorises, then the first place where it stands.
    let largest = |part: &[f32]| part.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, part) in logits.chunks(64).enumerate() {
        let top = largest(part);
        if top > best.0 {
            best = (top, i * 64);
        }
    }
    let part = &logits[best.1.min(logits.len())..];
    (best.1 + part.iter().position(|&z| z == best.0).unwrap_or(0)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn counts(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let history = History::of(&[], &sampling);
        let mut counts = vec![0; logits.len()];
        for _ in 0..4000 {
            counts[sampling.choose(logits, &history, &mut rng) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut greedy = |logits: &[f32]| Sampling::GREEDY.choose(logits, &History::default(), &mut rng);
        assert_eq!(greedy(&[0.0, 3.0, 3.0, -1.0]), 1);
        let mut many = vec![-1.0; 1000];
        (many[517], many[518]) = (2.5, 2.5);
        assert_eq!(greedy(&many), 517);
    }

    #[test]
    fn top_p_excludes_the_tail_and_frequencies_follow_the_softmax() {
        let logits = [2.0_f32.ln(), 1.0_f32.ln(), 1.0_f32.ln(), -20.0];
        let counts = counts(Sampling { temperature: 1.0, top_p: 0.7, ..Sampling::GREEDY }, &logits);
        assert_eq!((counts[2], counts[3]), (0, 0), "{counts:?}");
        let share = counts[0] as f64 / 4000.0;
        assert!((share - 2.0 / 3.0).abs() < 0.03, "{counts:?}");
    }

    #[test]
    fn top_p_of_many_tokens_is_that_of_a_full_sort() {
        // 500 equally likely tokens: 0.75 of the mass is 375 of them, those with the smallest ids.
        let counts = counts(Sampling { temperature: 1.0, top_p: 0.75, ..Sampling::GREEDY }, &[0.5; 500]);
        assert!(counts[375..].iter().all(|&n| n == 0), "{counts:?}");
        assert!(counts[..375].iter().filter(|&&n| n > 0).count() > 365);
    }

    #[test]
    fn top_k_and_min_p_keep_the_likely_ones() {
        let logits = [0.0, 4.0_f32.ln(), 2.0_f32.ln(), 3.0_f32.ln()];
        let few = counts(Sampling { temperature: 1.0, top_k: 2, ..Sampling::GREEDY }, &logits);
        assert!(few[0] == 0 && few[2] == 0 && few[1] > few[3] && few[3] > 0, "{few:?}");
        let likely = counts(Sampling { temperature: 1.0, min_p: 0.4, ..Sampling::GREEDY }, &logits);
        assert!(likely[0] == 0 && likely[2] > 0, "{likely:?}");
    }

    #[test]
    fn repeated_tokens_are_less_likely() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        let mut history = History::of(&[1], &sampling);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(sampling.choose(&[1.0, 1.5, -3.0], &history, &mut rng), 0);
        history.add(0);
        assert_eq!(sampling.choose(&[-1.0, -1.5, -1.8], &history, &mut rng), 2);
    }
}
