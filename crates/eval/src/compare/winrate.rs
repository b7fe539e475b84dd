//! Which of two answers a judge prefers, asked in both orders.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use chat_client::ChatMessage;
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::{Value, json};

use super::regression::{fit, sigmoid};
use super::runs::Pair;
use crate::bootstrap::{Estimate, clustered, interval};
use crate::judge::{Judge, Took, bracketed};
use crate::sample::tell_line;

/// How often the second run wins.
#[derive(Debug, Clone, Serialize)]
pub struct WinRate {
    /// Pairs that the judge could tell apart or call equal, in both orders.
    pub pairs: usize,
    /// Pairs left out because a judgement could not be read.
    pub unread: usize,
    /// Share of wins, ties and disagreements of the two orders as half a win.
    pub raw: Estimate,
    /// The same at equal length; see [`fit`].
    pub length_controlled: Estimate,
    /// Pairs for which the answer shown first won in both orders: the judge goes by the place.
    pub by_place: usize,
    /// Characters of the answers of both runs on average.
    pub characters: [f64; 2],
}

impl WinRate {
    /// A line for people.
    pub fn text(&self) -> String {
        format!(
            "B wins {:.4} [{:.4}, {:.4}], at equal length {:.4} [{:.4}, {:.4}]; {} pairs, {} unread, {} decided by their \
             place alone; {:.0} and {:.0} characters on average",
            self.raw.mean,
            self.raw.low,
            self.raw.high,
            self.length_controlled.mean,
            self.length_controlled.low,
            self.length_controlled.high,
            self.pairs,
            self.unread,
            self.by_place,
            self.characters[0],
            self.characters[1]
        )
    }
}

/// Wins of the second run in both orders, from 0 to 1; `None` where a judgement could not be read.
pub type Wins = [Option<f64>; 2];

/// What a judge said of a pair, in both orders.
pub struct Said {
    /// How often the second answer wins.
    pub wins: Wins,
    /// The judge's own words.
    pub words: [String; 2],
}

impl Said {
    /// Wins of the second answer, where both judgements could be read.
    pub fn both(&self) -> Option<f64> {
        self.wins[0].zip(self.wins[1]).map(|(first, second)| f64::midpoint(first, second))
    }
}

/// Wins of the answer shown second: 1, of the first: 0, a tie: ½.
fn parse(reply: &str) -> Option<f64> {
    bracketed(reply, |inside| match inside.to_lowercase().as_str() {
        "1" => Some(0.0),
        "2" => Some(1.0),
        "tie" => Some(0.5),
        _ => None,
    })
}

/// The question which of two answers is better. Nothing in it tells which model wrote which.
pub fn question(prompt: &str, first: &str, second: &str) -> Result<Vec<ChatMessage>> {
    let template = include_str!("../prompts/prefer.j2");
    let text = Environment::new().render_str(template, context! { prompt, first, second });
    Ok(vec![ChatMessage::user(text.context("the prompt renders")?)])
}

/// Asks about all pairs in both orders. `None` where it was interrupted.
pub fn preferences(judge: &Judge, pairs: &[(&str, &str, &str)]) -> Result<Option<(Vec<Said>, Took)>> {
    let orders = pairs.iter().flat_map(|&(prompt, a, b)| [question(prompt, a, b), question(prompt, b, a)]);
    let questions = orders.collect::<Result<Vec<_>>>()?;
    let count = questions.len();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let tell = |done: usize| {
        if done.is_multiple_of(100) || done == count {
            tell_line(&format!("judged {done}/{count}"));
        }
    };
    let form = "[[1]], [[2]] or [[tie]]";
    let Some((verdicts, took)) =
        runtime.block_on(judge.all(questions, form, &|_, reply| parse(reply), tell))?
    else {
        return Ok(None);
    };
    let said = verdicts.as_chunks::<2>().0.iter().map(|[ab, ba]| Said {
        wins: [ab.read, ba.read.map(|first| 1.0 - first)],
        words: [ab.text.clone(), ba.text.clone()],
    });
    Ok(Some((said.collect(), took)))
}

