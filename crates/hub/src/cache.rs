//! The cache directory as `huggingface_hub` lays it out: `blobs` by content, `snapshots/COMMIT` with links to
//! them, `refs/REVISION` with the commit.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use pref_data::write_atomic;

use crate::{Error, Kind};

/// One repository's folder.
#[derive(Debug, Clone)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub fn new(cache: &Path, kind: Kind, id: &str) -> Self {
        Self(cache.join(format!("{}--{}", kind.plural(), id.replace('/', "--"))))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.0.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.0.join("blobs").join(etag)
    }

    pub fn lock(&self, etag: &str) -> PathBuf {
        self.0.join(".locks").join(format!("{etag}.lock"))
    }

    /// Names of all files of a commit, as the Hub listed them; `None` where nobody wrote them down.
    pub fn listing(&self, commit: &str) -> Option<Vec<String>> {
        let text = fs::read_to_string(self.0.join("listings").join(commit)).ok()?;
        Some(text.lines().map(str::to_owned).collect())
    }

    /// Writes the names of all files of a commit down: what is there may be a part of them.
    pub fn list(&self, commit: &str, files: &[String]) -> Result<(), Error> {
        let path = self.0.join("listings").join(commit);
        if path.exists() {
            return Ok(());
        }
        create_parent(&path)?;
        let text = files.join("\n");
        Ok(write_atomic(&path, |out| out.write_all(text.as_bytes()))?)
    }

    /// The commit of a revision: remembered, or itself where its files are there.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let remembered = fs::read_to_string(self.0.join("refs").join(revision)).ok();
        let itself = || self.snapshot(revision).is_dir().then(|| revision.to_string());
        remembered.map(|commit| commit.trim().to_string()).or_else(itself)
    }

    pub fn remember(&self, revision: &str, commit: &str) -> Result<(), Error> {
        let path = self.0.join("refs").join(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        create_parent(&path)?;
        Ok(write_atomic(&path, |out| out.write_all(commit.as_bytes()))?)
    }

    /// Files of a commit that are there.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let mut files = Vec::new();
        walk(&self.snapshot(commit), "", &mut files);
        files.sort_unstable();
        files
    }

    /// Puts a downloaded blob into a commit's directory: a relative link, or a copy where there are no links.
    pub fn link(&self, commit: &str, file: &str, blob: &Path) -> Result<(), Error> {
        let path = self.snapshot(commit).join(file);
        create_parent(&path)?;
        let up = "../".repeat(file.matches('/').count() + 2);
        let target = format!("{up}blobs/{}", blob.file_name().unwrap_or_default().to_string_lossy());
        // Made beside its place and renamed: another process finds the old link or the new one, never none.
        let number = LINKS.fetch_add(1, Ordering::Relaxed);
        let beside = path.with_file_name(format!(".link-{}-{number}", std::process::id()));
        link(&target, blob, &beside).and_then(|()| fs::rename(&beside, &path)).map_err(Error::cache(&path))
    }
}

/// Links made so far, for names of their own.
static LINKS: AtomicUsize = AtomicUsize::new(0);

#[cfg(unix)]
fn link(target: &str, _: &Path, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(not(unix))]
fn link(_: &str, blob: &Path, path: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, path).or_else(|_| fs::copy(blob, path).map(|_| ()))
}

pub(crate) fn create_parent(path: &Path) -> Result<(), Error> {
    match path.parent() {
        Some(dir) => fs::create_dir_all(dir).map_err(Error::cache(dir)),
        None => Ok(()),
    }
}

fn walk(dir: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let path = entry.path();
        if path.is_dir() {
            walk(&path, &format!("{name}/"), files);
        } else if path.is_file() {
            files.push(name);
        }
    }
}
