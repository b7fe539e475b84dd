//! `eval run`: the page of one training run, from what the trainer has left.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use hub::DataRequest;
use serde_json::{Value, json};

use crate::args::RunArgs;
use crate::chart::{Series, lines};
use crate::data;
use crate::report::{Page, write_page};

/// Metrics whose first and last values are shown, of the logs of training and of evaluation.
const SHOWN: [&str; 7] = [
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
];

/// Writes the page; returns what it says in short.
pub fn run(args: &RunArgs, tell: impl Fn(&str)) -> Result<String> {
    let path = args.run.join("run.json");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("{}: no directory that `train` has written", path.display()))?;
    let run: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let facts = facts(&run);
    let ends = ends(&args.run)?;
    let described = requests(&run).and_then(|(requests, split)| {
        let wanted: Vec<&str> = split.iter().map(String::as_str).collect();
        data::described(&requests, &wanted, &tell)
    });
    let (data, no_data) = match described {
        Ok(data) => (Some(data), None),
        // The run may have been made on another machine: the rest of the page is worth having.
        Err(error) => (None, Some(format!("The data of the run cannot be read here: {error:#}"))),
    };
    if let Some(reason) = &no_data {
        tell(&format!("WARNING: {reason}"));
    }
    let page = json!({
        "name": args.run.display().to_string(), "facts": facts, "ends": ends, "learning": learning(&args.run)?,
        "samples": samples(&args.run)?, "data": data, "no_data": no_data, "run": run,
    });
    let out = args.out.as_ref().unwrap_or(&args.run);
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    write_page(&out.join("report.html"), Page::Run, &page)?;
    let mut lines: Vec<String> = facts.into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
    lines.extend(ends.into_iter().map(|(name, first, last)| format!("{name:28} {first:>12.4} {last:>12.4}")));
    Ok(lines.join("\n"))
}

/// What a run was, in words.
fn facts(run: &Value) -> Vec<(&'static str, String)> {
    let settings = &run["settings"];
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let list =
        |value: &Value| value.as_array().into_iter().flatten().map(text).collect::<Vec<_>>().join(", ");
    let datasets = settings["data"]["datasets"].as_array().into_iter().flatten().map(|entry| text(&entry[0]));
    let number = |key: &str| run[key].as_f64();
    let mut facts = vec![
        ("model", text(&settings["model"])),
        ("data", datasets.collect::<Vec<_>>().join(", ")),
        ("loss", format!("{}, β {}", list(&settings["loss_type"]), settings["beta"])),
        ("learning rate", format!("{}, {}", settings["learning_rate"], text(&settings["lr_scheduler_type"]))),
        (
            "rows",
            format!(
                "{} ({} dropped, {} cut)",
                run["data"]["rows"], run["data"]["dropped"], run["data"]["truncated"]
            ),
        ),
        ("steps", format!("{} of {}, {}", run["steps_done"], run["total_steps"], text(&run["status"]))),
        ("computed by", format!("{}, {}", text(&run["device"]), text(&run["dtype"]))),
        ("version", format!("{} {}", text(&run["version"]), text(&run["commit"]))),
    ];
    if let (Some(tokens), Some(seconds)) = (number("computed_tokens"), number("train_seconds")) {
        let speed = tokens / seconds.max(1e-9);
        facts.push(("time", format!("{seconds:.1} s, {speed:.0} packed tokens a second")));
    }
    let device = run["device_memory_bytes"][0].as_f64();
    if let Some(bytes) = device.or_else(|| number("peak_memory_bytes")) {
        let of = if device.is_some() { "of the device" } else { "of the process" };
        facts.push(("peak memory", format!("{:.2} GB {of}", bytes / 1e9)));
    }
    facts
}

