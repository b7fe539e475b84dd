//! One server: its connections, budgets, calls in flight, and whether it is well.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::select_all;
use reqwest::header::{CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::redirect::Policy;
use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

use crate::flow::{Flow, InFlight, Passed};
use crate::pace::{Budgets, Pace, Told, span};
use crate::provider::Provider;
use crate::retry::{is_overload, is_transient, retry_after};
use crate::stream::Collected;
use crate::{ChatRequest, Error, Reply};

/// Calls that share an HTTP/2 connection at most: usual servers allow a hundred streams.
const STREAMS: usize = 100;

/// Failures in a row after which an endpoint that answers is ill.
const FAILURES: u32 = 4;

/// Longest time without a byte where the reply is streamed.
const SILENCE: Duration = Duration::from_mins(2);

/// Headers with a limit, what is left of it, and when it is whole again.
const LIMITS: [(Told, &str, &str, &str); 5] = [
    (
        Told::Requests,
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    ),
    (Told::Tokens, "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    (
        Told::Requests,
        "anthropic-ratelimit-requests-limit",
        "anthropic-ratelimit-requests-remaining",
        "anthropic-ratelimit-requests-reset",
    ),
    (
        Told::Input,
        "anthropic-ratelimit-input-tokens-limit",
        "anthropic-ratelimit-input-tokens-remaining",
        "anthropic-ratelimit-input-tokens-reset",
    ),
    (
        Told::Output,
        "anthropic-ratelimit-output-tokens-limit",
        "anthropic-ratelimit-output-tokens-remaining",
        "anthropic-ratelimit-output-tokens-reset",
    ),
];

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Server {
    /// Base URL (`…/v1`) or the whole address.
    pub url: String,
    /// Its share of the calls.
    pub weight: f64,
    /// The key.
    pub key: Option<SecretString>,
}

/// One failed attempt.
#[derive(Debug)]
pub struct Failure {
    /// What happened, without the key.
    pub reason: String,
    /// How long the server asks to wait.
    pub asked: Option<Duration>,
    /// The server was reached at all.
    pub reached: bool,
    /// A status that will not change when the same is sent again.
    pub fatal: Option<u16>,
    /// The server has too much to do.
    pub overload: bool,
    /// The request took too long for something on the way; a streamed reply may get through.
    pub cut: bool,
    /// The server has probably worked on it: it may bill it.
    pub worked: bool,
    /// It goes again at once, in the form that the server wants.
    pub renamed: bool,
}

#[derive(Debug)]
struct Health {
    ill_until: Option<Instant>,
    failures: u32,
    /// It refused the key, or knows neither the address nor the model.
    refused: Option<(u16, String)>,
}

/// A server in use.
#[derive(Debug)]
pub struct Endpoint {
    pub(crate) provider: Provider,
    pub(crate) url: String,
    pub(crate) weight: f64,
    pub(crate) pace: Pace,
    pub(crate) flow: Flow,
    key: Option<SecretString>,
    clients: Vec<reqwest::Client>,
    next: AtomicUsize,
    health: Mutex<Health>,
    max_body: usize,
    /// It wants `max_completion_tokens`, as OpenAI's newer models do.
    new_limit: AtomicBool,
}

impl Endpoint {
    pub(crate) fn new(
        server: &Server,
        timeout: Duration,
        in_flight: InFlight,
        budgets: Budgets,
        max_body: usize,
    ) -> Result<Self, Error> {
        let provider = Provider::of(&server.url);
        let url = provider.url(&server.url)?;
        // With TLS, HTTP/2 is agreed on; then all calls of a client share one connection.
        let clients = if url.starts_with("https") { in_flight.most.div_ceil(STREAMS) } else { 1 };
        let client = || {
            reqwest::Client::builder()
                .timeout(timeout)
                .read_timeout(SILENCE.max(timeout.min(Duration::from_mins(10))))
                .connect_timeout(Duration::from_secs(15).min(timeout))
                .pool_max_idle_per_host(in_flight.most)
                .tcp_nodelay(true)
                .http2_adaptive_window(true)
                .http2_keep_alive_interval(Duration::from_secs(20))
                // The key must not travel to wherever a redirect points.
                .redirect(Policy::none())
                .user_agent(concat!("chat-client/", env!("CARGO_PKG_VERSION")))
                .build()
                .map_err(|e| Error::Setup(e.to_string()))
        };
        Ok(Self {
            provider,
            url,
            weight: server.weight,
            pace: Pace::new(budgets),
            flow: Flow::new(in_flight),
            key: server.key.clone(),
            clients: (0..clients.clamp(1, 16)).map(|_| client()).collect::<Result<_, _>>()?,
            next: AtomicUsize::new(0),
            health: Mutex::new(Health { ill_until: None, failures: 0, refused: None }),
            max_body,
            new_limit: AtomicBool::new(false),
        })
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls for its weight: the lowest gets the next one. `None` while it is ill.
    pub(crate) fn load(&self, now: Instant) -> Option<f64> {
        let health = self.health();
        let is_ill = health.refused.is_some() || health.ill_until.is_some_and(|until| now < until);
        (!is_ill).then(|| (self.flow.taken() + 1) as f64 / self.weight)
    }

    /// Why it refuses everything, if it does.
    pub(crate) fn refused(&self) -> Option<(u16, String)> {
        self.health().refused.clone()
    }

    pub(crate) fn refuse(&self, error: Error) {
        if let Error::Refused { status, body, .. } = error {
            self.health().refused = Some((status, body));
        }
    }

    /// A call failed. Where it could not be reached, or one failure follows the other, others take its calls for a
    /// while, longer each time.
    pub(crate) fn ail(&self, reached: bool) {
        let mut health = self.health();
        health.failures += 1;
        if reached && health.failures < FAILURES {
            return;
        }
        let pause = Duration::from_millis(250) * (1 << health.failures.min(7));
        health.ill_until = Some(Instant::now() + pause);
    }

    pub(crate) fn recover(&self) {
        let mut health = self.health();
        health.failures = 0;
        health.ill_until = None;
    }

    /// The body for this server: the one that is made already, or another.
    pub(crate) fn body(&self, request: &ChatRequest, plain: &Bytes, stream: bool) -> Bytes {
        let renamed = self.new_limit.load(Ordering::Relaxed);
        if self.provider == Provider::OpenAi && !stream && !renamed {
            return plain.clone();
        }
        let mut body = self.provider.body(request, stream);
        if renamed
            && let Some(body) = body.as_object_mut()
            && let Some(limit) = body.remove("max_tokens")
        {
            body.insert("max_completion_tokens".into(), limit);
        }
        Bytes::from(body.to_string())
    }

    /// True where a request was refused for the old name of its limit; all go by the new one after that.
    pub(crate) fn renames_limit(&self, sent: &[u8], failure: &Failure) -> bool {
        let body = || serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(sent);
        let renames = self.provider == Provider::OpenAi
            && failure.fatal == Some(400)
            && failure.reason.contains("max_completion_tokens")
            && failure.reason.to_lowercase().contains("unsupported")
            && body().is_ok_and(|body| body.contains_key("max_tokens"));
        if renames {
            self.new_limit.store(true, Ordering::Relaxed);
        }
        renames
    }

    /// A client for another path of the same server, with the key in place.
    pub(crate) fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        let client = &self.clients[self.next.fetch_add(1, Ordering::Relaxed) % self.clients.len()];
        self.provider.authorize(client.request(method, url), self.key.as_ref())
    }

    /// Sends a body once.
    pub(crate) async fn attempt(&self, body: Bytes, stream: bool) -> Result<Reply, Failure> {
        let sent = self.send(body, stream).await;
        sent.map_err(|failure| Failure { reason: self.without_key(failure.reason), ..failure })
    }

    async fn send(&self, body: Bytes, stream: bool) -> Result<Reply, Failure> {
        let request = self.request(reqwest::Method::POST, &self.url);
        let sent =
            request.header(CONTENT_TYPE, HeaderValue::from_static("application/json")).body(body).send();
        let mut response = sent.await.map_err(|e| lost(&e))?;
        let status = response.status().as_u16();
        self.learn(response.headers());
        let asked = asked(response.headers());
        let is_stream = stream && is_event_stream(response.headers()) && (200..300).contains(&status);
        let (mut bytes, mut events, mut len) = (Vec::new(), Collected::default(), 0);
        while let Some(chunk) = response.chunk().await.map_err(|e| lost(&e))? {
            len += chunk.len();
            if len > self.max_body {
                let reason = format!("reply of more than {} bytes", self.max_body);
                return Err(Failure { fatal: Some(status), worked: true, ..Failure::of(reason) });
            }
            if is_stream {
                events.push(&chunk).map_err(Failure::unreadable)?;
            } else {
                bytes.extend_from_slice(&chunk);
            }
        }
        if !(200..300).contains(&status) {
            return Err(self.refusal(status, &bytes, asked));
        }
        if is_stream {
            bytes = events.finish().map_err(Failure::unreadable)?.into_bytes();
        }
        Reply::parse(&bytes).map_err(Failure::unreadable)
    }

    fn refusal(&self, status: u16, bytes: &[u8], asked: Option<Duration>) -> Failure {
        let excerpt = self.excerpt(bytes);
        // A used-up account answers 429 too, and waiting does not fill it.
        let transient = is_transient(status) && !excerpt.contains("insufficient_quota");
        let reason = if transient { format!("status {status}: {excerpt}") } else { excerpt };
        Failure {
            asked,
            fatal: (!transient).then_some(status),
            overload: is_overload(status) && transient,
            cut: matches!(status, 504 | 524),
            ..Failure::of(reason)
        }
    }

    /// The start of a body.
    pub(crate) fn excerpt(&self, bytes: &[u8]) -> String {
        let excerpt: String = String::from_utf8_lossy(bytes).chars().take(2000).collect();
        self.without_key(excerpt).chars().take(300).collect()
    }

    /// Some servers echo the key they refuse.
    pub(crate) fn without_key(&self, text: String) -> String {
        match &self.key {
            Some(key) => text.replace(key.expose_secret(), "[key]"),
            None => text,
        }
    }

    /// Takes over the limits that the headers tell.
    fn learn(&self, headers: &HeaderMap) {
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let number = |name: &str| text(name)?.parse::<f64>().ok();
        for (what, limit, left, reset) in LIMITS {
            let Some(limit) = number(limit) else { continue };
            let reset = match self.provider {
                Provider::OpenAi => text(reset).and_then(span),
                // A time of day here; the server's own clock tells how far away it is.
                Provider::Anthropic => text(reset).and_then(|at| until(at, headers)),
            };
            if let (Some(left), Some(reset)) = (number(left), reset) {
                self.pace.told(what, limit, left, reset);
            }
        }
    }
}

impl Failure {
    fn of(reason: String) -> Self {
        Self {
            reason,
            asked: None,
            reached: true,
            fatal: None,
            overload: false,
            cut: false,
            worked: false,
            renamed: false,
        }
    }

    /// The request's time is over.
    pub(crate) fn late() -> Self {
        Self { worked: true, cut: true, ..Self::of("timed out: the deadline has passed".into()) }
    }

    fn unreadable(reason: String) -> Self {
        Self { worked: true, ..Self::of(reason) }
    }
}

/// The time until a time of day.
fn until(at: &str, headers: &HeaderMap) -> Option<Duration> {
    let now = jiff::Timestamp::try_from(server_now(headers)?).ok()?;
    Some(Duration::try_from(at.parse::<jiff::Timestamp>().ok()?.duration_since(now)).unwrap_or_default())
}

/// The server's clock, or ours where it tells none.
fn server_now(headers: &HeaderMap) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()
}

