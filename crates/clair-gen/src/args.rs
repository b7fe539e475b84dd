//! The command line.

use std::path::PathBuf;

use clap::{ArgAction, Args as Group, Parser, ValueEnum};

/// Make preference pairs with a language model: by default, a stronger one minimally revises a model's own answers.
///
/// Every raw reply is stored before it is read; running the same command again asks only for what is
/// missing.
#[derive(Debug, Clone, Parser)]
#[command(name = "clair-gen", version, after_help = EXAMPLES, args_override_self = true)]
pub struct Args {
    /// Rows with `prompt` (text or messages), `response` (the answer) or `responses` (several), optionally `scores`
    /// of them and `id`.
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Directory for pairs.jsonl, pairs.parquet, failed.jsonl, the reports and the reply store. With several methods,
    /// each has a directory of its name in it.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How pairs are made; several, separated by commas, share the input.
    #[arg(long, value_enum, default_value = "clair", value_delimiter = ',', action = ArgAction::Set)]
    pub method: Vec<Method>,
    /// Recorded replies instead of a server (method clair).
    #[arg(long, value_name = "FILE", conflicts_with = "endpoint")]
    pub replay: Option<PathBuf>,
    /// Servers, keys, limits.
    #[command(flatten)]
    pub server: ServerArgs,
    /// What is asked, and how.
    #[command(flatten)]
    pub asking: AskingArgs,
    /// Which pairs are kept.
    #[command(flatten)]
    pub gate: GateArgs,
    /// What to do with replies that an earlier run stored.
    #[arg(long, value_enum, default_value = "auto")]
    pub resume: Resume,
    /// Ask again for rows that failed in an earlier run.
    #[arg(long, requires = "endpoint")]
    pub retry_failed: bool,
    /// End early when more than this share of the rows fails (once 20 are done; up to 200 calls in flight count as if
    /// they went well) [default: 0.5].
    #[arg(long, value_name = "SHARE", requires = "endpoint")]
    pub max_failure_rate: Option<f64>,
    /// Print about how many calls, tokens and dollars are left to do for --out, and end; nothing is asked.
    #[arg(long, requires = "endpoint")]
    pub dry_run: bool,
}

/// Servers, keys, limits.
#[derive(Debug, Clone, Group)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Base URL of a server (`…/v1`; `URL=WEIGHT` for its share of the calls); several, separated by commas, share the
    /// calls and stand in for each other. OpenAI's interface, or Anthropic's where the host is theirs or the address
    /// ends in /messages.
    #[arg(long, value_name = "URL", value_delimiter = ',', action = ArgAction::Set, requires = "model")]
    pub endpoint: Vec<String>,
    /// Name of the teacher model.
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    pub model: Option<String>,
    /// Environment variable that holds the key (one for each endpoint, separated by commas, where they differ);
    /// OPENAI_API_KEY or ANTHROPIC_API_KEY is used when it is set.
    #[arg(long, value_name = "VAR", value_delimiter = ',', action = ArgAction::Set, requires = "endpoint")]
    pub api_key_env: Vec<String>,
    /// File that holds the key.
    #[arg(long, value_name = "FILE", requires = "endpoint", conflicts_with = "api_key_env")]
    pub api_key_file: Option<PathBuf>,
    /// Requests at a time, of each endpoint; fewer while it is overloaded [default: 32, and up to 1024 while latency
    /// stays flat].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub max_in_flight: Option<usize>,
    /// Requests a minute, of each endpoint [default: what its headers tell].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub rpm: Option<f64>,
    /// Tokens a minute, requests and replies together.
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub tpm: Option<f64>,
    /// Tokens of requests a minute.
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub input_tpm: Option<f64>,
    /// Tokens of replies a minute.
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub output_tpm: Option<f64>,
    /// Attempts after the first for timeouts, 408, 409, 429, 5xx and broken replies [default: 8].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub retries: Option<u32>,
    /// Longest time for one attempt, in seconds [default: 600].
    #[arg(long, value_name = "S", requires = "endpoint")]
    pub timeout: Option<f64>,
    /// Longest time for a request with all its attempts, in seconds [default: 21600].
    #[arg(long, value_name = "S", requires = "endpoint")]
    pub deadline: Option<f64>,
    /// Wait before the second attempt, in seconds; doubles from there [default: 0.5].
    #[arg(long, value_name = "S", requires = "endpoint")]
    pub backoff: Option<f64>,
    /// Stream replies; auto does from the moment on when a long request was cut off on the way [default: auto].
    #[arg(long, value_enum, requires = "endpoint")]
    pub stream: Option<Stream>,
    /// End this run before it spends more US dollars than this; calls in flight count.
    #[arg(long, value_name = "USD", requires = "endpoint")]
    pub max_cost: Option<f64>,
    /// US dollars for a million tokens of requests [default: from the table of prices, if it has the model].
    #[arg(long, value_name = "USD", requires = "endpoint", requires = "price_output")]
    pub price_input: Option<f64>,
    /// US dollars for a million tokens of replies.
    #[arg(long, value_name = "USD", requires = "endpoint", requires = "price_input")]
    pub price_output: Option<f64>,
    /// Table of prices: {"models": {"NAME": {"input": USD, "output": USD}}}.
    #[arg(long, value_name = "FILE", requires = "endpoint", conflicts_with = "price_input")]
    pub prices: Option<PathBuf>,
    /// Send requests through the server's Batch API: half the price, within 24 hours; run the same command again to
    /// go on.
    #[arg(long, requires = "endpoint", conflicts_with_all = ["max_in_flight", "rpm", "tpm", "input_tpm", "output_tpm", "stream", "deadline"])]
    pub batch_api: bool,
    /// Ask the server to cancel the batches that are under way for this --out, and end.
    #[arg(long, requires = "batch_api")]
    pub batch_cancel: bool,
    /// Seconds between two looks at a batch [default: 30].
    #[arg(long, value_name = "S", requires = "batch_api")]
    pub batch_poll: Option<f64>,
}

