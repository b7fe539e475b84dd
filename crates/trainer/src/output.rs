//! The output directory before a run: may it be used, and is there something to go on from?

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::settings::{Resume, Settings};
use crate::{checkpoint, checksums};

/// What a finished run leaves.
const MODELS: [&str; 2] = ["model.safetensors", "adapter_model.safetensors"];

/// The checkpoint to go on from. A broken one that is asked for by name is an error; `auto` passes over it.
pub fn resume_from(settings: &Settings, say: &dyn Fn(&str)) -> Result<Option<PathBuf>> {
    match &settings.resume {
        Resume::No => Ok(None),
        Resume::Auto => checkpoint::newest(&settings.output_dir, say),
        Resume::From(path) => {
            if !path.is_dir() {
                bail!("--resume-from-checkpoint {}: not a directory", path.display());
            }
            checksums::verify(path)?;
            Ok(Some(path.clone()))
        }
    }
}

/// Checks that the output directory can be used, and touches nothing in it.
pub fn check(settings: &Settings, sources: &[&Path], resume: Option<&Path>) -> Result<()> {
    let dir = &settings.output_dir;
    let context = || format!("{}: cannot create the output directory", dir.display());
    fs::create_dir_all(dir).with_context(context)?;
    for source in sources {
        if is_inside(source, dir) {
            bail!(
                "{}: the model {} is inside the output directory; choose another",
                dir.display(),
                source.display()
            );
        }
    }
    let text = fs::read_to_string(dir.join("run.json")).unwrap_or_default();
    let status = serde_json::from_str::<Value>(&text).map(|info| info["status"] == "complete");
    let complete = status.unwrap_or(false) || MODELS.iter().any(|name| dir.join(name).exists());
    let used = complete || dir.join("train_log.jsonl").exists() || dir.join("config.json").exists();
    if resume.is_none() && !settings.overwrite && (complete || (used && settings.resume == Resume::No)) {
        bail!(
            "{}: holds an earlier run; go on with --resume-from-checkpoint auto if it has checkpoints, replace it \
             with --overwrite-output-dir, or choose another directory",
            dir.display()
        );
    }
    let probe = dir.join(".writable.tmp");
    fs::write(&probe, b"")
        .with_context(|| format!("{}: cannot write into the output directory", dir.display()))?;
    fs::remove_file(&probe).ok();
    Ok(())
}

fn is_inside(path: &Path, dir: &Path) -> bool {
    matches!((path.canonicalize(), dir.canonicalize()), (Ok(path), Ok(dir)) if path.starts_with(&dir))
}
