//! Validated settings: every rule that involves more than one flag is here.

use std::path::PathBuf;

use pref_data::{Bound, Order, read_chat_template};
use serde::Serialize;

use crate::args::{Args, Backend, Sampling, Strategy};
use crate::data::DataSettings;
use crate::loss::LossSettings;
use crate::schedule::{Schedule, Scheduler};

/// How often something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Every {
    /// Never.
    Never,
    /// Every so many steps.
    Steps(usize),
    /// At the end of each epoch.
    Epoch,
}

/// Where to go on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Resume {
    /// Start anew.
    No,
    /// The newest checkpoint of the output directory, or anew when there is none.
    Auto,
    /// This checkpoint.
    From(PathBuf),
}

/// Everything a run needs to know, resolved; the fields stand for the flags of [`Args`].
#[allow(missing_docs)]
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    pub model: String,
    pub model_revision: Option<String>,
    pub reference: Option<String>,
    pub data: DataSettings,
    pub output_dir: PathBuf,
    pub overwrite: bool,
    pub chat_template: Option<String>,
    pub template_date: Option<jiff::civil::Date>,
    #[serde(flatten)]
    pub loss: LossSettings,
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub lr_scheduler_type: String,
    pub warmup_steps: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    pub num_train_epochs: f64,
    pub max_steps: Option<usize>,
    pub per_device_train_batch_size: Option<usize>,
    pub max_batch_tokens: Option<usize>,
    #[serde(skip)]
    pub bound: Bound,
    pub accumulation: usize,
    pub eval_batch: usize,
    pub seed: u64,
    pub train_sampling_strategy: String,
    #[serde(skip)]
    pub order: Order,
    pub logging_steps: usize,
    pub evaluate: Every,
    pub save: Every,
    pub save_total_limit: Option<usize>,
    pub save_only_model: bool,
    pub resume: Resume,
    pub ref_cache_dir: Option<PathBuf>,
    #[serde(skip)]
    pub backend: Backend,
    pub progress_bar: bool,
}

