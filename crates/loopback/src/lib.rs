//! A local server that behaves like a hosted language model: OpenAI's chat completions (whole and streamed) and Batch
//! API, Anthropic's messages, a latency, budgets a minute with their headers, and faults of ten kinds. What it replies
//! depends on the request alone; what it did is counted.

mod batch;
mod faults;
mod limits;
mod replies;
mod serve;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use tokio::net::TcpListener;

pub use faults::Fault;

use batch::Batches;
use limits::Limits;
use replies::Line;

/// How the server behaves.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Behaviour {
    /// Mean time before a reply, in milliseconds.
    #[arg(long, default_value_t = 0.0)]
    pub latency_ms: f64,
    /// Requests a minute; 0 is without limit.
    #[arg(long, default_value_t = 0.0)]
    pub rpm: f64,
    /// Tokens a minute; 0 is without limit.
    #[arg(long, default_value_t = 0.0)]
    pub tpm: f64,
    /// Share of the requests that get a fault instead of a reply.
    #[arg(long, default_value_t = 0.0)]
    pub faults: f64,
    /// Words that are added to each reply.
    #[arg(long, default_value_t = 0)]
    pub words: usize,
    /// Lines of `{"contains": text, "reply": text}`: a request with such a text gets that reply, of the first line that
    /// fits.
    #[arg(long)]
    pub replies: Option<PathBuf>,
    /// Every request is refused for its key.
    #[arg(long)]
    pub unauthorized: bool,
    /// Every request is answered 500.
    #[arg(long)]
    pub fails: bool,
    /// Requests with a schema for the reply are refused.
    #[arg(long)]
    pub no_schema: bool,
    /// Requests with `max_tokens` are refused: the limit is `max_completion_tokens`.
    #[arg(long)]
    pub new_limit: bool,
    /// Longest time a reply that is not streamed may take, in milliseconds: then the connection is cut. 0 is without.
    #[arg(long, default_value_t = 0)]
    pub cut_after_ms: u64,
    /// Time that a batch takes, in milliseconds.
    #[arg(long, default_value_t = 200)]
    pub batch_ms: u64,
    /// A fifth of a batch's items fails at the first try.
    #[arg(long)]
    pub batch_faults: bool,
}

/// What the server did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Counts {
    /// Requests by how they were answered: `good`, or a fault's name.
    pub kinds: HashMap<String, usize>,
    /// Good replies by the hash of their request: each is paid.
    #[serde(skip)]
    pub paid: HashMap<[u8; 32], usize>,
    /// Most requests at a time.
    pub most_in_flight: usize,
    /// Connections.
    pub connections: usize,
}

impl Counts {
    /// Good replies to requests that had one before.
    pub fn paid_again(&self) -> usize {
        self.paid.values().map(|times| times - 1).sum()
    }
}

pub(crate) struct Shared {
    pub(crate) behaviour: Behaviour,
    pub(crate) counts: Mutex<Counts>,
    pub(crate) limits: Limits,
    pub(crate) script: Vec<Line>,
    pub(crate) batches: Batches,
    pub(crate) number: AtomicUsize,
    pub(crate) in_flight: AtomicUsize,
}

impl Shared {
    pub(crate) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server; it ends with the process.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Server {
    /// Starts on a port that is free, in a thread of its own.
    pub fn start(behaviour: Behaviour) -> Result<Self> {
        Self::start_at(behaviour, "127.0.0.1:0", 1)
    }

    /// Starts at an address, with so many threads.
    pub fn start_at(behaviour: Behaviour, address: &str, threads: usize) -> Result<Self> {
        let listener = std::net::TcpListener::bind(address).with_context(|| address.to_string())?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let limits = Limits::new(behaviour.rpm, behaviour.tpm);
        let script = behaviour.replies.as_deref().map(replies::script).transpose()?.unwrap_or_default();
        let shared = Arc::new(Shared {
            behaviour,
            counts: Mutex::default(),
            limits,
            script,
            batches: Batches::default(),
            number: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
        });
        let of_thread = shared.clone();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
        std::thread::spawn(move || {
            runtime.block_on(async move {
                if let Ok(listener) = TcpListener::from_std(listener) {
                    serve::accept(listener, of_thread).await;
                }
            });
        });
        Ok(Self { address, shared })
    }

    /// Base address for clients.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.shared.counts().clone()
    }

    /// Requests answered in this way.
    pub fn count(&self, kind: &str) -> usize {
        self.shared.counts().kinds.get(kind).copied().unwrap_or(0)
    }

    /// All requests.
    pub fn total(&self) -> usize {
        self.shared.counts().kinds.values().sum()
    }
}
