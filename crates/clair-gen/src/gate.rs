//! Which pairs are kept: bounds on how much their texts differ.

use anyhow::{Result, bail};

use crate::args::GateArgs;
use crate::output::Pair;

/// Bounds; `None` is without.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Gate {
    jaccard: [Option<f64>; 2],
    levenshtein: [Option<f64>; 2],
    length_ratio: [Option<f64>; 2],
}

impl Gate {
    /// From the command line.
    pub fn new(args: &GateArgs) -> Result<Self> {
        let gate = Self {
            jaccard: [args.min_jaccard, args.max_jaccard],
            levenshtein: [args.min_levenshtein, args.max_levenshtein],
            length_ratio: [args.min_length_ratio, args.max_length_ratio],
        };
        for (name, [min, max]) in [
            ("jaccard", gate.jaccard),
            ("levenshtein", gate.levenshtein),
            ("length-ratio", gate.length_ratio),
        ] {
            if [min, max].into_iter().flatten().any(|bound| !bound.is_finite() || bound < 0.0) {
                bail!("--min-{name} and --max-{name} must be numbers of 0 or more");
            }
            if min.zip(max).is_some_and(|(min, max)| min > max) {
                bail!("--min-{name} is above --max-{name}: no pair could pass");
            }
        }
        Ok(gate)
    }

    /// The bound that a pair does not keep, and its own value.
    pub fn refuses(&self, pair: &Pair) -> Option<(&'static str, f64)> {
        let length = |text: &str| text.chars().count() as f64;
        let ratio = length(&pair.chosen) / length(&pair.rejected).max(1.0);
        let bounds = [
            (pair.contrast.jaccard, self.jaccard, ["min_jaccard", "max_jaccard"]),
            (pair.contrast.levenshtein, self.levenshtein, ["min_levenshtein", "max_levenshtein"]),
            (ratio, self.length_ratio, ["min_length_ratio", "max_length_ratio"]),
        ];
        bounds.into_iter().find_map(|(value, [min, max], [below, above])| {
            let is_below = min.is_some_and(|min| value < min);
            let is_above = max.is_some_and(|max| value > max);
            (is_below || is_above).then_some((if is_below { below } else { above }, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asker::Spent;
    use crate::input::Answer;

    #[test]
    fn bounds_name_what_they_refuse() {
        let answer =
            Answer { id: "1".into(), messages: Vec::new(), responses: Vec::new(), scores: Vec::new() };
        let pair =
            Pair::new(answer.into(), "one two three four".into(), "one two three".into(), Spent::default());
        let refuses = |gate: Gate| gate.refuses(&pair).map(|(reason, _)| reason);
        let with = |bounds| Gate { jaccard: bounds, ..Gate::default() };
        assert_eq!(refuses(Gate::default()), None);
        assert_eq!(refuses(with([Some(0.7), Some(0.8)])), None);
        assert_eq!(refuses(with([Some(0.8), None])), Some("min_jaccard"));
        assert_eq!(refuses(with([None, Some(0.7)])), Some("max_jaccard"));
        let lengths = Gate { length_ratio: [None, Some(1.2)], ..Gate::default() };
        assert_eq!(refuses(lengths), Some("max_length_ratio"));
    }
}
