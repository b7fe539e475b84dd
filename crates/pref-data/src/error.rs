//! What can be wrong with data, tokenizers and templates.

use std::path::PathBuf;

/// Errors of this crate.
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
    /// A record is malformed.
    #[error("{path}:{line}: {reason}")]
    Record {
        /// The file.
        path: PathBuf,
        /// Line (JSON Lines) or element number (JSON array), from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A data set path does not lead to data.
    #[error("{path}: {reason}")]
    Dataset {
        /// The path given.
        path: PathBuf,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// `tokenizer.json` or its configuration cannot be used.
    #[error("{path}: {reason}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A chat template failed.
    #[error("chat template: {0}")]
    Template(String),
    /// A record cannot be tokenized.
    #[error("record {record}")]
    Tokenize {
        /// Its id, or its place in the file.
        record: String,
        /// What is wrong.
        source: Box<Error>,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
