//! `--config recipe.yaml`: TRL's and alignment-handbook's keys as flags.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

/// Names of older recipes, and what they are called now.
const RENAMED: [(&str, &str); 3] =
    [("evaluation_strategy", "eval_strategy"), ("torch_dtype", "dtype"), ("warmup_ratio", "warmup_steps")];
/// Names that are gone, and what replaces them.
const GONE: [(&str, &str); 3] = [
    ("rpo_alpha", "add the loss sft with --loss-type … sft --loss-weights 1 ALPHA"),
    ("max_prompt_length", "--max-length bounds prompt and completion together"),
    ("max_completion_length", "--max-length bounds prompt and completion together"),
];

/// Keys of TRL's and alignment-handbook's recipes that have no meaning here.
const INERT: [&str; 26] = [
    "attn_implementation",
    "dataset_num_proc",
    "dataloader_num_workers",
    "ddp_timeout",
    "do_eval",
    "do_train",
    "eval_on_start",
    "fp16",
    "gradient_checkpointing_kwargs",
    "hub_model_id",
    "hub_strategy",
    "log_level",
    "logging_first_step",
    "logging_strategy",
    "optim_args",
    "padding_free",
    "preprocessing_num_workers",
    "push_to_hub",
    "remove_unused_columns",
    "report_to_hub",
    "run_name",
    "tf32",
    "trust_remote_code",
    "use_liger_kernel",
    "use_cache",
    "wandb_project",
];

/// Puts the keys of a `--config` file in front of the other flags, which override them. Also translates older
/// names of flags. Notices go to `say`.
pub fn expand(args: Vec<OsString>, say: &mut dyn FnMut(String)) -> Result<Vec<OsString>, String> {
    let mut rest = args.into_iter();
    let mut all: Vec<OsString> = rest.next().into_iter().collect();
    let (mut own, mut path) = (Vec::new(), None);
    while let Some(arg) = rest.next() {
        match arg.to_str() {
            Some("--config") => set(&mut path, rest.next().ok_or("--config needs a file")?)?,
            Some(text) if text.starts_with("--config=") => set(&mut path, text["--config=".len()..].into())?,
            Some(text) if text.starts_with("--") => own.push(renamed_flag(text, say)?.into()),
            _ => own.push(arg),
        }
    }
    if let Some(path) = path {
        let keys = warm_up(read(Path::new(&path))?)?;
        without_effect(Path::new(&path), &keys)?;
        let given: Vec<String> =
            own.iter().filter_map(|arg| Some(flag_name(arg.to_str()?)?.replace('_', "-"))).collect();
        for (key, value) in keys {
            let key = renamed(&key, say)?;
            let flag = format!("--{}", key.replace('_', "-"));
            // A flag of the command line takes the place of the recipe's key.
            if !given.iter().any(|name| *name == flag[2..]) {
                all.extend(flags(&flag, &value)?);
            }
        }
    }
    all.extend(own);
    Ok(all)
}

fn set(path: &mut Option<OsString>, given: OsString) -> Result<(), String> {
    match path.replace(given) {
        None => Ok(()),
        Some(first) => Err(format!("--config is given twice (first {})", first.display())),
    }
}

/// transformers' rule for `warmup_ratio`: it counts where `warmup_steps` is 0.
fn warm_up(mut keys: Map<String, Value>) -> Result<Map<String, Value>, String> {
    let Some(ratio) = keys.get("warmup_ratio").and_then(Value::as_f64) else { return Ok(keys) };
    if ratio >= 1.0 {
        return Err(format!("warmup_ratio: {ratio} is the whole run or more; give warmup_steps as a count"));
    }
    let steps = keys.get("warmup_steps").and_then(Value::as_f64).unwrap_or(0.0);
    keys.remove(if steps == 0.0 { "warmup_steps" } else { "warmup_ratio" });
    Ok(keys)
}

/// Keys that do nothing here are named, all at once: those that TRL and transformers have, and those that nobody
/// has.
fn without_effect(path: &Path, keys: &Map<String, Value>) -> Result<(), String> {
    let command = <crate::args::Args as clap::CommandFactory>::command();
    let known: Vec<String> =
        command.get_arguments().filter_map(|arg| Some(arg.get_long()?.replace('-', "_"))).collect();
    let translated = |key: &str| RENAMED.iter().chain(&GONE).any(|(old, _)| *old == key);
    let strange: Vec<&str> = keys
        .iter()
        .filter(|(key, value)| {
            !value.is_null() && !translated(key) && !known.contains(&key.replace('-', "_"))
        })
        .map(|(key, _)| key.as_str())
        .collect();
    if strange.is_empty() {
        return Ok(());
    }
    let (inert, unknown): (Vec<&str>, Vec<&str>) = strange.into_iter().partition(|key| INERT.contains(key));
    let mut said = Vec::new();
    if !inert.is_empty() {
        said.push(format!("these keys of TRL do nothing here, take them out: {}", inert.join(", ")));
    }
    if !unknown.is_empty() {
        said.push(format!("unknown: {}", unknown.join(", ")));
    }
    Err(format!("--config {}: {}", path.display(), said.join("; ")))
}

