//! Client for OpenAI-compatible `/v1/chat/completions`.
//!
//! Every raw reply is stored on disk, under a key of the whole request, before anything else is done
//! with it: a request that was answered once is never sent again. Transient failures are retried with
//! backoff; how many requests are in flight is bounded. No prompt text is in this crate.

mod client;
mod error;
mod request;
mod retry;
mod store;

pub use client::{Client, Settings, Source, Stored, api_key};
pub use error::Error;
pub use request::{ChatMessage, ChatRequest, Reply, Usage};
pub use store::{ReplyStore, StoredReply};
