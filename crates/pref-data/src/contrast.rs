//! How much two texts differ: the paper's measures of a preference set (arXiv 2408.06266, section 4).

use std::hash::Hash;

use rustc_hash::FxHashSet;
use serde::Serialize;

/// Contrast of one pair, or means over pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Contrast {
    /// Jaccard similarity of the token sets (words, split at white space), 0 to 1.
    pub jaccard: f64,
    /// Character Levenshtein distance.
    pub levenshtein: f64,
    /// Characters of the revision minus characters of the answer.
    pub length_change: f64,
}

impl Contrast {
    /// Measures one pair.
    pub fn of(answer: &str, revision: &str) -> Self {
        let length = |text: &str| text.chars().count() as f64;
        Self {
            jaccard: jaccard(answer.split_whitespace(), revision.split_whitespace()),
            levenshtein: levenshtein(answer, revision) as f64,
            length_change: length(revision) - length(answer),
        }
    }

    /// Means over pairs; zeros for none.
    pub fn mean(all: &[Self]) -> Self {
        let n = all.len().max(1) as f64;
        let sum = |f: fn(&Self) -> f64| all.iter().map(f).sum::<f64>() / n;
        Self {
            jaccard: sum(|c| c.jaccard),
            levenshtein: sum(|c| c.levenshtein),
            length_change: sum(|c| c.length_change),
        }
    }
}

/// Size of the intersection of two sets by that of their union; 1 for two empty ones.
pub fn jaccard<T: Hash + Eq>(a: impl IntoIterator<Item = T>, b: impl IntoIterator<Item = T>) -> f64 {
    let (a, b): (FxHashSet<T>, FxHashSet<T>) = (a.into_iter().collect(), b.into_iter().collect());
    let both = a.intersection(&b).count();
    let union = a.len() + b.len() - both;
    if union == 0 { 1.0 } else { both as f64 / union as f64 }
}

/// Insertions, deletions and replacements of characters that turn one text into the other.
pub fn levenshtein(a: &str, b: &str) -> usize {
    rapidfuzz::distance::levenshtein::distance(a.chars(), b.chars())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_edits_have_small_distances() {
        let contrast = Contrast::of("the cat sat", "the cat sits");
        assert_eq!(contrast, Contrast { jaccard: 0.5, levenshtein: 2.0, length_change: 1.0 });
        assert_eq!(jaccard([1, 2, 2], [2, 3]), 1.0 / 3.0);
        assert_eq!(jaccard::<u8>([], []), 1.0);
    }

    /// The textbook's table.
    fn slow(a: &[char], b: &[char]) -> usize {
        let mut row: Vec<usize> = (0..=b.len()).collect();
        for (i, x) in a.iter().enumerate() {
            let mut diagonal = row[0];
            row[0] = i + 1;
            for (j, y) in b.iter().enumerate() {
                let replaced = diagonal + usize::from(x != y);
                diagonal = row[j + 1];
                row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
            }
        }
        row[b.len()]
    }

    #[test]
    fn the_distance_is_the_textbooks() {
        let text = "the quick brown fox – jumps over the lazy dög and runs. ".repeat(9);
        let chars: Vec<char> = text.chars().collect();
        for (from, to, drop) in [(0, 400, 3), (5, 90, 7), (17, 300, 2), (0, 64, 64), (1, 66, 5)] {
            let a: String = chars[from..to].iter().collect();
            let b: String =
                chars[from..to].iter().enumerate().filter(|(i, _)| i % drop != 0).map(|(_, c)| *c).collect();
            let [x, y] = [&a, &b].map(|text| text.chars().collect::<Vec<_>>());
            assert_eq!(levenshtein(&a, &b), slow(&x, &y));
        }
    }
}
