//! Sending requests: bounded, paced, retried, stored, and paid for once.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OnceCell};
use tokio::time::Instant;

use crate::batch::Batches;
use crate::cost::{Ledger, Price};
use crate::endpoint::{Endpoint, Endpoints, Failure};
use crate::flow::Passed;
use crate::retry::delay;
use crate::settings::{Closed, Counts, Settings, Source, Stored, Streaming};
use crate::store::{NewReply, ReplyStore};
use crate::{ChatRequest, Error, Reply, Usage};

#[derive(Debug, Default)]
struct Totals {
    attempts: AtomicU64,
    refused: AtomicU64,
    prompt: AtomicU64,
    completion: AtomicU64,
}

/// A client of one or several servers with its reply store.
#[derive(Debug)]
pub struct Client {
    pub(crate) endpoints: Endpoints,
    pub(crate) settings: Settings,
    store: ReplyStore,
    pub(crate) ledger: Ledger,
    closed: AtomicU8,
    pub(crate) closing: Notify,
    pub(crate) batches: Option<Batches>,
    streams: AtomicBool,
    totals: Totals,
    same: Mutex<HashMap<String, Arc<OnceCell<Stored>>>>,
}

impl Client {
    /// Sets up the HTTP clients. A TLS provider must have been installed before.
    pub fn new(settings: Settings, store: ReplyStore) -> Result<Self, Error> {
        if settings.max_cost.is_some() && settings.prices.is_empty() {
            return Err(Error::NoPrice);
        }
        let endpoint = |server| {
            Endpoint::new(server, settings.timeout, settings.in_flight, settings.budgets, settings.max_body)
        };
        let endpoints = settings.servers.iter().map(endpoint).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            endpoints: Endpoints(endpoints),
            ledger: Ledger::new(settings.prices.clone(), settings.max_cost),
            streams: AtomicBool::new(settings.streaming == Streaming::Always),
            settings,
            store,
            batches: None,
            closed: AtomicU8::new(Closed::No as u8),
            closing: Notify::new(),
            totals: Totals::default(),
            same: Mutex::default(),
        })
    }

    /// The same through the server's Batch API; what is under way is remembered in `dir`.
    pub fn batched(
        settings: Settings,
        store: ReplyStore,
        dir: &std::path::Path,
        poll: Duration,
    ) -> Result<Self, Error> {
        let batches = Some(Batches::new(dir, poll));
        Ok(Self { batches, ..Self::new(settings, store)? })
    }

    /// The price of a model's tokens.
    pub fn price(&self, model: &str) -> Option<Price> {
        self.ledger.price(model)
    }

    /// The stored replies.
    pub fn store(&self) -> &ReplyStore {
        &self.store
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (prompt_tokens, completion_tokens) = (total(&self.totals.prompt), total(&self.totals.completion));
        Counts {
            in_flight: match &self.batches {
                Some(batches) => batches.sent(),
                None => self.endpoints.0.iter().map(|endpoint| endpoint.flow.in_flight()).sum(),
            },
            limit: self.endpoints.0.iter().map(|endpoint| endpoint.flow.limit()).sum(),
            attempts: total(&self.totals.attempts),
            refused: total(&self.totals.refused),
            usage: Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens: prompt_tokens + completion_tokens,
            },
            spent: self.ledger.spent(),
        }
    }

    /// No request is started after this; those in flight finish.
    pub fn close(&self) {
        self.close_for(Closed::Stopped);
    }

    pub(crate) fn close_for(&self, why: Closed) {
        let (open, why) = (Closed::No as u8, why as u8);
        self.closed.compare_exchange(open, why, Ordering::Relaxed, Ordering::Relaxed).ok();
        self.endpoints.0.iter().for_each(|endpoint| endpoint.flow.close());
        self.closing.notify_waiters();
    }

    /// Whether and why it was closed.
    pub fn closed(&self) -> Closed {
        match self.closed.load(Ordering::Relaxed) {
            0 => Closed::No,
            1 => Closed::Stopped,
            _ => Closed::Cost,
        }
    }

    /// True after [`Client::close`], or when the money is spent.
    pub fn is_closed(&self) -> bool {
        self.closed() != Closed::No
    }

    /// The stored reply, or the server's. `None` when the client was closed before the request started.
    /// Requests that are the same are sent once.
    pub async fn complete(&self, request: &ChatRequest) -> Result<Option<Stored>, Error> {
        let body = request.text();
        let key = request.key_of(&body);
        if let Some(found) = self.stored(&key)? {
            return Ok(Some(found));
        }
        let cell = {
            let mut same = self.same.lock().unwrap_or_else(PoisonError::into_inner);
            same.entry(key.clone()).or_default().clone()
        };
        let mut is_mine = false;
        let result = cell.get_or_try_init(|| async {
            // Another request for the same may have ended between the look above and here.
            if let Some(found) = self.stored(&key).map_err(Some)? {
                return Ok(found);
            }
            is_mine = true;
            match &self.batches {
                Some(batches) => Box::pin(self.in_batch(batches, &key, request)).await,
                None => self.request(&key, request, Bytes::from(body)).await,
            }
        });
        let result = result.await.cloned();
        self.forget(&key, &cell);
        match result {
            // What another request paid for comes from the store.
            Ok(stored) if !is_mine => Ok(Some(Stored { source: Source::Store, ..stored })),
            Ok(stored) => Ok(Some(stored)),
            Err(None) => Ok(None),
            Err(Some(error)) => Err(error),
        }
    }

    /// The last one that waits for a request's cell removes it: the map's and ours are left.
    fn forget(&self, key: &str, cell: &Arc<OnceCell<Stored>>) {
        let mut same = self.same.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::strong_count(cell) <= 2 {
            same.remove(key);
        }
    }

    /// The reply in the store.
    pub fn stored(&self, key: &str) -> Result<Option<Stored>, Error> {
        let Some(stored) = self.store.get(key)? else { return Ok(None) };
        let reply = Reply::parse(stored.reply.get().as_bytes())
            .map_err(|reason| Error::Setup(format!("the stored reply {key}: {reason}")))?;
        let (latency_ms, attempts) = (stored.latency_ms, stored.attempts);
        Ok(Some(Stored { reply, source: Source::Store, latency_ms, attempts }))
    }

    /// `Err(None)` when the client was closed before the request, or its next attempt, could start.
    async fn request(&self, key: &str, request: &ChatRequest, plain: Bytes) -> Result<Stored, Option<Error>> {
        // Time in the queue is not the request's: its clock starts when it is sent first.
        let (mut started, mut reached) = (None, false);
        let mut attempt = 1;
        loop {
            let (endpoint, passed) = self.endpoints.pass().await.map_err(Some)?.ok_or(None)?;
            if endpoint.refused().is_some() {
                continue;
            }
            let failure =
                match self.attempt(endpoint, passed, key, (request, &plain), attempt, &mut started).await? {
                    Ok(stored) => return Ok(stored),
                    Err(failure) => failure,
                };
            reached |= failure.reached;
            tracing::debug!(attempt, url = endpoint.url, reason = failure.reason, "attempt failed");
            if failure.renamed {
                // No attempt of its own: sent under the new name it cannot be refused for the old one.
                continue;
            }
            let others = self.endpoints.others(endpoint);
            if let Some(status) = failure.fatal {
                let refused = Error::Refused { url: endpoint.url.clone(), status, body: failure.reason };
                if !refused.is_setup() || !others {
                    return Err(Some(refused));
                }
                if endpoint.refused().is_none() {
                    tracing::warn!("{refused}; its calls go to the other endpoints");
                    endpoint.refuse(refused);
                }
                attempt += 1;
                continue;
            }
            let pause = delay(attempt, self.settings.backoff, failure.asked);
            let elapsed = started.map_or(Duration::ZERO, |started| started.elapsed());
            if attempt > self.settings.retries || elapsed + pause > self.settings.deadline {
                return Err(Some(Error::GaveUp {
                    url: endpoint.url.clone(),
                    attempts: attempt,
                    elapsed,
                    last: failure.reason,
                    unreachable: !reached,
                }));
            }
            // Where another server can take it, there is nothing to wait for.
            if failure.reached || !self.endpoints.well_others(endpoint) {
                self.pause(pause).await;
            }
            if self.is_closed() {
                return Err(None);
            }
            attempt += 1;
        }
    }

    /// Sleeps, but not beyond the moment at which the client is closed.
    pub(crate) async fn pause(&self, time: Duration) {
        self.unless_closed(tokio::time::sleep(time)).await;
    }

    /// `None` when the client is closed before the future is ready.
    pub(crate) async fn unless_closed<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut closing = pin!(self.closing.notified());
        closing.as_mut().enable();
        if self.is_closed() {
            return None;
        }
        tokio::select! {
            value = future => Some(value),
            () = closing => None,
        }
    }

    /// One attempt at one server, within its budgets and those of the user.
    async fn attempt(
        &self,
        endpoint: &Endpoint,
        mut passed: Passed<'_>,
        key: &str,
        (request, plain): (&ChatRequest, &Bytes),
        attempt: u32,
        started: &mut Option<Instant>,
    ) -> Result<Result<Stored, Failure>, Option<Error>> {
        let stream = self.streams.load(Ordering::Relaxed);
        let body = endpoint.body(request, plain, stream);
        let turn = self.unless_closed(endpoint.pace.reserve(body.len(), request.max_tokens));
        let call = turn.await.ok_or(None)?;
        let room = self.unless_closed(self.ledger.reserve(&request.model, call.input, call.output));
        let Some(reserved) = room.await.ok_or(None)? else {
            self.close_for(Closed::Cost);
            return Err(None);
        };
        let sent = Instant::now();
        let until = *started.get_or_insert(sent) + self.settings.deadline;
        if sent >= until {
            self.ledger.settle(&request.model, reserved, Usage::default());
            return Ok(Err(Failure { worked: false, ..Failure::late() }));
        }
        passed.sent();
        self.totals.attempts.fetch_add(1, Ordering::Relaxed);
        let answer = tokio::time::timeout_at(until, endpoint.attempt(body.clone(), stream)).await;
        let failure = match answer.unwrap_or_else(|_| Err(Failure::late())) {
            Ok(reply) => {
                let latency = sent.elapsed();
                let usage = reply.usage();
                endpoint.recover();
                passed.succeeded(latency);
                endpoint.pace.settle(call, usage.prompt_tokens, usage.completion_tokens);
                self.ledger.settle(&request.model, reserved, usage);
                self.count(usage);
                let latency_ms = latency.as_millis() as u64;
                self.keep(key, body, &reply, latency_ms, attempt).await.map_err(Some)?;
                return Ok(Ok(Stored { reply, source: Source::Server, latency_ms, attempts: attempt }));
            }
            Err(failure) => Failure { renamed: endpoint.renames_limit(&body, &failure), ..failure },
        };
        // What the server may bill for a call without a reply: at least its request.
        let prompt_tokens = if failure.worked { call.input as u64 } else { 0 };
        self.ledger.settle(&request.model, reserved, Usage { prompt_tokens, ..Usage::default() });
        if !failure.renamed {
            endpoint.ail(failure.reached);
        }
        if failure.overload {
            self.totals.refused.fetch_add(1, Ordering::Relaxed);
            endpoint.pace.refused();
            passed.overloaded(sent);
        }
        // Cut off after a good while: something on the way waits no longer for the first byte.
        let long = sent.elapsed() > Duration::from_secs(30).min(self.settings.timeout / 2);
        if failure.cut && long && self.settings.streaming == Streaming::Auto {
            self.streams.store(true, Ordering::Relaxed);
        }
        Ok(Err(failure))
    }

    pub(crate) fn count(&self, usage: Usage) {
        self.totals.prompt.fetch_add(usage.prompt_tokens, Ordering::Relaxed);
        self.totals.completion.fetch_add(usage.completion_tokens, Ordering::Relaxed);
    }

    /// Stores a reply before anything else is done with it.
    pub(crate) async fn keep(
        &self,
        key: &str,
        request: Bytes,
        reply: &Reply,
        latency_ms: u64,
        attempts: u32,
    ) -> Result<(), Error> {
        let reply = reply.raw().to_owned();
        self.store.put(NewReply { key: key.into(), request, reply, latency_ms, attempts }).await
    }
}
