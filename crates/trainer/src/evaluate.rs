//! Evaluation on the test rows during training.

use std::time::Instant;

use anyhow::{Result, bail};
use decoder::Decoder;
use pref_data::Dataset;
use serde_json::{Map, Value};

use crate::metrics::Window;
use crate::pending::read;
use crate::references::{References, Split};
use crate::settings::Settings;
use crate::step::Micro;

/// Metrics of the test rows with TRL's `eval_` names. As in TRL the loss is a mean over rows and every
/// other metric a mean over batches; the two differ only when the last batch is smaller.
pub fn run(
    model: &Decoder,
    rows: &Dataset,
    references: &References,
    settings: &Settings,
    train_tokens: usize,
) -> Result<Map<String, Value>> {
    let started = Instant::now();
    let model = model.frozen();
    let (mut window, mut loss) = (Window::default(), 0.0);
    let all: Vec<u32> = (0..rows.len() as u32).collect();
    for batch in all.chunks(settings.eval_batch) {
        let micro = Micro::new(rows, batch, settings.scoring());
        let reference = references.of(Split::Test, batch, &micro, &model);
        let (pending, _) = micro.run(&model, &settings.loss, reference, None);
        let (metrics, _) = read(vec![pending], Vec::new());
        let metrics = &metrics[0];
        if !metrics[0].1.is_finite() {
            let ids: Vec<String> = batch.iter().map(|&row| rows.id(row as usize)).collect();
            bail!(
                "the evaluation loss became {} on the test rows with ids {ids:?}; lower --learning-rate; earlier \
                 checkpoints are untouched",
                metrics[0].1
            );
        }
        loss += metrics[0].1 * batch.len() as f64;
        window.add(metrics);
    }
    let seconds = started.elapsed().as_secs_f64();
    let mut entry = window.means("eval_");
    entry.insert("eval_loss".into(), (loss / rows.len() as f64).into());
    entry.insert("eval_num_tokens".into(), train_tokens.into());
    entry.insert("eval_runtime".into(), seconds.into());
    entry.insert("eval_samples_per_second".into(), (rows.len() as f64 / seconds).into());
    Ok(entry)
}
