//! `check report`: the page of a run in a real browser, paged through by clicks.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cargo::{must, root};
use crate::report;

/// Clicks through all pairs, forwards and once back, and writes down what stands on the page.
const SCRIPT: &str = r#"<script>
const shown = id => [...by(id).childNodes].map(node => node.textContent).join("");
const marks = (id, tag) => [...by(id).querySelectorAll(tag)];
const colour = nodes => nodes.length ? getComputedStyle(nodes[0]).backgroundColor : null;
const seen = pairs.map(() => {
  const [del, ins] = [marks("rejected", "del"), marks("chosen", "ins")];
  const page = {
    where: by("where").textContent, rejected: shown("rejected"), chosen: shown("chosen"),
    del: del.length, ins: ins.length, colours: [colour(del), colour(ins)],
  };
  by("next").click();
  return page;
});
const around = by("where").textContent;
by("back").click();
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify({ seen, around, back: by("where").textContent, charts: document.querySelectorAll("svg rect").length });
document.body.append(result);
</script>"#;

pub fn run(args: &[String]) -> Result<ExitCode> {
    let browser = match args {
        [] => "chromium".to_string(),
        [flag, browser] if flag == "--chromium" => browser.clone(),
        _ => bail!("usage: cargo xtask check report [--chromium BINARY]"),
    };
    let dir = env::temp_dir().join(format!("check-report-{}", std::process::id()));
    let data = |name: &str| root().join("datasets/demo").join(name).display().to_string();
    let out = dir.join("pairs").display().to_string();
    let flags = ["--input", &data("answers.jsonl"), "--replay", &data("replies.jsonl"), "--out", &out];
    must("clair-gen", &flags.map(String::from))?;
    let page = fs::read_to_string(dir.join("pairs/report.html"))?;
    ensure!(!page.contains("http://") && !page.contains("https://"), "the page names another host");
    let probed = dir.join("probed.html");
    fs::write(&probed, page.replace("</body>", &format!("{SCRIPT}</body>")))?;
    let result = in_browser(&browser, &probed, &[])?;
    check(&result, &dir.join("pairs/pairs.jsonl"))?;
    fs::remove_dir_all(&dir).ok();
    Ok(ExitCode::SUCCESS)
}

/// What the script of a page leaves in its element `result`.
pub fn in_browser(browser: &str, page: &Path, flags: &[&str]) -> Result<Value> {
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
        .args(flags)
        .arg(format!("file://{}", page.display()))
        .output()
        .with_context(|| format!("cannot run {browser} (Debian: apt-get install chromium)"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.split(r#"<pre id="result">"#).nth(1).and_then(|rest| rest.split("</pre>").next());
    let json = json.with_context(|| {
        format!("the page's script did not end: {}", String::from_utf8_lossy(&output.stderr))
    })?;
    let plain =
        json.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u{a0}").replace("&amp;", "&");
    Ok(serde_json::from_str(&plain)?)
}

fn check(result: &Value, pairs: &Path) -> Result<()> {
    let text = fs::read_to_string(pairs)?;
    let rows: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let seen = result["seen"].as_array().context("no pages")?;
    ensure!(seen.len() == rows.len() && !rows.is_empty(), "{} pages for {} pairs", seen.len(), rows.len());
    for (i, (page, row)) in seen.iter().zip(&rows).enumerate() {
        let place = format!("{} of {} shown", i + 1, rows.len());
        ensure!(page["where"] == place, "page {i}: {}", page["where"]);
        for side in ["chosen", "rejected"] {
            let messages = row[side].as_array().context("messages")?;
            let want = &messages.last().context("messages")?["content"];
            ensure!(page[side] == *want, "page {i}: {side} is {} and not {want}", page[side]);
        }
        let marked = page["del"].as_u64().unwrap_or(0) + page["ins"].as_u64().unwrap_or(0);
        ensure!(marked > 0, "page {i}: nothing is highlighted");
        let colours = page["colours"].as_array().context("colours")?;
        let is_plain = |colour: &&Value| colour.as_str() == Some("rgba(0, 0, 0, 0)");
        ensure!(!colours.iter().any(|colour| is_plain(&colour)), "page {i}: marks have no colour");
    }
    let (first, last) = (format!("1 of {} shown", rows.len()), format!("{0} of {0} shown", rows.len()));
    ensure!(result["around"] == first && result["back"] == last, "paging does not go around: {result}");
    ensure!(result["charts"].as_u64().unwrap_or(0) >= 24, "no charts");
    report(&format!("{} pairs paged through by clicks: texts and marks are those of the set", rows.len()));
    Ok(())
}
