//! Validated settings: every rule that involves more than one flag is here.

use std::path::PathBuf;

use backend::Backend;
use pref_data::{Bound, Order, read_chat_template};
use serde::Serialize;

use crate::args::{Args, Optimizer, Report, Sampling, Strategy};
use crate::data::DataSettings;
use crate::loss::LossSettings;
use crate::metrics;
use crate::optimizer::Rule;
use crate::packing::Scoring;
use crate::peft_args::PeftSettings;
use crate::precision::Precision;
use crate::rules;
use crate::schedule::Schedule;

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

/// How the reference follows the policy (arXiv 2404.09656).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SyncReference {
    /// Steps between moves.
    pub steps: usize,
    /// Share of the policy.
    pub alpha: f64,
}

/// Which evaluation is the best, and what follows from it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Best {
    /// Name of the metric, with `eval_`.
    pub metric: String,
    /// Larger is better.
    pub greater: bool,
    /// The best checkpoint is kept and taken at the end.
    pub load: bool,
    /// Evaluations without a better one before the run stops.
    pub patience: Option<usize>,
    /// How much better counts as better, for the patience.
    pub threshold: f64,
}

/// Everything a run needs to know, resolved; the fields stand for the flags of [`Args`].
#[allow(missing_docs)]
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    pub model: String,
    pub model_revision: Option<String>,
    pub reference: Option<String>,
    pub data: DataSettings,
    pub live_reference: bool,
    pub sync_reference: Option<SyncReference>,
    pub peft: Option<PeftSettings>,
    pub precision: Precision,
    pub gradient_checkpointing: bool,
    pub memory_limit: Option<usize>,
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
    pub optim: Rule,
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
    /// Test prompts that are answered at every evaluation, and new tokens of an answer.
    pub eval_samples: Option<(usize, usize)>,
    pub save: Every,
    pub save_total_limit: Option<usize>,
    pub save_only_model: bool,
    pub best: Option<Best>,
    pub resume: Resume,
    pub ref_cache_dir: Option<PathBuf>,
    pub backend: Backend,
    pub device: Option<usize>,
    pub tensorboard: bool,
    pub progress_bar: bool,
}

impl Settings {
    /// Checks flags against each other. An `Err` is a usage error.
    pub fn new(args: Args) -> Result<Self, String> {
        if !args.backend.is_built() {
            return Err(format!("--backend: {}", backend::Error::NotBuilt(args.backend)));
        }
        rules::check(&args)?;
        let precision = Precision::new(&args)?;
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
        let epochs = args.num_train_epochs.unwrap_or(3.0);
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
        let loss = args.loss.settings()?;
        let beta1 = fraction("adam-beta1", args.adam_beta1.unwrap_or(0.9))?;
        let beta2 = fraction("adam-beta2", args.adam_beta2.unwrap_or(0.999))?;
        let eps = at_least_zero("adam-epsilon", args.adam_epsilon.unwrap_or(1e-8))?;
        if let Some(name) = &args.metric_for_best_model {
            let known = metrics::names(loss.is_unpaired());
            if !known.contains(&name.strip_prefix("eval_").unwrap_or(name)) {
                let known = known.join(", ");
                return Err(format!("--metric-for-best-model {name}: an evaluation has {known}"));
            }
        }
        let sampling = sampling(args.train_sampling_strategy, &loss, &bound)?;
        let chat_template = args.data.chat_template.as_deref().map(read_chat_template).transpose();
        Ok(Self {
            chat_template: chat_template.map_err(|e| format!("--chat-template: {e}"))?,
            template_date: args.data.template_date,
            data: args.data.settings(args.seed, evaluate != Every::Never, loss.is_unpaired())?,
            model: args.model_name_or_path,
            model_revision: args.model_revision,
            reference: args.ref_model_name_or_path,
            output_dir: args.output_dir,
            overwrite: args.overwrite_output_dir,
            live_reference: args.precompute_ref_log_probs == Some(false) || args.sync_ref_model,
            sync_reference: args.sync_ref_model.then(|| SyncReference {
                steps: args.ref_model_sync_steps.unwrap_or(512),
                alpha: args.ref_model_mixup_alpha.unwrap_or(0.6),
            }),
            peft: args.peft.settings()?,
            precision,
            gradient_checkpointing: args.gradient_checkpointing,
            memory_limit: args.memory_limit.map(|size| usize::try_from(size.as_u64()).unwrap_or(usize::MAX)),
            best: best(
                args.metric_for_best_model.as_deref(),
                args.greater_is_better,
                args.load_best_model_at_end,
                args.early_stopping_patience,
                args.early_stopping_threshold,
            ),
            optim: rule(args.optim, [beta1, beta2], eps),
            loss,
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
            num_train_epochs: epochs,
            max_steps,
            per_device_train_batch_size: matches!(bound, Bound::Rows(_)).then_some(batch),
            max_batch_tokens: args.max_batch_tokens,
            bound,
            accumulation: positive("gradient-accumulation-steps", args.gradient_accumulation_steps)?,
            eval_batch: positive("per-device-eval-batch-size", args.per_device_eval_batch_size.unwrap_or(8))?,
            seed: args.seed,
            train_sampling_strategy: value_name(&sampling),
            order: match sampling {
                Sampling::Random => Order::Random,
                Sampling::Sequential => Order::Sequential,
                Sampling::GroupByLength => Order::GroupByLength,
            },
            logging_steps,
            evaluate,
            eval_samples: args.eval_samples.map(|count| (count, args.eval_sample_tokens.unwrap_or(128))),
            save,
            save_total_limit: args.save_total_limit.map(|n| positive("save-total-limit", n)).transpose()?,
            save_only_model: args.save_only_model,
            resume,
            ref_cache_dir: args.ref_cache_dir,
            backend: args.backend,
            device: args.device,
            tensorboard: args.report_to.contains(&Report::Tensorboard),
            progress_bar: !args.disable_tqdm,
        })
    }
}

