//! From the command line to what a run needs.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use chat_client::{
    Budgets, ChatMessage, ChatRequest, Client, Error, InFlight, Price, Prices, Provider, Reasoning,
    ReplyStore, Server, Settings, Streaming, api_key, key_file,
};
use serde_json::{Map, Value, json};

use crate::args::{Args, JudgeBy, Method, PromptStyle, ReplyFormat, Resume, Stream, Ties};
use crate::asker::Asker;
use crate::gate::Gate;
use crate::input::Answer;
use crate::methods::{DropUnverified, Methods};
use crate::parse::Form;
use crate::prompt::{CLAIR, JUDGE, Prompt, SCORE, Style};

/// Methods in which a judge is asked.
const JUDGING: [Method; 2] = [Method::Judge, Method::JudgeOffpolicy];

/// Refuses what would do nothing or contradicts itself.
pub fn check(args: &Args, answers: &[Arc<Answer>]) -> Result<()> {
    let has = |method: Method| args.method.contains(&method);
    let judges = has(Method::Judge) || has(Method::JudgeOffpolicy);
    let revises = has(Method::Clair) || has(Method::Stronger);
    let mut methods = args.method.clone();
    methods.sort();
    methods.dedup();
    ensure!(methods.len() == args.method.len(), "--method names a method twice");
    if args.replay.is_some() {
        ensure!(args.method == [Method::Clair], "--replay has recorded replies of the method clair alone");
    } else if args.server.endpoint.is_empty() {
        let scored = answers.iter().all(|answer| !answer.scores.is_empty());
        let alone = args.method == [Method::JudgeOffpolicy];
        ensure!(
            alone && scored,
            "--endpoint and --model are needed (or --replay; or --method judge-offpolicy with `scores` in every row)"
        );
    }
    let asking = &args.asking;
    let judged = judges || args.gate.verify;
    ensure!(
        asking.judge_model.is_none() || judged,
        "--judge-model has no effect without a judge or --verify"
    );
    ensure!(asking.judge_by.is_none() || judges, "--judge-by has no effect without a judging method");
    ensure!(asking.ties.is_none() || judges, "--ties has no effect without a judging method");
    ensure!(!args.gate.verify || revises, "--verify has no effect without the method clair or stronger");
    for (name, value) in [("temperature", asking.temperature), ("top-p", asking.top_p)] {
        ensure!(
            value.is_none_or(|value| value.is_finite() && value >= 0.0),
            "--{name} must be a number of 0 or more"
        );
    }
    let server = &args.server;
    for (name, value) in [
        ("rpm", server.rpm),
        ("tpm", server.tpm),
        ("input-tpm", server.input_tpm),
        ("output-tpm", server.output_tpm),
        ("max-cost", server.max_cost),
    ] {
        ensure!(
            value.is_none_or(|value| value.is_finite() && value > 0.0),
            "--{name} must be a number above 0"
        );
    }
    let share = args.max_failure_rate.unwrap_or(0.5);
    ensure!((0.0..=1.0).contains(&share), "--max-failure-rate must be a share from 0 to 1");
    for (name, value) in
        [("timeout", server.timeout), ("deadline", server.deadline), ("batch-poll", server.batch_poll)]
    {
        ensure!(value.is_none_or(|value| value > 0.0), "--{name} must be a number of seconds above 0");
    }
    ensure!(server.max_in_flight != Some(0), "--max-in-flight must be 1 or more");
    Ok(())
}

