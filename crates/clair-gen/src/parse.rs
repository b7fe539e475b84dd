//! Teacher replies: reasoning, then the revision, between markers.
//!
//! Two formats are accepted:
//! - `<reasoning> … </reasoning> <revision> … </revision>`, which our prompt asks for;
//! - `{teacher_reasoning}: … {corrected_student_solution}: …`, that of the published CLAIR data.
//!
//! Parsing is strict: what is not clearly a revision is a failure with a reason, never a pair.

use chat_client::Reply;
use serde::{Deserialize, Serialize};

/// A parsed reply.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// The revision's marker is missing.
    NoMarker,
    /// The revision's marker stands more than once: which part is the revision is not clear.
    RepeatedMarker,
    /// The revision does not end with its closing marker.
    Unterminated,
    /// The revision is empty.
    EmptyRevision,
    /// The revision is the answer.
    Unchanged,
    /// The reply was cut off by the token limit.
    Length,
    /// The server filtered the reply, or the model declined.
    Filtered,
}

impl Reason {
    /// True when asking again may help: the reply did not keep to the form.
    pub fn is_form(self) -> bool {
        matches!(self, Self::NoMarker | Self::RepeatedMarker | Self::Unterminated | Self::EmptyRevision)
    }

    /// Name in reports and in `failed.jsonl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoMarker => "no_marker",
            Self::RepeatedMarker => "repeated_marker",
            Self::Unterminated => "unterminated",
            Self::EmptyRevision => "empty_revision",
            Self::Unchanged => "unchanged",
            Self::Length => "length",
            Self::Filtered => "filtered",
        }
    }
}

/// Parses a whole reply to an answer.
pub fn parse_reply(reply: &Reply, answer: &str) -> Result<Revision, Reason> {
    match reply.finish_reason() {
        "length" => return Err(Reason::Length),
        "content_filter" => return Err(Reason::Filtered),
        _ if reply.refusal().is_some() => return Err(Reason::Filtered),
        _ => {}
    }
    let revision = parse_text(reply.content())?;
    if revision.text.trim() == answer.trim() { Err(Reason::Unchanged) } else { Ok(revision) }
}

/// Parses the text of a reply.
pub fn parse_text(text: &str) -> Result<Revision, Reason> {
    if text.contains("<revision>") { tags(text) } else { braces(text) }
}

fn tags(text: &str) -> Result<Revision, Reason> {
    let (before, after) = split_once_only(text, "<revision>")?;
    let (body, rest) = after.rsplit_once("</revision>").ok_or(Reason::Unterminated)?;
    if body.contains("</revision>") || !rest.trim().is_empty() && rest.contains("<reasoning>") {
        return Err(Reason::RepeatedMarker);
    }
    let reasoning = before.split_once("<reasoning>").map_or(before, |(_, inner)| inner);
    let reasoning = reasoning.split_once("</reasoning>").map_or(reasoning, |(inner, _)| inner);
    finish(reasoning, body)
}

fn braces(text: &str) -> Result<Revision, Reason> {
    let (before, body) = split_once_only(text, "{corrected_student_solution}")?;
    let reasoning = before.split_once("{teacher_reasoning}").map_or(before, |(_, inner)| inner);
    finish(colon(reasoning), colon(body))
}

fn colon(text: &str) -> &str {
    text.strip_prefix(':').unwrap_or(text)
}

fn split_once_only<'a>(text: &'a str, marker: &str) -> Result<(&'a str, &'a str), Reason> {
    let (before, after) = text.split_once(marker).ok_or(Reason::NoMarker)?;
    if after.contains(marker) { Err(Reason::RepeatedMarker) } else { Ok((before, after)) }
}

fn finish(reasoning: &str, text: &str) -> Result<Revision, Reason> {
    let text = text.trim();
    if text.is_empty() {
        return Err(Reason::EmptyRevision);
    }
    Ok(Revision { reasoning: reasoning.trim().into(), text: text.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn ok(text: &str) -> (String, String) {
        let revision = parse_text(text).unwrap();
        (revision.reasoning, revision.text)
    }

    #[test]
    fn both_formats_are_read() {
        let want = ("why".to_string(), "new\n\ntext".to_string());
        assert_eq!(ok("<reasoning>\nwhy\n</reasoning>\n<revision>\nnew\n\ntext\n</revision>\n"), want);
        assert_eq!(ok("{teacher_reasoning}:\nwhy\n\n{corrected_student_solution}:\nnew\n\ntext"), want);
        assert_eq!(ok("why {corrected_student_solution} new\n\ntext"), want);
    }

    #[test]
    fn anything_unclear_is_a_failure() {
        let reason = |text: &str| parse_text(text).unwrap_err();
        assert_eq!(reason("Here is my opinion."), Reason::NoMarker);
        assert_eq!(reason("<revision>a</revision> or <revision>b</revision>"), Reason::RepeatedMarker);
        assert_eq!(
            reason("{corrected_student_solution}: a {corrected_student_solution}: b"),
            Reason::RepeatedMarker
        );
        assert_eq!(reason("<reasoning>x</reasoning><revision>half"), Reason::Unterminated);
        assert_eq!(reason("<revision>\n \n</revision>"), Reason::EmptyRevision);
        assert_eq!(reason("{corrected_student_solution}:   "), Reason::EmptyRevision);
    }

    #[test]
    fn cut_filtered_and_unchanged_replies_fail() {
        let reply = |finish: &str, refusal: Option<&str>| {
            let message = json!({"content": "<revision>same</revision>", "refusal": refusal});
            Reply(json!({"choices": [{"message": message, "finish_reason": finish}]}))
        };
        let reason = |finish, refusal| parse_reply(&reply(finish, refusal), "same ").unwrap_err();
        assert_eq!(reason("length", None), Reason::Length);
        assert_eq!(reason("content_filter", None), Reason::Filtered);
        assert_eq!(reason("stop", Some("I cannot")), Reason::Filtered);
        assert_eq!(reason("stop", None), Reason::Unchanged);
        assert!(parse_reply(&reply("stop", None), "other").is_ok());
    }

    proptest! {
        #[test]
        fn well_formed_replies_round_trip(reasoning in "[^<{]{0,80}", text in "[^<{]{1,120}") {
            prop_assume!(!text.trim().is_empty());
            let tagged = format!("<reasoning>\n{reasoning}\n</reasoning>\n<revision>\n{text}\n</revision>");
            let braced = format!("{{teacher_reasoning}}:\n{reasoning}\n{{corrected_student_solution}}:\n{text}");
            for reply in [tagged, braced] {
                let revision = parse_text(&reply).unwrap();
                prop_assert_eq!(&revision.text, text.trim());
                prop_assert_eq!(&revision.reasoning, reasoning.trim());
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,200}") {
            let _ = parse_text(&text);
        }
    }
}
