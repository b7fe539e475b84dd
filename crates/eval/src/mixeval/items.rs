//! MixEval's data files and prompts (arXiv 2406.06565; github.com/Psycoy/MixEval, `docs/how_to_use_your_own_eval_code.md`
//! fixes the wording of instructions).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which of the two sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// MixEval-Hard.
    Hard,
    /// MixEval.
    Full,
}

/// Kind of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Answered in words.
    FreeForm,
    /// Answered with a letter.
    MultipleChoice,
}

impl Kind {
    /// As in the names of the files.
    pub fn name(self) -> &'static str {
        match self {
            Self::FreeForm => "free-form",
            Self::MultipleChoice => "multiple-choice",
        }
    }
}

/// What counts as right.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// Any of these.
    Answers(Vec<String>),
    /// The option at this index.
    Option(usize),
}

/// One question.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// `free-form/KEY` or `multiple-choice/KEY` with the key of the file.
    pub id: String,
    /// Its kind.
    pub kind: Kind,
    /// Text before the question.
    pub context: Option<String>,
    /// The question.
    pub prompt: String,
    /// Options; empty where free.
    pub options: Vec<String>,
    /// What counts as right.
    pub target: Target,
    /// Where the question comes from.
    pub benchmark: String,
    /// The same for items with the same question, of which the sets have many.
    pub cluster: String,
}

/// Fields of an item in the files.
#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(default)]
    context: Option<Value>,
    prompt: String,
    #[serde(default)]
    options: Option<Vec<Value>>,
    target: Value,
    benchmark_name: String,
}

/// Reads both files of a split, in their order: from `dir` itself, or `dir/mixeval-hard` and `dir/mixeval`, as the
/// releases have them.
pub fn read(dir: &Path, split: Split) -> Result<Vec<Item>> {
    let name = if split == Split::Hard { "mixeval-hard" } else { "mixeval" };
    let places = [dir.join(name), dir.to_path_buf()];
    let other = if split == Split::Hard { "mixeval" } else { "mixeval-hard" };
    if dir.file_name().is_some_and(|own| own == other) {
        bail!("{}: is the other set; give --split, or the directory above", dir.display());
    }
    let place = places.iter().find(|place| place.join("free-form.json").exists()).with_context(|| {
        format!(
            "{}: holds neither {name}/free-form.json nor free-form.json; give a release of MixEval's data, such as \
             mix_eval/data/mixeval-2024-08-11 of its repository",
            dir.display()
        )
    })?;
    let mut items = read_file(&place.join("free-form.json"), Kind::FreeForm)?;
    items.extend(read_file(&place.join("multiple-choice.json"), Kind::MultipleChoice)?);
    Ok(items)
}

fn read_file(path: &PathBuf, kind: Kind) -> Result<Vec<Item>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let entries: serde_json::Map<String, Value> =
        serde_json::from_str(&text).with_context(|| format!("{}: not an object of items", path.display()))?;
    let item = |(key, value): (String, Value)| {
        let place = || format!("{}: item {key}", path.display());
        let entry: Entry = serde_json::from_value(value).with_context(place)?;
        entry.item(&key, kind).with_context(place)
    };
    entries.into_iter().map(item).collect()
}

impl Entry {
    fn item(self, key: &str, kind: Kind) -> Result<Item> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        // Some entries have the words "none" or "null" for none.
        let context = self.context.as_ref().filter(|context| !context.is_null()).map(text);
        let is_empty = |text: &String| matches!(text.trim().to_lowercase().as_str(), "" | "none" | "null");
        let context = context.filter(|text| !is_empty(text));
        let options: Vec<String> = self.options.iter().flatten().map(text).collect();
        let list = match &self.target {
            Value::Array(list) => list.clone(),
            one => vec![one.clone()],
        };
        let target = match kind {
            Kind::FreeForm => Target::Answers(list.iter().map(text).collect()),
            Kind::MultipleChoice => {
                let [one] = &list[..] else { bail!("the target is no single option") };
                let index = one.as_u64().context("the target is no index of an option")? as usize;
                if index >= options.len() || options.len() > 26 {
                    bail!("target {index} of {} options", options.len());
                }
                Target::Option(index)
            }
        };
        let whole = serde_json::json!([kind, context, self.prompt, options]).to_string();
        let cluster = blake3::hash(whole.as_bytes()).to_hex()[..16].to_string();
        let (prompt, benchmark) = (self.prompt, self.benchmark_name);
        Ok(Item {
            id: format!("{}/{key}", kind.name()),
            kind,
            context,
            prompt,
            options,
            target,
            benchmark,
            cluster,
        })
    }
}

/// The letter of an option.
pub fn letter(index: usize) -> char {
    char::from(b'A' + index as u8)
}

