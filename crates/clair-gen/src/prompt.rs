//! The messages to teachers and judges: one template a method, with its reply form.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use chat_client::ChatMessage;
use minijinja::{Environment, UndefinedBehavior, context, value::Serde};

use crate::input::Answer;
use crate::parse::Form;

/// Revision of an answer; the wording of all prompts is ours.
pub const CLAIR: &str = include_str!("prompts/clair.j2");
/// Comparison of two answers.
pub const JUDGE: &str = include_str!("prompts/judge.j2");
/// Grade of one answer.
pub const SCORE: &str = include_str!("prompts/score.j2");

/// Line between what is the same for every row and what is not.
const SEPARATOR: &str = "=== input ===";

/// How a prompt is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// One user message.
    Single,
    /// What stands above the line `=== input ===` as the system message.
    System,
}

/// A compiled prompt template. Its variables: `prompt` (the task as text), `messages`, `response`, `response_a`,
/// `response_b`, and `json`, true where replies follow a schema.
#[derive(Debug)]
pub struct Prompt {
    environment: Environment<'static>,
    style: Style,
    form: Form,
    /// Part above the line, where it is the same for every row.
    above: Option<String>,
    /// A template looks at the messages one by one.
    takes_messages: bool,
}

impl Prompt {
    /// Compiles a template.
    pub fn new(source: &str, style: Style, form: Form) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(1_000_000));
        let parts = source.split_once(&format!("\n{SEPARATOR}\n"));
        let (above, below) = match (parts, style) {
            (Some(parts), _) => parts,
            (None, Style::Single) => ("", source),
            (None, Style::System) => {
                bail!(
                    "the prompt template has no line {SEPARATOR:?}, above which the system message would stand; \
                     add it or leave out --prompt-style system"
                )
            }
        };
        for (name, part) in [("above", above), ("below", below)] {
            let added = environment.add_template_owned(name, part.to_string());
            added.context("the prompt template does not parse")?;
        }
        let mut used = HashSet::new();
        for (_, template) in environment.templates() {
            used.extend(template.undeclared_variables(false));
        }
        let variables = environment.get_template("above")?.undeclared_variables(false);
        let above = if variables.iter().all(|name| name == "json") {
            let rendered = environment.get_template("above")?.render(context! { json => form == Form::Json });
            Some(rendered.context("the prompt template fails")?)
        } else {
            None
        };
        Ok(Self { environment, style, form, above, takes_messages: used.contains("messages") })
    }

    /// Compiles a file, or the built-in template.
    pub fn read(file: Option<&Path>, built_in: &str, style: Style, form: Form) -> Result<Self> {
        let Some(path) = file else { return Self::new(built_in, style, form) };
        let source = fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
        Self::new(&source, style, form).with_context(|| path.display().to_string())
    }

    /// The form of the replies it asks for.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The messages for one answer.
    pub fn one(&self, answer: &Answer, response: &str) -> Result<Vec<ChatMessage>> {
        self.render(answer, &context! { response => response })
    }

    /// The messages for two answers to the same task.
    pub fn two(&self, answer: &Answer, a: &str, b: &str) -> Result<Vec<ChatMessage>> {
        self.render(answer, &context! { response_a => a, response_b => b })
    }

    fn render(&self, answer: &Answer, responses: &minijinja::Value) -> Result<Vec<ChatMessage>> {
        let messages: &[ChatMessage] = if self.takes_messages { &answer.messages } else { &[] };
        let values = context! {
            prompt => answer.prompt(),
            messages => minijinja::Value::from(Serde(messages)),
            json => self.form == Form::Json,
            ..responses.clone()
        };
        let part = |name: &str| {
            let template = self.environment.get_template(name).context("compiled just now")?;
            let text = template.render(&values);
            text.with_context(|| format!("the prompt template fails for id {}", answer.id))
        };
        let above = self.above.clone().map_or_else(|| part("above"), Ok)?;
        let below = part("below")?;
        Ok(match self.style {
            Style::System => vec![ChatMessage::system(above), ChatMessage::user(below)],
            Style::Single if above.is_empty() => vec![ChatMessage::user(below)],
            Style::Single => vec![ChatMessage::user(format!("{above}\n\n{below}"))],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        Answer {
            id: "a".into(),
            messages: vec![ChatMessage::user("2+2 < 5?")],
            responses: vec!["5 & 4".into()],
            scores: Vec::new(),
        }
    }

    #[test]
    fn the_task_and_the_answer_stand_in_the_prompt_unescaped() {
        let prompt = Prompt::new(CLAIR, Style::Single, Form::Markers).unwrap();
        let text = &prompt.one(&answer(), "5 & 4").unwrap()[0].content;
        assert!(
            text.contains("<task>\n2+2 < 5?\n</task>") && text.contains("<answer>\n5 & 4\n</answer>"),
            "{text}"
        );
        assert!(text.contains("<revision>") && !text.contains("===") && !text.contains("JSON"), "{text}");
    }

    #[test]
    fn every_prompt_has_both_forms_and_both_styles() {
        for source in [CLAIR, JUDGE, SCORE] {
            for (form, word) in [(Form::Json, "JSON object"), (Form::Markers, "exactly this form")] {
                let prompt = Prompt::new(source, Style::System, form).unwrap();
                let messages = if source == JUDGE {
                    prompt.two(&answer(), "x", "y")
                } else {
                    prompt.one(&answer(), "x")
                };
                let messages = messages.unwrap();
                assert_eq!([&messages[0].role, &messages[1].role], ["system", "user"]);
                assert!(messages[0].content.contains(word) && messages[1].content.contains("2+2 < 5?"));
            }
        }
    }

    #[test]
    fn unknown_variables_are_errors() {
        let custom = |text: &str| Prompt::new(text, Style::Single, Form::Markers);
        let prompt = custom("{{ messages[0].role }}: {{ prompt }} / {{ response }}").unwrap();
        assert_eq!(prompt.one(&answer(), "5 & 4").unwrap()[0].content, "user: 2+2 < 5? / 5 & 4");
        assert!(custom("{{ promt }}").unwrap().one(&answer(), "x").is_err());
        assert!(Prompt::new("{{ prompt }}", Style::System, Form::Markers).is_err());
    }
}
