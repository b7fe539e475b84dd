//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Make preference pairs: a stronger model minimally revises a model's own answers.
///
/// Every raw reply is stored before it is parsed; running the same command again asks only for what is
/// missing.
#[derive(Debug, Clone, Parser)]
#[command(name = "clair-gen", version, after_help = EXAMPLES, args_override_self = true)]
pub struct Args {
    /// Rows with `prompt` (text or messages), `response` (the answer) and optionally `id`.
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Directory for pairs.jsonl, pairs.parquet, failed.jsonl, the reports and the reply store.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How pairs are made.
    #[arg(long, value_enum, default_value = "clair")]
    pub method: Method,
    /// Base URL of an OpenAI-compatible server (`…/v1`).
    #[arg(
        long,
        value_name = "URL",
        required_unless_present = "replay",
        conflicts_with = "replay",
        requires = "model"
    )]
    pub endpoint: Option<String>,
    /// Name of the teacher model.
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    pub model: Option<String>,
    /// Environment variable that holds the key; OPENAI_API_KEY is used when it is set.
    #[arg(long, value_name = "VAR", requires = "endpoint")]
    pub api_key_env: Option<String>,
    /// Recorded replies instead of a server.
    #[arg(long, value_name = "FILE")]
    pub replay: Option<PathBuf>,
    /// Prompt template (minijinja) with the variables prompt, messages and response.
    #[arg(long, value_name = "FILE", requires = "endpoint")]
    pub prompt_file: Option<PathBuf>,
    /// Sampling temperature of the teacher.
    #[arg(long, requires = "endpoint")]
    pub temperature: Option<f64>,
    /// Nucleus of the teacher.
    #[arg(long, requires = "endpoint")]
    pub top_p: Option<f64>,
    /// Most tokens of a reply.
    #[arg(long, requires = "endpoint")]
    pub max_tokens: Option<u32>,
    /// Seed sent with every request.
    #[arg(long, requires = "endpoint")]
    pub seed: Option<u64>,
    /// Requests at a time [default: 32].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub max_in_flight: Option<usize>,
    /// Attempts after the first for timeouts, 408, 409, 429, 5xx and broken replies [default: 8].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub retries: Option<u32>,
    /// Times to ask again when a reply does not keep to the form [default: 4].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub form_retries: Option<u32>,
    /// Longest time for one attempt, in seconds [default: 600].
    #[arg(long, value_name = "S", requires = "endpoint")]
    pub timeout: Option<f64>,
    /// Wait before the second attempt, in seconds; doubles from there [default: 0.5].
    #[arg(long, value_name = "S", requires = "endpoint")]
    pub backoff: Option<f64>,
    /// What to do with replies that an earlier run stored.
    #[arg(long, value_enum, default_value = "auto")]
    pub resume: Resume,
}

const EXAMPLES: &str = "\
Examples:
  clair-gen --input answers.jsonl --out pairs --endpoint https://api.openai.com/v1 --model gpt-4o
  clair-gen --input answers.jsonl --out pairs --endpoint http://localhost:8000/v1 --model teacher --max-in-flight 128
  clair-gen --input answers.jsonl --out pairs --replay recorded.jsonl";

/// Ways of making pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// Contrastive learning from AI revisions.
    Clair,
}

/// What to do with stored replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Resume {
    /// Use them.
    Auto,
    /// Refuse to run when there are any.
    Never,
}
