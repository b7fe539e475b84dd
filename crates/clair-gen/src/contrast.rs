//! How much a revision differs from the answer.

use std::collections::HashSet;

use serde::Serialize;

/// Contrast of one pair, or means over pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Contrast {
    /// Jaccard similarity of the word sets, 0 to 1.
    pub jaccard: f64,
    /// Character Levenshtein distance.
    pub levenshtein: f64,
    /// Characters of the revision minus characters of the answer.
    pub length_change: f64,
}

/// Measures one pair.
pub fn measure(answer: &str, revision: &str) -> Contrast {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<HashSet<_>>();
    let (a, b) = (words(answer), words(revision));
    let union = a.union(&b).count();
    let jaccard = if union == 0 { 1.0 } else { a.intersection(&b).count() as f64 / union as f64 };
    let length = |text: &str| text.chars().count() as f64;
    Contrast {
        jaccard,
        levenshtein: strsim::levenshtein(answer, revision) as f64,
        length_change: length(revision) - length(answer),
    }
}

/// Means over pairs; zeros for none.
pub fn mean(all: &[Contrast]) -> Contrast {
    let n = all.len().max(1) as f64;
    let sum = |f: fn(&Contrast) -> f64| all.iter().map(f).sum::<f64>() / n;
    Contrast {
        jaccard: sum(|c| c.jaccard),
        levenshtein: sum(|c| c.levenshtein),
        length_change: sum(|c| c.length_change),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_edits_have_small_distances() {
        let contrast = measure("the cat sat", "the cat sits");
        assert_eq!(contrast, Contrast { jaccard: 0.5, levenshtein: 2.0, length_change: 1.0 });
    }
}
