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

    /// For the backend that arguments of `train`, `sample` or `eval` name, or their recipe, or the environment does.
    pub fn for_arguments(args: &[String]) -> Result<Self> {
        let named = flag(args, "--backend")
            .or_else(|| in_recipe(&flag(args, "--config")?))
            .or_else(|| env::var("CLAIR_BACKEND").ok());
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

/// Value of a flag, the last one given.
fn flag(args: &[String], name: &str) -> Option<String> {
    let value = |(i, arg): (usize, &String)| match arg.strip_prefix(name) {
        Some("") => args.get(i + 1).cloned(),
        Some(value) => value.strip_prefix('=').map(String::from),
        None => None,
    };
    args.iter().enumerate().filter_map(value).next_back()
}

/// The backend that a recipe names. Only which binary to build depends on it: the binary reads the recipe itself.
fn in_recipe(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("backend:"))?;
    let value = value.split('#').next().unwrap_or_default();
    Some(value.trim().trim_matches(['"', '\'']).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_flag_counts_and_a_recipe_may_name_a_backend() {
        let args: Vec<String> = ["--backend", "wgpu", "--x", "--backend=tch"].map(String::from).to_vec();
        assert_eq!(flag(&args, "--backend").as_deref(), Some("tch"));
        assert_eq!(flag(&args[..2], "--config"), None);
        let path = env::temp_dir().join(format!("recipe-{}.yaml", std::process::id()));
        for (text, want) in [("a: 1\nbackend: 'tch' # fast\n", Some("tch")), ("x:\n  backend: tch\n", None)] {
            std::fs::write(&path, text).ok();
            assert_eq!(in_recipe(&path.display().to_string()).as_deref(), want);
        }
        std::fs::remove_file(&path).ok();
    }
}
