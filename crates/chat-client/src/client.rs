//! Sending requests: bounded, retried, stored.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::RETRY_AFTER;
use reqwest::redirect::Policy;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{Notify, OnceCell, Semaphore};

use crate::retry::{delay, is_transient, retry_after};
use crate::store::{ReplyStore, StoredReply};
use crate::{ChatRequest, Error, Reply};

/// Largest reply that is read.
const MAX_BODY: usize = 64 << 20;

/// How to reach a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Base URL (`…/v1`) or the whole `…/chat/completions`.
    pub endpoint: String,
    /// Sent as a bearer token.
    pub api_key: Option<SecretString>,
    /// Requests at a time.
    pub max_in_flight: usize,
    /// Attempts after the first.
    pub retries: u32,
    /// Longest time for one attempt.
    pub timeout: Duration,
    /// Wait before the second attempt; doubles from there.
    pub backoff: Duration,
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

/// A client of one endpoint with its reply store.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    settings: Settings,
    store: ReplyStore,
    permits: Semaphore,
    closed: AtomicBool,
    closing: Notify,
    same: Mutex<HashMap<String, Arc<OnceCell<Stored>>>>,
}

/// One failed attempt.
struct Failure {
    reason: String,
    asked: Option<Duration>,
    reached: bool,
    fatal: Option<u16>,
}

impl Client {
    /// Sets up the HTTP client. A TLS provider must have been installed before.
    pub fn new(settings: Settings, store: ReplyStore) -> Result<Self, Error> {
        let url = completions_url(&settings.endpoint)?;
        let http = reqwest::Client::builder()
            .timeout(settings.timeout)
            .connect_timeout(Duration::from_secs(15).min(settings.timeout))
            .pool_max_idle_per_host(settings.max_in_flight)
            // The key must not travel to wherever a redirect points.
            .redirect(Policy::none())
            .user_agent(concat!("chat-client/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| Error::Setup(e.to_string()))?;
        let permits = Semaphore::new(settings.max_in_flight.clamp(1, Semaphore::MAX_PERMITS));
        Ok(Self {
            http,
            url,
            settings,
            store,
            permits,
            closed: AtomicBool::new(false),
            closing: Notify::new(),
            same: Mutex::default(),
        })
    }

    /// The stored replies.
    pub fn store(&self) -> &ReplyStore {
        &self.store
    }

    /// No request is started after this; those in flight finish.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.permits.close();
        self.closing.notify_waiters();
    }

    /// True after [`Client::close`].
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// The stored reply, or the server's. `None` when the client was closed before the request started.
    /// Requests that are the same are sent once.
    pub async fn complete(&self, request: &ChatRequest) -> Result<Option<Stored>, Error> {
        let key = request.key();
        if let Some(found) = self.stored(&key)? {
            return Ok(Some(found));
        }
        let cell = {
            let mut same = self.same.lock().unwrap_or_else(PoisonError::into_inner);
            same.entry(key.clone()).or_default().clone()
        };
        let result = cell
            .get_or_try_init(|| async {
                let Ok(_permit) = self.permits.acquire().await else { return Err(None) };
                self.request(&key, request).await
            })
            .await;
        self.same.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        match result {
            Ok(stored) => Ok(Some(stored.clone())),
            Err(None) => Ok(None),
            Err(Some(error)) => Err(error),
        }
    }

    fn stored(&self, key: &str) -> Result<Option<Stored>, Error> {
        Ok(self.store.get(key)?.map(|stored| Stored {
            reply: Reply(stored.reply),
            source: Source::Store,
            latency_ms: stored.latency_ms,
            attempts: stored.attempts,
        }))
    }

    /// `Err(None)` when the client was closed while waiting for another attempt.
    async fn request(&self, key: &str, request: &ChatRequest) -> Result<Stored, Option<Error>> {
        let body = request.body();
        let started = Instant::now();
        let mut reached = false;
        for attempt in 1.. {
            let sent = Instant::now();
            let failure = match self.attempt(&body).await {
                Ok(reply) => {
                    let latency_ms = sent.elapsed().as_millis() as u64;
                    let line = StoredReply {
                        key: key.into(),
                        request: body,
                        reply: reply.0.clone(),
                        latency_ms,
                        attempts: attempt,
                    };
                    self.store.put(line).await.map_err(Some)?;
                    return Ok(Stored { reply, source: Source::Server, latency_ms, attempts: attempt });
                }
                Err(failure) => failure,
            };
            reached |= failure.reached;
            tracing::debug!(attempt, reason = failure.reason, "attempt failed");
            if let Some(status) = failure.fatal {
                return Err(Some(Error::Refused { url: self.url.clone(), status, body: failure.reason }));
            }
            if attempt > self.settings.retries {
                return Err(Some(Error::GaveUp {
                    url: self.url.clone(),
                    attempts: attempt,
                    elapsed: started.elapsed(),
                    last: failure.reason,
                    unreachable: !reached,
                }));
            }
            let pause = tokio::time::sleep(delay(attempt, self.settings.backoff, failure.asked));
            tokio::select! {
                () = pause => {}
                () = self.closing.notified() => {}
            }
            if self.is_closed() {
                return Err(None);
            }
        }
        unreachable!("the loop ends by returning")
    }

    async fn attempt(&self, body: &serde_json::Value) -> Result<Reply, Failure> {
        let mut request = self.http.post(&self.url).json(body);
        if let Some(key) = &self.settings.api_key {
            request = request.bearer_auth(key.expose_secret());
        }
        let lost = |e: &reqwest::Error| {
            let what = if e.is_timeout() { "timed out" } else { "connection failed" };
            Failure {
                reason: format!("{what}: {}", innermost(e)),
                asked: None,
                reached: !e.is_connect(),
                fatal: None,
            }
        };
        let mut response = request.send().await.map_err(|e| lost(&e))?;
        let status = response.status().as_u16();
        let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let asked = retry_after(asked, SystemTime::now());
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| lost(&e))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_BODY {
                let reason = format!("reply of more than {MAX_BODY} bytes");
                return Err(Failure { reason, asked: None, reached: true, fatal: Some(status) });
            }
        }
        if !(200..300).contains(&status) {
            let mut excerpt: String = String::from_utf8_lossy(&bytes).chars().take(2000).collect();
            // Some servers echo the key they refuse.
            if let Some(key) = &self.settings.api_key {
                excerpt = excerpt.replace(key.expose_secret(), "[key]");
            }
            let excerpt: String = excerpt.chars().take(300).collect();
            let transient = is_transient(status);
            let reason = if transient { format!("status {status}: {excerpt}") } else { excerpt };
            return Err(Failure { reason, asked, reached: true, fatal: (!transient).then_some(status) });
        }
        Reply::parse(&bytes).map_err(|reason| Failure { reason, asked, reached: true, fatal: None })
    }
}

