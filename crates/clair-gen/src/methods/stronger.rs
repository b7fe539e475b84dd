//! Stronger preferred: a stronger model answers the prompt itself.

use std::sync::Arc;

use anyhow::Result;

use super::{Methods, Row};
use crate::asker::{Asked, Spent};
use crate::input::Answer;
use crate::output::Pair;
use crate::parse::{self, Reason};

/// The stronger model's answer is chosen, the model's own rejected.
pub async fn pair(methods: &Methods, answer: Arc<Answer>, spent: &mut Spent) -> Result<Row> {
    let asker = methods.asker()?;
    let request = asker.teacher(answer.messages.clone());
    let own = answer.response().to_string();
    let parse = |reply: &chat_client::Reply| {
        let text = parse::answer(reply)?;
        if text == own.trim() { Err(Reason::Unchanged) } else { Ok(text) }
    };
    Ok(match asker.ask(&answer.id, request, spent, parse).await? {
        Asked::Got(text, reply) => {
            let pair = Pair::new(answer, text, own, *spent).finished(&reply);
            Row::Pair(Box::new(Pair { rational: reply.reasoning().trim().into(), ..pair }))
        }
        Asked::Failed(failed) => Row::Failed(failed),
        Asked::Stopped => Row::Stopped,
    })
}
