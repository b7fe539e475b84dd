//! `eval data`: what a preference set is like.

mod measure;
mod report;

use std::fs;

use anyhow::{Context, Result};
use hub::{DataRequest, Hub, announce};
use pref_data::Tokenizer;
use serde::Serialize;
use serde_json::Value;

use crate::args::{DataArgs, template_time};
use crate::report::{Page, write_json, write_page};
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
    let wanted: Vec<&str> = args.split.iter().map(String::as_str).collect();
    let names = std::iter::once(&args.dataset).chain(&args.against);
    let sets = names
        .map(|name| measured(&reader, &args.reading.request(name)?, &wanted, &hub, &tell))
        .collect::<Result<Vec<_>>>()?;
    let report = Report {
        unit: args.model.clone().map_or("words".into(), |model| format!("tokens of {model}")),
        sets,
    };
    fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot create", args.out.display()))?;
    write_page(&args.out.join("report.html"), Page::Data, &report::page(&report.unit, &report.sets))?;
    write_json(&args.out.join("report.json"), &report)?;
    Ok(report::table(&report))
}

/// One set, in all its splits or the wanted ones.
fn measured(
    reader: &Reader,
    request: &DataRequest,
    wanted: &[&str],
    hub: &Hub,
    tell: &dyn Fn(&str),
) -> Result<SetReport> {
    let splits = request.find(hub, wanted, tell)?;
    let mut measured: Vec<Measured> = Vec::new();
    for (split, files) in &splits.splits {
        if wanted.is_empty() || wanted.contains(&split.as_str()) {
            measured.push(reader.split(split, files, &request.columns, tell)?);
        }
    }
    for split in wanted {
        splits.split(split)?;
    }
    SetReport::new(&request.name, &measured)
}

/// What a page shows of the sets, in words.
pub fn described(requests: &[DataRequest], wanted: &[&str], tell: &dyn Fn(&str)) -> Result<Value> {
    let hub = Hub::from_env();
    let of = |request: &DataRequest| {
        let reader = Reader { tokenizer: None, skip_invalid: request.skip_invalid };
        measured(&reader, request, wanted, &hub, tell)
    };
    Ok(report::page("words", &requests.iter().map(of).collect::<Result<Vec<_>>>()?))
}
