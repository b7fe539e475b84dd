//! Downloads against a server on this machine that behaves as the Hub does, and misbehaves as networks do.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hub::{Error, Hub};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does wrong, each once per file.
#[derive(Default, Clone)]
struct Faults {
    unavailable: bool,
    cut_after: Option<usize>,
    wrong_bytes: bool,
    ignore_range: bool,
}

struct Server {
    hub: String,
    files: HashMap<String, Vec<u8>>,
    faults: Mutex<HashMap<String, Faults>>,
    /// Request lines with the range asked for and whether a token came, Hub and storage.
    seen: Mutex<Vec<String>>,
    storage: String,
    private: bool,
}

impl Server {
    fn start(files: &[(&str, &[u8])], faults: Faults, private: bool) -> Arc<Self> {
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

    fn client(&self, cache: &Path) -> Hub {
        let mut hub = Hub::from_env();
        hub.endpoint.clone_from(&self.hub);
        hub.cache = cache.into();
        hub.offline = false;
        hub.backoff = Duration::from_millis(1);
        hub
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
        let sha: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
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

fn quiet(_: &str, _: u64, _: u64) {}

fn rows() -> Vec<u8> {
    (0..4000)
        .flat_map(|i| format!("{{\"chosen\": \"a{i}\", \"rejected\": \"b{i}\"}}\n").into_bytes())
        .collect()
}

#[test]
fn a_data_set_comes_whole_through_every_fault_and_stays() {
    let rows = rows();
    let files: [(&str, &[u8]); 4] = [
        ("README.md", b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/*.jsonl\n---\n"),
        ("x/a.jsonl", &rows),
        ("x/b.jsonl", b""),
        ("other.jsonl", b"not wanted"),
    ];
    let cases = [
        Faults::default(),
        Faults { unavailable: true, cut_after: Some(1000), ..Faults::default() },
        Faults { cut_after: Some(500), ignore_range: true, ..Faults::default() },
        Faults { cut_after: Some(70), wrong_bytes: true, ..Faults::default() },
    ];
    for faults in cases {
        let server = Server::start(&files, faults.clone(), false);
        let dir = tempfile::tempdir().unwrap();
        let mut hub = server.client(dir.path());
        let splits = hub.dataset("some/set", None, None, &["train"], &quiet).unwrap();
        let paths = splits.split("train").unwrap();
        assert_eq!(paths.len(), 2);
        assert!(fs::read(&paths[0]).unwrap() == rows);
        assert!(fs::read(&paths[1]).unwrap().is_empty());
        let seen = server.seen.lock().unwrap().clone();
        assert!(!seen.iter().any(|line| line.contains("other.jsonl")), "what is not wanted is not fetched");
        if faults.cut_after == Some(1000) {
            assert!(seen.iter().any(|line| line.contains("x/a.jsonl Some(1000)")), "{seen:#?}");
        }
        // The second time nothing is fetched but the list of files, and offline not even that.
        server.seen.lock().unwrap().clear();
        assert_eq!(hub.dataset("some/set", None, None, &[], &quiet).unwrap(), splits);
        assert_eq!(server.seen.lock().unwrap().len(), 1);
        hub.offline = true;
        assert_eq!(hub.dataset("some/set", None, None, &[], &quiet).unwrap(), splits);
        assert_eq!(hub.dataset("some/set", Some(COMMIT), None, &[], &quiet).unwrap(), splits);
        assert_eq!(server.seen.lock().unwrap().len(), 1);
        let missing = hub.dataset("some/other", None, None, &[], &quiet).unwrap_err();
        assert!(missing.to_string().contains("HF_HUB_OFFLINE"), "{missing}");
        // An unreachable Hub is no obstacle either.
        hub.offline = false;
        hub.endpoint = "http://127.0.0.1:1".into();
        assert_eq!(hub.dataset("some/set", None, None, &[], &quiet).unwrap(), splits);
        let leftovers = fs::read_dir(dir.path().join("datasets--some--set/blobs")).unwrap();
        assert_eq!(leftovers.count(), 3, "README.md and two files, no parts");
    }
}

#[test]
fn a_model_comes_with_what_it_needs_and_no_more() {
    let files: [(&str, &[u8]); 6] = [
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("model.safetensors", b"weights"),
        ("pytorch_model.bin", b"weights again"),
        ("onnx/model.json", b"{}"),
        ("additional_chat_templates/tool_use.jinja", b"x"),
    ];
    let server = Server::start(&files, Faults::default(), true);
    let dir = tempfile::tempdir().unwrap();
    // The token comes from the environment; a private repository without one is refused with a hint.
    let error = server.client(dir.path()).model("some/model", None, &quiet).unwrap_err();
    assert!(matches!(error, Error::Refused { status: 401, .. }) && error.to_string().contains("HF_TOKEN"));
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_with_a_token", "--nocapture", "--include-ignored"])
        .env("HF_TOKEN", "secret\n")
        .env("HF_ENDPOINT", &server.hub)
        .env("HF_HOME", dir.path())
        .env("HUB_TEST_CHILD", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let model = dir.path().join("hub/models--some--model/snapshots").join(COMMIT);
    let mut names: Vec<String> = fs::read_dir(&model)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["additional_chat_templates", "config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read_to_string(dir.path().join("hub/models--some--model/refs/main")).unwrap(), COMMIT);
    let seen = server.seen.lock().unwrap();
    let of_storage: Vec<&String> = seen.iter().filter(|line| line.contains("/storage/")).collect();
    assert!(
        !of_storage.is_empty() && of_storage.iter().all(|line| line.ends_with("false")),
        "the token stays at home"
    );
}

/// Run by the test above with the environment that a user would set.
#[test]
fn child_with_a_token() {
    if std::env::var_os("HUB_TEST_CHILD").is_some() {
        Hub::from_env().model("some/model", None, &quiet).unwrap();
    }
}

#[test]
fn what_is_neither_here_nor_on_the_hub_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[("weights.bin", b"x")], Faults::default(), false);
    let hub = server.client(dir.path());
    assert!(hub.model("./nowhere", None, &quiet).unwrap_err().to_string().contains("./nowhere"));
    let error = hub.model("some/model", None, &quiet).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
    let error = hub.dataset("nothing.jsonl", None, None, &[], &quiet).unwrap_err().to_string();
    assert!(error.contains("no such file"), "{error}");
}
