//! The command line, with TRL's names.

use std::ffi::OsString;
use std::path::PathBuf;

use backend::Backend;
use clap::{Parser, ValueEnum};

use crate::data_args::DataArgs;
use crate::loss_args::LossArgs;
use crate::peft_args::PeftArgs;
use crate::schedule::Scheduler;

/// Align a language model on preference pairs with anchored preference optimization.
///
/// Flags are those of `trl dpo` in kebab-case; the same names with underscores work too. Weights are
/// trained in 32-bit floats; batches are packed (a pair's common start is computed once, nothing is
/// padded); reference log-probabilities are computed before training and cached.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, after_help = EXAMPLES, args_override_self = true)]
pub struct Args {
    /// Read flags from a YAML file with TRL's keys; those of the command line win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Model to train: a directory (config.json, tokenizer.json, safetensors), or a Hub id.
    #[arg(long, value_name = "DIR|ID")]
    pub model_name_or_path: String,
    /// Revision of the model on the Hub.
    #[arg(long, value_name = "REV")]
    pub model_revision: Option<String>,
    /// Which rows to use.
    #[command(flatten)]
    pub data: DataArgs,
    /// Where the trained model, logs and checkpoints go.
    #[arg(long, value_name = "DIR", default_value = "trainer_output")]
    pub output_dir: PathBuf,
    /// Replace an earlier run in the output directory.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub overwrite_output_dir: bool,
    /// Model that the log-ratios are taken against; the initial model where not given.
    #[arg(long, value_name = "DIR|ID")]
    pub ref_model_name_or_path: Option<String>,

    /// Move the reference towards the policy now and then (TR-DPO).
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub sync_ref_model: bool,
    /// Steps between moves of the reference [default: 512].
    #[arg(long, value_name = "N")]
    pub ref_model_sync_steps: Option<usize>,
    /// Share of the policy in the moved reference [default: 0.6].
    #[arg(long, value_name = "ALPHA")]
    pub ref_model_mixup_alpha: Option<f64>,