/// The order of the rows; KTO mismatches completions within batches of neighbouring rows.
fn sampling(given: Option<Sampling>, loss: &LossSettings, bound: &Bound) -> Result<Sampling, String> {
    let default = if loss.is_unpaired() { Sampling::Sequential } else { Sampling::Random };
    let sampling = given.unwrap_or(default);
    if loss.needs_mismatched() {
        if sampling != Sampling::Sequential {
            return Err(
                "--train-sampling-strategy must be sequential with kto: the completions of its divergence \
                        come from the rows of the same batch"
                    .into(),
            );
        }
        match bound {
            Bound::Rows(1) => {
                return Err(
                    "--per-device-train-batch-size must be above 1 with kto: the completions of its \
                            divergence come from other rows of the batch"
                        .into(),
                );
            }
            Bound::Tokens(_) => {
                return Err(
                    "--max-batch-tokens does not go with kto, whose batches have a fixed number of rows"
                        .into(),
                );
            }
            Bound::Rows(_) => {}
        }
    }
    Ok(sampling)
}

fn rule(optim: Optimizer, betas: [f64; 2], eps: f64) -> Rule {
    match optim {
        Optimizer::AdamwTorch | Optimizer::AdamwTorchFused => Rule::AdamW { betas, eps },
        Optimizer::Adafactor => Rule::Adafactor,
        Optimizer::Rmsprop => Rule::RmsProp,
        Optimizer::Sgd => Rule::Sgd,
        Optimizer::Lion => Rule::Lion { betas },
    }
}

/// transformers' `metric_for_best_model`, its default and its direction.
fn best(
    metric: Option<&str>,
    greater: Option<bool>,
    load: bool,
    patience: Option<usize>,
    threshold: Option<f64>,
) -> Option<Best> {
    let metric = metric.unwrap_or("loss");
    let metric = if metric.starts_with("eval_") { metric.to_string() } else { format!("eval_{metric}") };
    let greater = greater.unwrap_or(!metric.ends_with("loss"));
    let threshold = threshold.unwrap_or(0.0);
    (load || patience.is_some()).then_some(Best { metric, greater, load, patience, threshold })
}

fn fraction(name: &str, value: f64) -> Result<f64, String> {
    if (0.0..1.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!("--{name} must be in [0, 1), not {value}"))
    }
}

impl Settings {
    /// A run that ends, early or not, writes a checkpoint where steps are counted, as transformers does, so that
    /// nothing is lost if the model cannot be written.
    pub fn saves_at_end(&self) -> bool {
        matches!(self.save, Every::Steps(_))
    }

    /// How rows are computed and what is summed for each.
    pub fn scoring(&self) -> Scoring {
        let mismatched = self.per_device_train_batch_size.filter(|_| self.loss.needs_mismatched());
        Scoring { ld_alpha: self.loss.ld_alpha, mismatched, part: self.part() }
    }

    /// Packed tokens that are computed together at most. Parts need less memory and are as fast as long as each keeps
    /// the device busy; but gradients of all weights that are kept from one part to the next would take as much as
    /// the parts save.
    fn part(&self) -> usize {
        match &self.peft {
            Some(_) if !self.loss.compares_pairs() => {
                if self.backend.is_on_host() {
                    2048
                } else {
                    1 << 16
                }
            }
            _ => usize::MAX,
        }
    }
}

fn value_name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}