/// `name` of `--name` and `--name=value`.
fn flag_name(arg: &str) -> Option<&str> {
    let name = arg.strip_prefix("--")?;
    Some(name.split_once('=').map_or(name, |(name, _)| name))
}

fn renamed_flag(arg: &str, say: &mut dyn FnMut(String)) -> Result<String, String> {
    let name = flag_name(arg).unwrap_or_default();
    let now = renamed(&name.replace('-', "_"), say)?;
    let value = arg.split_once('=').map(|(_, value)| format!("={value}")).unwrap_or_default();
    Ok(format!("--{}{value}", now.replace('_', "-")))
}

fn renamed(name: &str, say: &mut dyn FnMut(String)) -> Result<String, String> {
    if let Some((_, instead)) = GONE.iter().find(|(old, _)| *old == name) {
        return Err(format!("{name} no longer exists in TRL: {instead}"));
    }
    match RENAMED.iter().find(|(old, _)| *old == name) {
        Some((old, new)) => {
            say(format!("notice: {old} is called {new} now"));
            Ok((*new).into())
        }
        None => Ok(name.into()),
    }
}

fn read(path: &Path) -> Result<Map<String, Value>, String> {
    let wrong = |reason: String| format!("--config {}: {reason}", path.display());
    let text = fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let value: Value = serde_saphyr::from_str(&text).map_err(|e| wrong(format!("not usable YAML: {e}")))?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(wrong(format!("expected keys and values, found {other}"))),
    }
}

/// A key and its value as the command line has them.
fn flags(flag: &str, value: &Value) -> Result<Vec<OsString>, String> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(yes) => Ok(if *yes { "True" } else { "False" }.into()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Object(_) => Ok(value.to_string()),
        other => Err(format!(
            "the recipe's {} is {other}, expected a text, a number, a truth value or a list",
            &flag[2..]
        )),
    };
    let values = match value {
        // As if the key were not there.
        Value::Null => return Ok(Vec::new()),
        Value::Array(items) if items.is_empty() => return Ok(Vec::new()),
        Value::Array(items) => items.iter().map(one).collect::<Result<Vec<_>, _>>()?,
        other => vec![one(other)?],
    };
    let negative = |text: &str| text.starts_with('-');
    Ok(match values.as_slice() {
        // A value that starts with a dash must be tied to its flag.
        [only] if negative(only) => vec![format!("{flag}={only}").into()],
        _ => std::iter::once(flag.to_string()).chain(values).map(OsString::from).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(yaml: &str, flags: &str) -> Result<(String, Vec<String>), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.yaml");
        fs::write(&path, yaml).unwrap();
        let mut said = Vec::new();
        let args = format!("trainer --config {} {flags}", path.display());
        let args = args.split_whitespace().map(OsString::from).collect();
        let all = expand(args, &mut |line| said.push(line))?;
        let text: Vec<String> = all.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
        Ok((text.join(" "), said))
    }

    #[test]
    fn keys_become_flags_and_the_command_line_wins() {
        let yaml = "# recipe\nmodel_name_or_path: org/m\nloss_type: [apo_zero, sft]\nlearning_rate: 1.0e-6\nbf16: false\n\
                    max_steps: -1\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\nwarmup_ratio: 0.1\nreport_to: null\nbeta: 0.05\n";
        let (text, said) = expanded(yaml, "--beta 0.2 --seed=3").unwrap();
        assert_eq!(
            text,
            "trainer --model-name-or-path org/m --loss-type apo_zero sft --learning-rate 1e-6 --bf16 False \
             --max-steps=-1 --lr-scheduler-kwargs {\"min_lr_rate\":0.1} --warmup-steps 0.1 --beta 0.2 --seed=3"
        );
        assert_eq!(said, ["notice: warmup_ratio is called warmup_steps now"]);
    }

    #[test]
    fn what_is_gone_says_what_replaces_it() {
        assert!(expanded("rpo_alpha: 1.0", "").unwrap_err().contains("sft"));
        assert!(expanded("a: 1", "--max_prompt_length 3").unwrap_err().contains("--max-length"));
        assert!(expanded("- a\n- b", "").unwrap_err().contains("keys and values"));
        assert!(expanded("beta: [[1]]", "").unwrap_err().contains("expected a text"));
        let said =
            expanded("attn_implementation: eager\nbeta: 0.1\ndo_eval: true\nbetta: 1\n", "").unwrap_err();
        assert!(said.contains("take them out: attn_implementation, do_eval; unknown: betta"), "{said}");
        assert!(expanded("beta: 1", "--config other.yaml").unwrap_err().contains("given twice"));
        let (text, _) = expanded("warmup_ratio: 0.5\nwarmup_steps: 0\nreport_to: []\n", "").unwrap();
        assert_eq!(text, "trainer --warmup-steps 0.5");
        assert!(expanded("warmup_ratio: 1.0", "").unwrap_err().contains("as a count"));
        let missing = expand(["t", "--config", "nowhere.yaml"].map(OsString::from).to_vec(), &mut |_| {});
        assert!(missing.unwrap_err().contains("nowhere.yaml"));
    }
}
