//! Checks that no compiler makes.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::root;

/// Longest source file.
const MAX_LINES: usize = 450;
/// Largest file in the repository, in bytes.
const MAX_BYTES: u64 = 4_000_000;

/// Every source file is short, no file is large, and nothing is left unfinished.
pub fn check() -> Result<()> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .context("cannot run git")?;
    if !output.status.success() {
        bail!("git ls-files failed");
    }
    let mut problems = Vec::new();
    for name in String::from_utf8_lossy(&output.stdout).split('\0').filter(|name| !name.is_empty()) {
        let path = root().join(name);
        let Ok(meta) = fs::metadata(&path) else { continue };
        if meta.len() > MAX_BYTES {
            problems.push(format!("{name}: {} bytes", meta.len()));
        }
        if !name.ends_with(".rs") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| name.to_string())?;
        let lines = text.lines().count();
        if lines > MAX_LINES {
            problems.push(format!("{name}: {lines} lines, at most {MAX_LINES}"));
        }
        if !text.starts_with("//!") && !name.ends_with("lib.rs") {
            problems.push(format!("{name}: does not start with a module comment (//!)"));
        }
        for word in [
            concat!("todo", "!("),
            concat!("unimplemented", "!("),
            concat!("#[", "ignore"),
            concat!("FIX", "ME"),
        ] {
            if text.contains(word) {
                problems.push(format!("{name}: holds {word}"));
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { bail!("{}", problems.join("\n")) }
}
