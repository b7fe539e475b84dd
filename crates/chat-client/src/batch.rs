//! OpenAI's Batch API: requests are collected, uploaded as a file, worked on by the server within 24 hours at half the
//! price, and downloaded. What is under way stands in `batches.json`: another process goes on with it, days later too.
//! Only items that failed are sent again.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::client::{Client, Closed};
use crate::endpoint::{Endpoint, lost};
use crate::retry::{delay, is_transient};
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

type Answer = Result<(), Option<Error>>;

/// A request that waits for a batch.
#[derive(Debug)]
struct Waiting {
    line: String,
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
    poll: Duration,
    waiting: Mutex<HashMap<String, Waiting>>,
    /// Held by the request that works for all.
    driver: tokio::sync::Mutex<()>,
}

impl Batches {
    pub(crate) fn new(dir: &Path, poll: Duration) -> Self {
        let state = dir.join("batches.json");
        Self { state, poll, waiting: Mutex::default(), driver: tokio::sync::Mutex::new(()) }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<String, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that are with the server.
    pub(crate) fn sent(&self) -> usize {
        self.waiting().values().filter(|waiting| waiting.sent_in.is_some()).count()
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
        let call = endpoint.pace.estimate(body.to_string().len(), request.max_tokens);
        let Some(reserved) = self.ledger.reserve(call.input, call.output) else {
            self.close_for(Closed::Cost);
            return Err(None);
        };
        let line = json!({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body});
        let (done, mut answer) = oneshot::channel();
        let waiting = Waiting { line: line.to_string(), attempts: 0, reserved, sent_in: None, done };
        batches.waiting().insert(key.into(), waiting);
        // A batch of an earlier process may have brought it in the meantime.
        if self.store().has(key) {
            self.free(batches, key, crate::Usage::default());
            batches.answer(key, Ok(()));
        }
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => {
                    answer.unwrap_or(Err(None))?;
                    return self.stored(key).map_err(Some)?.ok_or(None);
                }
                guard = batches.driver.lock() => {
                    let worked = self.drive(batches, endpoint).await;
                    drop(guard);
                    self.end(batches, worked);
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
        let mut first = Some(error);
        for (_, waiting) in batches.waiting().drain() {
            waiting.done.send(Err(first.take())).ok();
        }
    }

    /// Sends what waits and fetches what is finished, until nothing is left.
    async fn drive(&self, batches: &Batches, endpoint: &Endpoint) -> Result<(), Error> {
        let mut open = batches.open()?;
        loop {
            if open.is_empty() {
                self.until_quiet(batches).await;
            }
            self.send_waiting(batches, endpoint, &mut open).await?;
            if open.is_empty() || self.is_closed() {
                return Ok(());
            }
            let mut still = Vec::new();
            for mut batch in std::mem::take(&mut open) {
                if !self.is_finished(batches, endpoint, &mut batch).await? {
                    still.push(batch);
                }
            }
            let finished = batches.open()?.len() > still.len();
            batches.remember(&still)?;
            open = still;
            if !finished {
                self.pause(batches.poll).await;
            }
        }
    }

    async fn pause(&self, time: Duration) {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = self.closing.notified() => {}
        }
    }

    async fn until_quiet(&self, batches: &Batches) {
        let mut before = usize::MAX;
        while before != batches.waiting().len() && !self.is_closed() {
            before = batches.waiting().len();
            self.pause(QUIET).await;
        }
    }

    /// Uploads what was not sent yet, in batches as large as may be. Batches of an earlier process come first: they
    /// may hold the replies.
    async fn send_waiting(
        &self,
        batches: &Batches,
        endpoint: &Endpoint,
        open: &mut Vec<Open>,
    ) -> Result<(), Error> {
        let is_resumed = !open.is_empty() && batches.sent() == 0;
        while !is_resumed && !self.is_closed() {
            let (mut file, mut keys) = (String::new(), Vec::new());
            for (key, waiting) in
                batches.waiting().iter_mut().filter(|(_, waiting)| waiting.sent_in.is_none())
            {
                if keys.len() == MOST || file.len() + waiting.line.len() > MOST_BYTES {
                    break;
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

    async fn upload(&self, endpoint: &Endpoint, file: String) -> Result<String, Error> {
        let bytes = bytes::Bytes::from(file);
        let url = address(endpoint, "files");
        let reply = self.call(endpoint, &url, |request| {
            let part =
                Part::stream_with_length(bytes.clone(), bytes.len() as u64).file_name("requests.jsonl");
            request.multipart(Form::new().text("purpose", "batch").part("file", part))
        });
        text(&json_of(&url, &reply.await?)?, &url, "id")
    }

    async fn create(&self, endpoint: &Endpoint, file: &str) -> Result<String, Error> {
        let url = address(endpoint, "batches");
        let body =
            json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"});
        let reply = self.call(endpoint, &url, |request| {
            request.header("content-type", "application/json").body(body.to_string())
        });
        text(&json_of(&url, &reply.await?)?, &url, "id")
    }

    /// Whether a batch is over; its replies are stored then, and what failed waits for the next one.
    async fn is_finished(
        &self,
        batches: &Batches,
        endpoint: &Endpoint,
        batch: &mut Open,
    ) -> Result<bool, Error> {
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
        let state = json_of(&url, &self.get(endpoint, &url).await?)?;
        let status = state["status"].as_str().unwrap_or_default();
        if status == "failed" {
            let reason: String = state["errors"].to_string().chars().take(500).collect();
            return Err(Error::Batch { id, reason });
        }
        if !["completed", "expired", "cancelled"].contains(&status) {
            return Ok(false);
        }
        for file in ["output_file_id", "error_file_id"].into_iter().filter_map(|name| state[name].as_str()) {
            let url = address(endpoint, &format!("files/{file}/content"));
            let content = self.get(endpoint, &url).await?;
            for line in content.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
                self.take(batches, endpoint, line).await?;
            }
        }
        self.send_again(batches, endpoint, &batch.file);
        Ok(true)
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
            self.keep(key, request.as_bytes(), &reply, 0, attempts).await?;
            self.count(reply.usage());
        }
        self.free(batches, key, reply.usage());
        batches.answer(key, Ok(()));
        Ok(())
    }

    /// What was reserved for a request goes.
    fn free(&self, batches: &Batches, key: &str, usage: crate::Usage) {
        let reserved = batches.waiting().get(key).map_or(0.0, |waiting| waiting.reserved);
        self.ledger.settle(reserved, usage);
    }

    /// What was sent and has no reply, because it failed or expired, goes into the next batch, a few times.
    fn send_again(&self, batches: &Batches, endpoint: &Endpoint, file: &str) {
        let mut given_up = Vec::new();
        let mut waiting = batches.waiting();
        let of_batch = waiting.iter_mut().filter(|(_, waiting)| waiting.sent_in.as_deref() == Some(file));
        for (key, waiting) in of_batch {
            waiting.sent_in = None;
            waiting.attempts += 1;
            if waiting.attempts > self.settings.retries {
                given_up.push((key.clone(), waiting.attempts));
            }
        }
        drop(waiting);
        for (key, attempts) in given_up {
            self.free(batches, &key, crate::Usage::default());
            let last = "the batch gave no reply to it".to_string();
            let (url, elapsed) = (endpoint.url.clone(), Duration::ZERO);
            batches
                .answer(&key, Err(Some(Error::GaveUp { url, attempts, elapsed, last, unreachable: false })));
        }
    }

    async fn find(&self, endpoint: &Endpoint, file: &str) -> Result<Option<String>, Error> {
        let url = address(endpoint, "batches?limit=100");
        let list = json_of(&url, &self.get(endpoint, &url).await?)?;
        let batches = list["data"].as_array().into_iter().flatten();
        let mut ours = batches.filter(|batch| batch["input_file_id"] == file);
        Ok(ours.next().and_then(|batch| batch["id"].as_str()).map(str::to_owned))
    }

    /// Asks the server to stop the batches under way; what they have finished is still paid, and fetched by the next
    /// run. Returns their number.
    pub async fn cancel_batches(&self) -> Result<usize, Error> {
        let Some(batches) = &self.batches else { return Ok(0) };
        let endpoint = self.endpoints.choose()?;
        let open = batches.open()?;
        for id in open.iter().filter_map(|batch| batch.id.as_deref()) {
            let url = address(endpoint, &format!("batches/{id}/cancel"));
            self.call(endpoint, &url, |request| request).await?;
        }
        Ok(open.len())
    }

    async fn get(&self, endpoint: &Endpoint, url: &str) -> Result<Vec<u8>, Error> {
        self.retried(url, || endpoint.request(Method::GET, url)).await
    }

    async fn call(
        &self,
        endpoint: &Endpoint,
        url: &str,
        with: impl Fn(reqwest::RequestBuilder) -> reqwest::RequestBuilder,
    ) -> Result<Vec<u8>, Error> {
        self.retried(url, || with(endpoint.request(Method::POST, url))).await
    }

    async fn retried(
        &self,
        url: &str,
        request: impl Fn() -> reqwest::RequestBuilder,
    ) -> Result<Vec<u8>, Error> {
        let started = tokio::time::Instant::now();
        for attempt in 1.. {
            let (last, reached) = match request().send().await {
                Ok(response) => {
                    let status = response.status().as_u16();
                    match response.bytes().await {
                        Ok(bytes) if (200..300).contains(&status) => return Ok(bytes.to_vec()),
                        Ok(bytes) => {
                            let body = self.endpoints.choose()?.excerpt(&bytes);
                            if !is_transient(status) {
                                return Err(Error::Refused { url: url.into(), status, body });
                            }
                            (format!("status {status}: {body}"), true)
                        }
                        Err(error) => (lost(&error).reason, true),
                    }
                }
                Err(error) => (lost(&error).reason, !error.is_connect()),
            };
            if attempt > self.settings.retries {
                let (attempts, elapsed) = (attempt, started.elapsed());
                return Err(Error::GaveUp {
                    url: url.into(),
                    attempts,
                    elapsed,
                    last,
                    unreachable: !reached,
                });
            }
            tokio::time::sleep(delay(attempt, self.settings.backoff, None)).await;
        }
        unreachable!("the loop ends by returning")
    }
}

fn address(endpoint: &Endpoint, path: &str) -> String {
    let base = endpoint.url.trim_end_matches("/chat/completions");
    format!("{base}/{path}")
}

fn json_of(url: &str, bytes: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(bytes).map_err(|e| Error::Batch { id: url.into(), reason: e.to_string() })
}

fn text(value: &Value, url: &str, name: &str) -> Result<String, Error> {
    let missing = || Error::Batch { id: url.into(), reason: format!("the reply has no {name}") };
    value[name].as_str().map(str::to_owned).ok_or_else(missing)
}
