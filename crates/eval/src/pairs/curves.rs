//! Pictures of a run: what the trainer has logged, and how held-out likelihoods went.

use std::path::Path;

use anyhow::Result;
use pref_data::read_jsonl;
use serde_json::{Value, json};

use super::trajectory::Point;
use crate::chart::{Series, lines};

/// Learning curves of the run whose model this is; none where the directory has no log.
pub fn learning(run: &Path) -> Result<Vec<String>> {
    let read = |name: &str| -> Result<Vec<Value>> {
        let path = run.join(name);
        if !path.exists() {
            return Ok(Vec::new());
        }
        Ok(read_jsonl(&path)?.into_iter().map(|(_, row)| row).collect())
    };
    let (train, held_out) = (read("train_log.jsonl")?, read("eval_log.jsonl")?);
    let curve = |rows: &[Value], key: &str| -> Vec<(f64, f64)> {
        rows.iter().filter_map(|row| Some((row["step"].as_f64()?, row[key].as_f64()?))).collect()
    };
    let pictures = [
        ("loss", vec![("training", &train, "loss"), ("held-out", &held_out, "eval_loss")]),
        (
            "rewards",
            vec![
                ("chosen", &train, "rewards/chosen"),
                ("rejected", &train, "rewards/rejected"),
                ("margin", &train, "rewards/margins"),
            ],
        ),
        (
            "accuracy",
            vec![
                ("training", &train, "rewards/accuracies"),
                ("held-out", &held_out, "eval_rewards/accuracies"),
            ],
        ),
        ("gradient norm", vec![("norm", &train, "grad_norm")]),
    ];
    let mut all = Vec::new();
    for (title, series) in pictures {
        let series: Vec<Series> = series
            .into_iter()
            .map(|(name, rows, key)| (name.to_string(), curve(rows, key)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        all.extend(lines(title, "step", &series)?);
    }
    Ok(all)
}

/// What the model answered before the training and after it, where the run has asked for that.
pub fn samples(run: &Path) -> Result<Vec<Value>> {
    let path = run.join("samples.jsonl");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut all: Vec<(String, Value)> = Vec::new();
    for (_, row) in read_jsonl(&path)? {
        let id = row["id"].to_string();
        match all.iter_mut().find(|(known, _)| *known == id) {
            Some((_, pair)) => pair["after"] = row["response"].clone(),
            None => {
                all.push((id, json!({"id": row["id"], "prompt": row["prompt"], "before": row["response"]})));
            }
        }
    }
    Ok(all.into_iter().map(|(_, pair)| pair).filter(|pair| pair.get("after").is_some()).collect())
}

/// How means over held-out pairs went.
pub fn held_out(points: &[Point]) -> Result<Vec<String>> {
    let curve = |f: fn(&Point) -> f64| points.iter().map(|p| (p.step as f64, f(p))).collect::<Vec<_>>();
    let pictures: [(&str, Vec<Series>); 3] = [
        (
            "held-out log-likelihood",
            vec![
                ("winners".into(), curve(|p| p.logps_chosen)),
                ("losers".into(), curve(|p| p.logps_rejected)),
            ],
        ),
        (
            "held-out rewards",
            vec![
                ("winners".into(), curve(|p| p.rewards_chosen)),
                ("losers".into(), curve(|p| p.rewards_rejected)),
            ],
        ),
        ("held-out accuracy", vec![("accuracy".into(), curve(|p| p.accuracy))]),
    ];
    let mut all = Vec::new();
    for (title, series) in pictures {
        all.extend(lines(title, "step", &series)?);
    }
    Ok(all)
}
