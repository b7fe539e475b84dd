//! Scores of items put together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::items::Kind;
use super::rules::rounded;
use crate::bootstrap::{Estimate, clustered};

/// One item's result, a row of `items.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The item.
    pub id: String,
    /// The same for the same question.
    pub cluster: String,
    /// Where the question comes from.
    pub benchmark: String,
    /// Kind of the question.
    pub kind: Kind,
    /// From 0 to 1.
    pub score: f64,
    /// What was read from the answer or the judge.
    pub read: Value,
    /// Why there is nothing to read, if there is not: the score is then 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// What was asked.
    pub question: String,
    /// What was answered.
    pub response: String,
    /// What would have been right.
    pub target: Value,
    /// What the judge said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judgement: Option<String>,
}

/// A mean of items with its interval.
#[derive(Debug, Clone, Serialize)]
pub struct Part {
    /// Benchmark, kind, or `overall`.
    pub name: String,
    /// Items.
    pub items: usize,
    /// Distinct questions.
    pub distinct: usize,
    /// Mean score, with an interval that resamples distinct questions.
    pub score: Estimate,
    /// Items that count as 0 because nothing could be read.
    pub unread: usize,
}

fn part(name: &str, items: &[&Scored]) -> Option<Part> {
    let values: Vec<f64> = items.iter().map(|item| item.score).collect();
    let clusters: Vec<&str> = items.iter().map(|item| item.cluster.as_str()).collect();
    let distinct = clusters.iter().collect::<std::collections::BTreeSet<_>>().len();
    let unread = items.iter().filter(|item| item.problem.is_some()).count();
    Some(Part {
        name: name.into(),
        items: items.len(),
        distinct,
        score: clustered(&values, &clusters)?,
        unread,
    })
}

/// The whole, both kinds, and every benchmark.
pub fn parts(items: &[Scored]) -> Vec<Part> {
    let of = |keep: &dyn Fn(&Scored) -> bool| items.iter().filter(|item| keep(item)).collect::<Vec<_>>();
    let mut all: Vec<Option<Part>> = vec![part("overall", &of(&|_| true))];
    for kind in [Kind::FreeForm, Kind::MultipleChoice] {
        all.push(part(kind.name(), &of(&|item| item.kind == kind)));
    }
    let benchmarks: std::collections::BTreeSet<&str> =
        items.iter().map(|item| item.benchmark.as_str()).collect();
    all.extend(benchmarks.into_iter().map(|name| part(name, &of(&|item| item.benchmark == name))));
    all.into_iter().flatten().collect()
}

/// `score.json` as MixEval's `compute_metrics.py` writes it: for the whole and each benchmark the scores of both kinds,
/// rounded to three decimals, weighted with their items.
pub fn reference_layout(items: &[Scored]) -> Value {
    let mut sums: BTreeMap<String, [(f64, usize); 2]> = BTreeMap::new();
    for item in items {
        for name in ["overall", item.benchmark.as_str()] {
            let (sum, count) =
                &mut sums.entry(name.into()).or_default()[usize::from(item.kind != Kind::FreeForm)];
            (*sum, *count) = (*sum + item.score, *count + 1);
        }
    }
    let mean = |parts: &[(f64, usize); 2]| {
        let all = (parts[0].1 + parts[1].1) as f64;
        let share = |&(sum, count): &(f64, usize)| match count {
            0 => 0.0,
            _ => rounded(sum / count as f64, 3) * (count as f64 / all),
        };
        parts.iter().map(share).sum::<f64>()
    };
    let mut scores = Map::new();
    if let Some(parts) = sums.remove("overall") {
        scores.insert("overall".into(), mean(&parts).into());
    }
    scores.extend(sums.iter().map(|(name, parts)| (name.clone(), mean(parts).into())));
    scores.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(benchmark: &str, kind: Kind, cluster: &str, score: f64) -> Scored {
        Scored {
            id: format!("{benchmark}/{cluster}/{score}"),
            cluster: cluster.into(),
            benchmark: benchmark.into(),
            kind,
            score,
            read: Value::Null,
            problem: None,
            question: String::new(),
            response: String::new(),
            target: Value::Null,
            judgement: None,
        }
    }

    /// Python, with the reference's own arithmetic:
    /// ```text
    /// ff, mp = [0.0, 0.3, 1.0], [1, 0, 0, 1]                       # AGIEval is in both
    /// overall = round(sum(ff)/3, 3) * 3/7 + round(sum(mp)/4, 3) * 4/7          # 0.4712857142857143
    /// agieval = round((0.3 + 1.0)/2, 3) * 2/3 + round(1/1, 3) * 1/3            # 0.7666666666666666
    /// ```
    #[test]
    fn scores_are_put_together_as_the_reference_does() {
        use Kind::{FreeForm, MultipleChoice};
        let items = [
            item("DROP", FreeForm, "a", 0.0),
            item("AGIEval", FreeForm, "b", 0.3),
            item("AGIEval", FreeForm, "c", 1.0),
            item("AGIEval", MultipleChoice, "d", 1.0),
            item("MMLU", MultipleChoice, "e", 0.0),
            item("MMLU", MultipleChoice, "e", 0.0),
            item("PIQA", MultipleChoice, "f", 1.0),
        ];
        let scores = reference_layout(&items);
        assert!((scores["overall"].as_f64().unwrap() - 0.471_285_714_285_714_3).abs() < 1e-12, "{scores}");
        assert!((scores["AGIEval"].as_f64().unwrap() - 0.766_666_666_666_666_6).abs() < 1e-12);
        assert_eq!(scores.as_object().unwrap().keys().next().unwrap(), "overall");
        // Python: round(1 / 80, 3) is 0.013, its value a little above 0.0125.
        assert_eq!(rounded(1.0 / 80.0, 3), 0.013);
        let parts = parts(&items);
        assert_eq!((parts[0].items, parts[0].distinct), (7, 6));
        assert!((parts[0].score.mean - 3.3 / 7.0).abs() < 1e-12);
    }
}
