//! A loopback chat-completion server with faults, one thread a connection.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// How the server misbehaves.
#[derive(Clone, Copy)]
pub struct Faults {
    /// Each fault comes once in so many requests; 0 for never.
    pub every: usize,
    /// Time before each answer.
    pub delay_ms: u64,
    /// Every request is refused.
    pub unauthorized: bool,
}

impl Faults {
    pub fn none() -> Self {
        Self { every: 0, delay_ms: 0, unauthorized: false }
    }

    /// Most requests fail, in seven ways.
    pub fn all() -> Self {
        Self { every: 1, delay_ms: 2, unauthorized: false }
    }
}

struct Shared {
    faults: Faults,
    number: AtomicUsize,
    counts: Mutex<HashMap<&'static str, usize>>,
}

/// A running server; it ends with the test process.
pub struct Server {
    port: u16,
    shared: Arc<Shared>,
}

impl Server {
    pub fn start(faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared { faults, number: AtomicUsize::new(0), counts: Mutex::default() });
        let for_thread = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = for_thread.clone();
                std::thread::spawn(move || serve(stream, &shared));
            }
        });
        Self { port, shared }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    /// Requests answered in this way.
    pub fn count(&self, kind: &str) -> usize {
        self.shared.counts.lock().unwrap().get(kind).copied().unwrap_or(0)
    }

    /// All requests.
    pub fn total(&self) -> usize {
        self.shared.counts.lock().unwrap().values().sum()
    }
}

const KINDS: [&str; 10] =
    ["good", "rate", "error", "good", "cut", "truncated", "html", "no_marker", "good", "stall"];

fn serve(mut stream: TcpStream, shared: &Shared) {
    while let Some(request) = read_request(&mut stream) {
        std::thread::sleep(Duration::from_millis(shared.faults.delay_ms));
        let number = shared.number.fetch_add(1, Ordering::Relaxed);
        let kind = match shared.faults {
            Faults { unauthorized: true, .. } => "unauthorized",
            Faults { every: 0, .. } => "good",
            _ => KINDS[number % KINDS.len()],
        };
        // A good answer counts before it is sent: a client killed meanwhile may never have got it.
        *shared.counts.lock().unwrap().entry(kind).or_default() += 1;
        let body = completion(&request).to_string();
        let sent = match kind {
            "rate" => respond(
                &mut stream,
                "429 Too Many Requests",
                "Retry-After: 0.05\r\n",
                "{\"error\": \"slow down\"}",
            ),
            "error" => respond(&mut stream, "500 Internal Server Error", "", "oops"),
            "unauthorized" => respond(&mut stream, "401 Unauthorized", "", "{\"error\": \"bad key\"}"),
            "truncated" => respond(&mut stream, "200 OK", "", &body[..body.len() / 2]),
            "html" => respond(&mut stream, "200 OK", "", "<html>gateway</html>"),
            "no_marker" => {
                let reply = json!({"choices": [{"message": {"content": "I think it is fine."}, "finish_reason": "stop"}]});
                respond(&mut stream, "200 OK", "", &reply.to_string())
            }
            "cut" => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{\"choi").ok();
                return;
            }
            "stall" => {
                std::thread::sleep(Duration::from_secs(3));
                return;
            }
            _ => respond(&mut stream, "200 OK", "", &body),
        };
        if sent.is_err() {
            return;
        }
    }
}

/// The reply depends on the request alone.
fn completion(request: &Value) -> Value {
    let content = request["messages"][0]["content"].as_str().unwrap_or_default();
    let part = |open: &str, close: &str| {
        let rest = content.split(open).nth(1).unwrap_or_default();
        rest.split(close).next().unwrap_or_default().trim().to_string()
    };
    let (task, answer) = (part("<task>", "</task>"), part("<answer>", "</answer>"));
    let revised =
        format!("<reasoning>\nto {task}\n</reasoning>\n<revision>\n{answer}, improved\n</revision>");
    let (text, finish) = match task.strip_prefix("say ") {
        Some("length") => (revised, "length"),
        Some("filtered") => (String::new(), "content_filter"),
        Some("unchanged") => (format!("<revision>{answer}</revision>"), "stop"),
        Some("never_marked") => ("no".to_string(), "stop"),
        _ => (revised, "stop"),
    };
    json!({
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
    })
}

fn respond(stream: &mut TcpStream, status: &str, headers: &str, body: &str) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes())
}

fn read_request(stream: &mut TcpStream) -> Option<Value> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    serde_json::from_slice(&body).ok()
}
