//! Parts between markers, read by a state machine.
//!
//! A reply is in one of three styles, the first of these whose revision marker it has outside of code blocks:
//! - tags, `<reasoning> … </reasoning> <revision> … </revision>`, which our prompts ask for;
//! - braces, `{teacher_reasoning}: … {corrected_student_solution}: …`, that of the published CLAIR data;
//! - headings, a line of its own such as `**Revision:**` or `## Revision`.
//!
//! Markers of other styles, and markers in code blocks, are text.

use super::{Reason, Revision};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Tags,
    Braces,
    Headings,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    OpenReasoning,
    CloseReasoning,
    OpenRevision,
    CloseRevision,
}

/// A marker with its place in the text.
#[derive(Debug, Clone, Copy)]
struct Found {
    mark: Mark,
    start: usize,
    end: usize,
}

/// Where the machine is; the numbers are where the part begins.
#[derive(Debug, Clone, Copy)]
enum State {
    Before(usize),
    Reasoning(usize),
    Between,
    Revision(usize),
    Done,
}

const TAGS: [(&str, Mark); 4] = [
    ("<reasoning>", Mark::OpenReasoning),
    ("</reasoning>", Mark::CloseReasoning),
    ("<revision>", Mark::OpenRevision),
    ("</revision>", Mark::CloseRevision),
];
const BRACES: [(&str, Mark); 2] =
    [("{teacher_reasoning}", Mark::OpenReasoning), ("{corrected_student_solution}", Mark::OpenRevision)];
const HEADINGS: [(&str, Mark); 6] = [
    ("reasoning", Mark::OpenReasoning),
    ("teacher reasoning", Mark::OpenReasoning),
    ("revision", Mark::OpenRevision),
    ("revised answer", Mark::OpenRevision),
    ("corrected student solution", Mark::OpenRevision),
    ("corrected solution", Mark::OpenRevision),
];

/// Parses the text of a reply.
pub fn revision(text: &str) -> Result<Revision, Reason> {
    let text = without_fence(text);
    let style = |style| (style, marks(text, style, true));
    let mut styles = [Style::Tags, Style::Braces, Style::Headings].into_iter().map(style);
    let is_one = |(_, marks): &(Style, Vec<Found>)| marks.iter().any(|m| m.mark == Mark::OpenRevision);
    let parsed = match styles.find(is_one) {
        Some((Style::Headings, found)) => headings(text, &found),
        Some((style, found)) => parse(text, style, &found),
        None => Err(Reason::NoMarker),
    };
    match parsed {
        // A code block that was never closed hides markers.
        Err(Reason::Unterminated | Reason::NoMarker) if has_open_fence(text) => {
            parse(text, Style::Tags, &marks(text, Style::Tags, false))
        }
        other => other,
    }
}

/// Some models put the whole reply into a code block.
fn without_fence(text: &str) -> &str {
    let text = text.trim();
    let inner = text.strip_prefix("```").and_then(|rest| rest.strip_suffix("```"));
    let inner = inner.and_then(|inner| Some(inner.split_once('\n')?.1));
    inner.filter(|inner| inner.trim_start().starts_with(['<', '{', '*', '#'])).map_or(text, str::trim)
}

/// Headings are words that answers have too: they count where the reply begins with one, and nothing that reads like a
/// note on the revision follows it.
fn headings(text: &str, found: &[Found]) -> Result<Revision, Reason> {
    if found.first().is_none_or(|first| !text[..first.start].trim().is_empty()) {
        return Err(Reason::NoMarker);
    }
    let revision = parse(text, Style::Headings, found)?;
    let names = ["changes", "changes made", "notes", "note", "explanation", "summary of changes"];
    let is_note = |line: &str| {
        let name = heading_name(line);
        name.is_some_and(|name| names.contains(&name.as_str()))
    };
    if revision.text.lines().any(is_note) { Err(Reason::RepeatedMarker) } else { Ok(revision) }
}

fn parse(text: &str, style: Style, found: &[Found]) -> Result<Revision, Reason> {
    let mut state = State::Before(0);
    let (mut reasoning, mut body) = ("", None);
    for &Found { mark, start, end } in found {
        state = match (state, mark) {
            (State::Before(_), Mark::OpenReasoning) => State::Reasoning(end),
            // A stray closing tag, as some models write it first.
            (State::Before(from) | State::Reasoning(from), Mark::CloseReasoning) => {
                reasoning = &text[from..start];
                State::Between
            }
            (State::Before(from) | State::Reasoning(from), Mark::OpenRevision) => {
                reasoning = &text[from..start];
                State::Revision(end)
            }
            (State::Between, Mark::OpenRevision) => State::Revision(end),
            (State::Revision(from), Mark::CloseRevision) => {
                body = Some(&text[from..start]);
                State::Done
            }
            (State::Before(_) | State::Between | State::Reasoning(_), Mark::CloseRevision) => {
                return Err(Reason::NoMarker);
            }
            _ => return Err(Reason::RepeatedMarker),
        };
    }
    let body = match (state, style) {
        (State::Done, _) => body.unwrap_or_default(),
        (State::Revision(_), Style::Tags) => return Err(Reason::Unterminated),
        (State::Revision(from), _) => &text[from..],
        _ => return Err(Reason::NoMarker),
    };
    if body.trim().is_empty() {
        return Err(Reason::EmptyRevision);
    }
    Ok(Revision { reasoning: reasoning.trim().into(), text: body.trim().into() })
}

