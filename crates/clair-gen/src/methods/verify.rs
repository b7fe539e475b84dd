//! A judge looks whether a pair's chosen text is better.

use anyhow::Result;

use super::{DropUnverified, Methods, Row, judge};
use crate::asker::{Asked, REQUEST_FAILED, Spent};
use crate::output::{Failed, Pair};
use crate::parse::verdict::Verdict;

/// The pair with what the judge says of it.
pub async fn pair(methods: &Methods, mut pair: Pair, spent: &mut Spent) -> Result<Row> {
    let Some(DropUnverified(drop)) = methods.verify else { return Ok(Row::Pair(Box::new(pair))) };
    let asked = judge::both_orders(methods, &pair.answer, &pair.chosen, &pair.rejected, spent).await?;
    let (verified, why) = match asked {
        Asked::Got(Verdict::A, _) => (Some(true), "the judge prefers the chosen text"),
        Asked::Got(Verdict::B, _) => (Some(false), "the judge prefers the rejected text in both orders"),
        Asked::Got(Verdict::Tie, _) => (Some(false), "the judge has no preference that holds in both orders"),
        // The next run asks the judge again; what is bought stays in the store.
        Asked::Failed(failed) if failed.reason == REQUEST_FAILED => return Ok(Row::Failed(failed)),
        Asked::Failed(_) => (None, "the judge refused the request, or its replies could not be read"),
        Asked::Stopped => return Ok(Row::Stopped),
    };
    if drop && verified != Some(true) {
        let (id, reason) = (pair.answer.id.clone(), "unverified".into());
        return Ok(Row::Failed(Failed { id, reason, attempts: 0, last_error: why.into() }));
    }
    pair.verified = verified;
    pair.spent = *spent;
    Ok(Row::Pair(Box::new(pair)))
}
