//! A faster way through the same tokenizer: byte-level BPE, one piece of text at a time.
//!
//! The `tokenizers` crate builds offsets and alignments that training never reads, and runs its splitting
//! expression with backtracking. For tokenizers of the GPT-2 kind (a regular expression cuts the text,
//! byte-level BPE encodes each piece) this does the cutting with a finite automaton and remembers the ids of
//! pieces it has seen; each new piece is encoded by the crate itself. Whatever is not of this kind, or does
//! not give the crate's ids on the samples of [`FastEncoder::new`], is left to the crate.

use aho_corasick::{AhoCorasick, MatchKind};
use regex_automata::meta::Regex;
use regex_automata::{Anchored, Input};
use rustc_hash::FxHashMap;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{Model, Tokenizer as Inner};
use unicode_normalization::{IsNormalized, is_nfc_quick};

/// What GPT-2's byte-level pre-tokenizer splits by.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The end of these expressions that needs a look ahead.
const LOOKAHEAD: &str = r"|\s+(?!\S)|\s+";
/// Pieces remembered before starting anew.
const MOST_WORDS: usize = 1 << 18;

const SAMPLES: [&str; 7] = [
    "Hello world! It's  a   test, isn't it?\n\n  We'll see: 12345 + 6.78 = 12351.78\t\tdone.  ",
    "def f(x):\n    return x**2  # comment\r\n\r\nfor i in range(10):\n\tprint(f\"{i}\")\n",
    "naïve café — 日本語のテキスト, русский текст, العربية, हिन्दी 🙂👩‍👩‍👧 x\u{300} ﬁ Å\u{a0}\u{2028}½²",
    " leading, trailing \n",
    "",
    "\u{0}\u{1f}\u{7f}\u{85}'S'LL I'M don'T \u{1c}a",
    "<|im_start|>user\nhi<|im_end|>\n<s>[INST] a [/INST]</s><bos><|endoftext|><start_of_turn>",
];

/// Ids of the pieces that one thread has seen.
#[derive(Debug, Default)]
pub(crate) struct Words {
    /// Do not use the faster way.
    pub exact: bool,
    places: FxHashMap<Box<[u8]>, (u32, u32)>,
    ids: Vec<u32>,
}

impl Words {
    /// Everything is left to the `tokenizers` crate.
    pub(crate) fn exact() -> Self {
        Self { exact: true, ..Self::default() }
    }
}

#[derive(Debug)]
pub(crate) struct FastEncoder {
    /// Added tokens found in the text as it is, and those found after normalization.
    tokens: [Finder; 2],
    nfc: bool,
    stages: Vec<Stage>,
    letters: [char; 256],
    affixes: [Vec<u32>; 2],
}

/// Finds added tokens of one kind.
#[derive(Debug)]
struct Finder {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

/// One pre-tokenizer.
#[derive(Debug)]
enum Stage {
    Split { regex: Regex, lookahead: bool, keep_gaps: bool },
    Digits { individual: bool },
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
}

impl FastEncoder {
    /// For the tokenizer whose file is `json`; `None` if it is of another kind.
    pub(crate) fn new(inner: &Inner, json: &[u8]) -> Option<Self> {
        let spec: Spec = serde_json::from_slice(json).ok()?;
        let (stages, byte_level) = stages(spec.pre_tokenizer.as_ref()?)?;
        let tokens = spec.added_tokens;
        if !byte_level || tokens.iter().any(|t| t.single_word || t.lstrip || t.rstrip || t.content.is_empty())
        {
            return None;
        }
        let nfc = match &spec.normalizer {
            None | Some(Value::Null) => false,
            Some(normalizer) if normalizer["type"] == "NFC" => true,
            Some(_) => return None,
        };
        let encoder = Self {
            tokens: [finder(&tokens, false)?, finder(&tokens, true)?],
            nfc,
            stages,
            letters: letters(),
            affixes: affixes(inner)?,
        };
        let mut words = Words::default();
        let agrees = |text: &str, words: &mut Words| {
            [false, true].into_iter().all(|special| {
                let want = inner.encode_fast(text, special).map(|e| e.get_ids().to_vec()).ok();
                let got = encoder.encode(inner, text, special, words);
                got.is_none() || got == want
            })
        };
        let agrees = SAMPLES.iter().all(|text| agrees(text, &mut words))
            && tokens.iter().take(64).all(|t| agrees(&format!("a {0}b{0}{0}\n c", t.content), &mut words));
        agrees.then_some(encoder)
    }

