//! Data cards: a `README.md` with the header that the Hub reads, so that a directory can be pushed as it is.

use std::fmt::Write;

/// What a card tells.
#[derive(Debug, Clone, Copy)]
pub struct Card<'a> {
    /// Heading.
    pub title: &'a str,
    /// One paragraph: what the rows are and how they were made.
    pub about: &'a str,
    /// Splits and their files, as the Hub is to read them.
    pub splits: &'a [(&'a str, &'a str)],
    /// Number of rows.
    pub rows: usize,
    /// Tags.
    pub tags: &'a [&'a str],
    /// Columns and what they hold.
    pub columns: &'a [(&'a str, &'a str)],
    /// Figures and settings.
    pub facts: &'a [(&'a str, String)],
}

impl Card<'_> {
    /// The text of `README.md`.
    pub fn text(&self) -> String {
        let mut out = String::from("---\n");
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        line("task_categories: [text-generation]".into());
        line(format!("tags: [{}]", self.tags.join(", ")));
        line(format!("size_categories: [{}]", size(self.rows)));
        line("configs:\n- config_name: default\n  data_files:".into());
        for (split, file) in self.splits {
            line(format!("  - split: {split}\n    path: {file}"));
        }
        line(format!("---\n# {}\n\n{}\n\n| column | holds |\n|---|---|", self.title, self.about));
        for (name, meaning) in self.columns {
            line(format!("| `{name}` | {meaning} |"));
        }
        out.push('\n');
        for (name, value) in self.facts {
            // A table would break on a pipe in a value.
            let _ = writeln!(out, "- {name}: {}", value.replace('\n', " "));
        }
        out
    }
}

/// The Hub's size categories.
fn size(rows: usize) -> &'static str {
    match rows {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        1_000_000..10_000_000 => "1M<n<10M",
        _ => "10M<n<100M",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_leads_to_its_data() {
        let card = Card {
            title: "Pairs",
            about: "Some.",
            splits: &[("train", "pairs.parquet"), ("test", "held/*.jsonl")],
            rows: 12_345,
            tags: &["preference"],
            columns: &[("prompt", "the task")],
            facts: &[("teacher", "a|b".into())],
        };
        let text = card.text();
        assert!(text.contains("size_categories: [10K<n<100K]") && text.contains("- teacher: a|b"));
        let files = ["README.md", "pairs.parquet", "pairs.jsonl", "held/1.jsonl"].map(String::from);
        let splits = crate::resolve(&files, Some(&text), None).unwrap();
        // The commonest format wins, and parquet among equals.
        assert_eq!(splits[0], ("train".into(), vec!["pairs.parquet".into()]));
    }
}