/// `Retry-After-Ms` and `Retry-After`. A date is compared with the server's own clock: ours may be wrong.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let ms = text("retry-after-ms").and_then(|ms| ms.parse::<f64>().ok());
    if let Some(ms) = ms.and_then(|ms| Duration::try_from_secs_f64(ms / 1000.0).ok()) {
        return Some(ms);
    }
    let told = text(RETRY_AFTER.as_str())?;
    retry_after(Some(told), server_now(headers).unwrap_or_else(SystemTime::now))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.starts_with("text/event-stream")
}

pub(crate) fn lost(error: &reqwest::Error) -> Failure {
    let what = if error.is_timeout() { "timed out" } else { "connection failed" };
    Failure {
        reached: !error.is_connect(),
        cut: !error.is_connect(),
        worked: !error.is_connect(),
        ..Failure::of(format!("{what}: {}", innermost(error)))
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

/// The servers that a client spreads its calls over, each with its share.
#[derive(Debug)]
pub(crate) struct Endpoints(pub Vec<Endpoint>);

impl Endpoints {
    /// The one with the least to do for its weight; where all are ill, the one that is so for the shortest.
    pub(crate) fn choose(&self) -> Result<&Endpoint, Error> {
        self.usable()?.first().copied().ok_or_else(|| self.refusal())
    }

    /// Those that can be used, the best first: the well ones by what they have to do for their weight.
    fn usable(&self) -> Result<Vec<&Endpoint>, Error> {
        let now = Instant::now();
        let well = self.0.iter().filter_map(|endpoint| Some((endpoint.load(now)?, endpoint)));
        let mut well: Vec<(f64, &Endpoint)> = well.collect();
        well.sort_by(|a, b| a.0.total_cmp(&b.0));
        if !well.is_empty() {
            return Ok(well.into_iter().map(|(_, endpoint)| endpoint).collect());
        }
        let mut ill: Vec<&Endpoint> = self.0.iter().filter(|e| e.refused().is_none()).collect();
        ill.sort_by_key(|endpoint| endpoint.health().ill_until);
        if ill.is_empty() { Err(self.refusal()) } else { Ok(ill) }
    }

    /// Waits until one of them has room. `None` after they were closed.
    pub(crate) async fn pass(&self) -> Result<Option<(&Endpoint, Passed<'_>)>, Error> {
        let usable = self.usable()?;
        if let [only] = usable.as_slice() {
            return Ok(only.flow.pass().await.map(|passed| (*only, passed)));
        }
        if let Some(now) = usable.iter().find_map(|endpoint| Some((*endpoint, endpoint.flow.pass_now()?))) {
            return Ok(Some(now));
        }
        // Whichever has room first.
        let waits = usable
            .iter()
            .map(|endpoint| Box::pin(async { endpoint.flow.pass().await.map(|passed| (*endpoint, passed)) }));
        Ok(select_all(waits).await.0)
    }

    fn refusal(&self) -> Error {
        let first = self.0.iter().find_map(|endpoint| Some((endpoint.url.clone(), endpoint.refused()?)));
        let (url, (status, body)) = first.unwrap_or_default();
        Error::Refused { url, status, body }
    }

    /// True when another one can take over from this one at once.
    pub(crate) fn well_others(&self, than: &Endpoint) -> bool {
        let now = Instant::now();
        self.0.iter().any(|endpoint| !std::ptr::eq(endpoint, than) && endpoint.load(now).is_some())
    }

    /// True when another one could take over from this one.
    pub(crate) fn others(&self, than: &Endpoint) -> bool {
        self.0.iter().any(|endpoint| !std::ptr::eq(endpoint, than) && endpoint.refused().is_none())
    }
}
