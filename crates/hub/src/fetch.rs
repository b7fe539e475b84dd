//! Requests: retried, resumed, checked.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use crate::cache::{Folder, create_parent};
use crate::{Error, Hub};

const ATTEMPTS: usize = 5;
/// Largest answer that is not a file.
const MAX_TEXT: u64 = 256 << 20;
/// Bytes between progress reports.
const CHUNK: usize = 1 << 16;

/// Bytes there, and in all.
type Progress<'a> = &'a dyn Fn(u64, u64);

/// What a response says of the file behind it.
#[derive(Debug)]
struct Facts {
    etag: String,
    size: Option<u64>,
}

pub(crate) fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_mins(1)))
        .user_agent(concat!("clair-apo/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}

/// Why one attempt failed.
enum Failure {
    /// Another attempt may do.
    Transient(String, Option<Duration>),
    Fatal(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl Hub {
    /// The body of an answer.
    pub(crate) fn text(&self, url: &str) -> Result<String, Error> {
        self.attempts(url, &mut || {
            let mut response = self.follow(url, 0)?;
            let body = response.body_mut().with_config().limit(MAX_TEXT).read_to_string();
            body.map_err(|e| Failure::Transient(e.to_string(), None))
        })
    }

    /// Downloads a file into the blobs of a folder and returns its path there.
    pub(crate) fn download(&self, url: &str, folder: &Folder, progress: Progress) -> Result<PathBuf, Error> {
        let facts = self.attempts(url, &mut || self.facts(url))?;
        let blob = folder.blob(&facts.etag);
        if blob.is_file() {
            return Ok(blob);
        }
        create_parent(&blob)?;
        // Another process may be downloading the same file: the second waits, and finds it there.
        let lock_path = folder.lock(&facts.etag);
        create_parent(&lock_path)?;
        let lock = File::create(&lock_path).map_err(Error::cache(&lock_path))?;
        lock.lock().map_err(Error::cache(&lock_path))?;
        if blob.is_file() {
            return Ok(blob);
        }
        let part = folder.blob(&format!("{}.incomplete", facts.etag));
        // Each attempt asks the Hub anew: the address it redirects to is signed and expires.
        self.attempts(url, &mut || {
            self.go_on(url, &part, facts.size, progress)?;
            let whole = is_whole(&part, &facts).map_err(Error::cache(&part))?;
            if !whole {
                fs::remove_file(&part).ok();
                return Err(Failure::Transient("the downloaded file is not the one announced".into(), None));
            }
            Ok(())
        })?;
        fs::rename(&part, &blob).map_err(Error::cache(&blob))?;
        Ok(blob)
    }

    /// The address is one of the Hub, and not only spelled like one.
    pub(crate) fn is_own(&self, url: &str) -> bool {
        url.strip_prefix(self.endpoint.trim_end_matches('/')).is_some_and(|rest| rest.starts_with('/'))
    }

    fn attempts<T>(&self, url: &str, attempt: &mut dyn FnMut() -> Result<T, Failure>) -> Result<T, Error> {
        let mut wait = self.backoff;
        let mut last = String::new();
        for number in 1..=ATTEMPTS {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Fatal(error)) => return Err(error),
                Err(Failure::Transient(reason, asked)) => {
                    last = reason;
                    if number < ATTEMPTS {
                        sleep(asked.unwrap_or(wait).min(Duration::from_mins(1)));
                        wait *= 2;
                    }
                }
            }
        }
        Err(Error::Unreachable { url: url.into(), attempts: ATTEMPTS, reason: last })
    }

    /// One request; the token goes to the Hub alone. Redirects are not followed.
    fn request(&self, url: &str, head: bool, range: Option<u64>) -> Result<Response<Body>, Failure> {
        let mut request = if head { self.agent.head(url) } else { self.agent.get(url) };
        // Compressed bodies have other lengths than the files.
        request = request.header("accept-encoding", "identity");
        if let Some(token) = self.token.as_ref().filter(|_| self.is_own(url)) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some(from) = range {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(|e| Failure::Transient(e.to_string(), None))?;
        check(url, &response)?;
        Ok(response)
    }

    /// A request with redirects followed.
    fn follow(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..6 {
            let response = self.request(&url, false, (from > 0).then_some(from))?;
            match location(&url, response.headers()) {
                Some(next) if response.status().is_redirection() => url = next,
                _ => return Ok(response),
            }
        }
        Err(Failure::Transient("too many redirects".into(), None))
    }

    /// Etag and size of a file. Redirects within the Hub are followed; where the file lies elsewhere, the
    /// Hub's own headers count.
    fn facts(&self, url: &str) -> Result<Facts, Failure> {
        let mut at = url.to_string();
        for _ in 0..6 {
            let response = self.request(&at, true, None)?;
            let headers = response.headers();
            let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
            let next = location(&at, headers).filter(|_| response.status().is_redirection());
            let etag = text("x-linked-etag").or_else(|| text("etag"));
            let linked = text("x-linked-size").is_some() || text("x-linked-etag").is_some();
            match (next, etag) {
                (Some(next), _) if !linked && self.is_own(&next) => at = next,
                (next, Some(etag)) => {
                    let size = text("x-linked-size")
                        .or_else(|| text("content-length").filter(|_| next.is_none()))
                        .and_then(|size| size.parse().ok());
                    let etag: String = etag.trim_start_matches("W/").trim_matches('"').into();
                    if etag.is_empty()
                        || !etag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
                    {
                        return Err(answer(url, format!("its etag {etag:?} cannot be a file name")));
                    }
                    return Ok(Facts { etag, size });
                }
                (Some(next), None) => at = next,
                (None, None) => return Err(answer(url, "the answer has no etag".into())),
            }
        }
        Err(answer(url, "too many redirects".into()))
    }

    /// Appends what is missing to the part of a file that is there.
    fn go_on(&self, url: &str, part: &Path, size: Option<u64>, progress: Progress) -> Result<(), Failure> {
        let open = OpenOptions::new().append(true).create(true).open(part);
        let mut file = open.map_err(Error::cache(part))?;
        let mut there = file.metadata().map_err(Error::cache(part))?.len();
        if size.is_some_and(|size| there >= size) && (there > 0 || size == Some(0)) {
            return Ok(());
        }
        let mut response = self.follow(url, there)?;
        if there > 0 && response.status().as_u16() != 206 {
            // The whole file comes again.
            file.set_len(0).map_err(Error::cache(part))?;
            there = 0;
        }
        let mut body = response.body_mut().as_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = body.read(&mut chunk).map_err(|e| Failure::Transient(e.to_string(), None))?;
            if n == 0 {
                break;
            }
            file.write_all(&chunk[..n]).map_err(Error::cache(part))?;
            there += n as u64;
            progress(there, size.unwrap_or(there));
        }
        if size.is_some_and(|size| there < size) {
            return Err(Failure::Transient(format!("the connection ended after {there} bytes"), None));
        }
        file.sync_all().map_err(Error::cache(part))?;
        Ok(())
    }
}

/// Size as announced and, where the etag is a SHA-256, the contents too.
fn is_whole(part: &Path, facts: &Facts) -> std::io::Result<bool> {
    let mut file = File::open(part)?;
    if facts.size.is_some_and(|size| file.metadata().is_ok_and(|meta| meta.len() != size)) {
        return Ok(false);
    }
    if facts.etag.len() != 64 || !facts.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(true);
    }
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher)?;
    Ok(format!("{:x}", hasher.finalize()) == facts.etag)
}

