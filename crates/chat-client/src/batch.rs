//! OpenAI's Batch API: requests are collected, uploaded as a file, worked on by the server within 24 hours at half the
//! price, and downloaded. What is under way stands in `batches.json`: another process goes on with it, days later too.
//! Only items that failed are sent again.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::batch_api::{address, json_of};
use crate::client::Client;
use crate::cost::Room;
use crate::endpoint::Endpoint;
use crate::retry::is_transient;
use crate::settings::{Closed, Source};
use crate::{ChatRequest, Error, Reply, Stored};

/// Most requests, and most bytes, of one batch: the API's limits are 50,000 and 200 MB.
const MOST: usize = 50_000;
const MOST_BYTES: usize = 150 << 20;

/// A batch is sent when no request has come for so long.
const QUIET: Duration = Duration::from_millis(500);

/// A batch under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Open {
    /// The uploaded requests.
    file: String,
    /// `None` until the server has told it: it may then be found by its file.
    id: Option<String>,
    requests: usize,
}

/// Where a batch is.
#[derive(Debug)]
enum State {
    UnderWay,
    Over,
    /// The server refused it as a whole.
    Failed(Error),
}

type Answer = Result<(), Option<Error>>;

/// A request that waits for a batch.
#[derive(Debug)]
struct Waiting {
    line: String,
    model: String,
    max_tokens: Option<u32>,
    attempts: u32,
    reserved: f64,
    /// The file of the batch that it is in.
    sent_in: Option<String>,
    done: oneshot::Sender<Answer>,
}

/// The requests and batches of one client.
#[derive(Debug)]
pub(crate) struct Batches {
    state: PathBuf,
    /// The account has too much under way: nothing is sent until a batch has ended.
    held: AtomicBool,
    /// Most requests of a batch.
    most: AtomicUsize,
    poll: Duration,
    waiting: Mutex<HashMap<String, Waiting>>,
    /// Held by the request that works for all.
    driver: tokio::sync::Mutex<()>,
}

impl Batches {
    pub(crate) fn new(dir: &Path, poll: Duration) -> Self {
        let state = dir.join("batches.json");
        let (held, most) = (AtomicBool::new(false), AtomicUsize::new(MOST));
        Self { state, held, most, poll, waiting: Mutex::default(), driver: tokio::sync::Mutex::new(()) }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<String, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that are with the server.
    pub(crate) fn sent(&self) -> usize {
        self.waiting().values().filter(|waiting| waiting.sent_in.is_some()).count()
    }

    fn unsent(&self) -> usize {
        self.waiting().values().filter(|waiting| waiting.sent_in.is_none()).count()
    }

    fn open(&self) -> Result<Vec<Open>, Error> {
        let failed = |reason: String| Error::Store { path: self.state.clone(), reason };
        match fs::read(&self.state) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| failed(e.to_string())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Written before anything that depends on it is done.
    fn remember(&self, open: &[Open]) -> Result<(), Error> {
        let failed = |reason: String| Error::Store { path: self.state.clone(), reason };
        let text = serde_json::to_vec_pretty(open).map_err(|e| failed(e.to_string()))?;
        let new = self.state.with_extension("json.new");
        let write = || -> std::io::Result<()> {
            fs::write(&new, &text)?;
            fs::File::open(&new)?.sync_all()?;
            fs::rename(&new, &self.state)
        };
        write().map_err(|e| failed(e.to_string()))
    }

    fn answer(&self, key: &str, answer: Answer) {
        if let Some(waiting) = self.waiting().remove(key) {
            waiting.done.send(answer).ok();
        }
    }
}

impl Client {
    /// Puts a request into the next batch and waits for its reply. One of those that wait does the work for all.
    pub(crate) async fn in_batch(
        &self,
        batches: &Batches,
        key: &str,
        request: &ChatRequest,
    ) -> Result<Stored, Option<Error>> {
        let endpoint = self.endpoints.choose().map_err(Some)?;
        let body = endpoint.provider.body(request, false);
        let line = json!({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body});
        let (done, mut answer) = oneshot::channel();
        let max_tokens = request.max_tokens;
        let waiting = Waiting {
            line: line.to_string(),
            model: request.model.clone(),
            max_tokens,
            attempts: 0,
            reserved: 0.0,
            sent_in: None,
            done,
        };
        batches.waiting().insert(key.into(), waiting);
        // A batch of an earlier process may have brought it in the meantime.
        let mut source = Source::Server;
        if self.store().has(key) {
            source = Source::Store;
            batches.answer(key, Ok(()));
        }
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => {
                    answer.unwrap_or(Err(None))?;
                    let stored = self.stored(key).map_err(Some)?.ok_or(None)?;
                    return Ok(Stored { source, ..stored });
                }
                guard = batches.driver.lock() => {
                    let worked = self.drive(batches, endpoint).await;
                    self.end(batches, worked);
                    drop(guard);
                }
            }
        }
    }

