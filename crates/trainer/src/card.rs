//! The model card: README.md of the output directory.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Result;
use pref_data::{read_jsonl, write_atomic};
use serde_json::Value;

use crate::run_info::RunInfo;
use crate::settings::Settings;

/// First line after the header: a file without it is someone's own and is left alone.
const MARK: &str = "<!-- Written by the trainer; a later run replaces it. -->";

/// Writes the card, unless a README.md of someone else is there.
pub fn write(info: &RunInfo, say: &dyn Fn(&str)) -> Result<()> {
    let path = info.settings.output_dir.join("README.md");
    if fs::read_to_string(&path).is_ok_and(|old| !old.contains(MARK)) {
        say(&format!("{}: kept; the model card is not written over it", path.display()));
        return Ok(());
    }
    let text = card(info);
    Ok(write_atomic(&path, |out| out.write_all(text.as_bytes()))?)
}

fn card(info: &RunInfo) -> String {
    let s = info.settings;
    let adapter = s.peft.as_ref().is_some_and(|peft| !peft.merge);
    let mut text = header(s, adapter);
    let name = s.output_dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    let what = if s.peft.is_some() { "a low-rank adapter was trained" } else { "all weights were trained" };
    let data: Vec<String> = s.data.datasets.iter().map(|(name, _)| format!("`{name}`")).collect();
    let _ = write!(
        text,
        "{MARK}\n\n# {name}\n\n`{}` aligned on {} by preference optimization; {what}.\n\n## Training\n\n\
         | setting | value |\n|---|---|\n",
        s.model,
        data.join(", ")
    );
    for (setting, value) in settings_table(info) {
        let _ = writeln!(text, "| {setting} | {value} |");
    }
    text.push_str(&results(s));
    text.push_str(&usage(s, adapter));
    text
}

fn header(s: &Settings, adapter: bool) -> String {
    // The Hub takes its own ids alone.
    let on_hub = |name: &str| !Path::new(name).exists() && name.split('/').count() == 2;
    let mut header = String::from("---\n");
    if on_hub(&s.model) {
        let _ = writeln!(header, "base_model: {}", quoted(&s.model));
    }
    let library = if adapter { "peft" } else { "transformers" };
    let _ = writeln!(header, "library_name: {library}\npipeline_tag: text-generation");
    let sets: Vec<&String> =
        s.data.datasets.iter().map(|(name, _)| name).filter(|name| on_hub(name)).collect();
    if !sets.is_empty() {
        header.push_str("datasets:\n");
    }
    for name in sets {
        let _ = writeln!(header, "- {}", quoted(name));
    }
    header.push_str("tags:\n- preference-optimization\n");
    for tag in s.loss.tags() {
        let _ = writeln!(header, "- {tag}");
    }
    header.push_str("---\n\n");
    header
}

/// A YAML string.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn settings_table(info: &RunInfo) -> Vec<(&'static str, String)> {
    let s = info.settings;
    let batch = match (s.per_device_train_batch_size, s.max_batch_tokens) {
        (Some(rows), _) => format!("{rows} rows x {}", s.accumulation),
        (None, tokens) => format!("at most {} packed tokens x {}", tokens.unwrap_or(0), s.accumulation),
    };
    let mut rows = vec![
        ("loss", s.loss.names()),
        ("beta", s.loss.beta.to_string()),
        (
            "rows",
            format!("{} ({} truncated, {} dropped)", info.data.rows, info.data.truncated, info.data.dropped),
        ),
        ("longest sequence", format!("{} tokens", s.data.max_length)),
        ("steps", format!("{} of {}", info.steps_done, info.total_steps)),
        ("batch", batch),
        (
            "learning rate",
            format!("{} ({}, warm-up {})", s.learning_rate, s.lr_scheduler_type, s.warmup_steps),
        ),
        ("optimizer", format!("{:?}, weight decay {}", s.optim, s.weight_decay)),
        ("largest gradient norm", s.max_grad_norm.to_string()),
        ("trained parameters", info.trained_parameters.to_string()),
        ("seed", s.seed.to_string()),
        ("device and data type", format!("{}, {}", info.device, info.dtype)),
        ("version", format!("{} ({})", info.version, info.commit)),
    ];
    if let Some(peft) = &s.peft {
        let new = peft.new_adapter();
        rows.push(("adapter", format!("rank {}, alpha {}, {:?}", new.rank, new.alpha, peft.targets())));
    }
    if let Some(best) = info.best {
        rows.push(("best evaluation", format!("step {}, {:.6}", best.step, best.value)));
    }
    rows
}

/// The last entries of both logs.
fn results(s: &Settings) -> String {
    let last = |name: &str| -> Option<Value> {
        let rows = read_jsonl(&s.output_dir.join(name)).ok()?;
        rows.into_iter().last().map(|(_, row)| row)
    };
    let (train, eval) = (last("train_log.jsonl"), last("eval_log.jsonl"));
    let shown = [
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "kl",
    ];
    let cell = |log: &Option<Value>, key: String| {
        log.as_ref()
            .and_then(|log| log[key].as_f64())
            .map_or_else(|| "–".into(), |value| format!("{value:.4}"))
    };
    let mut text = String::from(
        "\n## Results\n\nLast entries of `train_log.jsonl` and `eval_log.jsonl`; rewards are beta times the log-ratio to \
         the reference.\n\n| metric | training | evaluation |\n|---|---|---|\n",
    );
    for key in shown {
        let (a, b) = (cell(&train, key.into()), cell(&eval, format!("eval_{key}")));
        if a != "–" || b != "–" {
            let _ = writeln!(text, "| {key} | {a} | {b} |");
        }
    }
    text
}

fn usage(s: &Settings, adapter: bool) -> String {
    let dir = quoted(&s.output_dir.to_string_lossy());
    let load = if adapter {
        format!(
            "from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained({dir})"
        )
    } else {
        format!(
            "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({dir})"
        )
    };
    format!(
        "\n## Use\n\n```python\n{load}\n\nfrom transformers import AutoTokenizer\n\
         tokenizer = AutoTokenizer.from_pretrained({dir})\n```\n\nAll settings, versions and hashes are in `run.json`.\n"
    )
}
