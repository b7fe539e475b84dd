//! What a revision must not be: the answer again, a refusal, a text that speaks of itself as a revision, or one in
//! another language.

use super::Reason;

/// What a revision is looked at beside.
#[derive(Debug, Clone, Copy)]
pub struct Around<'a> {
    /// The task.
    pub prompt: &'a str,
    /// The answer that was revised.
    pub answer: &'a str,
}

/// Phrases that give a revision away as one, unless the task or the answer has them too; in lower case.
const ALLUSIONS: [&str; 20] = [
    "corrected version",
    "corrected answer",
    "corrected solution",
    "corrected response",
    "revised version",
    "revised answer",
    "revised response",
    "revised solution",
    "improved answer",
    "improved response",
    "the original answer",
    "the original response",
    "the previous answer",
    "the previous response",
    "student's answer",
    "student's response",
    "student's solution",
    "i have corrected",
    "i've corrected",
    "i have revised",
];

/// Starts of refusals, in lower case: an apology, and what cannot be done.
const APOLOGIES: [&str; 8] = [
    "i'm sorry, but ",
    "i'm sorry, ",
    "i am sorry, but ",
    "sorry, but ",
    "sorry, ",
    "i apologize, but ",
    "as an ai language model, ",
    "as an ai, ",
];
const CANNOT: [&str; 9] = [
    "i can't ",
    "i cannot ",
    "i can not ",
    "i won't ",
    "i'm unable to ",
    "i am unable to ",
    "i'm not able to ",
    "i am not able to ",
    "i must decline",
];
/// What it is that cannot be done, where nobody apologizes.
const HELP: [&str; 7] = ["assist", "help", "provide", "comply", "fulfill", "answer that", "do that"];

/// Sentences that say that nothing is to be changed, in lower case.
const NO_CHANGES: [&str; 8] = [
    "no change needed",
    "no changes needed",
    "no changes are needed",
    "no change is needed",
    "no changes are necessary",
    "no changes necessary",
    "no revision needed",
    "no revision is needed",
];

/// Texts whose words are the same to this degree (Jaccard) are in one language.
const SAME_LANGUAGE: f64 = 0.3;

/// Characters that tell a language.
const LOOKED_AT: usize = 1000;

/// A plain sentence in place of a revision has at most so many bytes.
const SENTENCE: usize = 300;

/// Looks a revision over.
pub fn revision(text: &str, around: Around) -> Result<(), Reason> {
    if text.trim() == around.answer.trim() || is_no_change(text) && !is_no_change(around.answer) {
        return Err(Reason::Unchanged);
    }
    if is_refusal(text) && !is_refusal(around.answer) {
        return Err(Reason::Refused);
    }
    if alludes(text, around) {
        return Err(Reason::Alludes);
    }
    if switches_language(text, around) { Err(Reason::LanguageSwitched) } else { Ok(()) }
}

/// True for a short text that sees nothing to change.
pub fn is_no_change(text: &str) -> bool {
    let lower = text.trim().to_lowercase();
    lower.len() <= SENTENCE && NO_CHANGES.iter().any(|phrase| lower.contains(phrase))
}

/// True for a text that begins as refusals do.
pub fn is_refusal(text: &str) -> bool {
    let start: String = plain(&text.trim_start().chars().take(120).collect::<String>());
    let apology = APOLOGIES.iter().find_map(|apology| start.strip_prefix(apology));
    let rest = apology.unwrap_or(&start);
    let Some(what) = CANNOT.iter().find_map(|cannot| rest.strip_prefix(cannot)) else { return false };
    apology.is_some() || HELP.iter().any(|help| what.starts_with(help))
}

/// In lower case, with straight apostrophes.
fn plain(text: &str) -> String {
    text.to_lowercase().replace('’', "'")
}

fn alludes(text: &str, around: Around) -> bool {
    let lower = plain(text);
    let hits: Vec<&str> = ALLUSIONS.into_iter().filter(|phrase| lower.contains(phrase)).collect();
    if hits.is_empty() {
        return false;
    }
    let (prompt, answer) = (plain(around.prompt), plain(around.answer));
    hits.into_iter().any(|phrase| !prompt.contains(phrase) && !answer.contains(phrase))
}

