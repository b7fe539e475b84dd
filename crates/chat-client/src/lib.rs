//! Client for OpenAI-compatible `/v1/chat/completions` and Anthropic's `/v1/messages`.
//!
//! Every raw reply is stored on disk, under a key of the whole request, before anything else is done
//! with it: a request that was answered once is never sent again. Transient failures are retried with
//! backoff; the number of calls in flight finds its own level; budgets of requests, tokens and dollars
//! are kept. No prompt text is in this crate.

mod batch;
mod batch_api;
mod client;
mod cost;
mod endpoint;
mod error;
mod flow;
mod keys;
mod log;
mod pace;
mod provider;
mod reply;
mod request;
mod retry;
mod settings;
mod store;
mod stream;

pub use client::Client;
pub use cost::{Price, Prices};
pub use endpoint::Server;
pub use error::Error;
pub use flow::InFlight;
pub use keys::{api_key, key_file};
pub use pace::Budgets;
pub use provider::Provider;
pub use reply::{Reply, Usage};
pub use request::{ChatMessage, ChatRequest, Reasoning};
pub use settings::{Closed, Counts, Settings, Source, Stored, Streaming};
pub use store::{Found, NewReply, ReplyStore, StoredReply};