/// What pairs are made with, all checked; the server is not asked anything yet, but for `--reply-format auto`.
pub async fn methods(args: &Args) -> Result<Methods> {
    let mut form = match args.asking.reply_format {
        Some(ReplyFormat::Json) => Form::Json,
        _ => Form::Markers,
    };
    let asker = if args.server.endpoint.is_empty() { None } else { Some(asker(args)?) };
    if let Some(asker) = &asker {
        let providers: Vec<Provider> = servers(args)?.iter().map(|s| Provider::of(&s.url)).collect();
        check_provider(args, &providers)?;
        // A dry run asks nothing, not even this.
        if args.asking.reply_format == Some(ReplyFormat::Auto) && !args.dry_run {
            form = probe(asker, &providers).await?;
        }
    }
    let style = match args.asking.prompt_style {
        Some(PromptStyle::System) => Style::System,
        _ => Style::Single,
    };
    let files = prompt_files(args)?;
    let prompt = |methods: &[Method], built_in| {
        let file = files.iter().find(|(method, _)| methods.contains(method)).map(|(_, path)| path.as_path());
        Prompt::read(file, built_in, style, form)
    };
    let judge_by = args.asking.judge_by.unwrap_or(JudgeBy::Compare);
    let (compares, scores) = match judge_by {
        JudgeBy::Compare => (&JUDGING[..], &[][..]),
        JudgeBy::Score => (&[][..], &JUDGING[..]),
    };
    Ok(Methods {
        asker,
        clair: prompt(&[Method::Clair], CLAIR)?,
        judge: prompt(compares, JUDGE)?,
        score: prompt(scores, SCORE)?,
        judge_by,
        ties: args.asking.ties.unwrap_or(Ties::Drop),
        gate: Gate::new(&args.gate)?,
        verify: args.gate.verify.then_some(DropUnverified(args.gate.drop_unverified)),
    })
}

/// `FILE` of the one method, or `METHOD=FILE`.
fn prompt_files(args: &Args) -> Result<Vec<(Method, PathBuf)>> {
    let file = |text: &String| {
        let named = text.split_once('=').and_then(|(name, path)| {
            // Pairs are verified by the judge's prompt.
            let judge = args.gate.verify.then_some(Method::Judge);
            let method = args.method.iter().copied().chain(judge).find(|method| method.name() == name)?;
            Some((method, PathBuf::from(path)))
        });
        let (method, path) = match (named, args.method.as_slice()) {
            (Some(named), _) => named,
            (None, [only]) => (*only, PathBuf::from(text)),
            _ => bail!("--prompt-file {text}: with several methods, give METHOD=FILE"),
        };
        ensure!(
            method != Method::Stronger,
            "--prompt-file has no effect on the method stronger, which sends the prompt as it is"
        );
        Ok((method, path))
    };
    let files: Vec<(Method, PathBuf)> = args.asking.prompt_file.iter().map(file).collect::<Result<_>>()?;
    let judges = files.iter().filter(|(method, _)| JUDGING.contains(method)).count();
    ensure!(judges <= 1, "--prompt-file: both judging methods use one prompt; give it once");
    Ok(files)
}

fn check_provider(args: &Args, providers: &[Provider]) -> Result<()> {
    let asking = &args.asking;
    let has = |provider| providers.contains(&provider);
    let anthropic = has(Provider::Anthropic);
    ensure!(!(anthropic && asking.seed.is_some()), "--seed has no effect with Anthropic's interface");
    ensure!(
        !(anthropic && asking.reply_format == Some(ReplyFormat::Json)),
        "--reply-format json is not offered for Anthropic's interface; leave it out"
    );
    ensure!(
        !(anthropic && asking.reasoning_effort.is_some()),
        "--reasoning-effort has no effect with Anthropic's interface; give --reasoning-budget TOKENS"
    );
    ensure!(
        !(has(Provider::OpenAi) && asking.reasoning_budget.is_some()),
        "--reasoning-budget has no effect with OpenAI's interface; give --reasoning-effort"
    );
    if let (Some(budget), most) = (asking.reasoning_budget, asking.max_tokens.unwrap_or(4096)) {
        ensure!(
            budget < most,
            "--reasoning-budget {budget} leaves no tokens of --max-tokens {most} for the reply"
        );
    }
    if args.server.batch_api {
        ensure!(providers.len() == 1, "--batch-api takes one endpoint");
        ensure!(
            asking.reply_format != Some(ReplyFormat::Auto),
            "--batch-api needs a --reply-format that is not auto, which asks the server first"
        );
    }
    ensure!(!(anthropic && args.server.batch_api), "--batch-api is offered for OpenAI's interface alone");
    Ok(())
}

