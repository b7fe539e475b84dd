//! Models and data sets by Hub id (`org/name`), downloaded once into the cache that Python's
//! `huggingface_hub` uses, and found there by it.
//!
//! Honours `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE`. An interrupted download
//! goes on where it stopped; a file appears in the cache whole, with its size and, for large files, its
//! SHA-256 checked, or not at all.

mod cache;
mod data;
mod error;
mod fetch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use pref_data::{Splits, user_cache_dir};
use serde_json::Value;

pub use data::{DataRequest, announce, columns, name_and_weight};
pub use error::Error;

use cache::Folder;

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl Kind {
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// How far a download is: file name, bytes there, bytes in all.
pub type Progress<'a> = &'a dyn Fn(&str, u64, u64);

/// Access to a Hub and its cache.
#[derive(Debug, Clone)]
pub struct Hub {
    /// Base address.
    pub endpoint: String,
    /// Sent to the Hub, and to nobody else.
    token: Option<String>,
    /// The cache directory.
    pub cache: PathBuf,
    /// Use only what is in the cache.
    pub offline: bool,
    /// Wait before the second attempt; doubled for each further one.
    pub backoff: Duration,
    agent: ureq::Agent,
}

impl Hub {
    /// From the environment, as `huggingface_hub` reads it.
    pub fn from_env() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let home = var("HF_HOME").map_or_else(|| user_cache_dir().join("huggingface"), PathBuf::from);
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let token_file = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());
        let yes = |text: String| matches!(text.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true");
        Self {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            token: token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
            cache,
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            backoff: Duration::from_secs(1),
            agent: fetch::agent(),
        }
    }

    /// The directory of a model: a local one as it is, or that of a Hub id with its configuration, tokenizer
    /// and weights.
    pub fn model(&self, name: &str, revision: Option<&str>, progress: Progress) -> Result<PathBuf, Error> {
        let local = Path::new(name);
        if local.is_dir() {
            if revision.is_some() {
                let reason = "is here, not on the Hub: --model-revision has no effect".into();
                return Err(Error::Unusable { id: name.into(), reason });
            }
            return Ok(local.into());
        }
        if !is_id(name) {
            return Err(Error::NoModel(name.into()));
        }
        let snapshot = self.snapshot(Kind::Model, name, revision)?;
        let has = |extension: &str| snapshot.files.iter().any(|f| !f.contains('/') && f.ends_with(extension));
        let weights: &[&str] =
            if has(".safetensors") { &[".safetensors"] } else { &["pytorch_model.bin", ".bin.index.json"] };
        let wanted = |file: &&String| {
            let inner = file.strip_prefix("additional_chat_templates/").unwrap_or(file);
            let small = [".json", ".jinja", "merges.txt"];
            let shard = file.starts_with("pytorch_model-") && file.ends_with(".bin") && !has(".safetensors");
            !inner.contains('/') && (shard || small.iter().chain(weights).any(|end| inner.ends_with(end)))
        };
        let files: Vec<&String> = snapshot.files.iter().filter(wanted).collect();
        if !files.iter().any(|file| *file == "config.json") {
            return Err(Error::Unusable {
                id: name.into(),
                reason: "has no config.json: it is not a model".into(),
            });
        }
        for file in files {
            self.file(&snapshot, file, progress)?;
        }
        Ok(snapshot.dir())
    }

    /// The splits of a data set: of a local path or pattern, or of a Hub id, of which the files of the wanted
    /// splits are downloaded (of all, if there are none).
    pub fn dataset(
        &self,
        name: &str,
        revision: Option<&str>,
        config: Option<&str>,
        wanted: &[&str],
        progress: Progress,
    ) -> Result<Splits, Error> {
        let local = Path::new(name);
        if local.exists() || !is_id(name) || pref_data::is_data_file(name) {
            let unusable = |flag: &str| Error::Unusable {
                id: name.into(),
                reason: format!("is here, not on the Hub: {flag} has no effect"),
            };
            if revision.is_some() {
                return Err(unusable("--dataset-revision"));
            }
            if config.is_some() && !local.is_dir() {
                return Err(unusable("--dataset-config"));
            }
            return Ok(Splits::find(local, config)?);
        }
        let snapshot = self.snapshot(Kind::Dataset, name, revision)?;
        let card = snapshot.files.iter().any(|file| file == "README.md");
        let card = card.then(|| self.file(&snapshot, "README.md", progress)).transpose()?;
        let card = card.and_then(|path| std::fs::read_to_string(path).ok());
        let unusable = |reason| Error::Unusable { id: name.into(), reason };
        let mut splits = pref_data::resolve(&snapshot.files, card.as_deref(), config).map_err(unusable)?;
        let names: Vec<String> = splits.iter().map(|(split, _)| split.clone()).collect();
        splits.retain(|(split, _)| wanted.is_empty() || wanted.contains(&split.as_str()));
        if splits.is_empty() {
            return Err(unusable(format!("has no split {wanted:?}; there are {names:?}")));
        }
        let download = |files: Vec<String>| -> Result<Vec<PathBuf>, Error> {
            files.iter().map(|file| self.file(&snapshot, file, progress)).collect()
        };
        let splits = splits.into_iter().map(|(split, files)| Ok((split, download(files)?)));
        Ok(Splits { path: name.into(), splits: splits.collect::<Result<_, Error>>()? })
    }

    /// The files of a repository at a revision, from the Hub, or from the cache when offline or unreachable.
    fn snapshot(&self, kind: Kind, id: &str, revision: Option<&str>) -> Result<Snapshot, Error> {
        let folder = Folder::new(&self.cache, kind, id);
        let revision = revision.unwrap_or("main");
        let cached = || {
            let commit = folder.commit(revision)?;
            let files = folder.listing(&commit).unwrap_or_else(|| folder.files(&commit));
            (!files.is_empty()).then(|| Snapshot {
                kind,
                id: id.into(),
                folder: folder.clone(),
                commit,
                files,
            })
        };
        if self.offline {
            return cached().ok_or_else(|| Error::Offline { id: id.into(), revision: revision.into() });
        }
        let path = format!("api/{}/{id}/revision/{}", kind.plural(), revision.replace('/', "%2F"));
        let info = match self.json(&path) {
            Ok(info) => info,
            // What was downloaded before stays usable without a network.
            Err(error @ Error::Unreachable { .. }) => return cached().ok_or(error),
            Err(error) => return Err(error),
        };
        let unexpected =
            |what: &str| Error::Unusable { id: id.into(), reason: format!("the Hub's answer has no {what}") };
        let commit = info["sha"].as_str().ok_or_else(|| unexpected("commit"))?;
        let listed = info["siblings"].as_array().ok_or_else(|| unexpected("files"))?;
        let files: Vec<String> = listed
            .iter()
            .filter_map(|entry| entry["rfilename"].as_str())
            .filter(|file| is_inside(file))
            .map(str::to_owned)
            .collect();
        if !commit.bytes().all(|b| b.is_ascii_alphanumeric()) || commit.is_empty() {
            return Err(unexpected("usable commit"));
        }
        folder.list(commit, &files)?;
        folder.remember(revision, commit)?;
        Ok(Snapshot { kind, id: id.into(), folder, commit: commit.into(), files })
    }

    fn json(&self, path: &str) -> Result<Value, Error> {
        let url = format!("{}/{path}", self.endpoint.trim_end_matches('/'));
        let text = self.text(&url)?;
        serde_json::from_str(&text).map_err(|e| Error::Answer { url, reason: format!("not JSON: {e}") })
    }

    /// Path of a file in the cache, downloaded if it is not there.
    fn file(&self, snapshot: &Snapshot, file: &str, progress: Progress) -> Result<PathBuf, Error> {
        let path = snapshot.dir().join(file);
        if path.is_file() {
            return Ok(path);
        }
        if self.offline {
            return Err(Error::Offline {
                id: snapshot.id.clone(),
                revision: format!("{} ({file})", snapshot.commit),
            });
        }
        let prefix = if snapshot.kind == Kind::Dataset { "datasets/" } else { "" };
        let name: Vec<String> = file.split('/').map(percent_encoded).collect();
        let (id, commit) = (&snapshot.id, &snapshot.commit);
        let base = self.endpoint.trim_end_matches('/');
        let url = format!("{base}/{prefix}{id}/resolve/{commit}/{}", name.join("/"));
        let blob = self.download(&url, &snapshot.folder, &|done, all| progress(file, done, all))?;
        snapshot.folder.link(&snapshot.commit, file, &blob)?;
        Ok(path)
    }
}

