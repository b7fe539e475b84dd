//! A model's tokenizer with its chat templates and special tokens.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::civil::DateTime;
use serde_json::{Map, Value};
use tokenizers::Tokenizer as Inner;

use crate::encode::{FastEncoder, Words};
use crate::gpt2;
use crate::{CHATML, ChatTemplate, Error, Extras, Message, SIMPLE};

/// Where the chat template came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateSource {
    /// The model directory.
    Model,
    /// The model has none: [`SIMPLE`] is used.
    Simple,
    /// The user gave one.
    Override,
}

/// A model's tokenizer with its chat templates and special tokens.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Inner,
    fast: Option<FastEncoder>,
    /// The faster way was wrong once.
    distrusted: AtomicBool,
    template: ChatTemplate,
    /// The template for conversations with tools, where the model has one of its own for them.
    tool_template: Option<ChatTemplate>,
    template_text: String,
    template_source: TemplateSource,
    special: Map<String, Value>,
    asks_for_date: bool,
    hash: blake3::Hash,
}

/// Text of `--chat-template`: `simple`, `chatml`, or the contents of a file.
pub fn read_chat_template(given: &str) -> Result<String, Error> {
    match given {
        "simple" => Ok(SIMPLE.into()),
        "chatml" => Ok(CHATML.into()),
        path => fs::read_to_string(path).map_err(|e| {
            Error::Template(format!("{path}: {e}; expected simple, chatml, or the file of a template"))
        }),
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json` and the chat templates of a model directory.
    /// `chat_template` is the text of a template that replaces the model's; `now` is the time that
    /// templates are told.
    pub fn load(dir: &Path, chat_template: Option<&str>, now: DateTime) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let unusable = |path: &Path, reason: String| Error::Tokenizer { path: path.into(), reason };
        let config = optional_json(&dir.join("tokenizer_config.json"))?;
        let special = special_tokens(&config, &optional_json(&dir.join("special_tokens_map.json"))?);
        let json = if path.is_file() {
            fs::read(&path).map_err(Error::io(&path))?
        } else {
            gpt2::tokenizer_json(dir, &config, &special)?
        };
        let mut inner = Inner::from_bytes(&json).map_err(|e| unusable(&path, e.to_string()))?;
        // Padding and truncation of the file would change token ids; TRL sets neither.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| unusable(&path, e.to_string()))?;
        let (templates, template_source) = match chat_template {
            Some(text) => (Templates::only(text), TemplateSource::Override),
            None => match Templates::of_model(dir, &config)? {
                Some(templates) => (templates, TemplateSource::Model),
                None => (Templates::only(SIMPLE), TemplateSource::Simple),
            },
        };
        let mut hasher = blake3::Hasher::new();
        let texts = [Some(&templates.default), templates.tool_use.as_ref()];
        let asks_for_date = texts.iter().flatten().any(|text| text.contains("strftime_now"));
        for text in texts.into_iter().flatten() {
            hasher.update(text.as_bytes()).update(&[0]);
        }
        if asks_for_date {
            hasher.update(now.to_string().as_bytes());
        }
        let hash =
            hasher.update(&json).update(Value::Object(special.clone()).to_string().as_bytes()).finalize();
        let compile = |text: &str| ChatTemplate::new(text, special.clone(), now);
        Ok(Self {
            fast: FastEncoder::new(&inner, &json),
            distrusted: AtomicBool::new(false),
            inner,
            template: compile(&templates.default)?,
            tool_template: templates.tool_use.as_deref().map(compile).transpose()?,
            template_text: templates.default,
            template_source,
            special,
            asks_for_date,
            hash,
        })
    }

    /// Where the chat template came from.
    pub fn template_source(&self) -> TemplateSource {
        self.template_source
    }

    /// Text of the chat template.
    pub fn template_text(&self) -> &str {
        &self.template_text
    }

    /// The chat template asks for the current date: token ids depend on the day.
    pub fn asks_for_date(&self) -> bool {
        self.asks_for_date
    }

    /// Hash of everything that token ids depend on besides the text.
    pub fn hash(&self) -> blake3::Hash {
        self.hash
    }

    /// Id of the end-of-sequence token, if it has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos().and_then(|eos| self.inner.token_to_id(eos))
    }

    /// Id of the token that starts a sequence, if it has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.get("bos_token").and_then(Value::as_str).and_then(|bos| self.inner.token_to_id(bos))
    }

    pub(crate) fn eos(&self) -> Option<&str> {
        self.special.get("eos_token").and_then(Value::as_str)
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
    pub fn encode_chat_prompt(&self, messages: &[Message], extras: &Extras) -> Result<Vec<u32>, Error> {
        self.encode_slowly(&self.render(messages, extras, true)?, false)
    }

    /// Token ids of plain text with the model's special tokens around it.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode_slowly(text, true)
    }

    /// Text of a conversation.
    pub fn render(&self, messages: &[Message], extras: &Extras, generation: bool) -> Result<String, Error> {
        let for_tools = self.tool_template.as_ref().filter(|_| extras.tools.is_some());
        for_tools.unwrap_or(&self.template).render(messages, extras, generation)
    }

    /// Token ids; `words` remembers pieces of earlier texts of this tokenizer.
    pub(crate) fn encode(&self, text: &str, special: bool, words: &mut Words) -> Result<Vec<u32>, Error> {
        let fast = self.fast.as_ref().filter(|_| !words.exact && !self.distrusted.load(Ordering::Relaxed));
        let ids = fast.and_then(|fast| fast.encode(&self.inner, text, special, words));
        ids.map_or_else(|| self.encode_slowly(text, special), Ok)
    }

    /// Token ids as the `tokenizers` crate makes them.
    fn encode_slowly(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, special);
        let encoding = encoding.map_err(|e| Error::Template(format!("tokenization failed: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Leaves everything to the `tokenizers` crate from now on.
    pub(crate) fn distrust(&self) {
        self.distrusted.store(true, Ordering::Relaxed);
    }

    /// There is a faster way for this tokenizer, and it has been right so far.
    pub fn is_fast(&self) -> bool {
        self.fast.is_some() && !self.distrusted.load(Ordering::Relaxed)
    }
}

/// The templates of a model by use.
struct Templates {
    default: String,
    tool_use: Option<String>,
}

impl Templates {
    fn only(text: &str) -> Self {
        Self { default: text.into(), tool_use: None }
    }

    /// `chat_template.jinja` and `additional_chat_templates/*.jinja`; without such a file the string or the
    /// list of named templates in `tokenizer_config.json`.
    fn of_model(dir: &Path, config: &Value) -> Result<Option<Self>, Error> {
        let read = |path: PathBuf| -> Result<Option<String>, Error> {
            if path.is_file() {
                fs::read_to_string(&path).map(Some).map_err(Error::io(&path))
            } else {
                Ok(None)
            }
        };
        let more = dir.join("additional_chat_templates");
        let default = match read(more.join("default.jinja"))? {
            Some(text) => Some(text),
            None => read(dir.join("chat_template.jinja"))?,
        };
        let tool_use = read(more.join("tool_use.jinja"))?;
        let (default, tool_use) = match (&config["chat_template"], default, tool_use) {
            (Value::String(text), None, None) => (Some(text.clone()), None),
            (Value::Array(list), None, None) => {
                let named = |name: &str| {
                    let entry = list.iter().find(|entry| entry["name"] == name)?;
                    entry["template"].as_str().map(str::to_owned)
                };
                (named("default"), named("tool_use"))
            }
            (_, default, tool_use) => (default, tool_use),
        };
        Ok(default.map(|default| Self { default, tool_use }))
    }
}

fn optional_json(path: &Path) -> Result<Value, Error> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let invalid = |e: serde_json::Error| Error::Tokenizer { path: path.into(), reason: e.to_string() };
    serde_json::from_str(&text).map_err(invalid)
}

/// The special tokens as text, from `tokenizer_config.json` or else `special_tokens_map.json`. Without a
/// padding token the end-of-sequence token stands for it, as TRL sets it.
fn special_tokens(config: &Value, map: &Value) -> Map<String, Value> {
    let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    let mut tokens = Map::new();
    for source in [&config["extra_special_tokens"], map, config] {
        for (name, value) in source.as_object().into_iter().flatten() {
            if let (true, Some(text)) = (name.ends_with("_token"), text(value)) {
                tokens.insert(name.clone(), text.into());
            }
        }
    }
    if let (false, Some(eos)) = (tokens.contains_key("pad_token"), tokens.get("eos_token").cloned()) {
        tokens.insert("pad_token".into(), eos);
    }
    tokens
}