    /// Token ids of a text; `None` where the text needs a normalizer.
    pub(crate) fn encode(
        &self,
        inner: &Inner,
        text: &str,
        special: bool,
        words: &mut Words,
    ) -> Option<Vec<u32>> {
        if self.nfc && !text.is_ascii() && is_nfc_quick(text.chars()) != IsNormalized::Yes {
            return None;
        }
        if words.places.len() > MOST_WORDS {
            *words = Words::default();
        }
        let mut ids = Vec::with_capacity(text.len() / 3 + 4);
        if special {
            ids.extend(&self.affixes[0]);
        }
        self.between_tokens(inner, text, 0, words, &mut ids)?;
        if special {
            ids.extend(&self.affixes[1]);
        }
        Some(ids)
    }

    /// Splits at the added tokens of one kind, then of the other, then into pieces.
    fn between_tokens(
        &self,
        inner: &Inner,
        text: &str,
        kind: usize,
        words: &mut Words,
        ids: &mut Vec<u32>,
    ) -> Option<()> {
        let Some(finder) = self.tokens.get(kind) else {
            return self.pieces(inner, text, 0, words, ids);
        };
        let mut from = 0;
        for token in finder.automaton.find_iter(text) {
            self.between_tokens(inner, &text[from..token.start()], kind + 1, words, ids)?;
            ids.push(finder.ids[token.pattern().as_usize()]);
            from = token.end();
        }
        self.between_tokens(inner, &text[from..], kind + 1, words, ids)
    }

    fn pieces(
        &self,
        inner: &Inner,
        text: &str,
        stage: usize,
        words: &mut Words,
        ids: &mut Vec<u32>,
    ) -> Option<()> {
        if text.is_empty() {
            return Some(());
        }
        let Some(current) = self.stages.get(stage) else { return self.word(inner, text, words, ids) };
        current.split(text, |piece| self.pieces(inner, piece, stage + 1, words, ids))
    }