/// First and last values of metrics.
fn ends(run: &Path) -> Result<Vec<(String, f64, f64)>> {
    let mut all = Vec::new();
    for (file, prefix) in [("train_log.jsonl", ""), ("eval_log.jsonl", "eval_")] {
        let rows = log(run, file)?;
        for name in SHOWN.map(|name| format!("{prefix}{name}")) {
            let mut values = rows.iter().filter_map(|row| row[&name].as_f64());
            if let Some(first) = values.next() {
                let last = values.next_back().unwrap_or(first);
                all.push((name, first, last));
            }
        }
    }
    Ok(all)
}

/// The data sets of a run as it asked for them, and the split it trained on.
fn requests(run: &Value) -> Result<(Vec<DataRequest>, Option<String>)> {
    let data = &run["settings"]["data"];
    let text = |key: &str| data[key].as_str().map(str::to_owned);
    let names = data["datasets"].as_array().context("run.json names no data sets")?;
    let request = |entry: &Value| -> Result<DataRequest> {
        Ok(DataRequest {
            name: entry[0].as_str().context("run.json names no data sets")?.to_owned(),
            revision: text("revision"),
            config: text("config"),
            columns: serde_json::from_value(data["columns"].clone()).unwrap_or_default(),
            unpaired: false,
            skip_invalid: data["skip_invalid_rows"] == true,
        })
    };
    Ok((names.iter().map(request).collect::<Result<_>>()?, text("train_split")))
}

/// Rows of a file that the trainer may have written.
fn log(run: &Path, name: &str) -> Result<Vec<Value>> {
    let path = run.join(name);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(row) => rows.push(row),
            // Of a run that is writing it, or that was killed.
            Err(_) if !text.ends_with('\n') && i + 1 == text.lines().count() => {}
            Err(error) => bail!("{}:{}: {error}", path.display(), i + 1),
        }
    }
    Ok(rows)
}

/// Learning curves of the run whose model this is; none where the directory has no log.
pub fn learning(run: &Path) -> Result<Vec<String>> {
    let (train, held_out) = (log(run, "train_log.jsonl")?, log(run, "eval_log.jsonl")?);
    let curve = |rows: &[Value], key: &str| -> Vec<(f64, f64)> {
        rows.iter().filter_map(|row| Some((row["step"].as_f64()?, row[key].as_f64()?))).collect()
    };
    let pictures = [
        ("loss", vec![("training", &train, "loss"), ("held-out", &held_out, "eval_loss")]),
        (
            "rewards",
            vec![
                ("chosen", &train, "rewards/chosen"),
                ("rejected", &train, "rewards/rejected"),
                ("margin", &train, "rewards/margins"),
            ],
        ),
        (
            "accuracy",
            vec![
                ("training", &train, "rewards/accuracies"),
                ("held-out", &held_out, "eval_rewards/accuracies"),
            ],
        ),
        (
            "evaluation: log-likelihood",
            vec![("winners", &held_out, "eval_logps/chosen"), ("losers", &held_out, "eval_logps/rejected")],
        ),
        ("gradient norm", vec![("norm", &train, "grad_norm")]),
    ];
    let mut all = Vec::new();
    for (title, series) in pictures {
        let series: Vec<Series> = series
            .into_iter()
            .map(|(name, rows, key)| (name.to_string(), curve(rows, key)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        all.extend(lines(title, "step", &series)?);
    }
    Ok(all)
}

/// What the model answered before the training and after it, where the run has asked for that.
pub fn samples(run: &Path) -> Result<Vec<Value>> {
    let mut all: Vec<(String, Value)> = Vec::new();
    for row in log(run, "samples.jsonl")? {
        let id = row["id"].to_string();
        match all.iter_mut().find(|(known, _)| *known == id) {
            Some((_, pair)) => pair["after"] = row["response"].clone(),
            None => {
                all.push((id, json!({"id": row["id"], "prompt": row["prompt"], "before": row["response"]})));
            }
        }
    }
    Ok(all.into_iter().map(|(_, pair)| pair).filter(|pair| pair.get("after").is_some()).collect())
}