/// The key in an environment variable: the one named, which must be set, or else `OPENAI_API_KEY` where it
/// is.
pub fn api_key(variable: Option<&str>) -> Result<Option<SecretString>, Error> {
    let name = variable.unwrap_or("OPENAI_API_KEY");
    match std::env::var(name) {
        Ok(key) if !key.trim().is_empty() => Ok(Some(key.trim().to_string().into())),
        _ if variable.is_some() => Err(Error::Key(name.into())),
        _ => Ok(None),
    }
}

/// The cause a person can act on; reqwest's own text repeats the URL and little else.
fn innermost(error: &reqwest::Error) -> String {
    let mut source: &dyn std::error::Error = error;
    while let Some(inner) = source.source() {
        source = inner;
    }
    source.to_string()
}

fn completions_url(endpoint: &str) -> Result<String, Error> {
    let bad = |reason: &str| Error::Endpoint { url: endpoint.into(), reason: reason.into() };
    let url = reqwest::Url::parse(endpoint).map_err(|e| bad(&e.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad("is neither http nor https"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("must not hold a user or password; use the key's environment variable"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("must not hold a query or fragment"));
    }
    let trimmed = endpoint.trim_end_matches('/');
    if trimmed.ends_with("/chat/completions") {
        return Ok(trimmed.into());
    }
    Ok(format!("{trimmed}/chat/completions"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_is_completed() {
        let url = |endpoint| completions_url(endpoint).unwrap();
        assert_eq!(url("http://localhost:8000/v1/"), "http://localhost:8000/v1/chat/completions");
        assert_eq!(url("https://h/v1/chat/completions"), "https://h/v1/chat/completions");
        for bad in ["localhost:8000", "ftp://x/v1", "", "https://user:secret@h/v1", "https://h/v1?key=1"] {
            assert!(completions_url(bad).is_err(), "{bad}");
        }
    }
}
