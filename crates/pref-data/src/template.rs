//! Chat templates, rendered by minijinja as transformers renders them with Jinja2.

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, Error as JinjaError, ErrorKind, State};
use serde_json::{Map, Value};

use crate::python::{self, Dumps};
use crate::{Error, Message};

/// The template used for conversations when a model has none: the capitalised role, a colon, the
/// content and a blank line.
pub const SIMPLE: &str = "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

/// The ChatML template: `<|im_start|>role`, content, `<|im_end|>`.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Work a template may do, in instructions and 64-byte pieces of text made: far above any real one
/// (a 100,000-token conversation needs about 100,000), far below a hang or a full memory.
const FUEL: u64 = 3_000_000;
/// Longest source of a template; the longest real ones have about 25 kB.
const MAX_SOURCE: usize = 1 << 20;

/// What a conversation brings besides its messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Extras {
    /// Descriptions of the tools that the model may call (`tools` column).
    pub tools: Option<Value>,
    /// Further variables of the template (`chat_template_kwargs` column).
    pub kwargs: Map<String, Value>,
}

/// A compiled chat template with the special tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Map<String, Value>,
}

impl ChatTemplate {
    /// Compiles a template. `special` holds `bos_token` and the like as text; `now` is what
    /// `strftime_now` tells.
    pub fn new(source: &str, special: Map<String, Value>, now: DateTime) -> Result<Self, Error> {
        if source.len() > MAX_SOURCE {
            let bytes = source.len();
            return Err(Error::Template(format!("the template has {bytes} bytes, at most {MAX_SOURCE}")));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| template_error(&e))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(method);
        environment.set_formatter(|out, _, value| {
            out.write_str(&python::text(value)).map_err(|e| invalid(e.to_string()))
        });
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, JinjaError> {
            Err(invalid(message))
        });
        environment.add_function("strftime_now", move |format: &str| {
            jiff::fmt::strtime::format(format, now).map_err(|e| invalid(format!("strftime_now: {e}")))
        });
        environment.add_filter("tojson", to_json);
        environment.add_filter("string", |value: &Jinja| python::text(value));
        environment.add_filter("trim", |text: &Jinja, chars: Option<&str>| {
            let text = python::text(text);
            strip(&text, chars, true, true).to_string()
        });
        let sized =
            |value: &Jinja| matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String);
        environment.add_test("sequence", sized);
        environment.add_test("iterable", move |value: &Jinja| {
            sized(value) || matches!(value.kind(), ValueKind::Iterable | ValueKind::Undefined)
        });
        environment.add_template_owned("chat", plain_generation(source)).map_err(|e| template_error(&e))?;
        Ok(Self { environment, special })
    }

    /// Renders a conversation (`transformers.apply_chat_template`).
    pub fn render(
        &self,
        messages: &[Message],
        extras: &Extras,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        if messages.is_empty() {
            return Err(Error::Template("the conversation has no messages".into()));
        }
        let mut context = self.special.clone();
        context.insert("messages".into(), messages.iter().map(as_template_sees).collect());
        context.insert("tools".into(), extras.tools.clone().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.extend(extras.kwargs.clone());
        let template = self.environment.get_template("chat").map_err(|e| template_error(&e))?;
        template.render(Jinja::from(Serde(&context))).map_err(|e| template_error(&e))
    }
}

/// A message without its null keys, and with the reasoning under all the names that templates read.
fn as_template_sees(message: &Message) -> Value {
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .into_iter()
        .find_map(|name| message.get(name).filter(|value| !value.is_null()));
    let filled = message.iter().filter(|(_, value)| !value.is_null());
    let mut seen = Map::new();
    if let Some(reasoning) = reasoning {
        seen.insert("thinking".into(), reasoning.clone());
    }
    seen.extend(filled.map(|(key, value)| (key.clone(), value.clone())));
    if let Some(reasoning) = reasoning {
        seen.insert("reasoning_content".into(), reasoning.clone());
    }
    Value::Object(seen)
}