/// The win-rate of the second run, what was said of each pair, and what it took.
pub fn ask(judge: &Judge, pairs: &[Pair]) -> Result<Option<(WinRate, Vec<Value>, Took)>> {
    let texts = pairs.iter().map(|pair| {
        let [a, b] = &pair.responses;
        (pair.question.as_str(), a.as_str(), b.as_str())
    });
    let Some((said, took)) = preferences(judge, &texts.collect::<Vec<_>>())? else { return Ok(None) };
    let row = |said: &Said| json!({"b_wins": said.wins, "wins": said.both(), "words": said.words});
    let rows = said.iter().map(row).collect();
    let wins: Vec<Wins> = said.iter().map(|said| said.wins).collect();
    Ok(Some((rate(pairs, &wins)?, rows, took)))
}

fn rate(pairs: &[Pair], said: &[Wins]) -> Result<WinRate> {
    let mut by_place = 0;
    let mut rows: Vec<Won> = Vec::new();
    let mut characters = [0.0; 2];
    for (pair, both) in pairs.iter().zip(said) {
        let [Some(first), Some(second)] = *both else { continue };
        // B loses where it stands second and wins where it stands first, or the other way.
        by_place += usize::from((first - second).abs() == 1.0);
        let [a, b] = [0, 1].map(|i| pair.responses[i].chars().count() as f64);
        characters = [characters[0] + a, characters[1] + b];
        rows.push((&pair.cluster, f64::midpoint(first, second), b - a));
    }
    let wins: Vec<f64> = rows.iter().map(|row| row.1).collect();
    let clusters: Vec<&str> = rows.iter().map(|row| row.0).collect();
    let raw = clustered(&wins, &clusters).context("no judgement could be read")?;
    let controlled = |rows: &[Won]| {
        let lengths: Vec<f64> = rows.iter().map(|row| row.2).collect();
        sigmoid(fit(&lengths, &rows.iter().map(|row| row.1).collect::<Vec<_>>())[0])
    };
    Ok(WinRate {
        pairs: rows.len(),
        unread: pairs.len() - rows.len(),
        raw,
        length_controlled: resampled(&rows, controlled),
        by_place,
        characters: characters.map(|sum| sum / rows.len() as f64),
    })
}

/// A pair: its cluster, wins, and how much longer the second answer is.
type Won<'a> = (&'a str, f64, f64);

/// An estimate of `of` by resampling clusters of rows.
fn resampled(rows: &[Won], of: impl Fn(&[Won]) -> f64) -> Estimate {
    let mut clusters: BTreeMap<&str, Vec<Won>> = BTreeMap::new();
    rows.iter().for_each(|row| clusters.entry(row.0).or_default().push(*row));
    let clusters: Vec<Vec<Won>> = clusters.into_values().collect();
    let [low, high] = interval(clusters.len(), 500, |drawn| {
        of(&drawn.flat_map(|i| clusters[i].iter().copied()).collect::<Vec<_>>())
    });
    Estimate { mean: of(rows), low, high }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(id: usize, lengths: [usize; 2]) -> Pair {
        Pair {
            id: id.to_string(),
            cluster: id.to_string(),
            group: String::new(),
            scores: [0.0; 2],
            question: "q".into(),
            responses: lengths.map(|n| "x".repeat(n)),
        }
    }

    #[test]
    fn a_judge_that_goes_by_the_place_gives_no_winner() {
        let pairs: Vec<Pair> = (0..40).map(|i| pair(i, [100, 100 + i])).collect();
        // In both orders the first: B loses where it is second, and wins where it is first.
        let rate = rate(&pairs, &[[Some(0.0), Some(1.0)]; 40]).unwrap();
        assert_eq!((rate.raw.mean, rate.by_place), (0.5, 40));
        assert!((rate.length_controlled.mean - 0.5).abs() < 1e-6);
    }

    #[test]
    fn unread_judgements_are_left_out_and_counted() {
        let pairs: Vec<Pair> = (0..4).map(|i| pair(i, [10, 10])).collect();
        let said =
            [[Some(1.0), Some(1.0)], [Some(1.0), None], [Some(0.0), Some(0.0)], [Some(0.5), Some(1.0)]];
        let rate = rate(&pairs, &said).unwrap();
        assert_eq!((rate.pairs, rate.unread, rate.raw.mean), (3, 1, (1.0 + 0.0 + 0.75) / 3.0));
        assert_eq!(parse("First says more. [[1]]"), Some(0.0));
        assert_eq!((parse("[[Tie]]"), parse("[[3]]")), (Some(0.5), None));
    }
}
