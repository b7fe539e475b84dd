//! Parquet files: any bytes give rows or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pref_data::read_blocks;

fuzz_target!(|data: &[u8]| {
    // Panics inside the parquet crate are caught by the reader; libFuzzer's hook would end the process first. One
    // that is not caught still ends it.
    std::panic::set_hook(Box::new(|_| {}));
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.parquet");
    std::fs::write(&path, data).expect("a file");
    let mut rows = 0;
    let _ = read_blocks(&path, None, &mut |block| {
        rows += block.rows().len();
        Ok(rows < 10_000)
    });
});
