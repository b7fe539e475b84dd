//! The command line.

use std::path::PathBuf;

use backend::Backend;
use clap::{Args, Subcommand, ValueEnum};
use hub::DataRequest;

use crate::judge::JudgeArgs;
use crate::mixeval::items::Split;
use crate::sampling::SamplingArgs;

/// Sample from language models and measure them.
#[derive(Debug, clap::Parser)]
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
    /// Preference metrics of a model on held-out pairs or labelled completions, against a reference.
    #[command(after_help = PAIRS_EXAMPLES, args_override_self = true)]
    Pairs(PairsArgs),
    /// Answers to MixEval or MixEval-Hard, scored by rules or by a judge.
    #[command(after_help = MIXEVAL_EXAMPLES, args_override_self = true)]
    Mixeval(MixevalArgs),
    /// Which of several continuations a model finds most likely, as lm-evaluation-harness scores multiple choice.
    #[command(after_help = CHOICES_EXAMPLES, args_override_self = true)]
    Choices(ChoicesArgs),
    /// Two runs on the same items, item by item; or two files of answers, by a judge.
    #[command(after_help = COMPARE_EXAMPLES, args_override_self = true)]
    Compare(CompareArgs),
    /// Which anchor of APO fits a preference set and a model: apo_zero or apo_down.
    #[command(after_help = RECOMMEND_EXAMPLES, args_override_self = true)]
    Recommend(RecommendArgs),
    /// How contrastive, long, repetitive and biased a preference set is, perhaps beside a second one.
    #[command(after_help = DATA_EXAMPLES, args_override_self = true)]
    Data(DataArgs),
    /// The page of one training run: curves, answers before and after, its data and its configuration.
    #[command(after_help = RUN_EXAMPLES, args_override_self = true)]
    Run(RunArgs),
}

const SAMPLE_EXAMPLES: &str = "\
Examples:
  eval sample --model models/SmolLM2-135M-Instruct --prompts prompts.jsonl --out answers.jsonl
  eval sample --model M --prompts P --out F --temperature 0.7 --top-p 0.95 --seed 1
  eval sample --endpoint http://localhost:8000/v1 --model NAME --prompts P --out F";

const PAIRS_EXAMPLES: &str = "\
Examples:
  eval pairs --model runs/apo --reference models/base --dataset heldout/ --out runs/apo/eval
  eval pairs --model runs/apo --reference models/base --dataset heldout/ --out runs/apo/eval --checkpoints";

const MIXEVAL_EXAMPLES: &str = "\
Examples:
  eval mixeval --model runs/apo --data mixeval-2024-08-11 --out runs/apo/mixeval --parser rule
  eval mixeval --model M --data D --out O --judge-endpoint https://api.openai.com/v1 --judge-model gpt-4o-mini
  eval mixeval --endpoint http://localhost:8000/v1 --model NAME --data D --split full --out O --parser rule
The data is that of github.com/Psycoy/MixEval: mix_eval/data/mixeval-<version>.";

const CHOICES_EXAMPLES: &str = "\
Examples:
  eval choices --model M --data arc_easy.jsonl --out O
  eval choices --model M --data openbookqa.jsonl --out O --context-template '{{ question }}'";

const COMPARE_EXAMPLES: &str = "\
Examples:
  eval compare runs/base/mixeval runs/apo/mixeval --out runs/apo/against-base
  eval compare base.jsonl apo.jsonl --out O --judge-endpoint https://api.openai.com/v1 --judge-model gpt-4o-mini";

const RECOMMEND_EXAMPLES: &str = "\
Examples:
  eval recommend --dataset pairs/ --model M --out O --judge-endpoint https://api.openai.com/v1 --judge-model gpt-4o-mini
  eval recommend --dataset pairs/ --scores scores.jsonl --out O";

const DATA_EXAMPLES: &str = "\
Examples:
  eval data --dataset pairs/ --out reports/pairs
  eval data --dataset ContextualAI/ultrafeedback_clair_32k --against judged.parquet --out reports/both
  eval data --dataset pairs/ --model models/SmolLM2-135M-Instruct --out reports/tokens";

const RUN_EXAMPLES: &str = "\
Examples:
  eval run runs/apo
  eval run runs/apo --out reports/apo";

/// Flags of `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Directory that `train` has written.
    #[arg(value_name = "DIR")]
    pub run: PathBuf,
    /// Directory for report.html [default: that of the run].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Flags of `sample`.
#[derive(Debug, Clone, Args)]
pub struct SampleArgs {
    /// Model directory or Hub id; with --endpoint the name of the served model.
    #[arg(long, value_name = "DIR|ID|NAME")]
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
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Answers to each prompt, in the column `responses` (for `generate-clair --method judge`).
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub samples: usize,
    /// Write the token ids of each answer too, in the column `token_ids`.
    #[arg(long, conflicts_with = "endpoint")]
    pub token_ids: bool,
    /// Who answers, and where.
    #[command(flatten)]
    pub answering: AnsweringArgs,
}

