//! `--profile`: a trace of where a run spends its time, and a table of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use tracing_chrome::{ChromeLayerBuilder, FlushGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

/// A trace that is being written.
pub struct Profile {
    path: PathBuf,
    guard: FlushGuard,
}

impl Profile {
    /// Starts to record the spans of this program's own crates.
    pub fn start(path: &Path) -> Result<Self> {
        let context = || format!("--profile {}: cannot write", path.display());
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(context)?;
        }
        let file = File::create(path).with_context(context)?;
        let (layer, guard) = ChromeLayerBuilder::new().writer(file).build();
        let ours = ["trainer", "decoder", "fused_ops"].map(|name| (name, LevelFilter::TRACE));
        let layer = layer.with_filter(Targets::new().with_targets(ours));
        tracing_subscriber::registry().with(layer).try_init().with_context(context)?;
        Ok(Self { path: path.to_path_buf(), guard })
    }

    /// Ends the trace; returns the table.
    pub fn finish(self) -> Result<Vec<String>> {
        let Self { path, guard } = self;
        drop(guard);
        let context = || format!("--profile {}: cannot read it back", path.display());
        let file = File::open(&path).with_context(context)?;
        let events: Vec<Event> = serde_json::from_reader(BufReader::new(file)).with_context(context)?;
        let mut lines = table(&own_times(&events));
        lines.push("on a device with a queue (cuda, wgpu) these are the times to hand work to it".into());
        lines.push(format!(
            "profile: {} (open it in https://ui.perfetto.dev or chrome://tracing)",
            path.display()
        ));
        Ok(lines)
    }
}

/// Start (`B`) or end (`E`) of a span; other kinds are descriptions.
#[derive(Debug, Deserialize)]
struct Event {
    ph: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    tid: u64,
    /// Microseconds.
    #[serde(default)]
    ts: f64,
}

/// Calls and seconds of each kind of span, without what is inside it.
fn own_times(events: &[Event]) -> BTreeMap<&str, (usize, f64)> {
    let mut open: BTreeMap<u64, Vec<(&str, f64, f64)>> = BTreeMap::new();
    let mut times: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for event in events {
        let stack = open.entry(event.tid).or_default();
        match event.ph.as_str() {
            "B" => stack.push((&event.name, event.ts, 0.0)),
            "E" => {
                let Some((name, start, inside)) = stack.pop() else { continue };
                let all = event.ts - start;
                let time = times.entry(name).or_default();
                *time = (time.0 + 1, time.1 + (all - inside) * 1e-6);
                if let Some((_, _, inside)) = stack.last_mut() {
                    *inside += all;
                }
            }
            _ => {}
        }
    }
    times
}

/// The most expensive first.
fn table(times: &BTreeMap<&str, (usize, f64)>) -> Vec<String> {
    let total: f64 = times.values().map(|time| time.1).sum();
    let mut rows: Vec<_> = times.iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    let row = |(name, (calls, seconds)): (&&str, &(usize, f64))| {
        format!("{name:28} {calls:8} {seconds:10.3} {:6.1}", 100.0 * seconds / total.max(f64::MIN_POSITIVE))
    };
    std::iter::once(format!("{:28} {:>8} {:>10} {:>6}", "time in", "calls", "seconds", "%"))
        .chain(rows.into_iter().map(row))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_inside_is_counted_once() {
        let event = |ph: &str, name: &str, tid, ts| Event { ph: ph.into(), name: name.into(), tid, ts };
        let events = [
            event("B", "step", 0, 0.0),
            event("B", "linear", 0, 1e6),
            event("B", "linear", 1, 0.0),
            event("E", "linear", 0, 3e6),
            event("E", "linear", 1, 5e6),
            event("E", "step", 0, 4e6),
        ];
        let times = own_times(&events);
        assert_eq!(times["step"], (1, 2.0));
        assert_eq!(times["linear"], (2, 7.0));
        assert!(table(&times)[1].starts_with("linear"));
    }
}
