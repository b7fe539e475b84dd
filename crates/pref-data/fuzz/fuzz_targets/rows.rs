//! JSON Lines, JSON, CSV and compressed files: any bytes give rows or an error that names the place.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use pref_data::{Layout, read_blocks};

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else { return };
    let names = ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.json.zst"];
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join(names[*kind as usize % names.len()]);
    std::fs::write(&path, bytes).expect("a file");
    let mut rows = Vec::new();
    let read = read_blocks(&path, None, &mut |block| {
        rows.extend(block.rows().into_iter().filter_map(|(_, row)| row.value().ok()));
        Ok(rows.len() < 1000)
    });
    let _ = read;
    if let Ok(layout) = Layout::detect(&rows, &BTreeMap::new()) {
        for (number, row) in rows.into_iter().enumerate() {
            let _ = layout.parse(row, number);
        }
    }
});