/// Flags that say who answers: a local model, or a server.
#[derive(Debug, Clone, Default, Args)]
pub struct AnsweringArgs {
    /// Tokens of all sequences that run together [default: 8192, in bfloat16 16384].
    #[arg(long, value_name = "N", conflicts_with = "endpoint")]
    pub batch_tokens: Option<usize>,
    /// Chat template instead of the model's: `simple`, `chatml`, or a file.
    #[arg(long, value_name = "simple|chatml|FILE", conflicts_with = "endpoint")]
    pub chat_template: Option<String>,
    /// The day that chat templates are told (some write it into the prompt) [default: today].
    #[arg(long, value_name = "YYYY-MM-DD", conflicts_with = "endpoint")]
    pub template_date: Option<jiff::civil::Date>,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Base URL of an OpenAI-compatible server instead of a local model.
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Environment variable that holds the server's key.
    #[arg(long, value_name = "VAR", requires = "endpoint")]
    pub api_key_env: Option<String>,
    /// Requests at a time [default: as many as the server takes well].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub max_in_flight: Option<usize>,
}

/// Flags of `pairs`.
#[derive(Debug, Clone, Args)]
pub struct PairsArgs {
    /// Model directory or Hub id.
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// Model that rewards are taken against; without it only log-probabilities are reported.
    #[arg(long, value_name = "DIR|ID")]
    pub reference: Option<String>,
    /// Preference pairs: a file, a pattern, a directory, or a Hub id.
    #[arg(long, value_name = "D")]
    pub dataset: String,
    /// Which split [default: test, or else validation, or else train].
    #[arg(long, value_name = "NAME")]
    pub split: Option<String>,
    /// How to read the data set.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Directory for score.json, rows.jsonl and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Measure every checkpoint-N of the run in --model too, and show how likelihoods went.
    #[arg(long)]
    pub checkpoints: bool,
    /// Factor of the rewards.
    #[arg(long, requires = "reference")]
    pub beta: Option<f64>,
    /// Longest sequence in tokens.
    #[arg(long, default_value_t = 1024)]
    pub max_length: usize,
    /// Pairs that run together.
    #[arg(long, default_value_t = 8)]
    pub batch_size: usize,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Where tokenized data is cached.
    #[arg(long, value_name = "DIR")]
    pub token_cache_dir: Option<PathBuf>,
    /// Chat template instead of the model's: `simple`, `chatml`, or a file.
    #[arg(long, value_name = "simple|chatml|FILE")]
    pub chat_template: Option<String>,
    /// The day that chat templates are told (some write it into the prompt) [default: today].
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub template_date: Option<jiff::civil::Date>,
}

/// How answers are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Parser {
    /// By rules.
    Rule,
    /// By a judge.
    Judge,
}

/// Flags of `mixeval`.
#[derive(Debug, Clone, Args)]
pub struct MixevalArgs {
    /// Model directory or Hub id; with --endpoint the name of the served model [default there: its only one].
    #[arg(long, value_name = "DIR|ID|NAME", required_unless_present = "endpoint")]
    pub model: Option<String>,
    /// A release of MixEval's data: a directory with mixeval-hard/ and mixeval/, or one of these.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Which set.
    #[arg(long, value_enum, default_value = "hard")]
    pub split: Split,
    /// Directory for score.json, summary.json, items.jsonl, answers.jsonl and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How answers are read [default: by the judge where one is given, or else by rules].
    #[arg(long, value_enum)]
    pub parser: Option<Parser>,
    /// The judge.
    #[command(flatten)]
    pub judge: JudgeArgs,
    /// Put five examples before each question and have the text continued, as for models without a chat template.
    #[arg(long)]
    pub base_model: bool,
    /// Examples for base models instead of our own: free-form.txt and multiple-choice.txt.
    #[arg(long, value_name = "DIR", requires = "base_model")]
    pub few_shot: Option<PathBuf>,
    /// System message before each question.
    #[arg(long, value_name = "TEXT")]
    pub system_prompt: Option<String>,
    /// Most new tokens of an answer [default: 512, for base models 399].
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// Who answers, and where.
    #[command(flatten)]
    pub answering: AnsweringArgs,
}

