//! What a client is told, and what it tells.

use std::collections::HashMap;
use std::time::Duration;

use secrecy::SecretString;

use crate::cost::Price;
use crate::endpoint::Server;
use crate::flow::InFlight;
use crate::pace::Budgets;
use crate::{Reply, Usage};

/// When replies are streamed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Streaming {
    /// Never.
    Never,
    /// From the moment on when something cut off a long request.
    #[default]
    Auto,
    /// Always.
    Always,
}

/// How to reach the servers.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where requests go: to the one with the least to do for its weight.
    pub servers: Vec<Server>,
    /// Requests at a time, of each server.
    pub in_flight: InFlight,
    /// Budgets a minute, of each server.
    pub budgets: Budgets,
    /// Attempts after the first.
    pub retries: u32,
    /// Longest time for one attempt.
    pub timeout: Duration,
    /// Longest time for a request with all its attempts.
    pub deadline: Duration,
    /// Wait before the second attempt; doubles from there.
    pub backoff: Duration,
    /// When replies are streamed.
    pub streaming: Streaming,
    /// Largest reply that is read.
    pub max_body: usize,
    /// What tokens of each model that is asked cost; none where it is not known of all.
    pub prices: HashMap<String, Price>,
    /// Dollars that may be spent.
    pub max_cost: Option<f64>,
}

impl Settings {
    /// One server and the usual limits.
    pub fn to(endpoint: &str, key: Option<SecretString>) -> Self {
        Self {
            servers: vec![Server { url: endpoint.into(), weight: 1.0, key }],
            in_flight: InFlight::default(),
            budgets: Budgets::default(),
            retries: 8,
            timeout: Duration::from_mins(10),
            deadline: Duration::from_hours(6),
            backoff: Duration::from_millis(500),
            streaming: Streaming::Auto,
            max_body: 64 << 20,
            prices: HashMap::new(),
            max_cost: None,
        }
    }
}

/// Where a reply came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Stored by an earlier request.
    Store,
    /// The server, now.
    Server,
}

/// A reply with its history.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The reply.
    pub reply: Reply,
    /// Where it came from.
    pub source: Source,
    /// Milliseconds the successful attempt took.
    pub latency_ms: u64,
    /// Attempts it took.
    pub attempts: u32,
}

/// What a client has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    /// Calls in flight now.
    pub in_flight: usize,
    /// Calls that may be in flight now.
    pub limit: usize,
    /// Attempts made.
    pub attempts: u64,
    /// Attempts answered 429.
    pub refused: u64,
    /// Tokens of the replies that came now.
    pub usage: Usage,
    /// Dollars spent now; `None` where no price is known.
    pub spent: Option<f64>,
}

/// Why nothing is started any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Closed {
    /// It is open.
    No,
    /// The user stopped it.
    Stopped,
    /// The next call would have passed the most that may be spent.
    Cost,
}
