//! What can go wrong between here and a Hub.

use std::path::PathBuf;

/// Errors of this crate. None of them holds the token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither a directory nor a Hub id.
    #[error("{0}: no such directory, and not a Hub id either (org/name)")]
    NoModel(String),
    /// The Hub cannot be reached.
    #[error(
        "{url}: not reachable after {attempts} attempts ({reason}); with HF_HUB_OFFLINE=1 only the cache is used"
    )]
    Unreachable {
        /// Address.
        url: String,
        /// Attempts made.
        attempts: usize,
        /// The last reason.
        reason: String,
    },
    /// The Hub refuses.
    #[error("{url}: {status}; {hint}")]
    Refused {
        /// Address.
        url: String,
        /// HTTP status.
        status: u16,
        /// What to do.
        hint: &'static str,
    },
    /// The Hub's answer makes no sense.
    #[error("{url}: {reason}")]
    Answer {
        /// Address.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Only the cache may be used, and it does not hold this.
    #[error("{id} at {revision} is not in the cache, and HF_HUB_OFFLINE forbids to download it")]
    Offline {
        /// Repository.
        id: String,
        /// Revision, perhaps with a file.
        revision: String,
    },
    /// The repository is not of use here.
    #[error("{id} {reason}")]
    Unusable {
        /// Repository.
        id: String,
        /// Why.
        reason: String,
    },
    /// The cache cannot be read or written.
    #[error("{path}: {source}")]
    Cache {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] pref_data::Error),
}

impl Error {
    pub(crate) fn cache(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Cache { path, source }
    }
}
