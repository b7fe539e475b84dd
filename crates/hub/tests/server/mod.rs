//! A Hub on this machine, as the tests of several crates need it.

#![allow(clippy::unwrap_used, dead_code)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// The one commit.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does wrong, each once per file.
#[derive(Default, Clone)]
pub struct Faults {
    pub unavailable: bool,
    pub cut_after: Option<usize>,
    pub wrong_bytes: bool,
    pub ignore_range: bool,
    /// Refused for good.
    pub refused: bool,
}

/// A Hub of which every repository holds the same files, and the storage it redirects to.
pub struct Server {
    /// Address of the Hub.
    pub hub: String,
    files: HashMap<String, Vec<u8>>,
    faults: Mutex<HashMap<String, Faults>>,
    /// Request lines with the range asked for and whether a token came, Hub and storage.
    pub seen: Mutex<Vec<String>>,
    storage: String,
    private: bool,
}

impl Server {
    pub fn start(files: &[(&str, &[u8])], faults: Faults, private: bool) -> Arc<Self> {
        let [hub, storage] = [0, 0].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let server = Arc::new(Self {
            hub: address(&hub),
            storage: address(&storage),
            files: files.iter().map(|(name, bytes)| ((*name).to_string(), bytes.to_vec())).collect(),
            faults: Mutex::new(files.iter().map(|(name, _)| ((*name).to_string(), faults.clone())).collect()),
            seen: Mutex::default(),
            private,
        });
        for listener in [hub, storage] {
            let server = server.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let server = server.clone();
                    std::thread::spawn(move || server.serve(stream));
                }
            });
        }
        server
    }

    /// Changes what goes wrong with a file.
    pub fn fault(&self, name: &str, faults: Faults) {
        self.faults.lock().unwrap().insert(name.into(), faults);
    }

    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let (mut line, mut range, mut token) = (String::new(), None, false);
        reader.read_line(&mut line).ok()?;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(from) = header.strip_prefix("range: bytes=") {
                range = from.trim_end_matches('-').parse::<usize>().ok();
            }
            token |= header.starts_with("authorization: bearer secret");
        }
        let (method, path) = line.split_once(' ')?;
        let path = path.split(' ').next()?;
        self.seen.lock().unwrap().push(format!("{method} {path} {range:?} {token}"));
        let mut send = |status: &str, headers: &str, body: &[u8]| {
            let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n");
            stream.write_all(head.as_bytes()).ok()?;
            stream.write_all(body).ok()
        };
        if let Some(name) = path.strip_prefix("/storage/") {
            return self.store(name, range, send);
        }
        if self.private && !token {
            return send("401 Unauthorized", "Content-Length: 0\r\n", b"");
        }
        if path.starts_with("/api/") {
            let siblings: Vec<String> =
                self.files.keys().map(|name| format!("{{\"rfilename\": \"{name}\"}}")).collect();
            let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", siblings.join(","));
            return send("200 OK", &format!("Content-Length: {}\r\n", body.len()), body.as_bytes());
        }
        let name = path.split_once(&format!("/resolve/{COMMIT}/"))?.1;
        let Some(bytes) = self.files.get(name) else {
            return send("404 Not Found", "Content-Length: 0\r\n", b"");
        };
        let sha = format!("{:x}", Sha256::digest(bytes));
        let headers = format!(
            "Location: {}/storage/{name}\r\nX-Linked-Etag: \"{sha}\"\r\nX-Linked-Size: {}\r\nContent-Length: 0\r\n",
            self.storage,
            bytes.len()
        );
        send("302 Found", &headers, b"")
    }

    fn store(
        &self,
        name: &str,
        range: Option<usize>,
        mut send: impl FnMut(&str, &str, &[u8]) -> Option<()>,
    ) -> Option<()> {
        let bytes = &self.files[name];
        let mut faults = self.faults.lock().unwrap();
        let fault = faults.get_mut(name)?;
        if fault.refused {
            return send("403 Forbidden", "Content-Length: 0\r\n", b"");
        }
        if std::mem::take(&mut fault.unavailable) {
            return send("503 Busy", "Retry-After: 0\r\nContent-Length: 0\r\n", b"");
        }
        let from = range.filter(|_| !fault.ignore_range).unwrap_or(0);
        let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
        let rest = &bytes[from..];
        let headers = format!("Content-Length: {}\r\n", rest.len());
        if let Some(cut) = fault.cut_after.take() {
            return send(status, &headers, &rest[..cut.min(rest.len())]);
        }
        if std::mem::take(&mut fault.wrong_bytes) {
            return send(status, &headers, &vec![b'x'; rest.len()]);
        }
        send(status, &headers, rest)
    }
}
