//! What a judge says: which of two answers is better, or a score.

use chat_client::Reply;

use super::{Form, Reason, json, usable};

/// Which of two answers is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The first.
    A,
    /// The second.
    B,
    /// Neither.
    Tie,
}

impl Verdict {
    /// The same with the answers the other way round.
    #[must_use]
    pub fn swapped(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
            Self::Tie => Self::Tie,
        }
    }
}

/// Scores go from this
pub const LOWEST: f64 = 1.0;
/// to this.
pub const HIGHEST: f64 = 10.0;

/// Reads a comparison.
pub fn verdict(reply: &Reply, form: Form) -> Result<Verdict, Reason> {
    let content = usable(reply)?;
    let text = match form {
        Form::Markers => tag(content, "verdict")?.to_string(),
        Form::Json => json::object(content)?["verdict"].as_str().ok_or(Reason::NotJson)?.to_string(),
    };
    match text.trim_matches(|c: char| !c.is_alphanumeric()).to_ascii_lowercase().as_str() {
        "a" | "answer a" => Ok(Verdict::A),
        "b" | "answer b" => Ok(Verdict::B),
        "tie" => Ok(Verdict::Tie),
        _ => Err(Reason::BadVerdict),
    }
}

/// Reads a score.
pub fn score(reply: &Reply, form: Form) -> Result<f64, Reason> {
    let content = usable(reply)?;
    let score = match form {
        Form::Markers => {
            let text = tag(content, "score")?.trim();
            let text = text.split_once('/').map_or(text, |(score, _)| score);
            text.trim().parse().map_err(|_| Reason::BadVerdict)?
        }
        Form::Json => json::object(content)?["score"].as_f64().ok_or(Reason::NotJson)?,
    };
    if (LOWEST..=HIGHEST).contains(&score) { Ok(score) } else { Err(Reason::BadVerdict) }
}

/// What stands between the last `<name>` and `</name>`: a judge that reasons may speak of them before.
fn tag<'a>(content: &'a str, name: &str) -> Result<&'a str, Reason> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let lower = content.to_ascii_lowercase();
    let start = lower.rfind(&open).ok_or(Reason::NoMarker)? + open.len();
    let len = lower[start..].find(&close).ok_or(Reason::Unterminated)?;
    Ok(&content[start..start + len])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reply(content: &str) -> Reply {
        let body = json!({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]});
        Reply::parse(body.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn verdicts_are_read() {
        let markers = |text| verdict(&reply(text), Form::Markers);
        assert_eq!(markers("<reasoning>x</reasoning><verdict>A</verdict>"), Ok(Verdict::A));
        assert_eq!(markers("I may say <verdict>A</verdict>, but <VERDICT> **B** </VERDICT>"), Ok(Verdict::B));
        assert_eq!(markers("<verdict>Tie.</verdict>"), Ok(Verdict::Tie));
        assert_eq!(markers("<verdict>both</verdict>"), Err(Reason::BadVerdict));
        assert_eq!([markers("A"), markers("<verdict>A")], [Err(Reason::NoMarker), Err(Reason::Unterminated)]);
        assert_eq!(verdict(&reply(r#"{"verdict": "B"}"#), Form::Json), Ok(Verdict::B));
        assert_eq!(Verdict::A.swapped().swapped(), Verdict::A);
    }

    #[test]
    fn scores_are_read() {
        let markers = |text| score(&reply(text), Form::Markers);
        assert_eq!([markers("<score>7.5</score>"), markers("<score> 8/10 </score>")], [Ok(7.5), Ok(8.0)]);
        assert_eq!(
            [markers("<score>11</score>"), markers("<score>NaN</score>")],
            [Err(Reason::BadVerdict); 2]
        );
        assert_eq!(score(&reply(r#"{"score": 3}"#), Form::Json), Ok(3.0));
    }
}