/// Asks the server for a tiny reply by a schema.
async fn probe(asker: &Asker, providers: &[Provider]) -> Result<Form> {
    if providers.contains(&Provider::Anthropic) {
        return Ok(Form::Markers);
    }
    let mut request =
        asker.teacher(vec![ChatMessage::user("Reply with a JSON object whose field \"ok\" is true.")]);
    let schema = json!({
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false,
    });
    request.schema = Some(("probe".into(), schema));
    match asker.client.complete(&request).await {
        Ok(Some(stored)) if crate::parse::json::object(stored.reply.content()).is_ok() => Ok(Form::Json),
        Ok(Some(_)) | Err(Error::Refused { status: 400 | 404 | 422, .. }) => Ok(Form::Markers),
        Ok(None) => bail!("stopped before the server was asked for its reply format"),
        // Anything else says nothing about the format: guessing would ask for every row twice.
        Err(error) => Err(error).context("asking the server for its reply format (--reply-format auto)"),
    }
}

/// Servers with their shares and keys.
fn servers(args: &Args) -> Result<Vec<Server>> {
    let given = &args.server;
    let names = given.api_key_env.len();
    ensure!(
        names <= 1 || names == given.endpoint.len(),
        "--api-key-env names {names} variables for {} endpoints: give one, or one for each",
        given.endpoint.len()
    );
    let server = |(index, text): (usize, &String)| {
        let (url, weight) = match text.rsplit_once('=') {
            Some((url, weight)) => {
                let weight: f64 = weight.parse().with_context(|| format!("--endpoint {text}: the weight"))?;
                (url, weight)
            }
            None => (text.as_str(), 1.0),
        };
        ensure!(weight.is_finite() && weight > 0.0, "--endpoint {text}: the weight must be above 0");
        let key = if let Some(path) = &given.api_key_file {
            Some(key_file(path)?)
        } else {
            let name = given.api_key_env.get(index).or(given.api_key_env.first());
            api_key(name.map(String::as_str), url)?
        };
        Ok(Server { url: url.into(), weight, key })
    };
    given.endpoint.iter().enumerate().map(server).collect()
}

fn asker(args: &Args) -> Result<Asker> {
    let model = args.server.model.clone().context("--model is required with --endpoint")?;
    let settings = settings(args, &model)?;
    let (store, found) = ReplyStore::open(&args.out.join("replies"))?;
    if found.torn > 0 {
        tracing::warn!(
            "the last stored reply was cut off by a crash ({} bytes); it is asked for again",
            found.torn
        );
    }
    if found.damaged > 0 {
        tracing::warn!("{} stored replies are damaged; they are asked for again", found.damaged);
    }
    if args.resume == Resume::Never && !store.is_empty() {
        bail!(
            "{}: holds {} stored replies and --resume never was given; choose another --out or leave it out",
            args.out.display(),
            store.len()
        );
    }
    let asking = &args.asking;
    let reasoning = match (&asking.reasoning_effort, asking.reasoning_budget) {
        (Some(effort), _) => Some(Reasoning::Effort(effort.clone())),
        (None, budget) => budget.map(Reasoning::Budget),
    };
    let request = ChatRequest {
        model: model.clone(),
        temperature: asking.temperature,
        top_p: asking.top_p,
        max_tokens: asking.max_tokens,
        seed: asking.seed,
        reasoning,
        extra: extra(asking.extra_body.as_deref())?,
        ..ChatRequest::default()
    };
    let client = if args.server.batch_api {
        let poll = seconds(args.server.batch_poll, 30.0, "batch-poll")?;
        Client::batched(settings, store, &args.out.join("replies"), poll)?
    } else {
        Client::new(settings, store)?
    };
    Ok(Asker {
        client,
        request,
        judge_model: asking.judge_model.clone().unwrap_or(model),
        form_retries: asking.form_retries.unwrap_or(4),
        retry_failed: args.retry_failed,
    })
}

