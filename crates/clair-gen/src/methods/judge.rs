//! A judge picks the better and the worse of several answers: of the model's own, or of any models'.

use std::sync::Arc;

use anyhow::Result;
use chat_client::ChatRequest;

use super::{Methods, Row, with_schema};
use crate::args::{JudgeBy, Method, Ties};
use crate::asker::{Asked, Asker, Spent};
use crate::input::Answer;
use crate::output::{Failed, Pair};
use crate::parse::json;
use crate::parse::verdict::{Verdict, score, verdict};

/// The best answer is chosen, the worst rejected.
pub async fn pair(methods: &Methods, method: Method, answer: Arc<Answer>, spent: &mut Spent) -> Result<Row> {
    let given = method == Method::JudgeOffpolicy && !answer.scores.is_empty();
    let scored = if given {
        Asked::Got(answer.scores.clone(), chat_client::Reply::default())
    } else {
        match methods.judge_by {
            JudgeBy::Score => scores(methods, &answer, spent).await?,
            JudgeBy::Compare => wins(methods, &answer, spent).await?,
        }
    };
    let (scores, reply) = match scored {
        Asked::Got(scores, reply) => (scores, reply),
        Asked::Failed(failed) => return Ok(Row::Failed(failed)),
        Asked::Stopped => return Ok(Row::Stopped),
    };
    Ok(choose(methods.ties, answer, &scores, &reply, *spent))
}

/// The first of the best and the first of the worst; a tie where all are the same.
fn choose(ties: Ties, answer: Arc<Answer>, scores: &[f64], reply: &chat_client::Reply, spent: Spent) -> Row {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let (Some(&best), Some(worst)) = (order.first(), order.last().map(|&last| scores[last])) else {
        return Row::Stopped;
    };
    let tie = scores[best] == worst;
    if tie && ties == Ties::Drop {
        let last_error = format!("all answers are worth {worst}");
        return Row::Failed(Failed { id: answer.id.clone(), reason: "tie".into(), attempts: 0, last_error });
    }
    // Where all are the same, the first two; else the first of the worst.
    let worst = if tie { 1 } else { scores.iter().position(|&score| score == worst).unwrap_or(1) };
    let (chosen, rejected) = (answer.responses[best].clone(), answer.responses[worst].clone());
    let pair = Pair::new(answer, chosen, rejected, spent).finished(reply);
    Row::Pair(Box::new(Pair { tie: Some(tie), scores: Some([scores[best], scores[worst]]), ..pair }))
}

async fn scores(methods: &Methods, answer: &Answer, spent: &mut Spent) -> Result<Asked<Vec<f64>>> {
    let asker = methods.asker()?;
    let form = methods.score.form();
    let (mut all, mut last) = (Vec::new(), chat_client::Reply::default());
    for request in requests(methods, asker, answer)? {
        match asker.ask(&answer.id, request, spent, |reply| score(reply, form)).await? {
            Asked::Got(score, reply) => {
                all.push(score);
                last = reply;
            }
            Asked::Failed(failed) => return Ok(Asked::Failed(failed)),
            Asked::Stopped => return Ok(Asked::Stopped),
        }
    }
    Ok(Asked::Got(all, last))
}

/// Every two answers are compared; a win counts 1, a tie one half.
async fn wins(methods: &Methods, answer: &Answer, spent: &mut Spent) -> Result<Asked<Vec<f64>>> {
    let mut wins = vec![0.0; answer.responses.len()];
    let mut last = chat_client::Reply::default();
    for a in 0..wins.len() {
        for b in a + 1..wins.len() {
            let texts = [&answer.responses[a], &answer.responses[b]];
            match both_orders(methods, answer, texts[0], texts[1], spent).await? {
                Asked::Got(verdict, reply) => {
                    last = reply;
                    let share = match verdict {
                        Verdict::A => 1.0,
                        Verdict::B => 0.0,
                        Verdict::Tie => 0.5,
                    };
                    wins[a] += share;
                    wins[b] += 1.0 - share;
                }
                Asked::Failed(failed) => return Ok(Asked::Failed(failed)),
                Asked::Stopped => return Ok(Asked::Stopped),
            }
        }
    }
    Ok(Asked::Got(wins, last))
}

/// Compares two answers in both orders: what a judge prefers in one place only is a tie.
pub async fn both_orders(
    methods: &Methods,
    answer: &Answer,
    a: &str,
    b: &str,
    spent: &mut Spent,
) -> Result<Asked<Verdict>> {
    let asker = methods.asker()?;
    let form = methods.judge.form();
    let mut verdicts = Vec::new();
    let mut last = chat_client::Reply::default();
    for request in both(methods, asker, answer, a, b)? {
        match asker.ask(&answer.id, request, spent, |reply| verdict(reply, form)).await? {
            Asked::Got(verdict, reply) => {
                verdicts.push(verdict);
                last = reply;
            }
            other => return Ok(other),
        }
    }
    let agreed = verdicts[0] == verdicts[1].swapped();
    Ok(Asked::Got(if agreed { verdicts[0] } else { Verdict::Tie }, last))
}

/// The requests of a comparison in both orders.
pub fn both(methods: &Methods, asker: &Asker, answer: &Answer, a: &str, b: &str) -> Result<[ChatRequest; 2]> {
    let request = |first: &str, second: &str| -> Result<ChatRequest> {
        let request = asker.judge(methods.judge.two(answer, first, second)?);
        Ok(with_schema(request, methods.judge.form(), json::verdict_schema))
    };
    Ok([request(a, b)?, request(b, a)?])
}

/// All requests for a row: a score of each answer, or comparisons of every two.
pub fn requests(methods: &Methods, asker: &Asker, answer: &Answer) -> Result<Vec<ChatRequest>> {
    let texts = &answer.responses;
    if methods.judge_by == JudgeBy::Score {
        let score = |text: &String| -> Result<ChatRequest> {
            let request = asker.judge(methods.score.one(answer, text)?);
            Ok(with_schema(request, methods.score.form(), json::score_schema))
        };
        return texts.iter().map(score).collect();
    }
    let mut all = Vec::new();
    for (i, a) in texts.iter().enumerate() {
        for b in &texts[i + 1..] {
            all.extend(both(methods, asker, answer, a, b)?);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use chat_client::ChatMessage;

    fn chosen(ties: Ties, scores: &[f64]) -> Option<(String, String, bool)> {
        let answer = Answer {
            id: "1".into(),
            messages: vec![ChatMessage::user("q")],
            responses: ["a", "b", "c"].map(String::from).to_vec(),
            scores: Vec::new(),
        };
        match choose(ties, answer.into(), scores, &chat_client::Reply::default(), Spent::default()) {
            Row::Pair(pair) => Some((pair.chosen, pair.rejected, pair.tie.unwrap())),
            _ => None,
        }
    }

    #[test]
    fn the_best_and_the_worst_make_the_pair() {
        let pair = |a: &str, b: &str, tie| Some((a.to_string(), b.to_string(), tie));
        assert_eq!(chosen(Ties::Drop, &[1.0, 3.0, 2.0]), pair("b", "a", false));
        assert_eq!(chosen(Ties::Drop, &[2.0, 2.0, 1.0]), pair("a", "c", false));
        assert_eq!(chosen(Ties::Drop, &[2.0, 1.0, 1.0]), pair("a", "b", false));
        assert_eq!(chosen(Ties::Drop, &[2.0, 2.0, 2.0]), None);
        assert_eq!(chosen(Ties::Keep, &[2.0, 2.0, 2.0]), pair("a", "b", true));
    }
}
