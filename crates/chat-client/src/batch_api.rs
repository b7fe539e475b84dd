//! The requests of the Batch API.

use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use crate::Error;
use crate::client::Client;
use crate::endpoint::{Endpoint, lost};
use crate::retry::{delay, is_transient};

/// Largest file of replies that is read.
const MOST_DOWNLOADED: usize = 2 << 30;

impl Client {
    pub(crate) async fn upload(&self, endpoint: &Endpoint, file: String) -> Result<String, Error> {
        let bytes = bytes::Bytes::from(file);
        let url = address(endpoint, "files");
        let reply = self.call(endpoint, &url, |request| {
            let part =
                Part::stream_with_length(bytes.clone(), bytes.len() as u64).file_name("requests.jsonl");
            request.multipart(Form::new().text("purpose", "batch").part("file", part))
        });
        text(&json_of(&url, &reply.await?)?, &url, "id")
    }

    /// Asks for a batch. Where it is not known whether the server took the request, it is looked for before it is
    /// asked for again: a batch is paid for.
    pub(crate) async fn create(&self, endpoint: &Endpoint, file: &str) -> Result<String, Error> {
        let url = address(endpoint, "batches");
        let body =
            json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"});
        for attempt in 1.. {
            let request = endpoint.request(Method::POST, &url);
            let request = request.header("content-type", "application/json").body(body.to_string());
            match self.once(endpoint, &url, request).await {
                Ok(reply) => return text(&json_of(&url, &reply)?, &url, "id"),
                Err(Error::GaveUp { .. }) if attempt <= self.settings.retries => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(delay(attempt, self.settings.backoff, None)).await;
            if let Some(id) = self.find(endpoint, file).await? {
                return Ok(id);
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// The batch that was made of a file, among all of the account's.
    pub(crate) async fn find(&self, endpoint: &Endpoint, file: &str) -> Result<Option<String>, Error> {
        let mut after = String::new();
        loop {
            let url = address(endpoint, &format!("batches?limit=100{after}"));
            let list = json_of(&url, &self.get(endpoint, &url).await?)?;
            let batches = list["data"].as_array().map(Vec::as_slice).unwrap_or_default();
            if let Some(ours) = batches.iter().find(|batch| batch["input_file_id"] == file) {
                return Ok(ours["id"].as_str().map(str::to_owned));
            }
            match batches.last().and_then(|last| last["id"].as_str()) {
                Some(last) if list["has_more"] == true => after = format!("&after={last}"),
                _ => return Ok(None),
            }
        }
    }

    pub(crate) async fn get(&self, endpoint: &Endpoint, url: &str) -> Result<Vec<u8>, Error> {
        self.retried(endpoint, url, || endpoint.request(Method::GET, url)).await
    }

    pub(crate) async fn call(
        &self,
        endpoint: &Endpoint,
        url: &str,
        with: impl Fn(reqwest::RequestBuilder) -> reqwest::RequestBuilder,
    ) -> Result<Vec<u8>, Error> {
        self.retried(endpoint, url, || with(endpoint.request(Method::POST, url))).await
    }

    async fn retried(
        &self,
        endpoint: &Endpoint,
        url: &str,
        request: impl Fn() -> reqwest::RequestBuilder,
    ) -> Result<Vec<u8>, Error> {
        for attempt in 1.. {
            match self.once(endpoint, url, request()).await {
                Err(Error::GaveUp { .. }) if attempt <= self.settings.retries && !self.is_closed() => {}
                other => return other,
            }
            self.pause(delay(attempt, self.settings.backoff, None)).await;
        }
        unreachable!("the loop ends by returning")
    }

    /// Sends one request. `GaveUp` is what may go better another time.
    async fn once(
        &self,
        endpoint: &Endpoint,
        url: &str,
        request: reqwest::RequestBuilder,
    ) -> Result<Vec<u8>, Error> {
        let started = tokio::time::Instant::now();
        let gave_up = |last: String, unreachable: bool| Error::GaveUp {
            url: url.into(),
            attempts: 1,
            elapsed: started.elapsed(),
            last,
            unreachable,
        };
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Err(gave_up(lost(&error).reason, error.is_connect())),
        };
        let (status, mut bytes) = (response.status().as_u16(), Vec::new());
        while let Some(chunk) = response.chunk().await.map_err(|e| gave_up(lost(&e).reason, false))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MOST_DOWNLOADED {
                let reason = format!("a file of more than {MOST_DOWNLOADED} bytes");
                return Err(Error::Batch { id: url.into(), reason });
            }
        }
        if (200..300).contains(&status) {
            return Ok(bytes);
        }
        let body = endpoint.excerpt(&bytes);
        if is_transient(status) {
            return Err(gave_up(format!("status {status}: {body}"), false));
        }
        Err(Error::Refused { url: url.into(), status, body })
    }
}

pub(crate) fn address(endpoint: &Endpoint, path: &str) -> String {
    let base = endpoint.url.trim_end_matches("/chat/completions");
    format!("{base}/{path}")
}

pub(crate) fn json_of(url: &str, bytes: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(bytes).map_err(|e| Error::Batch { id: url.into(), reason: e.to_string() })
}

pub(crate) fn text(value: &Value, url: &str, name: &str) -> Result<String, Error> {
    let missing = || Error::Batch { id: url.into(), reason: format!("the reply has no {name}") };
    value[name].as_str().map(str::to_owned).ok_or_else(missing)
}