    /// What is minimized.
    #[command(flatten)]
    pub loss: LossArgs,
    /// Low-rank adapters.
    #[command(flatten)]
    pub peft: PeftArgs,

    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-6)]
    pub learning_rate: f64,
    /// Shape of the learning rate over the run.
    #[arg(long, value_enum, default_value = "linear")]
    pub lr_scheduler_type: Scheduler,
    /// Settings of the schedule as a JSON object, such as '{"min_lr_rate": 0.1}'.
    #[arg(long, value_name = "JSON")]
    pub lr_scheduler_kwargs: Option<String>,
    /// Steps of warm-up: a count, or a fraction of all steps when below 1.
    #[arg(long, default_value_t = 0.0)]
    pub warmup_steps: f64,
    /// Decoupled weight decay; not applied to biases and norms.
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 does not clip.
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Decay of AdamW's first moment; Lion's first factor [default: 0.9].
    #[arg(long)]
    pub adam_beta1: Option<f64>,
    /// Decay of AdamW's second moment; Lion's second factor [default: 0.999].
    #[arg(long)]
    pub adam_beta2: Option<f64>,
    /// AdamW's epsilon [default: 1e-8].
    #[arg(long)]
    pub adam_epsilon: Option<f64>,
    /// Optimizer.
    #[arg(long, value_enum, default_value = "adamw_torch")]
    pub optim: Optimizer,

    /// Passes over the data; may be a fraction [default: 3].
    #[arg(long)]
    pub num_train_epochs: Option<f64>,
    /// Number of optimizer steps instead, when positive.
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    pub max_steps: i64,
    /// Pairs of a micro-batch [default: 8].
    #[arg(long)]
    pub per_device_train_batch_size: Option<usize>,
    /// Instead of a number of pairs: as many as have at most this many packed tokens. Every pair of a step
    /// then weighs the same in its loss.
    #[arg(long, value_name = "N", conflicts_with = "per_device_train_batch_size")]
    pub max_batch_tokens: Option<usize>,
    /// Micro-batches of an optimizer step.
    #[arg(long, default_value_t = 1)]
    pub gradient_accumulation_steps: usize,
    /// Pairs of an evaluation batch [default: 8].
    #[arg(long)]
    pub per_device_eval_batch_size: Option<usize>,
    /// Seed of the order of the rows.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Order of the rows [default: random; sequential for kto and apo_zero_unpaired].
    #[arg(long, value_enum)]
    pub train_sampling_strategy: Option<Sampling>,

    /// Steps between log entries.
    #[arg(long, default_value_t = 10)]
    pub logging_steps: usize,
    /// When to evaluate on the test rows.
    #[arg(long, value_enum, default_value = "no")]
    pub eval_strategy: Strategy,
    /// Steps between evaluations; the logging steps where not given.
    #[arg(long)]
    pub eval_steps: Option<usize>,
    /// At the start and at every evaluation the model answers the first N test prompts, in samples.jsonl.
    #[arg(long, value_name = "N")]
    pub eval_samples: Option<usize>,
    /// Most new tokens of these answers [default: 128].
    #[arg(long, value_name = "N")]
    pub eval_sample_tokens: Option<usize>,
    /// When to write checkpoints.
    #[arg(long, value_enum, default_value = "steps")]
    pub save_strategy: Strategy,
    /// Steps between checkpoints.
    #[arg(long)]
    pub save_steps: Option<usize>,
    /// Checkpoints kept; older ones are deleted.
    #[arg(long)]
    pub save_total_limit: Option<usize>,
    /// At the end take the checkpoint with the best metric instead of the last one.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub load_best_model_at_end: bool,
    /// Metric that --load-best-model-at-end and --early-stopping-patience go by, with or without `eval_`
    /// [default: loss].
    #[arg(long, value_name = "NAME")]
    pub metric_for_best_model: Option<String>,
    /// Larger values of the metric are better [default: unless its name ends in loss].
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_missing_value = "true")]
    pub greater_is_better: Option<bool>,
    /// Stop after so many evaluations without a better metric.
    #[arg(long, value_name = "N")]
    pub early_stopping_patience: Option<usize>,
    /// How much better the metric must be to count [default: 0].
    #[arg(long, value_name = "DELTA")]
    pub early_stopping_threshold: Option<f64>,
    /// Leave optimizer and position out of checkpoints; they cannot be resumed from.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub save_only_model: bool,
    /// Go on from a checkpoint: `auto` takes the newest of the output directory.
    #[arg(long, value_name = "auto|DIR")]
    pub resume_from_checkpoint: Option<String>,

    /// Compute reference log-probabilities before training, once, and cache them (the default here, because it
    /// saves a forward pass a step). False keeps the reference model in memory and runs it at each step, as TRL
    /// does unless told otherwise.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_missing_value = "true")]
    pub precompute_ref_log_probs: Option<bool>,
    /// Where reference log-probabilities are cached.
    #[arg(long, value_name = "DIR")]
    pub ref_cache_dir: Option<PathBuf>,

    /// Backend; a binary has those it was built with.
    #[arg(long, value_enum, default_value = "flex", env = backend::ENV)]
    pub backend: Backend,
    /// Device of the backend, from 0 [default: the first].
    #[arg(long, value_name = "N")]
    pub device: Option<usize>,
    /// Name the devices of every backend this binary was built with, and exit; no other flag is looked at.
    #[arg(long)]
    pub list_devices: bool,
    /// bfloat16 computes matrix products in 16 bits (flex, tch, cuda) and keeps activations so, with float32 weights,
    /// gradients, softmax and losses; an adapter's base model is then held in 16 bits.
    #[arg(long, value_enum, default_value = "float32")]
    pub dtype: Dtype,
    /// TRL's switch for mixed precision: True is the arithmetic of --dtype bfloat16.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_missing_value = "true")]
    pub bf16: Option<bool>,
    /// Keep only the input of each block and compute the block again in the backward pass: much less memory, a
    /// tenth to a fifth more time, the same numbers to the bit. (TRL's default is True.)
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub gradient_checkpointing: bool,
    /// Compute as many blocks again as it takes to stay below this, for example 3GB or 2.5GiB, and no more: the same
    /// numbers to the bit [default: most of what is free at the start, or of a CUDA device's memory; on the CPU less,
    /// where that takes at most 2.5 % more operations of the blocks].
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<bytesize::ByteSize>,
    /// Log targets; the JSON Lines files are always written.
    #[arg(long, value_enum, num_args = 1.., action = clap::ArgAction::Set, default_value = "jsonl")]
    pub report_to: Vec<Report>,
    /// Write a trace of where the time goes, in Chrome's format, and print a table of it at the end. A few thousand lines
    /// a step: for short runs.
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// No progress bar.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub disable_tqdm: bool,
    /// Print the first N rows token by token with their mask, and exit.
    #[arg(long, value_name = "N")]
    pub inspect: Option<usize>,
}