fn check(url: &str, response: &Response<Body>) -> Result<(), Failure> {
    let status = response.status().as_u16();
    let hint = match status {
        200..=399 => return Ok(()),
        408 | 429 | 500..=599 => {
            let header = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
            let wait = header.and_then(|text| text.parse().ok()).map(Duration::from_secs);
            return Err(Failure::Transient(format!("HTTP status {status}"), wait));
        }
        401 | 403 => "it is private or gated, or does not exist: set HF_TOKEN to a token that may read it",
        404 => "there is no such repository, revision or file",
        416 => "the part that was downloaded before does not fit; delete the .incomplete file",
        _ => "the Hub refuses the request",
    };
    Err(Failure::Fatal(Error::Refused { url: url.into(), status, hint }))
}

/// Where a redirect leads.
fn location(url: &str, headers: &HeaderMap) -> Option<String> {
    let to = headers.get("location")?.to_str().ok()?;
    if to.starts_with("http://") || to.starts_with("https://") {
        return Some(to.into());
    }
    let host = url.find("://").map_or(0, |at| at + 3);
    let host = url[host..].find('/').map_or(url.len(), |at| host + at);
    Some(format!("{}/{}", &url[..host], to.trim_start_matches('/')))
}

fn answer(url: &str, reason: String) -> Failure {
    Failure::Fatal(Error::Answer { url: url.into(), reason })
}