impl Item {
    /// Lines of lettered options.
    pub fn choices(&self) -> String {
        let line = |(i, option): (usize, &String)| format!("{}. {option}", letter(i));
        self.options.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
    }

    /// The question as a model sees it.
    pub fn question(&self) -> String {
        let context = self.context.as_ref().map_or_else(String::new, |context| format!("{context}\n"));
        match self.kind {
            Kind::FreeForm => {
                let steps = matches!(self.benchmark.as_str(), "BBH" | "GSM8k" | "MATH");
                let instruction = if steps {
                    "Answer the question. \nLet's think step by step."
                } else {
                    "Answer the question shortly."
                };
                format!("Question: {context}{}\n{instruction}", self.prompt)
            }
            Kind::MultipleChoice => format!(
                "{context}{}\n{}\nAnswer with the option letter from the given choices directly.",
                self.prompt,
                self.choices()
            ),
        }
    }
}

/// Texts before the questions for base models.
#[derive(Debug)]
pub struct FewShot(HashMap<Kind, String>);

impl FewShot {
    /// Our own five examples of each kind, or those of a directory with `free-form.txt` and `multiple-choice.txt`.
    pub fn read(dir: Option<&Path>) -> Result<Self> {
        let own = [
            (Kind::FreeForm, include_str!("few_shot/free-form.txt")),
            (Kind::MultipleChoice, include_str!("few_shot/multiple-choice.txt")),
        ];
        let text = |(kind, own): (Kind, &str)| {
            let Some(dir) = dir else { return Ok((kind, own.to_string())) };
            let path = dir.join(format!("{}.txt", kind.name()));
            Ok((kind, fs::read_to_string(&path).with_context(|| path.display().to_string())?))
        };
        Ok(Self(own.into_iter().map(text).collect::<Result<_>>()?))
    }

    /// Examples and question, to be continued.
    pub fn before(&self, item: &Item) -> String {
        format!("{}{}\n", self.0[&item.kind], item.question())
    }

    /// Where a base model has begun the next example.
    pub fn end(kind: Kind) -> &'static str {
        match kind {
            Kind::FreeForm => "\n\n\nQuestion",
            Kind::MultipleChoice => "\n\n",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(kind: Kind, text: &str) -> Result<Vec<Item>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.json");
        fs::write(&path, text).unwrap();
        read_file(&path, kind)
    }

    #[test]
    fn questions_have_the_fixed_wording() {
        let text = r#"{
            "7": {"context": null, "prompt": "How many?", "target": ["3"], "benchmark_name": "GSM8k"},
            "9": {"context": "A farm.", "prompt": "Whose?", "target": ["Ann's", "Ann"], "benchmark_name": "DROP"}
        }"#;
        let free = items(Kind::FreeForm, text).unwrap();
        assert_eq!(free[0].id, "free-form/7");
        assert_eq!(
            free[0].question(),
            "Question: How many?\nAnswer the question. \nLet's think step by step."
        );
        assert_eq!(free[1].question(), "Question: A farm.\nWhose?\nAnswer the question shortly.");
        let text = r#"{"0": {"context": "None", "prompt": "Which?", "options": ["this", 4], "target": [1],
            "benchmark_name": "PIQA"}}"#;
        let choice = items(Kind::MultipleChoice, text).unwrap().remove(0);
        let want = "Which?\nA. this\nB. 4\nAnswer with the option letter from the given choices directly.";
        assert_eq!(choice.question(), want);
        assert_eq!(choice.target, Target::Option(1));
        let base = FewShot::read(None).unwrap().before(&choice);
        assert!(
            base.ends_with(&format!("{want}\n"))
                && base.matches("Answer with the option letter").count() == 6
        );
    }

    #[test]
    fn the_same_question_is_the_same_cluster_and_errors_name_their_item() {
        let entry = |prompt: &str, benchmark: &str| {
            format!(r#"{{"prompt": "{prompt}", "target": ["x"], "benchmark_name": "{benchmark}"}}"#)
        };
        let (a, b) = (entry("q", "TriviaQA"), entry("r", "TriviaQA"));
        let all = items(Kind::FreeForm, &format!(r#"{{"0": {a}, "1": {b}, "2": {a}}}"#)).unwrap();
        assert_eq!(all[0].cluster, all[2].cluster);
        assert_ne!(all[0].cluster, all[1].cluster);
        let bad = r#"{"3": {"prompt": "q", "options": ["a"], "target": [1], "benchmark_name": "ARC"}}"#;
        let said = format!("{:#}", items(Kind::MultipleChoice, bad).unwrap_err());
        assert!(said.contains("item 3") && said.contains("target 1 of 1 options"), "{said}");
    }
}
