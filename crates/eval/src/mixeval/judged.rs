//! What the judge is asked, and how its replies are read.

use anyhow::{Context, Result};
use chat_client::ChatMessage;
use minijinja::{Environment, context};

use super::items::{Item, Kind, Target, letter};
use crate::judge::bracketed;

/// What a judge says of an answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Said {
    /// Score of a free answer, from 0 to 1.
    Score(f64),
    /// The option that was chosen.
    Option(usize),
    /// No option was chosen.
    None,
}

/// The question to the judge. Nothing in it tells which model answered.
pub fn question(item: &Item, response: &str) -> Result<Vec<ChatMessage>> {
    let environment = Environment::new();
    let render =
        |template: &str, values| environment.render_str(template, values).context("the prompt renders");
    let text = match (&item.target, item.kind) {
        (Target::Answers(answers), Kind::FreeForm) => render(
            include_str!("../prompts/free_form.j2"),
            context! { question => &item.prompt, answers, response },
        )?,
        _ => render(
            include_str!("../prompts/multiple_choice.j2"),
            context! { question => &item.prompt, options => item.choices(), response },
        )?,
    };
    Ok(vec![ChatMessage::user(text)])
}

/// The form that a reply ends with, in words.
pub fn form(kind: Kind) -> &'static str {
    match kind {
        Kind::FreeForm => "the score from 0.0 to 1.0 in double square brackets, such as [[0.7]]",
        Kind::MultipleChoice => {
            "the letter of the option in double square brackets, such as [[A]], or [[none]]"
        }
    }
}

/// Reads a reply.
pub fn parse(kind: Kind, options: usize, reply: &str) -> Option<Said> {
    match kind {
        Kind::FreeForm => bracketed(reply, |inside| {
            let score: f64 = inside.parse().ok()?;
            (0.0..=1.0).contains(&score).then_some(Said::Score(score))
        }),
        Kind::MultipleChoice => bracketed(reply, |inside| {
            if inside.eq_ignore_ascii_case("none") {
                return Some(Said::None);
            }
            (0..options).find(|&i| inside == letter(i).to_string()).map(Said::Option)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_and_others_are_not() {
        let free = |reply: &str| parse(Kind::FreeForm, 0, reply);
        assert_eq!(free("It matches. [[1.0]]"), Some(Said::Score(1.0)));
        assert_eq!(free("[[7]]"), None);
        let choice = |reply: &str| parse(Kind::MultipleChoice, 3, reply);
        assert_eq!(choice("It says the second. [[B]]"), Some(Said::Option(1)));
        assert_eq!(choice("[[none]]"), Some(Said::None));
        assert_eq!(choice("[[D]]"), None, "there is no fourth option");
    }
}