/// The markers of a style, in their order.
fn marks(text: &str, style: Style, skip_code: bool) -> Vec<Found> {
    let (mut found, mut fence, mut offset) = (Vec::new(), None, 0);
    for line in text.split_inclusive('\n') {
        let mark = fence_of(line);
        match (fence, mark) {
            (None, Some(mark)) if skip_code => fence = Some(mark),
            (Some(open), Some(mark)) if open == mark => fence = None,
            (None, _) => line_marks(line, offset, style, &mut found),
            _ => {}
        }
        offset += line.len();
    }
    found
}

fn line_marks(line: &str, offset: usize, style: Style, found: &mut Vec<Found>) {
    let names: &[(&str, Mark)] = match style {
        Style::Tags => &TAGS,
        Style::Braces => &BRACES,
        Style::Headings => return found.extend(heading(line, offset)),
    };
    let mut at = 0;
    while let Some(next) = line[at..].find(['<', '{']) {
        at += next;
        let hit = names.iter().find(|(name, _)| {
            line.as_bytes()
                .get(at..at + name.len())
                .is_some_and(|part| part.eq_ignore_ascii_case(name.as_bytes()))
        });
        let Some((name, mark)) = hit else {
            at += 1;
            continue;
        };
        let (start, end) = match (style, mark) {
            // `{name}:`, `**{name}:** text`, `**{name}**: text`
            (Style::Braces, _) => bold(line, at, at + name.len()),
            (_, Mark::OpenReasoning | Mark::OpenRevision) if is_bold_only(&line[..at]) => {
                bold(line, at, at + name.len())
            }
            _ => (at, at + name.len()),
        };
        found.push(Found { mark: *mark, start: offset + start, end: offset + end });
        at = end;
    }
}

/// True for asterisks with nothing before them.
fn is_bold_only(before: &str) -> bool {
    let before = before.trim_start();
    !before.is_empty() && before.trim_end_matches('*').is_empty()
}

/// The marker with the asterisks around it, where as many stand before it as after it, and a colon in or after them.
fn bold(line: &str, start: usize, end: usize) -> (usize, usize) {
    let stars = |text: &str| text.len() - text.trim_start_matches('*').len();
    let before = start - line[..start].trim_end_matches('*').len();
    let colon = |at: usize| at + usize::from(line[at..].starts_with(':'));
    let inner = colon(end);
    let after = stars(&line[inner..]);
    if before == 0 || after < before {
        return (start, inner);
    }
    (start - before, colon(inner + before))
}

/// The mark that a line opens or closes a code block with; a line that holds it twice is a whole block of its own.
fn fence_of(line: &str) -> Option<&'static str> {
    let start = line.trim_start();
    let mark = ["```", "~~~"].into_iter().find(|mark| start.starts_with(mark))?;
    (!start.trim_start_matches(['`', '~']).contains(mark)).then_some(mark)
}

/// True where a code block is never closed.
fn has_open_fence(text: &str) -> bool {
    ["```", "~~~"]
        .iter()
        .any(|mark| text.lines().filter(|line| fence_of(line) == Some(mark)).count() % 2 == 1)
}

fn heading(line: &str, offset: usize) -> Option<Found> {
    let name = heading_name(line)?;
    let (_, mark) = HEADINGS.iter().find(|(heading, _)| *heading == name)?;
    Some(Found { mark: *mark, start: offset, end: offset + line.len() })
}