/// `{% generation %}` marks what the assistant said, for masks that pairs do not need: its body is kept.
fn plain_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        out.push_str(&rest[..start]);
        let Some(end) = rest[start + 2..].find("%}").map(|at| start + at + 4) else { break };
        let tag = &rest[start..end];
        let name = tag[2..tag.len() - 2].trim_matches(['-', '+', ' ', '\t', '\r', '\n']);
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "with", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Methods of Python's `str`, `dict` and `list`.
fn method(state: &mut State, value: &Jinja, name: &str, args: &[Jinja]) -> Result<Jinja, JinjaError> {
    let sides = match name {
        "strip" => Some((true, true)),
        "lstrip" => Some((true, false)),
        "rstrip" => Some((false, true)),
        _ => None,
    };
    if let (Some((left, right)), Some(text)) = (sides, value.as_str()) {
        let (chars,): (Option<&str>,) = minijinja::value::from_args(args)?;
        return Ok(Jinja::from(strip(text, chars, left, right)));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let drop = |c: char| chars.map_or_else(|| python::is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(drop) } else { text };
    if right { text.trim_end_matches(drop) } else { text }
}

fn invalid(message: String) -> JinjaError {
    JinjaError::new(ErrorKind::InvalidOperation, message)
}

fn template_error(error: &JinjaError) -> Error {
    let line = error.line().map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
    Error::Template(format!("{}{line}", error.detail().map_or_else(|| error.to_string(), str::to_owned)))
}

/// transformers' `tojson` filter: `json.dumps` with `ensure_ascii=False`.
fn to_json(value: &Jinja, args: Rest<Jinja>, kwargs: Kwargs) -> Result<String, JinjaError> {
    if value.is_undefined() {
        return Err(invalid("tojson of something undefined".into()));
    }
    let value: Value = serde_json::to_value(value)
        .map_err(|e| JinjaError::new(ErrorKind::BadSerialization, e.to_string()))?;
    if args.len() > 1 {
        return Err(invalid("tojson takes its options by name".into()));
    }
    let ensure_ascii = match args.first() {
        Some(given) => given.is_true(),
        None => kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let [item_separator, key_separator] =
        separators.map_or([None, None], |both| [0, 1].map(|i| both.get(i).cloned()));
    let dumps = Dumps {
        ensure_ascii,
        indent: kwargs.get("indent")?,
        item_separator,
        key_separator,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    dumps.run(value).map_err(|e| JinjaError::new(ErrorKind::BadSerialization, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn messages(value: Value) -> Vec<Message> {
        value.as_array().unwrap().iter().map(|m| m.as_object().unwrap().clone()).collect()
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, Map::new(), jiff::civil::date(2024, 7, 4).at(12, 5, 0, 0)).unwrap()
    }

    fn one(source: &str, message: Value) -> Result<String, Error> {
        template(source).render(&messages(json!([message])), &Extras::default(), false)
    }

    #[test]
    fn simple_renders_roles_and_generation_prompt() {
        let chat =
            messages(json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]));
        let text = template(SIMPLE).render(&chat, &Extras::default(), true).unwrap();
        assert_eq!(text, "User: Hi\n\nAssistant: Yo\n\nAssistant:");
        let text = template(CHATML).render(&chat[..1], &Extras::default(), true).unwrap();
        assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn a_template_that_raises_gives_its_own_message() {
        let source = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}ok";
        let chat = messages(json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]));
        let error = template(source).render(&chat, &Extras::default(), false).unwrap_err().to_string();
        assert!(error.contains("one turn only"), "{error}");
        assert_eq!(template(source).render(&chat[..1], &Extras::default(), false).unwrap(), "ok");
    }

    #[test]
    fn endless_and_exploding_templates_stop() {
        let user = json!({"role": "user", "content": "x"});
        let endless = "{% for i in range(10000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}";
        assert!(one(endless, user.clone()).is_err());
        let doubling = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
        assert!(one(doubling, user.clone()).is_err());
        assert!(one("{{ 'x' * 100000000000 }}", user.clone()).is_err());
        assert!(one("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", user.clone()).is_err());
        assert!(one("{% include '/etc/passwd' %}", user).is_err());
        let long = ChatTemplate::new(&" ".repeat(MAX_SOURCE + 1), Map::new(), DateTime::MIN);
        assert!(long.is_err());
    }

    #[test]
    fn python_habits_of_templates() {
        let user = json!({"role": "user", "content": " x\u{1f}", "gone": null, "n": [1.0, true, null]});
        let shows = |source: &str, want: &str| {
            assert_eq!(one(source, user.clone()).unwrap(), want, "{source}");
        };
        shows(
            "{{ messages[0] | tojson }}",
            r#"{"role": "user", "content": " x\u001f", "n": [1.0, true, null]}"#,
        );
        shows("{{ messages[0].n }}", "[1.0, True, None]");
        shows("{{ messages[0].content.strip() }}|{{ messages[0].content | trim }}", "x|x");
        shows("{{ strftime_now('%d %B %Y, %H:%M') }}", "04 July 2024, 12:05");
        shows("{{ 'a' is sequence }}{{ {} is sequence }}{{ 1 is iterable }}", "TrueTrueFalse");
        shows("{%- generation -%} {% set a = 1 %}b {%- endgeneration %}{{ a }}", "b");
        shows("{{ tools is none }}{{ documents }}", "TrueNone");
        assert!(ChatTemplate::new("a{%} b %}", Map::new(), DateTime::MIN).is_err());
    }

    #[test]
    fn tools_and_keyword_arguments_reach_the_template() {
        let chat = messages(json!([{"role": "user", "content": "q", "reasoning": "why"}]));
        let kwargs = json!({"enable_thinking": false}).as_object().unwrap().clone();
        let extras = Extras { tools: Some(json!([{"name": "f"}])), kwargs };
        let source = "{{ tools[0].name }} {{ enable_thinking }} {{ messages[0] | tojson }}";
        let want = r#"f False {"thinking": "why", "role": "user", "content": "q", "reasoning": "why", "reasoning_content": "why"}"#;
        assert_eq!(template(source).render(&chat, &extras, false).unwrap(), want);
    }
}