/// What is asked, and how.
#[derive(Debug, Clone, Group)]
#[command(next_help_heading = "Requests")]
pub struct AskingArgs {
    /// Prompt template (minijinja; variables prompt, messages, response, for judges response_a and response_b) of the
    /// one method, or METHOD=FILE; several separated by commas.
    #[arg(long, value_name = "FILE", value_delimiter = ',', action = ArgAction::Set, requires = "endpoint")]
    pub prompt_file: Vec<String>,
    /// Everything in one user message, or the instructions as the system message [default: single].
    #[arg(long, value_enum, requires = "endpoint")]
    pub prompt_style: Option<PromptStyle>,
    /// Parts between markers, or a JSON object by a schema (`response_format`); auto asks the server which it takes
    /// [default: markers].
    #[arg(long, value_enum, requires = "endpoint")]
    pub reply_format: Option<ReplyFormat>,
    /// Sampling temperature [default: the server's; 0 for judges].
    #[arg(long, requires = "endpoint")]
    pub temperature: Option<f64>,
    /// Nucleus.
    #[arg(long, requires = "endpoint")]
    pub top_p: Option<f64>,
    /// Most tokens of a reply; one that is cut off is asked for once more with twice as many. Sent as max_tokens, or as
    /// max_completion_tokens with --reasoning-effort and to servers that refuse the first (but not in batches).
    #[arg(long, requires = "endpoint")]
    pub max_tokens: Option<u32>,
    /// Seed sent with every request (OpenAI's interface).
    #[arg(long, requires = "endpoint")]
    pub seed: Option<u64>,
    /// Effort of a reasoning model (OpenAI's interface: minimal, low, medium, high).
    #[arg(long, value_name = "EFFORT", requires = "endpoint", conflicts_with = "reasoning_budget")]
    pub reasoning_effort: Option<String>,
    /// Tokens for a reasoning model's thinking (Anthropic's interface).
    #[arg(long, value_name = "TOKENS", requires = "endpoint")]
    pub reasoning_budget: Option<u32>,
    /// Further fields of every request, a JSON object.
    #[arg(long, value_name = "JSON", requires = "endpoint")]
    pub extra_body: Option<String>,
    /// Times to ask again when a reply does not keep to the form [default: 4].
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub form_retries: Option<u32>,
    /// Model that judges (methods judge and judge-offpolicy, and --verify) [default: the teacher].
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    pub judge_model: Option<String>,
    /// Judges compare two answers in both orders, or score each from 1 to 10 [default: compare].
    #[arg(long, value_enum)]
    pub judge_by: Option<JudgeBy>,
    /// Rows in which a judge sees no winner: left out, or kept with `tie` set; counted either way [default: drop].
    #[arg(long, value_enum)]
    pub ties: Option<Ties>,
}