/// A repository at one commit.
#[derive(Debug)]
struct Snapshot {
    kind: Kind,
    id: String,
    folder: Folder,
    commit: String,
    files: Vec<String>,
}

impl Snapshot {
    fn dir(&self) -> PathBuf {
        self.folder.snapshot(&self.commit)
    }
}

/// `org/name`, as the Hub allows them.
fn is_id(name: &str) -> bool {
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    name.split_once('/').is_some_and(|(organisation, name)| word(organisation) && word(name))
}

/// A file name from the Hub must stay inside its directory.
fn is_inside(file: &str) -> bool {
    !file.is_empty()
        && !file.contains(['\\', '\n', '\r'])
        && file.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn percent_encoded(part: &str) -> String {
    part.bytes()
        .map(|b| match b {
            b if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        assert!(is_id("ContextualAI/ultrafeedback_clair_32k"));
        for path in ["gpt2", "./gpt2", "a/b/c", "/abs", "pairs.jsonl", "data/*.jsonl", "..", "a/../b", ""] {
            assert!(!is_id(path), "{path}");
        }
    }

    #[test]
    fn names_that_lead_outside_are_not_taken() {
        assert!(is_inside("data/train-00000-of-00001.parquet"));
        for name in ["../x", "/etc/passwd", "a//b", "a/./b", "a\\b", ""] {
            assert!(!is_inside(name), "{name}");
        }
    }

    #[test]
    fn only_the_hubs_own_addresses_get_the_token() {
        let mut hub = Hub::from_env();
        hub.endpoint = "https://hub.example/".into();
        assert!(hub.is_own("https://hub.example/api/models/a/b"));
        for other in [
            "https://hub.example.evil.com/x",
            "https://hub.example@evil.com/",
            "http://hub.example/",
            "https://hub.example:81/x",
        ] {
            assert!(!hub.is_own(other), "{other}");
        }
    }
}