    /// Whoever still waits hears why there is nothing to wait for.
    fn end(&self, batches: &Batches, worked: Result<(), Error>) {
        let stopped = self.is_closed();
        let Err(error) = worked else {
            if stopped {
                batches.waiting().drain().for_each(|(_, waiting)| drop(waiting.done.send(Err(None))));
            }
            return;
        };
        // Whatever it is, it is no matter of one row.
        let error = match error {
            Error::Refused { .. } | Error::GaveUp { .. } if !error.is_setup() => {
                Error::Batch { id: "API".into(), reason: error.to_string() }
            }
            other => other,
        };
        let mut first = Some(error);
        for (_, waiting) in batches.waiting().drain() {
            waiting.done.send(Err(first.take())).ok();
        }
    }

    /// Sends what waits and fetches what is finished, until nothing is left.
    async fn drive(&self, batches: &Batches, endpoint: &Endpoint) -> Result<(), Error> {
        let mut open = batches.open()?;
        loop {
            // Batches of an earlier process come first: they may hold the replies.
            let is_resumed = !open.is_empty() && batches.sent() == 0;
            let is_held = batches.held.load(Ordering::Relaxed) && !open.is_empty();
            if !is_resumed && !is_held && batches.unsent() > 0 {
                self.until_quiet(batches).await;
                self.send_waiting(batches, endpoint, &mut open).await?;
            }
            if open.is_empty() || self.is_closed() {
                return Ok(());
            }
            let mut finished = false;
            for i in (0..open.len()).rev() {
                let mut batch = open[i].clone();
                let state = self.look_at(batches, endpoint, &mut batch).await?;
                open[i] = batch;
                if !matches!(state, State::UnderWay) {
                    finished = true;
                    open.remove(i);
                }
                batches.remember(&open)?;
                if let State::Failed(error) = state {
                    return Err(error);
                }
            }
            if !finished {
                self.pause(batches.poll).await;
            }
        }
    }

    async fn until_quiet(&self, batches: &Batches) {
        let mut before = usize::MAX;
        while before != batches.waiting().len() && !self.is_closed() {
            before = batches.waiting().len();
            self.pause(QUIET).await;
        }
    }

