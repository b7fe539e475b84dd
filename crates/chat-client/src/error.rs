//! Errors of requests and of the reply store. No message holds a key.

use std::path::PathBuf;
use std::time::Duration;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The endpoint is not a usable URL.
    #[error("endpoint {url:?}: {reason}; expected something like https://api.openai.com/v1")]
    Endpoint {
        /// As given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The server refused the request; sending it again would not help.
    #[error("{url} answered {status}: {body}")]
    Refused {
        /// Where it was sent.
        url: String,
        /// HTTP status.
        status: u16,
        /// Start of the reply's body.
        body: String,
    },
    /// All attempts failed.
    #[error("{url}: gave up after {attempts} attempts in {:.1} s; last: {last}", elapsed.as_secs_f64())]
    GaveUp {
        /// Where it was sent.
        url: String,
        /// Attempts made.
        attempts: u32,
        /// Time from the first to the last.
        elapsed: Duration,
        /// The last failure.
        last: String,
        /// No attempt reached the server at all.
        unreachable: bool,
    },
    /// The environment variable that should hold the key does not.
    #[error("the environment variable {0} (--api-key-env) is not set")]
    Key(String),
    /// The file that should hold the key does not.
    #[error("{path}: {reason}")]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The most that may be spent is given, but what tokens cost is not known.
    #[error("a cost limit needs the model's price: give --price-input and --price-output, or --prices FILE")]
    NoPrice,
    /// A batch could not be made or read.
    #[error("batch {id}: {reason}")]
    Batch {
        /// Its id, or the address that was asked.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// The HTTP client could not be set up.
    #[error("cannot set up the HTTP client: {0}")]
    Setup(String),
    /// The reply store cannot be read or written.
    #[error("reply store {path}: {reason}")]
    Store {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// True when every other request of the run would fail in the same way: wrong key, wrong address.
    pub fn is_setup(&self) -> bool {
        match self {
            Self::Refused { status, .. } => matches!(status, 300..=399 | 401 | 402 | 403 | 404 | 429),
            Self::GaveUp { unreachable, .. } => *unreachable,
            _ => true,
        }
    }

    /// Attempts made before this error.
    pub fn attempts(&self) -> u32 {
        match self {
            Self::GaveUp { attempts, .. } => *attempts,
            Self::Refused { .. } => 1,
            _ => 0,
        }
    }
}
