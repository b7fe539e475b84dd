//! The output directory before a run: may it be used, and is there something to go on from?

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::settings::{Resume, Settings};
use crate::{checkpoint, checksums, logs};

/// What a finished run leaves.
const MODELS: [&str; 2] = ["model.safetensors", "adapter_model.safetensors"];

/// The checkpoint to go on from. A broken one that is asked for by name is an error; `auto` passes over it.
pub fn resume_from(settings: &Settings, say: &dyn Fn(&str)) -> Result<Option<PathBuf>> {
    match &settings.resume {
        Resume::No => Ok(None),
        Resume::Auto => {
            let newest = checkpoint::newest(&settings.output_dir, say)?;
            let all = checkpoint::list(&settings.output_dir)?;
            if let (None, Some((_, last))) = (&newest, all.last()) {
                bail!(
                    "{}: none of the {} checkpoints can be resumed from (the last is {}): they are broken, or made with \
                     --save-only-model. Move them away, or start anew with --overwrite-output-dir in place of \
                     --resume-from-checkpoint",
                    settings.output_dir.display(),
                    all.len(),
                    last.display()
                );
            }
            Ok(newest)
        }
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
                "{}: {}, which the run starts from, is inside the output directory; choose another",
                dir.display(),
                source.display()
            );
        }
    }
    let text = fs::read_to_string(dir.join("run.json")).unwrap_or_default();
    let status = serde_json::from_str::<Value>(&text).map(|info| info["status"] == "complete");
    let complete = status.unwrap_or(false) || MODELS.iter().any(|name| dir.join(name).exists());
    let found = logs::ours(dir)?;
    let stranger =
        checkpoint::list(dir)?.into_iter().map(|(_, path)| path).find(|path| !found.contains(path));
    if let Some(stranger) = stranger.filter(|_| resume.is_none()) {
        bail!("{}: a checkpoint of another program, or a broken one; move it away", stranger.display());
    }
    // A run that was stopped before its first checkpoint begins again.
    let begun = ["run.json", "train_log.jsonl"].iter().any(|name| dir.join(name).exists());
    let replaces = settings.overwrite || (settings.resume == Resume::Auto && begun && !complete);
    if let Some(first) = found.first().filter(|_| resume.is_none() && !replaces) {
        bail!(
            "{}: holds an earlier run ({}); go on with --resume-from-checkpoint auto if it has checkpoints, replace it \
             with --overwrite-output-dir, or choose another directory",
            dir.display(),
            first.display()
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