/// Flags of `choices`.
#[derive(Debug, Clone, Args)]
pub struct ChoicesArgs {
    /// Model directory or Hub id.
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// Rows with `question`, `choices` and `answer` (index, letter, label or text).
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Directory for summary.json, items.jsonl and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What stands before a choice and a space, minijinja with `question` and `choices` [default: the word Question and
    /// the question, and on the next line the word Answer, each with a colon].
    #[arg(long, value_name = "TEMPLATE")]
    pub context_template: Option<String>,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Flags of `compare`.
#[derive(Debug, Clone, Args)]
pub struct CompareArgs {
    /// Directory of `mixeval`, `choices` or `pairs`, or a file of `sample`.
    #[arg(value_name = "RUN_A")]
    pub run_a: PathBuf,
    /// The same of another model, on the same items.
    #[arg(value_name = "RUN_B")]
    pub run_b: PathBuf,
    /// Directory for compare.json, items.jsonl and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// A judge of which answers are better, asked in both orders.
    #[command(flatten)]
    pub judge: JudgeArgs,
}

/// Flags of `recommend`.
#[derive(Debug, Clone, Args)]
pub struct RecommendArgs {
    /// Preference set: a file, a pattern, a directory, or a Hub id.
    #[arg(long, value_name = "D")]
    pub dataset: String,
    /// Which split [default: train].
    #[arg(long, value_name = "NAME", conflicts_with = "scores")]
    pub split: Option<String>,
    /// How to read the data set.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// The model that is to be trained; its own answers are compared with the set's winners.
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<String>,
    /// Pairs to compare, spread evenly over the set [default: 200].
    #[arg(long, value_name = "N")]
    pub rows: Option<usize>,
    /// Most new tokens of an answer.
    #[arg(long, default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Directory for recommend.json, rows.jsonl and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The judge, asked in both orders.
    #[command(flatten)]
    pub judge: JudgeArgs,
    /// Instead of model and judge: rows with `own_score` and `chosen_score` of a reward model.
    #[arg(long, value_name = "FILE")]
    pub scores: Option<PathBuf>,
    /// Chat template instead of the model's: `simple`, `chatml`, or a file.
    #[arg(long, value_name = "simple|chatml|FILE")]
    pub chat_template: Option<String>,
    /// The day that chat templates are told (some write it into the prompt) [default: today].
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub template_date: Option<jiff::civil::Date>,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Flags that say where a model computes, and in what.
#[derive(Debug, Clone, Default, Args)]
pub struct DeviceArgs {
    /// Backend; a binary has those it was built with [default: flex].
    #[arg(long, value_enum, env = backend::ENV)]
    pub backend: Option<Backend>,
    /// Device of the backend, from 0 [default: the first].
    #[arg(long, value_name = "N")]
    pub device: Option<usize>,
    /// Name the devices of every backend this binary was built with, and exit; no other flag is looked at.
    #[arg(long)]
    pub list_devices: bool,
    /// bfloat16 computes in 16 bits (flex, tch, cuda) [default: float32].
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
}

/// Data types that models compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 32-bit floats.
    Float32,
    /// 16-bit brain floats.
    Bfloat16,
}

impl DeviceArgs {
    /// The backend.
    pub fn backend(&self) -> Backend {
        self.backend.unwrap_or(Backend::Flex)
    }

    /// Weights and products are of 16 bits.
    pub fn is_narrow(&self) -> bool {
        self.dtype == Some(Dtype::Bfloat16)
    }

    /// Anything was given on the command line.
    pub fn is_given(&self) -> bool {
        let is_backend = |arg: std::ffi::OsString| arg.to_string_lossy().starts_with("--backend");
        std::env::args_os().any(is_backend) || self.device.is_some() || self.dtype.is_some()
    }
}

/// Flags that say how to read a data set.
#[derive(Debug, Clone, Args)]
pub struct ReadingArgs {
    /// Configuration of the data set's card.
    #[arg(long, value_name = "NAME")]
    pub dataset_config: Option<String>,
    /// Revision of the data set on the Hub.
    #[arg(long, value_name = "REV")]
    pub dataset_revision: Option<String>,
    /// Columns with other names than their roles, such as chosen=better; an empty name takes a column out of use.
    #[arg(long, value_name = "ROLE=COLUMN", num_args = 1.., action = clap::ArgAction::Append)]
    pub columns: Vec<String>,
    /// Leave out rows that cannot be used (nulls, malformed messages) and count them, instead of stopping.
    #[arg(long)]
    pub skip_invalid_rows: bool,
}

impl ReadingArgs {
    /// The request for a data set.
    pub fn request(&self, name: &str) -> anyhow::Result<DataRequest> {
        Ok(DataRequest {
            name: name.into(),
            revision: self.dataset_revision.clone(),
            config: self.dataset_config.clone(),
            columns: hub::columns(&self.columns).map_err(|reason| anyhow::anyhow!("--columns {reason}"))?,
            unpaired: false,
            skip_invalid: self.skip_invalid_rows,
        })
    }
}

/// Flags of `data`.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Preference set: a file, a pattern, a directory, or a Hub id.
    #[arg(long, value_name = "D")]
    pub dataset: String,
    /// A second set to show beside it.
    #[arg(long, value_name = "D")]
    pub against: Option<String>,
    /// Only these splits [default: all].
    #[arg(long, value_name = "NAME", num_args = 1.., action = clap::ArgAction::Append)]
    pub split: Vec<String>,
    /// How to read the data sets.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Measure lengths and similarity in this model's tokens (directory or Hub id) instead of words.
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<String>,
    /// Directory for report.json and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// The time that chat templates are told.
pub fn template_time(day: Option<jiff::civil::Date>) -> jiff::civil::DateTime {
    // The day alone: with the time of day no two starts would have the same tokens.
    day.unwrap_or_else(|| jiff::ZonedDateTime::now().date()).at(0, 0, 0, 0)
}