fn switches_language(text: &str, around: Around) -> bool {
    // Most revisions keep most words: they need no look at their language, which costs more than all other checks.
    let shared = pref_data::jaccard(text.split_whitespace(), around.answer.split_whitespace());
    if shared > SAME_LANGUAGE {
        return false;
    }
    let language = |text: &str| {
        let end = text.char_indices().nth(LOOKED_AT).map_or(text.len(), |(end, _)| end);
        let info = whatlang::detect(&text[..end])?;
        (text.len() >= 80 && info.is_reliable()).then(|| info.lang())
    };
    let (Some(now), Some(before)) = (language(text), language(around.answer)) else { return false };
    // A task may ask for another language than the answer had: by being in it, by naming it, or by asking for a
    // translation.
    let prompt = around.prompt.to_lowercase();
    let names = [now.eng_name().to_lowercase(), now.name().to_lowercase()];
    let translates = [
        "translat",
        "übersetz",
        "tradu",
        "перев",
        "翻译",
        "翻訳",
        "번역",
        "ترجم",
        "in english",
        "ins englisch",
    ];
    let asked =
        names.iter().any(|name| prompt.contains(name)) || translates.iter().any(|word| prompt.contains(word));
    now != before && language(around.prompt) != Some(now) && !asked
}

/// What stands in quotes or in a code block that the answer has not: some teachers wrap the whole revision.
pub fn unwrapped<'a>(text: &'a str, answer: &str) -> Option<&'a str> {
    let text = text.trim();
    for (open, close) in [("\"", "\""), ("“", "”"), ("'''", "'''"), ("\"\"\"", "\"\"\"")] {
        let inner = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
        if let Some(inner) = inner.filter(|inner| !inner.contains(open) && !inner.contains(close))
            && !answer.trim_start().starts_with(open)
            && !inner.trim().is_empty()
        {
            return Some(inner.trim());
        }
    }
    let inner = text.strip_prefix("```").and_then(|rest| rest.strip_suffix("```"))?;
    let (language, inner) = inner.split_once('\n')?;
    let is_prose = ["", "text", "markdown", "md"].contains(&language.trim());
    let is_whole = is_prose && !inner.contains("```") && !inner.trim().is_empty();
    (is_whole && !answer.contains("```")).then(|| inner.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, prompt: &str, answer: &str) -> Result<(), Reason> {
        revision(text, Around { prompt, answer })
    }

    #[test]
    fn a_revision_must_not_speak_of_itself() {
        let told = "In the corrected version, the sum is 4.";
        assert_eq!(check(told, "2+2?", "5"), Err(Reason::Alludes));
        assert_eq!(check(told, "Write the corrected version of this text", "5"), Ok(()));
        assert_eq!(check("The sum is 4.", "2+2?", "5"), Ok(()));
        assert_eq!(check("The student’s answer was right.", "2+2?", "5"), Err(Reason::Alludes));
    }

    #[test]
    fn refusals_and_unchanged_texts_are_told_apart() {
        assert_eq!(check("I'm sorry, but I can't help with that.", "q", "a"), Err(Reason::Refused));
        let refusal = "I'm sorry, but I can't do that.";
        assert_eq!(check("I'm sorry, but I can't do this for you.", "q", refusal), Ok(()));
        for refusal in
            ["I’m sorry, I can’t write this.", "I'm unable to help with that.", "As an AI, I cannot say."]
        {
            assert!(is_refusal(refusal), "{refusal}");
        }
        for fine in [
            "I'm sorry, but I can see why you are upset.",
            "I can't wait to see you!",
            "Sorry for the delay.",
        ] {
            assert!(!is_refusal(fine), "{fine}");
        }
        assert_eq!(check(" a ", "q", "a"), Err(Reason::Unchanged));
        assert_eq!(check("No changes are needed.", "q", "a"), Err(Reason::Unchanged));
    }

    #[test]
    fn a_switch_of_language_is_seen_unless_asked_for() {
        let english =
            "The quick brown fox jumps over the lazy dog, and then it runs back into the deep dark forest.";
        let german = "Der schnelle braune Fuchs springt über den faulen Hund und läuft dann zurück in den tiefen dunklen Wald.";
        assert_eq!(check(german, "Tell me a story.", english), Err(Reason::LanguageSwitched));
        assert_eq!(check(german, "Translate it into German.", english), Ok(()));
        assert_eq!(check(german, german, english), Ok(()));
        assert_eq!(check(&format!("{english} It sleeps."), "Tell me a story.", english), Ok(()));
        assert_eq!(check("fn main() {}", "Tell me a story.", english), Ok(()));
    }

    #[test]
    fn wrappings_go_where_the_answer_has_none() {
        assert_eq!(unwrapped("\"Hello there\"", "Hi"), Some("Hello there"));
        assert_eq!(unwrapped("“Hello”", "Hi"), Some("Hello"));
        assert_eq!(unwrapped("\"Hello\" and \"bye\"", "Hi"), None);
        assert_eq!(unwrapped("\"Hello\"", "\"Hi\""), None);
        assert_eq!(unwrapped("```\nHello\n```", "Hi"), Some("Hello"));
        assert_eq!(unwrapped("```markdown\nHello\n```", "Hi"), Some("Hello"));
        assert_eq!(unwrapped("```python\nprint()\n```", "print"), None);
        assert_eq!(unwrapped("```\nHello\n```", "```\nHi\n```"), None);
    }
}
