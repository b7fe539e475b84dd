//! The token cache: any bytes are a token set whose rows can all be read, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pref_data::TokenSet;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.tokens");
    // The checksums would hide everything behind them: the file is sealed as a whole one is.
    std::fs::write(&path, TokenSet::seal(data)).expect("a file");
    if let Ok(set) = TokenSet::open(&path) {
        for row in 0..set.len() {
            let tokens = set.tokens(row);
            assert_eq!(tokens.prompt.len(), set.lengths(row).prompt);
            let _ = (set.id(row), set.label(row), set.boundary(row));
        }
    }
    std::fs::write(&path, data).expect("a file");
    let _ = TokenSet::open(&path);
});
