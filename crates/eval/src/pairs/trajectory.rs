//! How metrics went over the checkpoints of a run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::metrics::rewards;
use crate::chart::{Series, lines};
use crate::score::PairScore;

/// Means at one step.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// Optimizer steps; 0 is the reference.
    pub step: usize,
    /// Log-likelihood of winners.
    pub logps_chosen: f64,
    /// Log-likelihood of losers.
    pub logps_rejected: f64,
    /// Rewards of winners.
    pub rewards_chosen: f64,
    /// Rewards of losers.
    pub rewards_rejected: f64,
    /// Share of the pairs whose winner has the higher reward.
    pub accuracy: f64,
}

/// Means of a model after `step` steps.
pub fn point(step: usize, model: &[PairScore], reference: &[PairScore], beta: f64) -> Point {
    let n = model.len() as f64;
    let mean = |f: &dyn Fn(&PairScore, [f64; 2]) -> f64| {
        model.iter().zip(reference).map(|(m, r)| f(m, rewards(m, r, beta))).sum::<f64>() / n
    };
    Point {
        step,
        logps_chosen: mean(&|m, _| m.logps[0]),
        logps_rejected: mean(&|m, _| m.logps[1]),
        rewards_chosen: mean(&|_, r| r[0]),
        rewards_rejected: mean(&|_, r| r[1]),
        accuracy: mean(&|_, r| f64::from(u8::from(r[0] > r[1]))),
    }
}

/// The checkpoints of a run by their steps.
pub fn checkpoints(run: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(run).with_context(|| run.display().to_string())? {
        let path = entry?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("checkpoint-")?.parse().ok());
        if let Some(step) = step.filter(|_| path.is_dir()) {
            all.push((step, path));
        }
    }
    if all.is_empty() {
        bail!(
            "{}: holds no checkpoint-N; train with --save-strategy steps and --save-steps N",
            run.display()
        );
    }
    all.sort_unstable();
    Ok(all)
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
