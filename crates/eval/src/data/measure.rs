//! Numbers of each row; the texts themselves are not kept.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use pref_data::{Kind, Layout, Row, RowText, Text, Tokenizer, jaccard, layout_of, levenshtein, read_blocks};
use rayon::prelude::*;

/// Reads and measures data sets.
pub struct Reader {
    /// Counts in its tokens instead of words.
    pub tokenizer: Option<Tokenizer>,
    /// Leave out rows that cannot be used.
    pub skip_invalid: bool,
}

/// Numbers of one row.
#[derive(Debug, Clone, Copy, Default)]
pub struct Numbers {
    /// Tokens of the prompt, the chosen and the rejected completion; of an unpaired row, 0 in one of the latter.
    pub tokens: [u32; 3],
    /// Characters of the same.
    pub chars: [u32; 3],
    /// Jaccard similarity of the completions' token sets.
    pub jaccard: f64,
    /// Levenshtein distance of the completions in characters.
    pub levenshtein: u32,
    /// Characters at the start of both completions that are the same.
    pub common_start: u32,
    /// The completions are the same.
    pub identical: bool,
    /// Hash of the prompt, upper and lower case and white space aside.
    pub prompt: [u8; 16],
    /// Hash of the whole row.
    pub row: [u8; 16],
    /// Label of an unpaired row.
    pub label: Option<bool>,
}

/// A measured split.
#[derive(Debug)]
pub struct Measured {
    /// Name of the split.
    pub split: String,
    /// Layout as shown to people.
    pub layout: String,
    /// Rows that were left out.
    pub skipped: usize,
    /// The rows.
    pub rows: Vec<Numbers>,
}

impl Reader {
    /// Measures the files of a split.
    pub fn split(
        &self,
        split: &str,
        files: &[PathBuf],
        columns: &BTreeMap<String, String>,
        tell: &dyn Fn(&str),
    ) -> Result<Measured> {
        let layout = layout_of(files, columns)?;
        tell(&format!("{split}: {layout}"));
        let mut measured =
            Measured { split: split.into(), layout: layout.to_string(), skipped: 0, rows: Vec::new() };
        for file in files {
            let (mut failure, mut first) = (None, measured.rows.len());
            read_blocks(file, Some(&layout.used_columns()), &mut |block| {
                let texts = block.rows();
                let rows = texts.par_iter().enumerate().map(|(i, (line, text))| {
                    self.row(*text, &layout, first + i).with_context(|| format!("{}:{line}", file.display()))
                });
                for row in rows.collect::<Vec<_>>() {
                    match row {
                        Ok(row) => measured.rows.push(row),
                        Err(_) if self.skip_invalid => measured.skipped += 1,
                        Err(error) => {
                            failure.get_or_insert(error);
                        }
                    }
                }
                first += texts.len();
                Ok(failure.is_none())
            })?;
            if let Some(error) = failure {
                return Err(error.context("--skip-invalid-rows leaves such rows out"));
            }
        }
        if measured.rows.is_empty() {
            bail!("split {split} holds no usable rows");
        }
        Ok(measured)
    }

    fn row(&self, text: RowText, layout: &Layout, number: usize) -> Result<Numbers> {
        let value = text.value().map_err(|reason| anyhow!(reason))?;
        let row = layout.parse(value, number).map_err(|reason| anyhow!(reason))?;
        let (prompt, chosen, rejected, label) = match &row {
            Row::Pair(row) => (plain(&row.prompt), plain(&row.chosen), plain(&row.rejected), None),
            Row::Unpaired(row) if row.label => {
                (plain(&row.prompt), plain(&row.completion), String::new(), Some(true))
            }
            Row::Unpaired(row) => (plain(&row.prompt), String::new(), plain(&row.completion), Some(false)),
        };
        let texts = [&prompt, &chosen, &rejected];
        let hash = |text: &str| -> [u8; 16] {
            let mut short = [0; 16];
            short.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
            short
        };
        let normal = prompt.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        let mut numbers = Numbers {
            chars: texts.map(|text| text.chars().count() as u32),
            prompt: hash(&normal),
            row: hash(&texts.map(String::as_str).join("\0")),
            identical: chosen == rejected,
            label,
            ..Numbers::default()
        };
        let pairs = layout.kind == Kind::Pairs;
        if let Some(tokenizer) = &self.tokenizer {
            let [prompt, chosen, rejected] = texts.map(|text| tokenizer.encode_text(text));
            let (prompt, chosen, rejected) = (prompt?, chosen?, rejected?);
            numbers.tokens = [&prompt, &chosen, &rejected].map(|ids| ids.len() as u32);
            numbers.jaccard = if pairs { jaccard(chosen, rejected) } else { 0.0 };
        } else {
            numbers.tokens = texts.map(|text| text.split_whitespace().count() as u32);
            numbers.jaccard =
                if pairs { jaccard(chosen.split_whitespace(), rejected.split_whitespace()) } else { 0.0 };
        }
        if pairs {
            numbers.levenshtein = levenshtein(&chosen, &rejected) as u32;
            numbers.common_start =
                chosen.chars().zip(rejected.chars()).take_while(|(a, b)| a == b).count() as u32;
        }
        Ok(numbers)
    }
}

/// A text, or the contents of a conversation's messages.
fn plain(text: &Text) -> String {
    match text {
        Text::Plain(text) => text.clone(),
        Text::Chat(messages) => {
            let contents = messages.iter().filter_map(|message| match message.get("content") {
                Some(serde_json::Value::String(text)) => Some(text.clone()),
                None | Some(serde_json::Value::Null) => None,
                Some(parts) => Some(parts.to_string()),
            });
            contents.collect::<Vec<_>>().join("\n\n")
        }
    }
}