/// The words of a line that looks like a heading.
fn heading_name(line: &str) -> Option<String> {
    let bare = line.trim();
    let is_heading = bare.starts_with(['#', '*']) || bare.ends_with(':');
    is_heading.then(|| bare.trim_matches(|c: char| "#*: ".contains(c)).to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ok(text: &str) -> (String, String) {
        let revision = revision(text).unwrap_or_else(|reason| panic!("{reason:?}: {text}"));
        (revision.reasoning, revision.text)
    }

    #[test]
    fn all_styles_and_their_variants_are_read() {
        let want = ("why".to_string(), "new\n\ntext".to_string());
        for text in [
            "<reasoning>\nwhy\n</reasoning>\n<revision>\nnew\n\ntext\n</revision>\n",
            "<Reasoning>why</Reasoning><REVISION>new\n\ntext</REVISION>",
            "```xml\n<reasoning>why</reasoning>\n<revision>new\n\ntext</revision>\n```",
            "why\n<revision>new\n\ntext</revision>\nI hope this helps!",
            "why</reasoning>\n<revision>new\n\ntext</revision>",
            "<reasoning>why</reasoning>\n**<revision>**new\n\ntext</revision>",
            "{teacher_reasoning}:\nwhy\n\n{corrected_student_solution}:\nnew\n\ntext",
            "**{Teacher_Reasoning}:** why\n**{corrected_student_solution}**: new\n\ntext",
            "why {corrected_student_solution} new\n\ntext",
            "## Reasoning\nwhy\n\n## Revision\nnew\n\ntext",
            "**Reasoning:**\nwhy\n\n**Revised answer:**\nnew\n\ntext",
            "reasoning:\nwhy\nREVISION:\nnew\n\ntext",
        ] {
            assert_eq!(ok(text), want, "{text}");
        }
    }

    #[test]
    fn markers_in_code_blocks_and_of_other_styles_are_text() {
        let body = "Use it so:\n```\n<revision>x</revision>\n```\nand **Revision:** is a word\n\n## Reasoning\nof mine";
        assert_eq!(ok(&format!("<reasoning>r</reasoning><revision>\n{body}\n</revision>")).1, body);
        // A block that is never closed does not hide the end.
        assert_eq!(ok("<revision>\n```\ncode\n</revision>").1, "```\ncode");
        assert_eq!(ok("<reasoning>\n```\n</reasoning>\n<revision>\nnew\n</revision>").1, "new");
        assert_eq!(revision("So:\n```\n<revision>x</revision>\n```"), Err(Reason::NoMarker));
    }

    #[test]
    fn bold_text_beside_markers_stays() {
        let text = |reply: &str| ok(reply).1;
        assert_eq!(text("<revision>**a** is **42**</revision>"), "**a** is **42**");
        assert_eq!(text("{corrected_student_solution}:**Bold** x"), "**Bold** x");
        assert_eq!(text("<reasoning>**key:**<revision>**Paris** is it.</revision>"), "**Paris** is it.");
        assert_eq!(text("<reasoning>\n```x```\n</reasoning><revision>\n```y```\n</revision>"), "```y```");
        assert_eq!(text("**{corrected_student_solution}:****Bold** x"), "**Bold** x");
        assert_eq!(text("{corrected_student_solution}: **Bold** x"), "**Bold** x");
    }

    #[test]
    fn headings_count_only_where_a_reply_is_made_of_them() {
        let reason = |text: &str| revision(text).unwrap_err();
        assert_eq!(reason("My essay.\n\n## Revision\nThe revision of the law."), Reason::NoMarker);
        assert_eq!(reason("## Revision\nnew\n\n### Changes made:\n- x"), Reason::RepeatedMarker);
    }

    #[test]
    fn anything_unclear_is_a_failure() {
        let reason = |text: &str| revision(text).unwrap_err();
        assert_eq!(reason("Here is my opinion."), Reason::NoMarker);
        assert_eq!(reason("<revision>a</revision> or <revision>b</revision>"), Reason::RepeatedMarker);
        assert_eq!(reason("<revision>a <revision>b</revision>"), Reason::RepeatedMarker);
        assert_eq!(
            reason("<reasoning>a<reasoning>b</reasoning><revision>c</revision>"),
            Reason::RepeatedMarker
        );
        let twice = "{corrected_student_solution}: a {corrected_student_solution}: b";
        assert_eq!(reason(twice), Reason::RepeatedMarker);
        assert_eq!(reason("<reasoning>x</reasoning><revision>half"), Reason::Unterminated);
        assert_eq!(reason("</revision> <revision>a</revision>"), Reason::NoMarker);
        assert_eq!(reason("<revision>\n \n</revision>"), Reason::EmptyRevision);
        assert_eq!(reason("{corrected_student_solution}:   "), Reason::EmptyRevision);
    }

    proptest! {
        #[test]
        fn well_formed_replies_round_trip(reasoning in "[^<{`~#*:]{0,80}", text in "[^<{`~#*:]{1,120}") {
            prop_assume!(!text.trim().is_empty());
            let tags = format!("<reasoning>\n{reasoning}\n</reasoning>\n<revision>\n{text}\n</revision>");
            let braces = format!("{{teacher_reasoning}}:\n{reasoning}\n{{corrected_student_solution}}:\n{text}");
            let headings = format!("## Reasoning\n{reasoning}\n## Revision\n{text}");
            for reply in [tags, braces, headings] {
                let revision = revision(&reply).unwrap();
                prop_assert_eq!(&revision.text, text.trim());
                prop_assert_eq!(&revision.reasoning, reasoning.trim());
            }
        }

        #[test]
        fn anything_but_tags_round_trips_between_tags(text in "\\PC{1,200}") {
            prop_assume!(!text.trim().is_empty() && !text.to_lowercase().contains("<re") && !text.to_lowercase().contains("</re"));
            for reply in [
                format!("<reasoning>r</reasoning>\n<revision>\n{text}\n</revision>"),
                format!("<reasoning>r</reasoning><revision> {text} </revision>"),
            ] {
                prop_assert_eq!(revision(&reply).unwrap().text, text.trim());
            }
        }

        #[test]
        fn no_text_panics(text in "(<revision>|</revision>|\\{corrected_student_solution\\}|```\n|## Revision\n|\\PC|\n){0,40}") {
            let _ = revision(&text);
        }
    }
}
