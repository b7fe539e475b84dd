//! Tokenizes the rows of `fixtures/make/tokens.py` and counts those whose ids are TRL's: what
//! `cargo xtask check tokens` runs.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pref_data::{Error, Source, Tokenizer, read_jsonl, tokenize};
use serde_json::{Value, json};

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        println!("usage: tokens DIR");
        return ExitCode::from(2);
    };
    match compare(&dir) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(dir: &Path) -> Result<bool, Error> {
    let (mut all, mut equal, mut sets) = (0, 0, 0);
    let mut numbers: Vec<PathBuf> = entries(dir);
    numbers.sort();
    for case in numbers {
        // The day of chat_templates.py.
        let now = jiff::civil::date(2024, 7, 26).at(9, 3, 7, 0);
        let tokenizer = Tokenizer::load(&case.join("model"), None, now)?;
        let cache = case.join("cache");
        for expected in entries(&case) {
            let name = expected.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(layout) = name.strip_suffix(".expected.jsonl") else { continue };
            let source = Source { files: vec![case.join(format!("{layout}.jsonl"))], ..Source::default() };
            let set = tokenize(&source, &tokenizer, &cache, &|_| {})?.set;
            sets += 1;
            let mut shown = false;
            for (i, (_, want)) in read_jsonl(&expected)?.into_iter().enumerate() {
                let tokens = set.tokens(i);
                let got = json!([tokens.prompt, tokens.chosen, tokens.rejected]);
                all += 1;
                equal += usize::from(got == want);
                if got != want && !std::mem::replace(&mut shown, true) {
                    println!("{} {layout}, row {i}: {}", case.display(), difference(&got, &want));
                }
            }
        }
    }
    println!("{sets} sets, {equal} of {all} rows equal");
    Ok(equal == all && all > 0)
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn difference(got: &Value, want: &Value) -> String {
    let names = ["prompt", "chosen", "rejected"];
    let differing = names.iter().enumerate().find(|(i, _)| got[i] != want[i]);
    differing.map_or_else(String::new, |(i, name)| format!("{name} is {}, TRL has {}", got[i], want[i]))
}
