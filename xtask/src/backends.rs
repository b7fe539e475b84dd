//! How binaries with a backend are built: cargo features, a target directory of their own, environment.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::cargo::root;
use crate::libtorch::LibTorch;

/// Names that `--backend` takes.
const NAMES: [&str; 5] = ["flex", "tch", "cuda", "wgpu", "cubecl-cuda"];

/// One build: changing the features of a dependency would build everything again, so each has its own directory.
pub struct Build {
    /// Cargo features of the crates, besides their defaults.
    features: Vec<&'static str>,
    /// Target directory.
    pub target: PathBuf,
    /// With nothing but the default backend.
    pub is_default: bool,
    /// Environment of cargo and of what it runs.
    pub environment: Vec<(&'static str, OsString)>,
}

impl Build {
    /// For these backends together.
    pub fn of(backends: &[&str]) -> Result<Self> {
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
        let mut build = Self { features: Vec::new(), target, is_default: true, environment: Vec::new() };
        let mut names: Vec<&str> = backends.iter().copied().filter(|&name| name != "flex").collect();
        names.sort_unstable();
        names.dedup();
        for &name in &names {
            let feature = match name {
                "tch" | "cuda" => "tch",
                "wgpu" => "wgpu",
                "cubecl-cuda" => "cubecl-cuda",
                other => bail!("--backend {other}: expected one of {}", NAMES.join(", ")),
            };
            if feature == "tch" && build.environment.is_empty() {
                build.environment = LibTorch::find(names.contains(&"cuda"))?.environment();
            }
            build.features.push(feature);
        }
        build.features.dedup();
        if !names.is_empty() {
            build.target.push(names.join("-"));
            build.is_default = false;
        }
        Ok(build)
    }

    /// For the backend that arguments of `train`, `sample` or `eval` name, or the environment does.
    pub fn for_arguments(args: &[String]) -> Result<Self> {
        let mut named = env::var("CLAIR_BACKEND").ok();
        for (i, arg) in args.iter().enumerate() {
            match arg.strip_prefix("--backend") {
                Some("") => named = args.get(i + 1).cloned().or(named),
                Some(value) if value.starts_with('=') => named = Some(value[1..].to_string()),
                _ => {}
            }
        }
        match named.as_deref() {
            // What is no backend the binary itself refuses, with the others' names.
            Some(name) if NAMES.contains(&name) => Self::of(&[name]),
            _ => Self::of(&[]),
        }
    }

    /// The features as cargo takes them, for each of these packages.
    pub fn feature_flags(&self, packages: &[&str]) -> Vec<String> {
        let mut all = Vec::new();
        for package in packages {
            all.extend(self.features.iter().map(|feature| format!("{package}/{feature}")));
        }
        if all.is_empty() { Vec::new() } else { vec!["--features".into(), all.join(",")] }
    }
}
