//! What is printed before the first step: data, memory, and anything suspicious.

use decoder::{Config, Mlp};
use pref_data::{Audit, Bound, Dataset, TemplateSource, Tokenizer, audit};
use serde::Serialize;

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
    #[serde(skip)]
    pub audit: Audit,
}

/// Expected memory in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MemoryPlan {
    pub weights: usize,
    pub gradients: usize,
    pub optimizer: usize,
    pub activations: usize,
}

impl MemoryPlan {
    /// Weights, gradients and both moments in `f32`; activations of a micro-batch of `tokens`.
    pub fn new(config: &Config, tokens: usize) -> Self {
        let weights = 4 * config.weights().iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>();
        let (hidden, heads) = (config.hidden, config.heads);
        let attention = 2 * heads.query * heads.dim + 2 * heads.kv * heads.dim + heads.query;
        let inner = match config.mlp {
            Mlp::SwiGlu => 3 * config.intermediate,
            Mlp::Relu => 2 * config.intermediate,
        };
        let per_token = config.layers * (5 * hidden + 2 * attention + inner) + 4 * hidden;
        let head = (64 << 20) + 4 * 2 * config.vocab * hidden;
        Self {
            weights,
            gradients: weights,
            optimizer: 2 * weights,
            activations: 4 * tokens * per_token + head,
        }
    }

    /// Everything together.
    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.optimizer + self.activations
    }
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
        simple_chat_template: tokenizer.template_source() == TemplateSource::Simple,
        audit: audit(tokenizer, rows),
    }
}

/// Lines for people.
pub fn lines(settings: &Settings, data: &DataReport, memory: &MemoryPlan, steps: usize) -> Vec<String> {
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let mut lines = vec![
        format!(
            "data: {} pairs kept, {} dropped (prompt reaches --max-length {}), {} truncated; longest sequence {} tokens (id {})",
            data.rows,
            data.dropped,
            settings.data.max_length,
            data.truncated,
            data.longest_tokens,
            data.longest_id
        ),
        format!(
            "tokens: {} in both sequences of each pair, {} after sharing common starts ({:.0} %), no padding",
            data.tokens,
            data.packed_tokens,
            100.0 * data.packed_tokens as f64 / data.tokens.max(1) as f64
        ),
        format!(
            "memory plan: weights {:.2} GiB + gradients {:.2} + AdamW {:.2} + activations about {:.2} = {:.2} GiB",
            gib(memory.weights),
            gib(memory.gradients),
            gib(memory.optimizer),
            gib(memory.activations),
            gib(memory.total())
        ),
        format!(
            "run: {} steps of {} x {}, loss {}, beta {}, learning rate {} ({})",
            steps,
            settings.accumulation,
            match settings.bound {
                Bound::Rows(pairs) => format!("{pairs} pairs"),
                Bound::Tokens(tokens) => format!("at most {tokens} packed tokens"),
            },
            settings.loss.names(),
            settings.loss.beta,
            settings.learning_rate,
            settings.lr_scheduler_type
        ),
    ];
    lines.extend(data.audit.lines.iter().map(|line| format!("first row, {line}")));
    lines.extend(warnings(data));
    lines
}

/// What is probably wrong with the data.
pub fn warnings(data: &DataReport) -> Vec<String> {
    let mut lines = Vec::new();
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