const EXAMPLES: &str = "\
Examples:
  trainer --model-name-or-path models/SmolLM2-135M-Instruct --dataset-name pairs/ \\
          --loss-type apo_zero --learning-rate 1e-6 --output-dir runs/apo
  trainer … --eval-strategy steps --eval-steps 50 --save-steps 100 --save-total-limit 2
  trainer --config recipe.yaml --beta 0.05   (keys of TRL's and alignment-handbook's recipes; flags win)
  trainer … --use-peft --lora-r 16 --lora-target-modules all-linear --learning-rate 1e-5
  trainer … --loss-type kto --per-device-train-batch-size 8   (rows with prompt, completion and label, or pairs)
  trainer … --resume-from-checkpoint auto
  trainer … --inspect 2";

/// Optimizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW with decoupled weight decay.
    AdamwTorch,
    /// The same; TRL's name for its fused kernel.
    AdamwTorchFused,
    /// Factored second moment; little memory.
    Adafactor,
    /// Gradients over the root of their mean square.
    Rmsprop,
    /// Plain gradient descent.
    Sgd,
    /// The sign of a momentum.
    Lion,
}

/// Order of training rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Sampling {
    /// A new seeded permutation each epoch.
    Random,
    /// As in the file.
    Sequential,
    /// At random, rows of similar length together.
    GroupByLength,
}

/// When something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// Never.
    No,
    /// Every so many steps.
    Steps,
    /// At the end of each epoch.
    Epoch,
}

/// Data types of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 32-bit floats.
    Float32,
    /// 16-bit brain floats.
    Bfloat16,
}

/// Log targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Report {
    /// JSON Lines files in the output directory.
    Jsonl,
    /// TensorBoard's event files too, in `runs/` of the output directory.
    Tensorboard,
    /// Nothing besides them.
    None,
}

pub(crate) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "True" | "true" | "1" => Ok(true),
        "False" | "false" | "0" => Ok(false),
        _ => Err("expected True or False".into()),
    }
}

/// Turns `--learning_rate` into `--learning-rate`; values are left as they are.
pub fn kebab(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    args.into_iter()
        .map(|arg| match arg.to_str() {
            Some(text) if text.starts_with("--") => {
                let (name, value) = text.split_once('=').map_or((text, None), |(n, v)| (n, Some(v)));
                let name = name.replace('_', "-");
                value.map_or(name.clone(), |value| format!("{name}={value}")).into()
            }
            _ => arg,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::LossType;

    #[test]
    fn trls_spelling_is_understood() {
        let line = "trainer --model_name_or_path m --dataset_name d --output_dir=my_dir --loss_type apo_zero \
                    --bf16 False --save_only_model --report_to none --max_steps 12";
        let args = Args::try_parse_from(kebab(line.split_whitespace().map(OsString::from))).unwrap();
        assert_eq!(args.loss.loss_type, [LossType::ApoZero]);
        assert_eq!(args.output_dir, PathBuf::from("my_dir"));
        assert_eq!((args.bf16, args.save_only_model, args.max_steps), (Some(false), true, 12));
    }
}
