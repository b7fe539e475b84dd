//! Metrics of rows under a model and a reference.

use pref_data::{Dataset, PreparedRow};
use serde::Serialize;
use serde_json::{Value, json};

use crate::bootstrap::{Estimate, mean};
use crate::score::PairScore;

/// One line of the table.
#[derive(Debug, Serialize)]
pub struct Metric {
    /// Name, TRL's where it has one.
    pub name: &'static str,
    /// What it says.
    pub meaning: &'static str,
    /// Value for the reference, where there is one.
    pub reference: Option<f64>,
    /// Value for the model.
    pub model: Estimate,
}

/// Rewards `β · (log π - log π_ref)` of a pair.
pub fn rewards(model: &PairScore, reference: &PairScore, beta: f64) -> [f64; 2] {
    [0, 1].map(|i| beta * (model.logps[i] - reference.logps[i]))
}

/// Of pairs.
pub fn of_pairs(model: &[PairScore], reference: Option<&[PairScore]>, beta: f64) -> Vec<Metric> {
    let mut all = Vec::new();
    let mut push = |name, meaning, reference: Option<f64>, values: Vec<f64>| {
        if let Some(model) = mean(&values) {
            all.push(Metric { name, meaning, reference, model });
        }
    };
    let average = |scores: &[PairScore], f: &dyn Fn(&PairScore) -> f64| {
        scores.iter().map(f).sum::<f64>() / scores.len() as f64
    };
    if let Some(reference) = reference {
        let pairs: Vec<[f64; 2]> = model.iter().zip(reference).map(|(m, r)| rewards(m, r, beta)).collect();
        let of = |f: fn(&[f64; 2]) -> f64| pairs.iter().map(f).collect::<Vec<_>>();
        let hit = |p: &[f64; 2]| f64::from(u8::from(p[0] > p[1]));
        push("rewards/accuracies", "the winner's reward is above the loser's", Some(0.0), of(hit));
        push("rewards/margins", "winner's reward minus loser's", Some(0.0), of(|p| p[0] - p[1]));
        push("rewards/chosen", "winner's reward", Some(0.0), of(|p| p[0]));
        push("rewards/rejected", "loser's reward", Some(0.0), of(|p| p[1]));
    }
    let mut likelihood = |name, meaning, f: &dyn Fn(&PairScore) -> f64| {
        push(name, meaning, reference.map(|r| average(r, f)), model.iter().map(f).collect());
    };
    likelihood("logps/chosen", "log-likelihood of the winner", &|s| s.logps[0]);
    likelihood("logps/rejected", "log-likelihood of the loser", &|s| s.logps[1]);
    likelihood("logps/chosen per token", "the same a token", &|s| s.logps[0] / s.tokens[0].max(1) as f64);
    likelihood("logps/rejected per token", "the same a token", &|s| s.logps[1] / s.tokens[1].max(1) as f64);
    let prefers = |s: &PairScore| f64::from(u8::from(s.logps[0] > s.logps[1]));
    likelihood("likelihood accuracy", "the winner is more likely than the loser", &prefers);
    all
}

/// Of completions with labels, as TRL's KTO trainer names them: winners are the desirable ones.
pub fn of_rows(
    data: &Dataset,
    model: &[PairScore],
    reference: Option<&[PairScore]>,
    beta: f64,
) -> Vec<Metric> {
    let mut all = Vec::new();
    let which = |label: bool| (0..model.len()).filter(move |&i| data.label(i) == label);
    let sides = [
        (
            true,
            "rewards/chosen",
            "reward of the desirable ones",
            "logps/chosen",
            "log-likelihood of the desirable ones",
        ),
        (false, "rewards/rejected", "reward of the others", "logps/rejected", "log-likelihood of the others"),
    ];
    let mut means = Vec::new();
    for (label, rewards, reward, logps, likelihood) in sides {
        if let Some(reference) = reference {
            let values: Vec<f64> =
                which(label).map(|i| beta * (model[i].logps[0] - reference[i].logps[0])).collect();
            means.extend(mean(&values).map(|estimate| estimate.mean));
            all.extend(mean(&values).map(|model| Metric {
                name: rewards,
                meaning: reward,
                reference: Some(0.0),
                model,
            }));
        }
        let values: Vec<f64> = which(label).map(|i| model[i].logps[0]).collect();
        let before =
            reference.map(|r| which(label).map(|i| r[i].logps[0]).sum::<f64>() / values.len() as f64);
        all.extend(mean(&values).map(|model| Metric {
            name: logps,
            meaning: likelihood,
            reference: before,
            model,
        }));
    }
    if let [desirable, other] = means[..] {
        let between = desirable - other;
        let model = Estimate { mean: between, low: between, high: between };
        let meaning = "the first minus the second of the rewards, without an interval";
        all.push(Metric { name: "rewards/margins", meaning, reference: Some(0.0), model });
    }
    all
}

/// A row of `rows.jsonl` each.
pub fn rows(data: &Dataset, model: &[PairScore], reference: Option<&[PairScore]>, beta: f64) -> Vec<Value> {
    if data.is_unpaired() {
        let row = |(i, (row, score)): (usize, (PreparedRow, &PairScore))| {
            let mut value = json!({
                "id": row.id, "label": row.label, "logps": score.logps[0], "tokens": score.tokens[0],
            });
            if let Some(reference) = reference.map(|all| &all[i]) {
                value["ref_logps"] = reference.logps[0].into();
                value["reward"] = (beta * (score.logps[0] - reference.logps[0])).into();
            }
            value
        };
        return data.iter().zip(model).enumerate().map(row).collect();
    }
    let row = |(i, (row, score)): (usize, (PreparedRow, &PairScore))| {
        let mut value = json!({
            "id": row.id,
            "logps": {"chosen": score.logps[0], "rejected": score.logps[1]},
            "tokens": {"chosen": score.tokens[0], "rejected": score.tokens[1]},
        });
        if let Some(reference) = reference.map(|all| &all[i]) {
            let [chosen, rejected] = rewards(score, reference, beta);
            value["ref_logps"] = json!({"chosen": reference.logps[0], "rejected": reference.logps[1]});
            value["rewards"] = json!({"chosen": chosen, "rejected": rejected, "margin": chosen - rejected});
        }
        value
    };
    data.iter().zip(model).enumerate().map(row).collect()
}
