//! What is printed before the first step: data, memory, and anything suspicious.

use pref_data::{Audit, Bound, Dataset, TemplateSource, Tokenizer, audit};
use serde::Serialize;

use crate::memory::MemoryPlan;
use crate::settings::Settings;

/// Facts about the training data.
#[derive(Debug, Clone, Serialize)]
pub struct DataReport {
    pub rows: usize,
    pub dropped: usize,
    pub truncated: usize,
    pub boundary: usize,
    pub longest_tokens: usize,
    pub longest_id: String,
    pub tokens: usize,
    pub packed_tokens: usize,
    pub simple_chat_template: bool,
    /// Desirable completions, where rows are unpaired.
    pub desirable: Option<usize>,
    #[serde(skip)]
    pub audit: Audit,
}

/// Counts the training data.
pub fn data_report(rows: &Dataset, tokenizer: &Tokenizer) -> DataReport {
    let (mut tokens, mut packed_tokens, mut longest) = (0, 0, (0, 0));
    for i in 0..rows.len() {
        let lengths = rows.lengths(i);
        tokens += lengths.both(rows.is_unpaired());
        packed_tokens += lengths.packed();
        if lengths.longest() > longest.0 {
            longest = (lengths.longest(), i);
        }
    }
    DataReport {
        rows: rows.len(),
        dropped: rows.dropped,
        truncated: rows.truncated,
        boundary: rows.boundary,
        longest_tokens: longest.0,
        longest_id: rows.id(longest.1),
        tokens,
        packed_tokens,
        desirable: rows.is_unpaired().then(|| (0..rows.len()).filter(|&i| rows.label(i)).count()),
        simple_chat_template: tokenizer.template_source() == TemplateSource::Simple,
        audit: audit(tokenizer, rows),
    }
}

/// Lines for people.
pub fn lines(settings: &Settings, data: &DataReport, memory: &MemoryPlan, steps: usize) -> Vec<String> {
    let what = if settings.loss.is_unpaired() { "completions" } else { "pairs" };
    let mut lines = vec![
        format!(
            "data: {} {what} kept, {} dropped (prompt reaches --max-length {}), {} truncated; longest sequence {} tokens (id {})",
            data.rows,
            data.dropped,
            settings.data.max_length,
            data.truncated,
            data.longest_tokens,
            data.longest_id
        ),
        format!(
            "tokens: {} in all sequences, {} after sharing common starts ({:.0} %), no padding",
            data.tokens,
            data.packed_tokens,
            100.0 * data.packed_tokens as f64 / data.tokens.max(1) as f64
        ),
        format!(
            "run: {} steps of {} x {}, loss {}, beta {}, learning rate {} ({})",
            steps,
            settings.accumulation,
            match settings.bound {
                Bound::Rows(rows) => format!("{rows} {what}"),
                Bound::Tokens(tokens) => format!("at most {tokens} packed tokens"),
            },
            settings.loss.names(),
            settings.loss.beta,
            settings.learning_rate,
            settings.lr_scheduler_type
        ),
    ];
    lines.extend(memory.lines(settings.memory_limit.is_some()));
    lines.extend(data.audit.lines.iter().map(|line| format!("first row, {line}")));
    lines.extend(warnings(settings, data));
    lines
}

/// What is probably wrong with the data.
pub fn warnings(settings: &Settings, data: &DataReport) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(label_balance(settings, data));
    if data.simple_chat_template {
        lines.push(
            "WARNING: the model has no chat template; conversations are written as \"Role: text\" (the template \
             'simple'). Give --chat-template to choose another."
                .into(),
        );
    }
    if data.boundary > 0 {
        lines.push(format!(
            "WARNING: in {} rows the prompt alone tokenizes differently from the start of prompt + completion; the \
             completion starts where they diverge (as in TRL)",
            data.boundary
        ));
    }
    lines.extend(data.audit.warnings.iter().map(|warning| format!("WARNING: {warning}")));
    lines
}

/// KTO's advice for uneven labels (eq. 8 of arXiv 2402.01306, as `KTOTrainer` gives it).
fn label_balance(settings: &Settings, data: &DataReport) -> Option<String> {
    let desirable = data.desirable?.max(1) as f64;
    let undesirable = (data.rows as f64 - desirable).max(1.0);
    let (d, u) = (settings.loss.desirable_weight, settings.loss.undesirable_weight);
    let ratio = d * desirable / (u * undesirable);
    if desirable == undesirable || (1.0..=4.0 / 3.0).contains(&ratio) {
        return None;
    }
    let (low, high) = (undesirable * u / desirable, undesirable * u / desirable * 1.33);
    let (other_low, other_high) = (desirable * d / undesirable / 1.33, desirable * d / undesirable);
    Some(format!(
        "WARNING: {desirable} desirable and {undesirable} undesirable completions; balance them with either \
         --desirable-weight in [{low:.2}, {high:.2}] or --undesirable-weight in [{other_low:.2}, {other_high:.2}]"
    ))
}
