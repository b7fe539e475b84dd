//! `bench generate`: the revision client against a local server that behaves like a hosted model, beside its peers.

use std::collections::BinaryHeap;
use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::process::{Loopback, Took, build_loopback, timed};
use super::{count, flags};
use crate::cargo::{build, cargo, root};
use crate::report;

const PARTS: [&str; 5] = ["speed", "limits", "faults", "kills", "store"];
const PEERS: [&str; 3] = ["asyncio", "curator", "distilabel"];

#[derive(Clone)]
struct Options {
    rows: usize,
    latency_ms: f64,
    in_flight: usize,
    peer_rows: usize,
    replies: usize,
    kills: usize,
    only: Vec<String>,
    peers: Vec<String>,
    venv: Option<PathBuf>,
    dir: PathBuf,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            rows: 20_000,
            latency_ms: 1000.0,
            in_flight: 1000,
            peer_rows: 2000,
            replies: 1_000_000,
            kills: 50,
            only: PARTS.map(String::from).to_vec(),
            peers: PEERS.map(String::from).to_vec(),
            venv: None,
            dir: env::temp_dir().join("bench-generate"),
        };
        for [flag, value] in flags(args)? {
            let count = || count(flag, value);
            match flag.as_str() {
                "--rows" => options.rows = count()?.max(1),
                "--latency-ms" => options.latency_ms = count()? as f64,
                "--in-flight" => options.in_flight = count()?.max(1),
                "--peer-rows" => options.peer_rows = count()?.max(1),
                "--replies" => options.replies = count()?.max(1),
                "--kills" => options.kills = count()?,
                "--only" => options.only = value.split(',').map(String::from).collect(),
                "--peers" => options.peers = value.split(',').map(String::from).collect(),
                "--against" => options.venv = Some(value.into()),
                "--dir" => options.dir = value.into(),
                other => bail!("unknown flag {other}"),
            }
        }
        if let Some(other) = options.only.iter().find(|part| !PARTS.contains(&part.as_str())) {
            bail!("--only {other}: expected some of {}", PARTS.join(", "));
        }
        if let Some(other) = options.peers.iter().find(|peer| !PEERS.contains(&peer.as_str())) {
            bail!("--peers {other}: expected some of {}", PEERS.join(", "));
        }
        Ok(options)
    }

    /// The same with so many calls in flight.
    fn with_in_flight(&self, in_flight: usize) -> Self {
        Self { in_flight, ..self.clone() }
    }
}