    /// Uploads what was not sent yet, in batches as large as may be, as far as the money goes.
    async fn send_waiting(
        &self,
        batches: &Batches,
        endpoint: &Endpoint,
        open: &mut Vec<Open>,
    ) -> Result<(), Error> {
        while !self.is_closed() {
            let (mut file, mut keys) = (String::new(), Vec::new());
            for (key, waiting) in
                batches.waiting().iter_mut().filter(|(_, waiting)| waiting.sent_in.is_none())
            {
                if keys.len() == batches.most.load(Ordering::Relaxed)
                    || file.len() + waiting.line.len() > MOST_BYTES
                {
                    break;
                }
                let call = endpoint.pace.estimate(waiting.line.len(), waiting.max_tokens);
                match self.ledger.try_reserve(&waiting.model, call.input, call.output) {
                    Room::Now(reserved) => waiting.reserved = reserved,
                    Room::Later => break,
                    Room::Never => {
                        self.close_for(Closed::Cost);
                        break;
                    }
                }
                file.push_str(&waiting.line);
                file.push('\n');
                keys.push(key.clone());
            }
            if keys.is_empty() {
                return Ok(());
            }
            let requests = keys.len();
            let uploaded = self.upload(endpoint, file).await?;
            open.push(Open { file: uploaded.clone(), id: None, requests });
            batches.remember(open)?;
            for key in &keys {
                if let Some(waiting) = batches.waiting().get_mut(key) {
                    waiting.sent_in = Some(uploaded.clone());
                }
            }
            if let Some(last) = open.last_mut() {
                last.id = Some(self.create(endpoint, &last.file).await?);
            }
            batches.remember(open)?;
            tracing::info!(requests, "a batch is under way");
        }
        Ok(())
    }

