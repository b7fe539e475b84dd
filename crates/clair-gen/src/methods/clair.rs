//! CLAIR: a stronger model revises the answer minimally.

use std::sync::Arc;

use anyhow::Result;
use chat_client::ChatRequest;

use super::{Methods, Row, with_schema};
use crate::asker::{Asked, Spent};
use crate::input::Answer;
use crate::output::Pair;
use crate::parse::checks::Around;
use crate::parse::{self, json};

/// The revision is chosen, the answer rejected.
pub async fn pair(methods: &Methods, answer: Arc<Answer>, spent: &mut Spent) -> Result<Row> {
    let asker = methods.asker()?;
    let messages = methods.clair.one(&answer, answer.response())?;
    let form = methods.clair.form();
    let request = with_form(asker.teacher(messages), methods);
    let prompt = answer.prompt();
    let around = Around { prompt: &prompt, answer: answer.response() };
    let asked = asker.ask(&answer.id, request, spent, |reply| parse::revision(reply, form, around)).await?;
    Ok(match asked {
        Asked::Got(revision, reply) => {
            let rejected = answer.response().to_string();
            let pair = Pair::new(answer, revision.text, rejected, *spent);
            Row::Pair(Box::new(Pair { rational: revision.reasoning, ..pair.finished(&reply) }))
        }
        Asked::Failed(failed) => Row::Failed(failed),
        Asked::Stopped => Row::Stopped,
    })
}

/// The request with the schema of a revision, where replies follow one.
pub fn with_form(request: ChatRequest, methods: &Methods) -> ChatRequest {
    with_schema(request, methods.clair.form(), json::revision_schema)
}