    fn word(&self, inner: &Inner, word: &str, words: &mut Words, ids: &mut Vec<u32>) -> Option<()> {
        let (start, len) = if let Some(&place) = words.places.get(word.as_bytes()) {
            place
        } else {
            let spelled: String = word.bytes().map(|b| self.letters[b as usize]).collect();
            let tokens = inner.get_model().tokenize(&spelled).ok()?;
            let place = (words.ids.len() as u32, tokens.len() as u32);
            words.ids.extend(tokens.iter().map(|token| token.id));
            words.places.insert(word.as_bytes().into(), place);
            place
        };
        ids.extend_from_slice(&words.ids[start as usize..(start + len) as usize]);
        Some(())
    }
}

impl Stage {
    /// Gives the pieces of a text in order.
    fn split<'t>(&self, text: &'t str, mut piece: impl FnMut(&'t str) -> Option<()>) -> Option<()> {
        match self {
            Self::Split { regex, lookahead, keep_gaps } => {
                let mut at = 0;
                while at < text.len() {
                    let input = Input::new(text).range(at..);
                    let found =
                        regex.search(&input.clone().anchored(Anchored::Yes)).or_else(|| regex.search(&input));
                    let Some(found) = found else { break };
                    let mut end = found.end();
                    if found.is_empty() {
                        // No expression in use matches nothing; the crate would make an empty piece of it.
                        return None;
                    }
                    if *lookahead && found.pattern().as_usize() == 1 && end < text.len() {
                        // `\s+(?!\S)` leaves the last white space to the text that follows, if there are more.
                        let last = text[found.start()..end].chars().next_back().map_or(0, char::len_utf8);
                        if found.len() > last {
                            end -= last;
                        }
                    }
                    if *keep_gaps && found.start() > at {
                        piece(&text[at..found.start()])?;
                    }
                    piece(&text[found.start()..end])?;
                    at = end;
                }
                if *keep_gaps && at < text.len() { piece(&text[at..]) } else { Some(()) }
            }
            Self::Digits { individual } => {
                let mut from = 0;
                let mut before = None;
                for (at, c) in text.char_indices() {
                    let digit = c.is_numeric();
                    if before.is_some_and(|before: bool| before != digit || (digit && *individual)) {
                        piece(&text[from..at])?;
                        from = at;
                    }
                    before = Some(digit);
                }
                piece(&text[from..])
            }
        }
    }
}

/// The pre-tokenizer as stages, and whether it ends in byte-level spelling.
fn stages(spec: &Value) -> Option<(Vec<Stage>, bool)> {
    match spec["type"].as_str()? {
        "Sequence" => {
            let (mut all, mut byte_level) = (Vec::new(), false);
            for part in spec["pretokenizers"].as_array()? {
                if byte_level {
                    return None;
                }
                let (stages, ends) = stages(part)?;
                all.extend(stages);
                byte_level = ends;
            }
            Some((all, byte_level))
        }
        "ByteLevel" => {
            let no_prefix = spec["add_prefix_space"] == false;
            let regex = spec["use_regex"].as_bool().unwrap_or(true);
            let split = if regex { vec![split(GPT2, true)?] } else { Vec::new() };
            no_prefix.then_some((split, true))
        }
        "Digits" => Some((vec![Stage::Digits { individual: spec["individual_digits"].as_bool()? }], false)),
        "Split" => {
            let keep_gaps = match (spec["behavior"].as_str()?, spec["invert"].as_bool()?) {
                ("Isolated", false) => true,
                ("Removed", true) => false,
                _ => return None,
            };
            let pattern = spec["pattern"]["Regex"].as_str()?;
            Some((vec![split(pattern, keep_gaps)?], false))
        }
        _ => None,
    }
}

/// Compiles an expression, unless it needs backtracking beyond the usual end.
fn split(pattern: &str, keep_gaps: bool) -> Option<Stage> {
    let head = pattern.strip_suffix(LOOKAHEAD);
    let own = head.unwrap_or(pattern);
    let backtracking = ["(?=", "(?!", "(?<", "(?>", "?+", "*+", "++", "\\1", "\\G", "\\Z"];
    // `{1,3}+` never gives back what it took, `\p{L}+` is a plain repetition.
    let possessive = own
        .match_indices("}+")
        .any(|(at, _)| own[..at].ends_with([',', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']));
    if possessive || backtracking.iter().any(|part| own.contains(part)) {
        return None;
    }
    let regex = match head {
        Some(head) => Regex::new_many(&[head, r"\s+"]),
        None => Regex::new(pattern),
    };
    Some(Stage::Split { regex: regex.ok()?, lookahead: head.is_some(), keep_gaps })
}

fn finder(tokens: &[AddedToken], normalized: bool) -> Option<Finder> {
    let of_kind: Vec<&AddedToken> = tokens.iter().filter(|token| token.normalized == normalized).collect();
    let automaton = AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .build(of_kind.iter().map(|token| &token.content))
        .ok()?;
    Some(Finder { automaton, ids: of_kind.iter().map(|token| token.id).collect() })
}

/// What the post-processor puts before and after a text.
fn affixes(inner: &Inner) -> Option<[Vec<u32>; 2]> {
    let ids = |special| inner.encode_fast("a", special).map(|e| e.get_ids().to_vec()).ok();
    let (plain, whole) = (ids(false)?, ids(true)?);
    let at = whole.windows(plain.len().max(1)).position(|part| part == plain)?;
    Some([whole[..at].to_vec(), whole[at + plain.len()..].to_vec()])
}

/// GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on.
fn letters() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'t>(stage: &Stage, text: &'t str) -> Vec<&'t str> {
        let mut all = Vec::new();
        stage.split(text, |piece| {
            all.push(piece);
            Some(())
        });
        all
    }

    #[test]
    fn white_space_before_a_word_leaves_one_to_it() {
        let gpt2 = split(GPT2, true).unwrap();
        assert_eq!(pieces(&gpt2, "a  b\n\n c   "), ["a", " ", " b", "\n\n", " c", "   "]);
        assert_eq!(pieces(&gpt2, "don't  \u{3000}x"), ["don", "'t", "  ", "\u{3000}", "x"]);
    }

    #[test]
    fn digits_stand_alone() {
        assert_eq!(pieces(&Stage::Digits { individual: true }, "a12b3"), ["a", "1", "2", "b", "3"]);
        assert_eq!(pieces(&Stage::Digits { individual: false }, "12b3"), ["12", "b", "3"]);
    }

    #[test]
    fn expressions_that_backtrack_are_left_to_the_crate() {
        assert!(split(r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}+", true).is_none());
        assert!(split(r"a(?=b)|c", true).is_none());
    }
}
