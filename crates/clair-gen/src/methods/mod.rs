//! Ways of making pairs, one file each.

pub mod clair;
pub mod judge;
pub mod stronger;
pub mod verify;

use std::sync::Arc;

use anyhow::{Context, Result};
use chat_client::ChatRequest;

use crate::args::{JudgeBy, Method, Ties};
use crate::asker::{Asker, Spent};
use crate::gate::Gate;
use crate::input::Answer;
use crate::output::{Failed, Pair};
use crate::parse::Form;
use crate::prompt::Prompt;

/// What became of one row.
#[derive(Debug)]
pub enum Row {
    /// A pair.
    Pair(Box<Pair>),
    /// None, and why.
    Failed(Failed),
    /// It was not asked to the end.
    Stopped,
}

/// Everything that a method needs.
#[derive(Debug)]
pub struct Methods {
    /// Asks; `None` where scores stand in the rows.
    pub asker: Option<Asker>,
    /// For revisions.
    pub clair: Prompt,
    /// For comparisons.
    pub judge: Prompt,
    /// For scores.
    pub score: Prompt,
    /// How a judge judges.
    pub judge_by: JudgeBy,
    /// What happens to ties.
    pub ties: Ties,
    /// Which pairs are kept.
    pub gate: Gate,
    /// Pairs are looked at by a judge; those not confirmed are left out.
    pub verify: Option<DropUnverified>,
}

/// Whether pairs that a judge does not confirm are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropUnverified(pub bool);

impl Methods {
    /// Makes a pair of a row. `spent` is added to, whatever becomes of it.
    pub async fn make(&self, method: Method, answer: Arc<Answer>, spent: &mut Spent) -> Result<Row> {
        let row = match method {
            Method::Clair => clair::pair(self, answer, spent).await?,
            Method::Stronger => stronger::pair(self, answer, spent).await?,
            Method::Judge | Method::JudgeOffpolicy => {
                return judge::pair(self, method, answer, spent).await.map(|row| self.gated(row));
            }
        };
        match self.gated(row) {
            Row::Pair(pair) => verify::pair(self, *pair, spent).await,
            other => Ok(other),
        }
    }

    fn asker(&self) -> Result<&Asker> {
        self.asker.as_ref().context("--endpoint and --model are needed")
    }

    /// The pair, if it passes the gate.
    pub fn gated(&self, row: Row) -> Row {
        let Row::Pair(pair) = row else { return row };
        match self.gate.refuses(&pair) {
            None => Row::Pair(pair),
            Some((reason, value)) => Row::Failed(Failed {
                id: pair.answer.id.clone(),
                reason: reason.into(),
                attempts: 0,
                last_error: format!("{value:.3}"),
            }),
        }
    }
}

/// The schema, where replies follow one.
fn with_schema(request: ChatRequest, form: Form, schema: fn() -> (String, serde_json::Value)) -> ChatRequest {
    ChatRequest { schema: (form == Form::Json).then(schema), ..request }
}