pub fn run(args: &[String]) -> Result<ExitCode> {
    let options = Options::parse(args)?;
    fs::create_dir_all(&options.dir)?;
    let binary = build("clair-gen")?;
    build_loopback()?;
    for part in &options.only {
        match part.as_str() {
            "speed" => speed(&options, &binary)?,
            "limits" => limits(&options, &binary)?,
            "faults" => faults(&options, &binary)?,
            "kills" => kills(&options, &binary)?,
            _ => store(&options)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Rows with a task and an answer of some hundred characters.
fn input(options: &Options, rows: usize) -> Result<PathBuf> {
    let path = options.dir.join(format!("answers-{rows}.jsonl"));
    let mut text = String::new();
    for i in 0..rows {
        let words: Vec<String> = (0..60).map(|w| format!(" word{}", (i * 31 + w * 7) % 97)).collect();
        let words = words.concat();
        writeln!(
            text,
            r#"{{"id": "r{i}", "prompt": "Question {i}:{words}?", "response": "Answer {i}:{words}."}}"#
        )?;
    }
    fs::write(&path, text)?;
    Ok(path)
}

fn client(binary: &Path, options: &Options, server: &Loopback, input: &Path, out: &str) -> Command {
    let mut command = Command::new(binary);
    command.arg("--input").arg(input).arg("--out").arg(options.dir.join(out));
    command.args(["--endpoint", &server.url, "--model", "teacher"]);
    command.args(["--max-in-flight", &options.in_flight.to_string()]).env_remove("OPENAI_API_KEY");
    command
}

fn fresh(options: &Options, out: &str) -> Result<PathBuf> {
    let dir = options.dir.join(out);
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    Ok(dir)
}

/// The time that the best client would take: each call starts as soon as one before it has ended.
fn ideal(rows: usize, in_flight: usize, latency_ms: f64) -> f64 {
    // As the server draws them.
    let latency = |number: usize| {
        let part = (number.wrapping_mul(2_654_435_761) >> 7) % 1000;
        latency_ms / 1000.0 * (0.5 + part as f64 / 1000.0)
    };
    let mut ends: BinaryHeap<std::cmp::Reverse<u64>> = BinaryHeap::new();
    let mut last = 0;
    for number in 0..rows {
        let start = if ends.len() < in_flight { 0 } else { ends.pop().map_or(0, |end| end.0) };
        let end = start + (1e6 * latency(number)) as u64;
        last = last.max(end);
        ends.push(std::cmp::Reverse(end));
    }
    last as f64 / 1e6
}

fn tell(name: &str, rows: usize, took: Took) {
    report(&format!(
        "{name}: {:.2} s, {:.0} calls/s, {:.0} µs CPU a call, {:.0} MB",
        took.wall,
        rows as f64 / took.wall,
        1e6 * took.cpu / rows as f64,
        took.memory_mb
    ));
}

fn speed(options: &Options, binary: &Path) -> Result<()> {
    let latency = options.latency_ms.to_string();
    let best = ideal(options.rows, options.in_flight, options.latency_ms);
    report(&format!(
        "speed: {} calls, {latency} ms mean latency, {} in flight; best possible {best:.2} s",
        options.rows, options.in_flight
    ));
    let server = Loopback::start(&["--latency-ms", &latency])?;
    let source = input(options, options.rows)?;
    fresh(options, "speed")?;
    let took = timed(client(binary, options, &server, &source, "speed"), &options.dir.join("speed.log"))?;
    ensure!(took.is_success, "clair-gen failed: {}", options.dir.join("speed.log").display());
    tell("ours", options.rows, took);
    report(&format!("  {:.1} % of the best possible", 100.0 * best / took.wall));
    floor(options, &server)?;
    drop(server);
    let Some(venv) = &options.venv else { return Ok(()) };
    let rows = options.peer_rows;
    let source = input(options, rows)?;
    let in_flight = options.in_flight.min(200);
    let best = ideal(rows, in_flight, 300.0);
    report(&format!(
        "beside peers: {rows} calls, 300 ms mean latency, {in_flight} in flight; best {best:.2} s"
    ));
    let server = Loopback::start(&["--latency-ms", "300"])?;
    fresh(options, "small")?;
    let small = options.with_in_flight(in_flight);
    let took = timed(client(binary, &small, &server, &source, "small"), &options.dir.join("small.log"))?;
    tell("ours", rows, took);
    drop(server);
    for peer in &options.peers {
        let server = Loopback::start(&["--latency-ms", "300"])?;
        let out = fresh_file(options, peer)?;
        let took =
            timed(peer_command(venv, options, peer, &server, &source, &out, in_flight), &log(options, peer))?;
        let came = lines(&out);
        tell(peer, rows, took);
        if came < rows || !took.is_success {
            report(&format!("  {came} of {rows} rows came, exit {}", took.is_success));
        }
    }
    Ok(())
}

fn log(options: &Options, name: &str) -> PathBuf {
    options.dir.join(format!("{name}.log"))
}

fn fresh_file(options: &Options, peer: &str) -> Result<PathBuf> {
    let out = options.dir.join(format!("{peer}.jsonl"));
    fs::remove_file(&out).ok();
    let home = options.dir.join(format!("home-{peer}"));
    fs::remove_dir_all(&home).ok();
    fs::create_dir_all(&home)?;
    Ok(out)
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

fn peer_command(
    venv: &Path,
    options: &Options,
    peer: &str,
    server: &Loopback,
    source: &Path,
    out: &Path,
    in_flight: usize,
) -> Command {
    let mut command = Command::new(venv.join("bin/python3"));
    let home = options.dir.join(format!("home-{peer}"));
    command.arg(root().join("xtask/src/bench/generate_peers.py")).args([peer, &server.url]);
    command.arg(source).arg(out).arg(in_flight.to_string());
    // Its caches belong to this run.
    command.env("HOME", &home).env("CURATOR_CACHE_DIR", home.join("curator")).env("OPENAI_API_KEY", "none");
    command.env("HF_HUB_OFFLINE", "1").env("TELEMETRY_ENABLED", "False");
    command
}

fn limits(options: &Options, binary: &Path) -> Result<()> {
    let (rpm, tpm) = (60_000.0, 21_000_000.0);
    let source = input(options, options.rows)?;
    for told in ["by options", "by the server's headers"] {
        let [rpm, tpm, latency] = [rpm, tpm, options.latency_ms].map(|number: f64| number.to_string());
        let server = Loopback::start(&["--latency-ms", &latency, "--rpm", &rpm, "--tpm", &tpm])?;
        fresh(options, "limits")?;
        let mut command = client(binary, options, &server, &source, "limits");
        if told == "by options" {
            command.args(["--rpm", &rpm, "--tpm", &tpm]);
        }
        // More than the limit allows, so that it is the limit that holds.
        command.args(["--max-in-flight", &(3 * options.in_flight).to_string()]);
        let took = timed(command, &log(options, "limits"))?;
        ensure!(took.is_success, "clair-gen failed: {}", log(options, "limits").display());
        let refused = server.count("limited")?;
        let manifest: Value =
            serde_json::from_str(&fs::read_to_string(options.dir.join("limits/report.json"))?)?;
        let tokens = manifest["all_usage"]["total_tokens"].as_f64().unwrap_or(0.0);
        let allowed = (60.0 * options.rows as f64 / 60_000.0).max(60.0 * tokens / 21_000_000.0);
        // The last call's own time is nobody's to save.
        let working = took.wall - options.latency_ms / 1000.0;
        tell(&format!("limits, {told}: 60,000 requests and 21 M tokens a minute"), options.rows, took);
        report(&format!(
            "  {:.1} % of what the limit allows ({allowed:.2} s); {refused} calls answered 429 ({:.2} %)",
            100.0 * allowed / working,
            100.0 * refused as f64 / options.rows as f64
        ));
    }
    Ok(())
}

fn faults(options: &Options, binary: &Path) -> Result<()> {
    let rows = 1000;
    let source = input(options, rows)?;
    let small = options.with_in_flight(200);
    let mut outputs = Vec::new();
    for share in ["0", "0.2"] {
        let server = Loopback::start(&["--latency-ms", "300", "--faults", share])?;
        let dir = fresh(options, "faults")?;
        let mut command = client(binary, &small, &server, &source, "faults");
        command.args(["--timeout", "5", "--backoff", "0.05"]);
        let took = timed(command, &log(options, "faults"))?;
        ensure!(took.is_success, "clair-gen failed: {}", log(options, "faults").display());
        tell(&format!("faults {share}"), rows, took);
        outputs.push(texts(&dir.join("pairs.jsonl"))?);
        let stats = server.stats()?;
        report(&format!(
            "  {} good replies, {} paid again",
            stats["counts"]["kinds"]["good"], stats["paid_again"]
        ));
    }
    report(&format!("  same pairs with and without faults: {}", outputs[0] == outputs[1]));
    let Some(venv) = &options.venv else { return Ok(()) };
    for peer in &options.peers {
        let server = Loopback::start(&["--latency-ms", "300", "--faults", "0.2"])?;
        let out = fresh_file(options, peer)?;
        let took =
            timed(peer_command(venv, options, peer, &server, &source, &out, 200), &log(options, peer))?;
        let came = lines(&out);
        tell(&format!("{peer}, faults 0.2"), rows, took);
        let (success, stats) = (took.is_success, server.stats()?);
        let good = &stats["counts"]["kinds"]["good"];
        report(&format!(
            "  {came} of {rows} rows came, {good} good replies, {} paid again; success: {success}",
            stats["paid_again"]
        ));
    }
    Ok(())
}

/// Ids with their chosen texts.
fn texts(path: &Path) -> Result<Vec<(String, String)>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let row = |line: &str| -> Result<(String, String)> {
        let row: Value = serde_json::from_str(line)?;
        let of = |value: &Value| value.as_str().unwrap_or_default().to_string();
        Ok((of(&row["id"]), of(&row["chosen"][1]["content"])))
    };
    text.lines().map(row).collect()
}

fn kills(options: &Options, binary: &Path) -> Result<()> {
    let rows = 8000;
    let source = input(options, rows)?;
    let small = options.with_in_flight(100);
    let server = Loopback::start(&["--latency-ms", "200"])?;
    let dir = fresh(options, "kills")?;
    let mut draw = 12345_u64;
    for _ in 0..options.kills {
        let mut command = client(binary, &small, &server, &source, "kills");
        let mut child = command.stderr(Stdio::null()).spawn()?;
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis(20 + (draw >> 33) % 500));
        child.kill()?;
        child.wait()?;
    }
    let started = Instant::now();
    let took = timed(client(binary, &small, &server, &source, "kills"), &log(options, "kills"))?;
    ensure!(took.is_success, "clair-gen failed: {}", log(options, "kills").display());
    let ids: Vec<String> = texts(&dir.join("pairs.jsonl"))?.into_iter().map(|(id, _)| id).collect();
    let want: Vec<String> = (0..rows).map(|i| format!("r{i}")).collect();
    let again = server.stats()?["paid_again"].as_u64().unwrap_or(0);
    report(&format!(
        "kills: {} of a run of {rows} calls, 100 in flight; every row once, in order: {}; {again} calls paid again ({:.1} a kill); \
         last run {:.1} s",
        options.kills,
        ids == want,
        again as f64 / options.kills.max(1) as f64,
        started.elapsed().as_secs_f64()
    ));
    drop(server);
    let Some(venv) = &options.venv else { return Ok(()) };
    let rows = 1000;
    let source = input(options, rows)?;
    for peer in &options.peers {
        let server = Loopback::start(&["--latency-ms", "300"])?;
        let out = fresh_file(options, peer)?;
        let mut child = peer_command(venv, options, peer, &server, &source, &out, 200)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        while server.count("good")? < 500 && child.try_wait()?.is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill()?;
        child.wait()?;
        let before = server.count("good")?;
        let mut again = peer_command(venv, options, peer, &server, &source, &out, 200)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let until = Instant::now() + Duration::from_secs(90);
        while again.try_wait()?.is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
        }
        let hangs = again.try_wait()?.is_none();
        again.kill().ok();
        again.wait()?;
        let paid = server.stats()?["paid_again"].as_u64().unwrap_or(0);
        let came = lines(&out);
        report(&format!(
            "{peer}, killed after {before} of {rows}: {came} rows in the end, {paid} paid again{}",
            if hangs { "; its second run did not end within 90 s" } else { "" }
        ));
    }
    Ok(())
}

/// The same requests by the HTTP client alone.
fn floor(options: &Options, server: &Loopback) -> Result<()> {
    let log = options.dir.join("speed/replies/replies.jsonl");
    let mut plain = Command::new(example("plain")?);
    plain.arg(format!("{}/chat/completions", server.url)).arg(log).arg(options.in_flight.to_string());
    let output = plain.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let &[wall, cpu, failed] = numbers.as_slice() else {
        bail!("the HTTP client alone failed: {}", String::from_utf8_lossy(&output.stderr));
    };
    ensure!(failed == 0.0, "{failed} requests of the HTTP client alone failed");
    let per_call = 1e6 * cpu / options.rows as f64;
    report(&format!(
        "the same requests by reqwest alone, nothing kept: {wall:.2} s, {per_call:.0} µs CPU a call"
    ));
    Ok(())
}

/// A built example of the client.
fn example(name: &str) -> Result<PathBuf> {
    let built =
        cargo(&["build", "--release", "--quiet", "--package", "chat-client", "--example", name]).status();
    ensure!(built.context("cannot run cargo")?.success(), "building failed");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("release/examples").join(name))
}

fn store(options: &Options) -> Result<()> {
    let dir = options.dir.join(format!("store-{}", options.replies));
    let binary = example("store")?;
    let output = Command::new(binary).arg(options.replies.to_string()).arg(&dir).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let bytes = fs::metadata(dir.join("replies.jsonl"))?.len() as f64 / 1e9;
    report(&format!("store of {} replies ({bytes:.2} GB), seconds: {}", options.replies, text.trim()));
    Ok(())
}
