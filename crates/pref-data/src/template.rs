//! Chat templates, rendered by minijinja as transformers renders them with Jinja2.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind, State};
use serde_json::{Map, Value};

use crate::{Error, Message};

/// The template used for conversations when a model has none: the capitalised role, a colon, the
/// content and a blank line.
pub const SIMPLE: &str = "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

/// Instructions a template may run; far above any real one, far below a hang.
const FUEL: u64 = 10_000_000;

/// A compiled chat template with the special tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Map<String, Value>,
}

impl ChatTemplate {
    /// Compiles a template. `special` holds `bos_token` and the like as text.
    pub fn new(source: &str, special: Map<String, Value>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| template_error(&e))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", source.to_string()).map_err(|e| template_error(&e))?;
        Ok(Self { environment, special })
    }

    /// Renders a conversation (`transformers.apply_chat_template`).
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Error> {
        let mut context = self.special.clone();
        context.insert("messages".into(), messages.iter().cloned().map(Value::Object).collect());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let template = self.environment.get_template("chat").map_err(|e| template_error(&e))?;
        template.render(Jinja::from(Serde(&context))).map_err(|e| template_error(&e))
    }
}

fn template_error(error: &minijinja::Error) -> Error {
    let line = error.line().map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
    Error::Template(format!("{}{line}", error.detail().map_or_else(|| error.to_string(), str::to_owned)))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`, as transformers' `tojson` filter.
fn to_json(_: &State, value: Serde<Value>, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.assert_all_used()?;
    let invalid = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let value = value.0;
    let mut out = Vec::new();
    if let Some(width) = indent {
        let spaces = vec![b' '; width];
        let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
        serde::Serialize::serialize(&value, &mut serde_json::Serializer::with_formatter(&mut out, formatter))
            .map_err(invalid)?;
    } else {
        serde::Serialize::serialize(&value, &mut serde_json::Serializer::with_formatter(&mut out, Python))
            .map_err(invalid)?;
    }
    Ok(String::from_utf8(out).expect("serde_json writes UTF-8"))
}

/// Python's default separators, `", "` and `": "`.
struct Python;

impl serde_json::ser::Formatter for Python {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn messages(value: Value) -> Vec<Message> {
        value.as_array().unwrap().iter().map(|m| m.as_object().unwrap().clone()).collect()
    }

    #[test]
    fn simple_renders_roles_and_generation_prompt() {
        let template = ChatTemplate::new(SIMPLE, Map::new()).unwrap();
        let chat =
            messages(json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]));
        assert_eq!(template.render(&chat, true).unwrap(), "User: Hi\n\nAssistant: Yo\n\nAssistant:");
    }

    #[test]
    fn a_template_that_raises_gives_its_own_message() {
        let source = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}ok";
        let template = ChatTemplate::new(source, Map::new()).unwrap();
        let chat = messages(json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]));
        let error = template.render(&chat, false).unwrap_err().to_string();
        assert!(error.contains("one turn only"), "{error}");
        assert_eq!(template.render(&chat[..1], false).unwrap(), "ok");
    }

    #[test]
    fn endless_templates_stop() {
        let source = "{% for i in range(10000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(source, Map::new()).unwrap();
        assert!(template.render(&[], false).is_err());
    }

    #[test]
    fn tojson_is_pythons() {
        let template = ChatTemplate::new("{{ messages[0] | tojson }}", Map::new()).unwrap();
        let chat = messages(json!([{"role": "user", "content": "a<b>é", "n": [1, 2]}]));
        let want = r#"{"role": "user", "content": "a<b>é", "n": [1, 2]}"#;
        assert_eq!(template.render(&chat, false).unwrap(), want);
    }
}