impl Settings {
    /// Checks flags against each other. An `Err` is a usage error.
    pub fn new(args: Args) -> Result<Self, String> {
        refuse_what_has_no_effect(&args)?;
        let positive = |name: &str, value: usize| {
            if value == 0 { Err(format!("--{name} must be at least 1")) } else { Ok(value) }
        };
        let at_least_zero = |name: &str, value: f64| {
            if value.is_finite() && value >= 0.0 {
                Ok(value)
            } else {
                Err(format!("--{name} must be 0 or more, not {value}"))
            }
        };
        let logging_steps = positive("logging-steps", args.logging_steps)?;
        let evaluate = match args.eval_strategy {
            Strategy::No => Every::Never,
            Strategy::Steps => {
                Every::Steps(positive("eval-steps", args.eval_steps.unwrap_or(logging_steps))?)
            }
            Strategy::Epoch => Every::Epoch,
        };
        let save = match args.save_strategy {
            Strategy::No => Every::Never,
            Strategy::Steps => Every::Steps(positive("save-steps", args.save_steps.unwrap_or(500))?),
            Strategy::Epoch => Every::Epoch,
        };
        let max_steps = usize::try_from(args.max_steps).ok().filter(|&steps| steps > 0);
        let epochs = args.num_train_epochs;
        if max_steps.is_none() && !(epochs.is_finite() && epochs > 0.0) {
            return Err("give --num-train-epochs or --max-steps above 0".into());
        }
        let resume = match args.resume_from_checkpoint.as_deref() {
            None => Resume::No,
            Some("auto" | "True" | "true") => Resume::Auto,
            Some(path) => Resume::From(path.into()),
        };
        let batch = positive("per-device-train-batch-size", args.per_device_train_batch_size.unwrap_or(8))?;
        let bound = match args.max_batch_tokens {
            Some(tokens) => Bound::Tokens(positive("max-batch-tokens", tokens)?),
            None => Bound::Rows(batch),
        };
        let chat_template = args.data.chat_template.as_deref().map(read_chat_template).transpose();
        Ok(Self {
            chat_template: chat_template.map_err(|e| format!("--chat-template: {e}"))?,
            template_date: args.data.template_date,
            data: args.data.settings(args.seed, evaluate != Every::Never)?,
            model: args.model_name_or_path,
            model_revision: args.model_revision,
            reference: args.ref_model_name_or_path,
            output_dir: args.output_dir,
            overwrite: args.overwrite_output_dir,
            loss: args.loss.settings()?,
            learning_rate: at_least_zero("learning-rate", args.learning_rate)?,
            lr_scheduler_type: value_name(&args.lr_scheduler_type),
            schedule: Schedule::new(
                args.lr_scheduler_type,
                args.lr_scheduler_kwargs.as_deref(),
                args.learning_rate,
            )?,
            warmup_steps: at_least_zero("warmup-steps", args.warmup_steps)?,
            weight_decay: at_least_zero("weight-decay", args.weight_decay)?,
            max_grad_norm: at_least_zero("max-grad-norm", args.max_grad_norm)?,
            adam_beta1: fraction("adam-beta1", args.adam_beta1)?,
            adam_beta2: fraction("adam-beta2", args.adam_beta2)?,
            adam_epsilon: at_least_zero("adam-epsilon", args.adam_epsilon)?,
            num_train_epochs: args.num_train_epochs,
            max_steps,
            per_device_train_batch_size: matches!(bound, Bound::Rows(_)).then_some(batch),
            max_batch_tokens: args.max_batch_tokens,
            bound,
            accumulation: positive("gradient-accumulation-steps", args.gradient_accumulation_steps)?,
            eval_batch: positive("per-device-eval-batch-size", args.per_device_eval_batch_size.unwrap_or(8))?,
            seed: args.seed,
            train_sampling_strategy: value_name(&args.train_sampling_strategy),
            order: match args.train_sampling_strategy {
                Sampling::Random => Order::Random,
                Sampling::Sequential => Order::Sequential,
                Sampling::GroupByLength => Order::GroupByLength,
            },
            logging_steps,
            evaluate,
            save,
            save_total_limit: args.save_total_limit.map(|n| positive("save-total-limit", n)).transpose()?,
            save_only_model: args.save_only_model,
            resume,
            ref_cache_dir: args.ref_cache_dir,
            backend: args.backend,
            progress_bar: !args.disable_tqdm,
        })
    }
}

/// Flags that would do nothing in this run are errors.
fn refuse_what_has_no_effect(args: &Args) -> Result<(), String> {
    let rules = [
        (
            args.bf16 == Some(true),
            "--bf16 True: mixed precision is not available with this backend; leave it out or give False",
        ),
        (
            args.gradient_checkpointing == Some(true),
            "--gradient-checkpointing True is not available yet; leave it out or give False",
        ),
        (
            !args.precompute_ref_log_probs,
            "--precompute-ref-log-probs False: reference log-probabilities are always precomputed; leave it out",
        ),
        (
            args.eval_strategy != Strategy::Steps && args.eval_steps.is_some(),
            "--eval-steps has no effect without --eval-strategy steps",
        ),
        (
            args.save_strategy != Strategy::Steps && args.save_steps.is_some(),
            "--save-steps has no effect without --save-strategy steps",
        ),
        (
            args.save_strategy == Strategy::No && args.save_total_limit.is_some(),
            "--save-total-limit has no effect with --save-strategy no",
        ),
        (
            args.lr_scheduler_type == Scheduler::Constant && args.warmup_steps > 0.0,
            "--warmup-steps has no effect with --lr-scheduler-type constant; use constant_with_warmup",
        ),
        (
            args.overwrite_output_dir && args.resume_from_checkpoint.is_some(),
            "--overwrite-output-dir and --resume-from-checkpoint contradict each other",
        ),
        (
            args.eval_strategy == Strategy::No && args.per_device_eval_batch_size.is_some(),
            "--per-device-eval-batch-size has no effect without --eval-strategy",
        ),
    ];
    rules.into_iter().find(|(broken, _)| *broken).map_or(Ok(()), |(_, reason)| Err(reason.into()))
}

fn fraction(name: &str, value: f64) -> Result<f64, String> {
    if (0.0..1.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!("--{name} must be in [0, 1), not {value}"))
    }
}

fn value_name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}
