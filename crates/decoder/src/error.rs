//! What can be wrong with a model directory.

use std::path::PathBuf;

/// Errors of loading and saving models.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not parse.
    #[error("{path}: not valid JSON")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said, with line and column.
        source: serde_json::Error,
    },
    /// `config.json` asks for something that is not implemented, or lacks a key.
    #[error("{path}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Which key, and what is wrong with it.
        reason: String,
    },
    /// A safetensors file is cut off or malformed.
    #[error("{path}: not a whole safetensors file ({reason}); download or copy it again")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// Weights are missing, unexpected, or of another shape than the configuration says.
    #[error("{path}: {reason}")]
    Weights {
        /// The model directory.
        path: PathBuf,
        /// Names and shapes.
        reason: String,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
