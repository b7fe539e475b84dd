//! Rules that involve more than one flag: a flag that would do nothing in the run is an error.

use crate::args::{Args, Dtype, Optimizer, Report, Strategy};
use crate::schedule::Scheduler;

/// Errors for the first flag that would do nothing in this run, or contradicts another.
pub fn check(args: &Args) -> Result<(), String> {
    let evaluates = args.eval_strategy != Strategy::No;
    let adam = matches!(args.optim, Optimizer::AdamwTorch | Optimizer::AdamwTorchFused);
    let betas = args.adam_beta1.is_some() || args.adam_beta2.is_some();
    let best = args.load_best_model_at_end || args.early_stopping_patience.is_some();
    let live = args.sync_ref_model || args.precompute_ref_log_probs == Some(false);
    let adapter = args.peft.use_peft || args.peft.adapter_path.is_some();
    let rules = [
        (
            args.bf16 == Some(false) && args.dtype == Dtype::Bfloat16,
            "--bf16 False and --dtype bfloat16 contradict each other",
        ),
        (
            args.sync_ref_model && args.precompute_ref_log_probs == Some(true),
            "--precompute-ref-log-probs and --sync-ref-model contradict each other: the reference moves",
        ),
        (
            args.sync_ref_model && adapter,
            "--sync-ref-model does not go with an adapter: the reference is the model without it",
        ),
        (
            live && args.ref_cache_dir.is_some(),
            "--ref-cache-dir has no effect where reference log-probabilities are not precomputed",
        ),
        (
            args.ref_model_sync_steps.is_some() && !args.sync_ref_model,
            "--ref-model-sync-steps has no effect without --sync-ref-model",
        ),
        (args.ref_model_sync_steps == Some(0), "--ref-model-sync-steps must be at least 1"),
        (
            args.ref_model_mixup_alpha.is_some() && !args.sync_ref_model,
            "--ref-model-mixup-alpha has no effect without --sync-ref-model",
        ),
        (
            args.ref_model_mixup_alpha.is_some_and(|alpha| !(0.0..=1.0).contains(&alpha)),
            "--ref-model-mixup-alpha must be in [0, 1]",
        ),
        (
            args.ref_model_name_or_path.is_some() && adapter,
            "--ref-model-name-or-path does not go with an adapter: the reference is the model without it; \
             --ref-adapter-path gives it an adapter",
        ),
        (
            betas && !adam && args.optim != Optimizer::Lion,
            "--adam-beta1 and --adam-beta2 have no effect with this --optim",
        ),
        (args.adam_epsilon.is_some() && !adam, "--adam-epsilon has no effect with this --optim"),
        (
            args.max_steps > 0 && args.num_train_epochs.is_some(),
            "--num-train-epochs has no effect with --max-steps, which overrides it",
        ),
        (
            args.max_steps == 0,
            "--max-steps 0 trains nothing; give a number of steps, or -1 for --num-train-epochs",
        ),
        (
            args.memory_limit.is_some() && args.gradient_checkpointing,
            "--memory-limit has no effect with --gradient-checkpointing: every block is computed again already",
        ),
        (
            args.inspect.is_some() && args.profile.is_some(),
            "--profile has no effect with --inspect, which only prints rows",
        ),
        (
            args.memory_limit.is_some_and(|size| size.as_u64() < 1 << 20),
            "--memory-limit: less than a megabyte; give a unit, as in 3GB",
        ),
        (args.inspect == Some(0), "--inspect 0 prints nothing; give a number of rows"),
        (best && !evaluates, "--load-best-model-at-end and --early-stopping-patience need --eval-strategy"),
        (
            args.load_best_model_at_end && args.save_strategy != args.eval_strategy,
            "--load-best-model-at-end needs the same --save-strategy as --eval-strategy",
        ),
        (
            args.load_best_model_at_end && saves_unevaluated(args),
            "--load-best-model-at-end needs --save-steps to be a multiple of --eval-steps",
        ),
        (
            args.metric_for_best_model.is_some() && !best,
            "--metric-for-best-model has no effect without --load-best-model-at-end or --early-stopping-patience",
        ),
        (
            args.greater_is_better.is_some() && !best,
            "--greater-is-better has no effect without --load-best-model-at-end or --early-stopping-patience",
        ),
        (args.early_stopping_patience == Some(0), "--early-stopping-patience must be at least 1"),
        (
            args.early_stopping_threshold.is_some() && args.early_stopping_patience.is_none(),
            "--early-stopping-threshold has no effect without --early-stopping-patience",
        ),
        (
            args.early_stopping_threshold.is_some_and(|delta| !(delta.is_finite() && delta >= 0.0)),
            "--early-stopping-threshold must be 0 or more",
        ),
        (
            args.save_only_model && args.save_strategy == Strategy::No,
            "--save-only-model has no effect with --save-strategy no",
        ),
        (
            args.report_to.contains(&Report::None) && args.report_to.len() > 1,
            "--report-to none contradicts the other targets",
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
        (
            args.eval_strategy == Strategy::No && args.eval_samples.is_some(),
            "--eval-samples has no effect without --eval-strategy",
        ),
        (
            args.eval_samples.is_none() && args.eval_sample_tokens.is_some(),
            "--eval-sample-tokens has no effect without --eval-samples",
        ),
        (args.eval_samples == Some(0), "--eval-samples must be at least 1"),
        (args.eval_sample_tokens == Some(0), "--eval-sample-tokens must be at least 1"),
    ];
    rules.into_iter().find(|(broken, _)| *broken).map_or(Ok(()), |(_, reason)| Err(reason.into()))
}

/// Checkpoints are written at steps that are not evaluated.
fn saves_unevaluated(args: &Args) -> bool {
    let eval = args.eval_steps.unwrap_or(args.logging_steps).max(1);
    args.save_strategy == Strategy::Steps && !args.save_steps.unwrap_or(500).is_multiple_of(eval)
}
