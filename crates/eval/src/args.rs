//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Sample from language models and measure them.
#[derive(Debug, Parser)]
#[command(name = "eval", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer a file of prompts with a local model, or with a server.
    #[command(after_help = SAMPLE_EXAMPLES, args_override_self = true)]
    Sample(SampleArgs),
    /// Preference metrics of a model on held-out pairs, against a reference.
    #[command(after_help = PAIRS_EXAMPLES, args_override_self = true)]
    Pairs(PairsArgs),
}

const SAMPLE_EXAMPLES: &str = "\
Examples:
  eval sample --model models/SmolLM2-135M-Instruct --prompts prompts.jsonl --out answers.jsonl
  eval sample --model M --prompts P --out F --temperature 0.7 --top-p 0.95 --seed 1
  eval sample --endpoint http://localhost:8000/v1 --model NAME --prompts P --out F";

const PAIRS_EXAMPLES: &str = "\
Examples:
  eval pairs --model runs/apo --reference models/base --dataset heldout/ --out runs/apo/eval";

/// Flags of `sample`.
#[derive(Debug, Clone, Args)]
pub struct SampleArgs {
    /// Model directory; with --endpoint the name of the served model.
    #[arg(long, value_name = "DIR|NAME")]
    pub model: String,
    /// Rows with `prompt` (text or messages) and optionally `id`; other columns are kept.
    #[arg(long, value_name = "FILE")]
    pub prompts: PathBuf,
    /// Where the answers go, one JSON object a line, in the order of the prompts.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Most new tokens of an answer.
    #[arg(long, default_value_t = 512)]
    pub max_new_tokens: usize,
    /// 0 takes the most likely token each time.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Draw from the smallest set of tokens with this probability.
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Seed; each row has its own stream of it.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Tokens of all sequences that run together [default: 8192].
    #[arg(long, value_name = "N", conflicts_with = "endpoint")]
    pub batch_tokens: Option<usize>,
    /// Chat template instead of the model's: `simple`, or a file.
    #[arg(long, value_name = "simple|FILE", conflicts_with = "endpoint")]
    pub chat_template: Option<String>,
    /// Base URL of an OpenAI-compatible server instead of a local model.
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Environment variable that holds the server's key.
    #[arg(long, value_name = "VAR", requires = "endpoint")]
    pub api_key_env: Option<String>,
    /// Requests at a time [default: 32].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub max_in_flight: Option<usize>,
}

/// Flags of `pairs`.
#[derive(Debug, Clone, Args)]
pub struct PairsArgs {
    /// Model directory.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Model that rewards are taken against; without it only log-probabilities are reported.
    #[arg(long, value_name = "DIR")]
    pub reference: Option<PathBuf>,
    /// Preference pairs: a file, or a directory (its test rows where it has them).
    #[arg(long, value_name = "PATH")]
    pub dataset: PathBuf,
    /// Which rows of a directory.
    #[arg(long, value_enum)]
    pub split: Option<Split>,
    /// Directory for score.json, rows.jsonl and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Factor of the rewards.
    #[arg(long, requires = "reference")]
    pub beta: Option<f64>,
    /// Longest sequence in tokens.
    #[arg(long, default_value_t = 1024)]
    pub max_length: usize,
    /// Pairs that run together.
    #[arg(long, default_value_t = 8)]
    pub batch_size: usize,
    /// Chat template instead of the model's: `simple`, or a file.
    #[arg(long, value_name = "simple|FILE")]
    pub chat_template: Option<String>,
}

/// Rows of a data set directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Split {
    /// Training rows.
    Train,
    /// Test rows.
    Test,
}