fn seconds(value: Option<f64>, default: f64, name: &str) -> Result<Duration> {
    let value = value.unwrap_or(default);
    Duration::try_from_secs_f64(value).with_context(|| format!("--{name} {value} is no duration"))
}

fn extra(text: Option<&str>) -> Result<Map<String, Value>> {
    let Some(text) = text else { return Ok(Map::new()) };
    let value: Value = serde_json::from_str(text).context("--extra-body is not JSON")?;
    let Value::Object(fields) = value else { bail!("--extra-body is no JSON object") };
    let own =
        ["model", "messages", "stream", "response_format", "temperature", "top_p", "max_tokens", "seed"];
    if let Some(name) = own.iter().find(|name| fields.contains_key(**name)) {
        bail!("--extra-body must not hold {name:?}, which has an option of its own");
    }
    Ok(fields)
}

fn settings(args: &Args, model: &str) -> Result<Settings> {
    let given = &args.server;
    let defaults = Settings::to("http://localhost", None);
    let in_flight = match given.max_in_flight {
        Some(calls) => InFlight::fixed(calls),
        None => InFlight::default(),
    };
    Ok(Settings {
        servers: servers(args)?,
        in_flight,
        budgets: Budgets {
            requests: given.rpm,
            tokens: given.tpm,
            input_tokens: given.input_tpm,
            output_tokens: given.output_tpm,
        },
        retries: given.retries.unwrap_or(defaults.retries),
        timeout: seconds(given.timeout, defaults.timeout.as_secs_f64(), "timeout")?,
        deadline: seconds(given.deadline, defaults.deadline.as_secs_f64(), "deadline")?,
        backoff: seconds(given.backoff, defaults.backoff.as_secs_f64(), "backoff")?,
        streaming: match given.stream {
            None | Some(Stream::Auto) => Streaming::Auto,
            Some(Stream::Always) => Streaming::Always,
            Some(Stream::Never) => Streaming::Never,
        },
        max_body: defaults.max_body,
        prices: prices(args, model)?,
        max_cost: given.max_cost,
    })
}

/// Prices of the models that are asked; none where one of them is not known.
fn prices(args: &Args, model: &str) -> Result<HashMap<String, Price>> {
    let given = &args.server;
    let asks = |methods: &[Method]| args.method.iter().any(|method| methods.contains(method));
    let teacher = asks(&[Method::Clair, Method::Stronger]).then_some(model);
    let judge = args.asking.judge_model.as_deref().unwrap_or(model);
    let judge = (asks(&JUDGING) || args.gate.verify).then_some(judge);
    let table = table(given.prices.as_deref())?;
    let half = if given.batch_api { 0.5 } else { 1.0 };
    let price = |name: &str| -> Result<Option<(String, Price)>> {
        let price = if let (Some(input), Some(output)) = (given.price_input, given.price_output) {
            let good = |price: f64| price.is_finite() && price >= 0.0;
            ensure!(
                good(input) && good(output),
                "--price-input and --price-output must be numbers of 0 or more"
            );
            Some(Price { input, output })
        } else {
            table.of(name)
        };
        Ok(price.map(|p| (name.to_string(), Price { input: p.input * half, output: p.output * half })))
    };
    let all: Option<HashMap<_, _>> =
        [teacher, judge].into_iter().flatten().map(price).collect::<Result<Vec<_>>>()?.into_iter().collect();
    Ok(all.unwrap_or_default())
}

fn table(path: Option<&Path>) -> Result<Prices> {
    let Some(path) = path else { return Ok(Prices::bundled()) };
    let text = fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
    Prices::parse(&text).map_err(anyhow::Error::msg).with_context(|| path.display().to_string())
}
