//! Tokenization of pairs as TRL's `DPOTrainer` does it.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};
use tokenizers::Tokenizer as Inner;

use crate::{ChatTemplate, Error, Message, Record, SIMPLE, Text};

/// Where the chat template came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerSource {
    /// The model directory.
    Model,
    /// The model has none: [`SIMPLE`] is used.
    Simple,
    /// The user gave one.
    Override,
}

/// A model's tokenizer with its chat template and special tokens.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Inner,
    template: ChatTemplate,
    template_text: String,
    template_source: TokenizerSource,
    eos: Option<String>,
}

/// Token ids of one pair: the common prompt and the two completions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairTokens {
    /// Common start of prompt, prompt + chosen and prompt + rejected.
    pub prompt: Vec<u32>,
    /// What follows in prompt + chosen.
    pub chosen: Vec<u32>,
    /// What follows in prompt + rejected.
    pub rejected: Vec<u32>,
    /// Tokens at the end of the prompt that prompt + completion tokenizes differently.
    pub boundary: usize,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json` and the chat template of a model directory.
    /// `chat_template` replaces the model's: `simple`, or the text of a template.
    pub fn load(dir: &Path, chat_template: Option<&str>) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let unusable = |path: PathBuf, reason: String| Error::Tokenizer { path, reason };
        if !path.is_file() {
            return Err(unusable(path, "no such file; the model directory needs a fast tokenizer".into()));
        }
        let mut inner = Inner::from_file(&path).map_err(|e| unusable(path.clone(), e.to_string()))?;
        // Padding and truncation of the file would change token ids; TRL sets neither.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| unusable(path, e.to_string()))?;
        let config = optional_json(&dir.join("tokenizer_config.json"))?;
        let special = special_tokens(&config, &optional_json(&dir.join("special_tokens_map.json"))?);
        let (source, template_source) = match chat_template {
            Some("simple") => (SIMPLE.to_string(), TokenizerSource::Override),
            Some(text) => (text.to_string(), TokenizerSource::Override),
            None => match template_of(dir, &config)? {
                Some(text) => (text, TokenizerSource::Model),
                None => (SIMPLE.to_string(), TokenizerSource::Simple),
            },
        };
        let eos = special.get("eos_token").and_then(Value::as_str).map(str::to_owned);
        let template = ChatTemplate::new(&source, special, jiff::civil::DateTime::MIN)?;
        Ok(Self { inner, template, template_text: source, template_source, eos })
    }

    /// Where the chat template came from.
    pub fn template_source(&self) -> TokenizerSource {
        self.template_source
    }

    /// Text of the chat template.
    pub fn template_text(&self) -> &str {
        &self.template_text
    }

    /// Id of the end-of-sequence token, if it has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_deref().and_then(|eos| self.inner.token_to_id(eos))
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Text of token ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.inner.decode(ids, true).map_err(|e| Error::Template(format!("decoding failed: {e}")))
    }

    /// Text of one token id as the vocabulary spells it.
    pub fn token(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_else(|_| format!("<{id}>"))
    }

    /// Token ids of a conversation that asks for an answer.
    pub fn encode_chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        self.encode_chat(messages, true)
    }

    /// Token ids of plain text with the model's special tokens around it.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, true)
    }

    fn encode_chat(&self, messages: &[Message], generation: bool) -> Result<Vec<u32>, Error> {
        self.encode(&self.template.render(messages, &crate::Extras::default(), generation)?, false)
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, special);
        let encoding = encoding.map_err(|e| Error::Template(format!("tokenization failed: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokenizes one pair (`DPOTrainer._prepare_dataset`). Plain completions get the end-of-sequence
    /// token where it is missing. The completion starts where the prompt alone and prompt + completion
    /// diverge.
    pub fn pair(&self, record: &Record) -> Result<PairTokens, Error> {
        let wrap = |source| Error::Tokenize { record: record.id.clone(), source: Box::new(source) };
        let [prompt, chosen, rejected] = self.three(record).map_err(wrap)?;
        let shared = common_prefix(&prompt, &chosen).min(common_prefix(&prompt, &rejected));
        Ok(PairTokens {
            boundary: prompt.len() - shared,
            prompt: prompt[..shared].to_vec(),
            chosen: chosen[shared..].to_vec(),
            rejected: rejected[shared..].to_vec(),
        })
    }

    /// Ids of the prompt, of prompt + chosen and of prompt + rejected.
    fn three(&self, record: &Record) -> Result<[Vec<u32>; 3], Error> {
        match (&record.prompt, &record.chosen, &record.rejected) {
            (Text::Chat(prompt), Text::Chat(chosen), Text::Chat(rejected)) => {
                let with = |rest: &[Message]| self.encode_chat(&[prompt, rest].concat(), false);
                Ok([self.encode_chat(prompt, true)?, with(chosen)?, with(rejected)?])
            }
            (Text::Plain(prompt), Text::Plain(chosen), Text::Plain(rejected)) => {
                let with = |completion: &str| {
                    let eos = self.eos.as_deref().filter(|&eos| !completion.ends_with(eos)).unwrap_or("");
                    self.encode(&format!("{prompt}{completion}{eos}"), true)
                };
                Ok([self.encode(prompt, true)?, with(chosen)?, with(rejected)?])
            }
            _ => Err(Error::Template("prompt and completions are of different kinds".into())),
        }
    }
}

/// A pair ready for packing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedRow {
    /// The record's id.
    pub id: String,
    /// Its place in the data set, from 0.
    pub row: usize,
    /// Its tokens, truncated.
    pub tokens: PairTokens,
}

/// Pairs ready for packing, and what happened on the way.
#[derive(Debug, Clone, Default)]
pub struct Prepared {
    /// Rows kept, in order.
    pub rows: Vec<PreparedRow>,
    /// Ids of rows whose prompt alone reaches the maximum length.
    pub dropped: Vec<String>,
    /// Rows of which a completion was cut.
    pub truncated: usize,
    /// Rows whose prompt does not tokenize as the start of prompt + completion.
    pub boundary: usize,
}

/// Tokenizes pairs on all cores, drops those whose prompt reaches `max_length`, and cuts the others at
/// the end (TRL's `keep_start`).
pub fn prepare(
    tokenizer: &Tokenizer,
    records: &[Record],
    max_length: Option<usize>,
) -> Result<Prepared, Error> {
    let all: Vec<PairTokens> =
        records.par_iter().map(|record| tokenizer.pair(record)).collect::<Result<_, _>>()?;
    let mut prepared = Prepared::default();
    let max = max_length.unwrap_or(usize::MAX);
    for (row, (record, mut tokens)) in records.iter().zip(all).enumerate() {
        prepared.boundary += usize::from(tokens.boundary > 0);
        if tokens.prompt.len() >= max {
            prepared.dropped.push(record.id.clone());
            continue;
        }
        let room = max - tokens.prompt.len();
        prepared.truncated += usize::from(tokens.chosen.len().max(tokens.rejected.len()) > room);
        tokens.chosen.truncate(room);
        tokens.rejected.truncate(room);
        prepared.rows.push(PreparedRow { id: record.id.clone(), row, tokens });
    }
    Ok(prepared)
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn optional_json(path: &Path) -> Result<Value, Error> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let invalid = |e: serde_json::Error| Error::Tokenizer { path: path.into(), reason: e.to_string() };
    serde_json::from_str(&text).map_err(invalid)
}

/// The special tokens as text, from `tokenizer_config.json` or else `special_tokens_map.json`.
fn special_tokens(config: &Value, map: &Value) -> Map<String, Value> {
    let names = ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"];
    let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    names
        .into_iter()
        .filter_map(|name| {
            let text = text(&config[name]).or_else(|| text(&map[name]))?;
            Some((name.to_string(), Value::String(text)))
        })
        .collect()
}

/// A model's template: `chat_template.jinja`, or the string or the list's `default` in
/// `tokenizer_config.json`.
fn template_of(dir: &Path, config: &Value) -> Result<Option<String>, Error> {
    let file = dir.join("chat_template.jinja");
    if file.is_file() {
        return fs::read_to_string(&file).map(Some).map_err(Error::io(&file));
    }
    Ok(match &config["chat_template"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => list
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    })
}
