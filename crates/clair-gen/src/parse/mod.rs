//! What teachers and judges reply, read strictly: what is not clearly an answer in the form that was asked for is a
//! failure with a reason, never a pair.

pub mod checks;
pub mod json;
pub mod markers;
pub mod verdict;

use chat_client::Reply;
use serde::{Deserialize, Serialize};

use checks::Around;

/// A parsed reply of a teacher.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revision {
    /// What the teacher thought.
    pub reasoning: String,
    /// The revised answer.
    pub text: String,
}

/// Why a reply gives no pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The marker of what was asked for is missing.
    NoMarker,
    /// A marker stands more than once: which part counts is not clear.
    RepeatedMarker,
    /// The closing marker is missing.
    Unterminated,
    /// Nothing stands between the markers.
    EmptyRevision,
    /// The reply is not the JSON that was asked for.
    NotJson,
    /// A judge's verdict or score is none of those that it may give.
    BadVerdict,
    /// The revision speaks of itself as one ("in the corrected version …").
    Alludes,
    /// The revision is in another language.
    LanguageSwitched,
    /// The revision is the answer, or the teacher sees nothing to change.
    Unchanged,
    /// The model did not come to an end, for a reason of the server's.
    BrokeOff,
    /// The reply was cut off by the token limit, twice.
    Length,
    /// The model declined.
    Refused,
    /// The server filtered the reply.
    Filtered,
}

impl Reason {
    /// True when asking again may help: the reply did not keep to the form.
    pub fn is_form(self) -> bool {
        !matches!(self, Self::Unchanged | Self::Length | Self::Refused | Self::Filtered)
    }

    /// Name in reports and in `failed.jsonl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoMarker => "no_marker",
            Self::RepeatedMarker => "repeated_marker",
            Self::Unterminated => "unterminated",
            Self::EmptyRevision => "empty_revision",
            Self::NotJson => "not_json",
            Self::BadVerdict => "bad_verdict",
            Self::Alludes => "alludes",
            Self::LanguageSwitched => "language_switched",
            Self::Unchanged => "unchanged",
            Self::BrokeOff => "broke_off",
            Self::Length => "length",
            Self::Refused => "refused",
            Self::Filtered => "filtered",
        }
    }
}

/// The form of replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Parts between markers.
    Markers,
    /// A JSON object by a schema.
    Json,
}

/// What every kind of reply is looked at for first.
pub fn usable(reply: &Reply) -> Result<&str, Reason> {
    match reply.finish_reason() {
        "length" => Err(Reason::Length),
        "content_filter" => Err(Reason::Filtered),
        // Some servers say nothing; what is left is a reply that broke off.
        other if !["stop", ""].contains(&other) => Err(Reason::BrokeOff),
        _ if reply.refusal().is_some() => Err(Reason::Refused),
        _ => Ok(reply.content()),
    }
}

/// A teacher's revision of an answer.
pub fn revision(reply: &Reply, form: Form, around: Around) -> Result<Revision, Reason> {
    let content = usable(reply)?;
    let parsed = match form {
        Form::Markers => markers::revision(content),
        Form::Json => json::revision(content),
    };
    let mut revision = match parsed {
        Ok(revision) => revision,
        Err(reason) if checks::is_no_change(content) => {
            return Err(unless_unclear(reason, Reason::Unchanged));
        }
        Err(reason) if checks::is_refusal(content) => return Err(unless_unclear(reason, Reason::Refused)),
        Err(reason) => return Err(reason),
    };
    if let Some(inner) = checks::unwrapped(&revision.text, around.answer) {
        revision.text = inner.to_string();
    }
    checks::revision(&revision.text, around)?;
    if revision.reasoning.is_empty() {
        reply.reasoning().trim().clone_into(&mut revision.reasoning);
    }
    Ok(revision)
}

/// A whole reply without any marker may be a plain sentence; one with markers that are wrong is just that.
fn unless_unclear(found: Reason, plain: Reason) -> Reason {
    if matches!(found, Reason::NoMarker | Reason::NotJson) { plain } else { found }
}

/// A stronger model's own answer: the whole reply.
pub fn answer(reply: &Reply) -> Result<String, Reason> {
    let text = usable(reply)?.trim();
    if text.is_empty() {
        return Err(Reason::EmptyRevision);
    }
    if checks::is_refusal(text) { Err(Reason::Refused) } else { Ok(text.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reply(content: &str, finish: &str, refusal: Option<&str>) -> Reply {
        let message = json!({"content": content, "refusal": refusal});
        let body = json!({"choices": [{"message": message, "finish_reason": finish}]});
        Reply::parse(body.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn cut_filtered_refused_and_unchanged_replies_fail() {
        let around = Around { prompt: "p", answer: "same " };
        let reason = |content, finish, refusal| {
            revision(&reply(content, finish, refusal), Form::Markers, around).unwrap_err()
        };
        let same = "<revision>same</revision>";
        assert_eq!(reason(same, "length", None), Reason::Length);
        assert_eq!(reason(same, "content_filter", None), Reason::Filtered);
        assert_eq!(reason(same, "stop", Some("I cannot")), Reason::Refused);
        assert_eq!(reason(same, "stop", None), Reason::Unchanged);
        assert_eq!(reason("No changes are needed.", "stop", None), Reason::Unchanged);
        assert_eq!(reason("I'm sorry, but I can't help with that.", "stop", None), Reason::Refused);
        assert_eq!(reason("I think it is fine.", "stop", None), Reason::NoMarker);
        let fine = revision(&reply("<revision>\"other\"</revision>", "stop", None), Form::Markers, around);
        assert_eq!(fine.unwrap().text, "other");
    }
}
