//! Choosing the next token from logits.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Draws from the smallest set of tokens whose probability reaches this; 1 draws from all.
    pub top_p: f32,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0 };

    /// The next token for one row of logits.
    pub fn choose(&self, logits: &[f32], rng: &mut ChaCha8Rng) -> u32 {
        if self.temperature <= 0.0 {
            return argmax(logits);
        }
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut weights: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .map(|(id, &z)| (id as u32, f64::from((z - top) / self.temperature).exp()))
            .collect();
        weights.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f64 = weights.iter().map(|w| w.1).sum();
        let mut kept = 0.0;
        let nucleus = weights.iter().take_while(|w| {
            let inside = kept < f64::from(self.top_p) * total;
            kept += w.1;
            inside
        });
        let count = nucleus.count().max(1);
        let mass: f64 = weights[..count].iter().map(|w| w.1).sum();
        let mut draw = rng.random::<f64>() * mass;
        for &(id, weight) in &weights[..count] {
            draw -= weight;
            if draw <= 0.0 {
                return id;
            }
        }
        weights[count - 1].0
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, z) in logits.iter().enumerate() {
        if *z > logits[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn greedy_takes_the_first_maximum() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(Sampling::GREEDY.choose(&[0.0, 3.0, 3.0, -1.0], &mut rng), 1);
    }

    #[test]
    fn top_p_excludes_the_tail_and_frequencies_follow_the_softmax() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let logits = [2.0_f32.ln(), 1.0_f32.ln(), 1.0_f32.ln(), -20.0];
        let sampling = Sampling { temperature: 1.0, top_p: 0.7 };
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[sampling.choose(&logits, &mut rng) as usize] += 1;
        }
        assert_eq!((counts[2], counts[3]), (0, 0), "{counts:?}");
        let share = f64::from(counts[0]) / 4000.0;
        assert!((share - 2.0 / 3.0).abs() < 0.03, "{counts:?}");
    }
}