    /// Where a batch is. When it is over, its replies are stored, and what failed waits for the next one.
    async fn look_at(
        &self,
        batches: &Batches,
        endpoint: &Endpoint,
        batch: &mut Open,
    ) -> Result<State, Error> {
        let id = match &batch.id {
            Some(id) => id.clone(),
            // The process ended between asking for the batch and hearing its name.
            None => match self.find(endpoint, &batch.file).await? {
                Some(id) => id,
                None => self.create(endpoint, &batch.file).await?,
            },
        };
        batch.id = Some(id.clone());
        let url = address(endpoint, &format!("batches/{id}"));
        let state = match self.get(endpoint, &url).await {
            // The batch goes on, whether it can be looked at now or not.
            Err(Error::GaveUp { last, .. }) => {
                tracing::warn!("{url}: {last}; it is looked at again later");
                return Ok(State::UnderWay);
            }
            // Deleted, or of another account: nothing will come of it.
            Err(Error::Refused { status: 404, body, .. }) => {
                tracing::warn!("{url} is gone ({body}); what has no reply is sent again");
                self.send_again(batches, endpoint, &batch.file, true);
                return Ok(State::Over);
            }
            other => json_of(&url, &other?)?,
        };
        let status = state["status"].as_str().unwrap_or_default();
        if status == "failed" {
            let reason = endpoint.excerpt(state["errors"].to_string().as_bytes());
            // Too much is under way for this account: a matter of time.
            if reason.contains("token_limit") && !self.is_closed() {
                tracing::warn!("batch {id}: {reason}; it is sent again later, in smaller parts");
                self.send_again(batches, endpoint, &batch.file, false);
                batches.held.store(true, Ordering::Relaxed);
                batches.most.store((batch.requests / 2).max(1), Ordering::Relaxed);
                self.pause(batches.poll).await;
                return Ok(State::Over);
            }
            self.send_again(batches, endpoint, &batch.file, true);
            return Ok(State::Failed(Error::Batch { id, reason }));
        }
        if !["completed", "expired", "cancelled"].contains(&status) {
            return Ok(State::UnderWay);
        }
        for file in ["output_file_id", "error_file_id"].into_iter().filter_map(|name| state[name].as_str()) {
            let url = address(endpoint, &format!("files/{file}/content"));
            let content = self.get(endpoint, &url).await?;
            let lines: Vec<&[u8]> =
                content.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).collect();
            // Together, so that they are written to the disk in groups.
            for lines in lines.chunks(1000) {
                try_join_all(lines.iter().map(|line| self.take(batches, endpoint, line))).await?;
            }
        }
        batches.held.store(false, Ordering::Relaxed);
        self.send_again(batches, endpoint, &batch.file, true);
        Ok(State::Over)
    }

    /// One line of a batch's files.
    async fn take(&self, batches: &Batches, endpoint: &Endpoint, line: &[u8]) -> Result<(), Error> {
        let Ok(line) = serde_json::from_slice::<Value>(line) else { return Ok(()) };
        let Some(key) = line["custom_id"].as_str() else { return Ok(()) };
        let status = line["response"]["status_code"].as_u64().unwrap_or(0) as u16;
        let body = line["response"]["body"].to_string();
        if !(200..300).contains(&status) {
            let is_final = (400..500).contains(&status) && !is_transient(status);
            if is_final {
                let body = endpoint.excerpt(body.as_bytes());
                self.free(batches, key, crate::Usage::default());
                batches.answer(key, Err(Some(Error::Refused { url: endpoint.url.clone(), status, body })));
            }
            return Ok(());
        }
        // What cannot be read is as if it had not come: it is sent again.
        let Ok(reply) = Reply::parse(body.as_bytes()) else { return Ok(()) };
        let attempts = batches.waiting().get(key).map_or(1, |waiting| waiting.attempts + 1);
        let request =
            batches.waiting().get(key).map_or_else(|| "null".into(), |waiting| waiting.line.clone());
        if !self.store().has(key) {
            self.keep(key, request.into(), &reply, 0, attempts).await?;
            self.count(reply.usage());
        }
        self.free(batches, key, reply.usage());
        batches.answer(key, Ok(()));
        Ok(())
    }

    /// What was reserved for a request goes.
    fn free(&self, batches: &Batches, key: &str, usage: crate::Usage) {
        let waiting = batches.waiting();
        if let Some(waiting) = waiting.get(key) {
            self.ledger.settle(&waiting.model, waiting.reserved, usage);
        }
    }

    /// What was sent and has no reply, because it failed or expired, goes into the next batch, a few times.
    fn send_again(&self, batches: &Batches, endpoint: &Endpoint, file: &str, counts: bool) {
        let mut given_up = Vec::new();
        let mut waiting = batches.waiting();
        let of_batch = waiting.iter_mut().filter(|(_, waiting)| waiting.sent_in.as_deref() == Some(file));
        for (key, waiting) in of_batch {
            waiting.sent_in = None;
            let reserved = std::mem::take(&mut waiting.reserved);
            self.ledger.settle(&waiting.model, reserved, crate::Usage::default());
            waiting.attempts += u32::from(counts);
            if waiting.attempts > self.settings.retries {
                given_up.push((key.clone(), waiting.attempts));
            }
        }
        drop(waiting);
        for (key, attempts) in given_up {
            let last = "the batch gave no reply to it".to_string();
            let (url, elapsed) = (endpoint.url.clone(), Duration::ZERO);
            batches
                .answer(&key, Err(Some(Error::GaveUp { url, attempts, elapsed, last, unreachable: false })));
        }
    }

    /// Asks the server to stop the batches under way; what they have finished is still paid, and fetched by the next
    /// run. Returns their number.
    pub async fn cancel_batches(&self) -> Result<usize, Error> {
        let Some(batches) = &self.batches else { return Ok(0) };
        let endpoint = self.endpoints.choose()?;
        let (mut cancelled, mut failure) = (0, None);
        for batch in batches.open()? {
            let id = match batch.id {
                Some(id) => Some(id),
                None => self.find(endpoint, &batch.file).await?,
            };
            let Some(id) = id else { continue };
            let url = address(endpoint, &format!("batches/{id}"));
            let state = match self.get(endpoint, &url).await {
                Err(Error::Refused { status: 404, .. }) => continue,
                other => json_of(&url, &other?)?,
            };
            if !["validating", "in_progress", "finalizing"].iter().any(|status| state["status"] == *status) {
                continue;
            }
            match self.call(endpoint, &format!("{url}/cancel"), |request| request).await {
                Ok(_) => cancelled += 1,
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(cancelled), Err)
    }
}
