//! `eval data`: what a preference set is like.

mod measure;
mod report;

use std::fs;

use anyhow::{Context, Result};
use hub::{Hub, announce};
use pref_data::{Tokenizer, write_atomic};
use serde::Serialize;

use crate::args::{DataArgs, template_time};
use measure::{Measured, Reader};
use report::SetReport;

/// Contents of `report.json`.
#[derive(Debug, Serialize)]
struct Report {
    /// What lengths and similarity are counted in: `words`, or the model whose tokens they are.
    unit: String,
    /// The sets: the one asked about, and the one beside it.
    sets: Vec<SetReport>,
}

/// Runs the command; returns the table for stdout.
pub fn run(args: &DataArgs, tell: impl Fn(&str) + Sync) -> Result<String> {
    let hub = Hub::from_env();
    let tokenizer = args.model.as_deref().map(|name| -> Result<Tokenizer> {
        let dir = hub.model(name, None, &announce(&tell))?;
        Ok(Tokenizer::load(&dir, None, template_time(None))?)
    });
    let reader = Reader { tokenizer: tokenizer.transpose()?, skip_invalid: args.reading.skip_invalid_rows };
    let names = std::iter::once(&args.dataset).chain(&args.against);
    let sets = names
        .map(|name| {
            let request = args.reading.request(name)?;
            let wanted: Vec<&str> = args.split.iter().map(String::as_str).collect();
            let splits = request.find(&hub, &wanted, &tell)?;
            let mut measured: Vec<Measured> = Vec::new();
            for (split, files) in &splits.splits {
                if wanted.is_empty() || wanted.contains(&split.as_str()) {
                    measured.push(reader.split(split, files, &request.columns, &tell)?);
                }
            }
            for split in &wanted {
                splits.split(split)?;
            }
            SetReport::new(name, &measured)
        })
        .collect::<Result<Vec<_>>>()?;
    let report = Report {
        unit: args.model.clone().map_or("words".into(), |model| format!("tokens of {model}")),
        sets,
    };
    fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot create", args.out.display()))?;
    let html = report::html(&report)?;
    write_atomic(&args.out.join("report.html"), |out| out.write_all(html.as_bytes()))?;
    let text = serde_json::to_string_pretty(&report)?;
    write_atomic(&args.out.join("report.json"), |out| out.write_all(text.as_bytes()))?;
    Ok(report::table(&report))
}
