//! The message to the teacher.

use anyhow::{Context, Result};
use minijinja::{Environment, UndefinedBehavior, context, value::Serde};

use crate::input::Answer;

/// The built-in prompt; its wording is ours.
pub const CLAIR: &str = include_str!("prompts/clair.j2");

/// A compiled prompt template with the variables `prompt`, `messages` and `response`.
#[derive(Debug)]
pub struct Prompt(Environment<'static>);

impl Prompt {
    /// Compiles a template.
    pub fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(1_000_000));
        environment
            .add_template_owned("prompt", source.to_string())
            .context("the prompt template does not parse")?;
        Ok(Self(environment))
    }

    /// The user message for one answer.
    pub fn render(&self, answer: &Answer) -> Result<String> {
        let template = self.0.get_template("prompt").context("compiled just now")?;
        let values = context! {
            prompt => answer.prompt(),
            messages => minijinja::Value::from(Serde(&answer.messages)),
            response => answer.response.clone(),
        };
        template.render(values).with_context(|| format!("the prompt template fails for id {}", answer.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chat_client::ChatMessage;

    fn answer() -> Answer {
        let messages = vec![ChatMessage { role: "user".into(), content: "2+2 < 5?".into() }];
        Answer { id: "a".into(), messages, response: "5 & 4".into() }
    }

    #[test]
    fn the_task_and_the_answer_stand_in_the_prompt_unescaped() {
        let text = Prompt::new(CLAIR).unwrap().render(&answer()).unwrap();
        assert!(
            text.contains("<task>\n2+2 < 5?\n</task>") && text.contains("<answer>\n5 & 4\n</answer>"),
            "{text}"
        );
    }

    #[test]
    fn unknown_variables_are_errors() {
        let custom = Prompt::new("{{ messages[0].role }}: {{ prompt }} / {{ response }}").unwrap();
        assert_eq!(custom.render(&answer()).unwrap(), "user: 2+2 < 5? / 5 & 4");
        assert!(Prompt::new("{{ promt }}").unwrap().render(&answer()).is_err());
    }
}
