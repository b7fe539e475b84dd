//! Data set cards and file names: any text gives splits or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pref_data::resolve;

fuzz_target!(|data: &str| {
    let (card, names) = data.split_once('\0').unwrap_or((data, "data/train-00000-of-00001.parquet\ntest.jsonl"));
    let files: Vec<String> = names.lines().map(str::to_owned).collect();
    let _ = resolve(&files, Some(card), None);
    let _ = resolve(&files, None, None);
});
