//! `eval sample --endpoint`: answers from an OpenAI-compatible server.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::sample::tell_line;
use anyhow::{Context, Result, bail};
use chat_client::{ChatMessage, ChatRequest, Client, InFlight, ReplyStore, Settings, api_key};
use pref_data::Message;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::args::SampleArgs;
use crate::sample::{Answers, INTERRUPTED, Outcome, Prompt, finish};

/// The name of the only model that a server has.
pub fn only_model(endpoint: &str, key_variable: Option<&str>) -> Result<String> {
    let url = format!("{}/models", endpoint.trim_end_matches('/'));
    let mut request = ureq::get(&url);
    if let Some(key) = api_key(key_variable, endpoint)? {
        request = request.header("authorization", format!("Bearer {}", key.expose_secret()));
    }
    let hint = || format!("{url}: cannot tell which model to ask; give its name with --model");
    let text = request.call().and_then(|mut reply| reply.body_mut().read_to_string()).with_context(hint)?;
    let list: Value = serde_json::from_str(&text).with_context(hint)?;
    let names: Vec<&str> =
        list["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str()).collect();
    match names[..] {
        [name] => Ok(name.to_string()),
        _ => bail!("{url} names {} models; give one of them with --model: {}", names.len(), names.join(", ")),
    }
}

/// Answers prompts with a server; every reply is stored beside the output. `tell` gets `(answers, all)`.
pub async fn run(
    args: &SampleArgs,
    endpoint: &str,
    prompts: &[Prompt],
    mut tell: impl FnMut(usize, usize),
) -> Result<Outcome> {
    let sampling = &args.sampling;
    let settings = json!({
        "endpoint": endpoint, "model": args.model, "max_new_tokens": args.max_new_tokens,
        "sampling": sampling.record(), "samples": args.samples,
    });
    let mut name = args.out.as_os_str().to_owned();
    name.push(".replies");
    let (store, found) = ReplyStore::open(&PathBuf::from(name))?;
    if found.torn > 0 {
        tell_line(&format!(
            "WARNING: the last reply was cut off by a crash ({} bytes); it is asked for again",
            found.torn
        ));
    }
    let settings_of_client = Settings {
        in_flight: args.answering.max_in_flight.map_or_else(InFlight::default, InFlight::fixed),
        ..Settings::to(endpoint, api_key(args.answering.api_key_env.as_deref(), endpoint)?)
    };
    let client = Arc::new(Client::new(settings_of_client, store)?);
    let mut answers = Answers::open(&args.out, &settings, prompts, args.samples)?;
    let mut requests = Vec::new();
    for (index, prompt) in prompts.iter().enumerate().filter(|(_, prompt)| !answers.has(&prompt.id)) {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let message = |m: &Message| -> Option<ChatMessage> {
            Some(ChatMessage { role: text(m.get("role"))?, content: text(m.get("content"))? })
        };
        let messages: Option<Vec<ChatMessage>> = prompt.messages.iter().map(message).collect();
        let messages = messages
            .with_context(|| format!("prompt {}: a message without role and text content", prompt.id))?;
        let request = ChatRequest {
            model: args.model.clone(),
            messages,
            temperature: Some(sampling.temperature.unwrap_or(0.0)),
            top_p: sampling.top_p,
            max_tokens: Some(u32::try_from(args.max_new_tokens).unwrap_or(u32::MAX)),
            seed: sampling.seed,
            extra: sampling.fields(),
            sample: (index % args.samples) as u32,
            ..ChatRequest::default()
        };
        requests.push((index, request));
    }
    // Only now that every row is known to be good: what is under way must not be dropped.
    let mut tasks = JoinSet::new();
    for (index, request) in requests {
        let client = client.clone();
        tasks.spawn(async move { (index, client.complete(&request).await) });
    }
    let mut first_error: Option<(String, anyhow::Error)> = None;
    loop {
        let joined = tokio::select! {
            joined = tasks.join_next() => joined,
            () = tokio::time::sleep(Duration::from_millis(200)) => {
                if INTERRUPTED.load(Ordering::Relaxed) {
                    client.close();
                }
                continue;
            }
        };
        let Some(joined) = joined else { break };
        let (index, result) = joined.context("a task panicked; this is a bug")?;
        match result {
            Ok(Some(stored)) => {
                let (reply, tokens) = (&stored.reply, stored.reply.usage().completion_tokens);
                let columns = vec![
                    ("response", reply.content().into()),
                    ("finish_reason", reply.finish_reason().into()),
                    ("completion_tokens", tokens.into()),
                ];
                if let Err(error) = answers.push(&prompts[index], columns) {
                    client.close();
                    first_error.get_or_insert((prompts[index].id.clone(), error));
                }
                tell(answers.len(), prompts.len());
            }
            Ok(None) => {}
            Err(error) => {
                if error.is_setup() {
                    client.close();
                }
                first_error.get_or_insert((prompts[index].id.clone(), error.into()));
            }
        }
    }
    match first_error {
        Some((id, error)) => Err(error.context(format!(
            "prompt {id} has no answer ({} of {} are saved; run again to go on)",
            answers.len(),
            prompts.len()
        ))),
        None => finish(answers, prompts),
    }
}
