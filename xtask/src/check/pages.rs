//! `check pages`: reports of `eval` in a real browser: on a telephone, in the dark, on paper, and every part opened.
//! Without pages one of every kind is made.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

use super::made;
use super::report::in_browser;
use crate::report;

/// Opens every part, and writes down what can be measured.
const SCRIPT: &str = r#"<script>
document.querySelectorAll("details").forEach(part => part.querySelector("summary").click());
const shown = node => node.getBoundingClientRect().height > 0;
const beyond = [...document.querySelectorAll("body *")].filter(node =>
  !node.closest(".wide") && node.getBoundingClientRect().right > innerWidth + 1);
const found = {
  width: innerWidth, overflow: document.documentElement.scrollWidth, beyond: beyond.slice(0, 3).map(node => node.outerHTML.slice(0, 80)),
  headings: [...document.querySelectorAll("h1, h2")].map(node => node.textContent),
  pictures: document.querySelectorAll("svg").length,
  opened: [...document.querySelectorAll("details")].every(part => part.open && shown(part.querySelector("pre, table"))),
  parts: document.querySelectorAll("details").length,
  ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
  hosts: performance.getEntriesByType("resource").length,
};
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(found);
document.body.append(result);
</script>"#;

pub fn run(args: &[String]) -> Result<ExitCode> {
    let (mut browser, mut shots, mut pages) = ("chromium".to_string(), None, Vec::new());
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let mut value = || rest.next().cloned().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--chromium" => browser = value()?,
            "--shots" => shots = Some(PathBuf::from(value()?)),
            flag if flag.starts_with("--") => bail!("unknown flag {flag}"),
            page => pages.push(fs::canonicalize(page).with_context(|| page.to_string())?),
        }
    }
    let dir = env::temp_dir().join(format!("check-pages-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    if pages.is_empty() {
        pages = made::pages(&dir)?;
    }
    for page in &pages {
        check(&browser, page, &dir)?;
        print(&browser, page, &dir)?;
        if let Some(shots) = &shots {
            shoot(&browser, page, shots)?;
        }
    }
    fs::remove_dir_all(&dir).ok();
    Ok(ExitCode::SUCCESS)
}

fn check(browser: &str, page: &Path, dir: &Path) -> Result<()> {
    let html = fs::read_to_string(page)?;
    ensure!(
        !html.contains("src=") && !html.contains("@import"),
        "{}: takes something from elsewhere",
        page.display()
    );
    let probed = dir.join("probed.html");
    fs::write(&probed, html.replace("</body>", &format!("{SCRIPT}</body>")))?;
    let at = |flags: &[&str]| in_browser(browser, &probed, flags);
    let telephone = at(&["--window-size=500,900"])?;
    let dark = at(&["--window-size=1200,900", "--blink-settings=preferredColorScheme=0"])?;
    let light = at(&["--window-size=1200,900", "--blink-settings=preferredColorScheme=1"])?;
    let name = page.display();
    for (what, seen) in [("telephone", &telephone), ("dark", &dark), ("light", &light)] {
        ensure!(
            seen["beyond"].as_array().is_some_and(Vec::is_empty),
            "{name}, {what}: wider than the screen: {seen}"
        );
        ensure!(seen["opened"] == true, "{name}, {what}: a part does not open");
        ensure!(seen["headings"].as_array().is_some_and(|all| !all.is_empty()), "{name}: no headings");
        ensure!(seen["hosts"] == 0, "{name}: loads something: {seen}");
    }
    ensure!(
        dark["ink"] == light["paper"] || dark["paper"] != light["paper"],
        "{name}: the dark is not dark: {dark}"
    );
    report(&format!(
        "{name}: {} pictures, {} parts opened; fits a telephone, has a dark side",
        light["pictures"], light["parts"]
    ));
    Ok(())
}

fn print(browser: &str, page: &Path, dir: &Path) -> Result<()> {
    let pdf = dir.join("page.pdf");
    headless(browser, page, &[&format!("--print-to-pdf={}", pdf.display())])?;
    let bytes = fs::read(&pdf).with_context(|| format!("{}: was not printed", page.display()))?;
    ensure!(bytes.starts_with(b"%PDF") && bytes.len() > 5_000, "{}: the print is empty", page.display());
    Ok(())
}

fn shoot(browser: &str, page: &Path, shots: &Path) -> Result<()> {
    fs::create_dir_all(shots)?;
    let run =
        page.parent().and_then(Path::file_name).map_or_else(|| "page".into(), |name| name.to_string_lossy());
    let shot = shots.join(format!("{run}.png"));
    headless(
        browser,
        page,
        &["--window-size=1000,1150", "--hide-scrollbars", &format!("--screenshot={}", shot.display())],
    )?;
    report(&shot.display().to_string());
    Ok(())
}

fn headless(browser: &str, page: &Path, flags: &[&str]) -> Result<()> {
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu"])
        .args(flags)
        .arg(format!("file://{}", page.display()))
        .output()
        .with_context(|| format!("cannot run {browser} (Debian: apt-get install chromium)"))?;
    ensure!(output.status.success(), "{browser}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