/// Which pairs are kept.
#[derive(Debug, Clone, Group)]
#[command(next_help_heading = "Quality gate")]
pub struct GateArgs {
    /// Smallest word Jaccard similarity of a pair: below, it is no minimal revision.
    #[arg(long, value_name = "X")]
    pub min_jaccard: Option<f64>,
    /// Largest word Jaccard similarity of a pair: above, it differs in nothing to learn from.
    #[arg(long, value_name = "X")]
    pub max_jaccard: Option<f64>,
    /// Smallest character edit distance of a pair.
    #[arg(long, value_name = "N")]
    pub min_levenshtein: Option<f64>,
    /// Largest character edit distance of a pair.
    #[arg(long, value_name = "N")]
    pub max_levenshtein: Option<f64>,
    /// Largest length of the chosen text in lengths of the rejected one.
    #[arg(long, value_name = "X")]
    pub max_length_ratio: Option<f64>,
    /// Smallest length of the chosen text in lengths of the rejected one.
    #[arg(long, value_name = "X")]
    pub min_length_ratio: Option<f64>,
    /// A judge looks at each pair of clair and stronger in both orders; column `verified` says whether it prefers
    /// the chosen text in both; null where the judge's replies cannot be read. Where the judge cannot be reached the row
    /// fails, and the next run asks again.
    #[arg(long, requires = "endpoint")]
    pub verify: bool,
    /// Leave out pairs that the judge does not confirm.
    #[arg(long, requires = "verify")]
    pub drop_unverified: bool,
}

const EXAMPLES: &str = "\
Examples:
  clair-gen --input answers.jsonl --out pairs --endpoint https://api.openai.com/v1 --model gpt-4o --max-cost 20
  clair-gen --input answers.jsonl --out pairs --endpoint http://localhost:8000/v1 --model teacher --max-in-flight 128
  clair-gen --input answers.jsonl --out sets --method clair,stronger --endpoint https://api.anthropic.com/v1 --model claude-sonnet-4-0
  clair-gen --input samples.jsonl --out judged --method judge --endpoint http://localhost:8000/v1 --model judge
  clair-gen --input answers.jsonl --out pairs --endpoint https://api.openai.com/v1 --model gpt-4o --batch-api
  clair-gen --input answers.jsonl --out pairs --replay recorded.jsonl";

/// Ways of making pairs (arXiv 2408.06266, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Method {
    /// A stronger model revises the answer: the revision is chosen, the answer rejected.
    Clair,
    /// A judge picks the better and the worse of the model's own answers (column `responses`).
    Judge,
    /// The same for answers of any models; column `scores`, where there is one, takes the judge's place.
    JudgeOffpolicy,
    /// A stronger model answers the prompt: its answer is chosen, the model's rejected.
    Stronger,
}

impl Method {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clair => "clair",
            Self::Judge => "judge",
            Self::JudgeOffpolicy => "judge-offpolicy",
            Self::Stronger => "stronger",
        }
    }
}

/// What to do with stored replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Resume {
    /// Use them.
    Auto,
    /// Refuse to run when there are any.
    Never,
}

/// When replies are streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stream {
    /// Once a long request was cut off.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How a prompt is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PromptStyle {
    /// One user message.
    Single,
    /// Instructions as the system message.
    System,
}

/// The form of replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReplyFormat {
    /// Parts between markers.
    Markers,
    /// A JSON object by a schema.
    Json,
    /// JSON where the server takes it.
    Auto,
}

/// How a judge judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum JudgeBy {
    /// Every two answers are compared in both orders.
    Compare,
    /// Every answer gets a score.
    Score,
}

/// What happens to ties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ties {
    /// Left out.
    Drop,
    /// Kept.
    Keep,
}
