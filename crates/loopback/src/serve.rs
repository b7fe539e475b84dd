//! Connections and requests.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::faults::Fault;
use crate::limits::Decision;
use crate::replies::{completion, events, message, said};
use crate::{Shared, batch};

type Answer = Response<BoxBody<Bytes, io::Error>>;

/// Accepts connections until the process ends.
pub async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).ok();
        shared.counts().connections += 1;
        let shared = shared.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, shared.clone()));
            http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.ok();
        });
    }
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Answer, Infallible> {
    let (parts, body) = request.into_parts();
    let Ok(body) = body.collect().await else { return Ok(status(400, "no body")) };
    let body = body.to_bytes();
    let path = parts.uri.path().trim_start_matches("/v1").to_string();
    let query = parts.uri.query().unwrap_or_default();
    Ok(match (parts.method, path.as_str()) {
        (Method::GET, "/models") => {
            json_answer(200, &json!({"object": "list", "data": [{"id": "loopback"}]}))
        }
        (Method::GET, "/stats") => {
            let counts = shared.counts();
            json_answer(
                200,
                &json!({"counts": *counts, "paid": counts.paid.len(), "paid_again": counts.paid_again()}),
            )
        }
        (Method::POST, "/chat/completions") => chat(&body, &shared, false).await,
        (Method::POST, "/messages") => chat(&body, &shared, true).await,
        (method, path) => match batch::answer(&shared, &method, path, query, &body) {
            Some((status, text)) => whole(status, "application/json", text),
            None => status(404, "no such path"),
        },
    })
}

/// Counts a request while it is worked on.
struct InFlight<'a>(&'a Shared);

impl<'a> InFlight<'a> {
    fn new(shared: &'a Shared) -> Self {
        let now = shared.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        let mut counts = shared.counts();
        counts.most_in_flight = counts.most_in_flight.max(now);
        Self(shared)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn chat(body: &Bytes, shared: &Shared, is_anthropic: bool) -> Answer {
    let _in_flight = InFlight::new(shared);
    let Ok(request) = serde_json::from_slice::<Value>(body) else { return status(400, "not JSON") };
    let behaviour = &shared.behaviour;
    let count = |kind: &str| *shared.counts().kinds.entry(kind.to_string()).or_default() += 1;
    if behaviour.unauthorized {
        count("unauthorized");
        return status(401, "bad key");
    }
    if behaviour.fails {
        count("fails");
        return status(500, "oops");
    }
    if behaviour.no_schema && !request["response_format"].is_null() {
        count("no_schema");
        return status(400, "response_format is not supported");
    }
    if behaviour.new_limit && !request["max_tokens"].is_null() {
        count("old_limit");
        return status(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.");
    }
    let said = said(&request, behaviour.words, &shared.script);
    let decision = shared.limits.take((said.prompt_tokens + said.completion_tokens) as f64);
    if !decision.passes {
        count("limited");
        return with_limits(status(429, "slow down"), decision);
    }
    let number = shared.number.fetch_add(1, Ordering::Relaxed);
    let latency = latency(behaviour.latency_ms, number);
    let stream = request["stream"] == true;
    let cut = Duration::from_millis(behaviour.cut_after_ms);
    if !cut.is_zero() && latency > cut && !stream {
        tokio::time::sleep(cut).await;
        count("cut_long");
        return whole_body(200, "application/json", Cut(Some(Bytes::from_static(b"{\"choi"))));
    }
    tokio::time::sleep(latency).await;
    if let Some(fault) = Fault::of(number, behaviour.faults) {
        count(fault.name());
        return with_limits(faulty(fault, &completion(&said)).await, decision);
    }
    // A good reply counts before it is sent: a client killed meanwhile may never have got it.
    count("good");
    *shared.counts().paid.entry(blake3::hash(body).into()).or_default() += 1;
    let answer = if is_anthropic {
        json_answer(200, &message(&said))
    } else if stream {
        whole(200, "text/event-stream", events(&said).into())
    } else {
        json_answer(200, &completion(&said))
    };
    with_limits(answer, decision)
}

/// Between half and one and a half times the mean, by the request's number.
fn latency(mean: f64, number: usize) -> Duration {
    let part = (number.wrapping_mul(2_654_435_761) >> 7) % 1000;
    Duration::from_secs_f64(mean / 1000.0 * (0.5 + part as f64 / 1000.0))
}

async fn faulty(fault: Fault, good: &Value) -> Answer {
    let text = good.to_string();
    match fault {
        Fault::Rate => {
            let mut answer = status(429, "slow down");
            answer.headers_mut().insert("retry-after-ms", hyper::header::HeaderValue::from_static("50"));
            answer
        }
        Fault::Error => status(500, "oops"),
        Fault::Unavailable => status(503, "try later"),
        Fault::Overloaded => status(529, "overloaded"),
        Fault::Cut => whole_body(200, "application/json", Cut(Some(Bytes::from_static(b"{\"choi")))),
        Fault::Truncated => whole(200, "application/json", text[..text.len() / 2].to_string().into()),
        Fault::Html => whole(200, "text/html", "<html>gateway</html>".into()),
        Fault::NoMarker => {
            let message = json!({"role": "assistant", "content": "I think it is fine."});
            json_answer(200, &json!({"choices": [{"message": message, "finish_reason": "stop"}]}))
        }
        Fault::Length => {
            let mut cut = good.clone();
            cut["choices"][0]["finish_reason"] = "length".into();
            json_answer(200, &cut)
        }
        Fault::Stall => {
            tokio::time::sleep(Duration::from_mins(1)).await;
            status(504, "too late")
        }
    }
}

fn with_limits(mut answer: Answer, decision: Decision) -> Answer {
    for (told, name) in decision.told.into_iter().zip(["requests", "tokens"]) {
        let Some([limit, remaining, reset]) = told else { continue };
        for (part, text) in [
            ("limit", format!("{limit:.0}")),
            ("remaining", format!("{:.0}", remaining.max(0.0))),
            ("reset", format!("{:.0}ms", 1000.0 * reset)),
        ] {
            let name = hyper::header::HeaderName::try_from(format!("x-ratelimit-{part}-{name}"));
            if let (Ok(name), Ok(value)) = (name, text.parse()) {
                answer.headers_mut().insert(name, value);
            }
        }
    }
    answer
}

fn status(code: u16, message: &str) -> Answer {
    json_answer(code, &json!({"error": {"message": message}}))
}

fn json_answer(code: u16, body: &Value) -> Answer {
    whole(code, "application/json", body.to_string().into())
}

fn whole(code: u16, kind: &'static str, body: Bytes) -> Answer {
    whole_body(code, kind, Full::new(body).map_err(|never| match never {}))
}

fn whole_body(
    code: u16,
    kind: &'static str,
    body: impl Body<Data = Bytes, Error = io::Error> + Send + Sync + 'static,
) -> Answer {
    let mut answer = Response::new(body.boxed());
    *answer.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or_default();
    answer.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    answer
}

/// A body that ends too early.
struct Cut(Option<Bytes>);

impl Body for Cut {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let cut = || io::Error::new(io::ErrorKind::ConnectionReset, "cut");
        Poll::Ready(Some(self.0.take().map(Frame::data).ok_or_else(cut)))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(5000)
    }
}
