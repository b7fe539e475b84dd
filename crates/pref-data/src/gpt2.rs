//! Tokenizers of the GPT-2 kind without a `tokenizer.json`: `vocab.json` and `merges.txt`, as OPT's and GPT-2's
//! are on the Hub (transformers' `GPT2Tokenizer`).

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Error;

/// The `tokenizer.json` that transformers makes of such a directory.
pub(crate) fn tokenizer_json(
    dir: &Path,
    config: &Value,
    special: &Map<String, Value>,
) -> Result<Vec<u8>, Error> {
    let (vocab, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
    if !vocab.is_file() || !merges.is_file() {
        return Err(Error::Tokenizer {
            path: dir.join("tokenizer.json"),
            reason: "no such file; the model directory needs a fast tokenizer (or vocab.json and merges.txt)"
                .into(),
        });
    }
    let text = fs::read_to_string(&vocab).map_err(Error::io(&vocab))?;
    let ids: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|e| Error::Tokenizer { path: vocab.clone(), reason: e.to_string() })?;
    let text = fs::read_to_string(&merges).map_err(Error::io(&merges))?;
    let merges: Vec<&str> =
        text.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()).collect();
    let missing = |token: &str| Error::Tokenizer {
        path: vocab.clone(),
        reason: format!("has no entry for the special token {token:?}"),
    };
    let mut added: Vec<(u64, &str)> = Vec::new();
    for token in special.values().filter_map(Value::as_str) {
        let id = ids.get(token).and_then(Value::as_u64).ok_or_else(|| missing(token))?;
        if !added.contains(&(id, token)) {
            added.push((id, token));
        }
    }
    added.sort_unstable();
    let added: Vec<Value> = added
        .into_iter()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": true, "special": true})
        })
        .collect();
    let bos = special.get("bos_token").and_then(Value::as_str).filter(|_| config["add_bos_token"] == true);
    let processor = bos.map(|bos| {
        let (token, text) = (
            json!({"SpecialToken": {"id": bos, "type_id": 0}}),
            json!({"Sequence": {"id": "A", "type_id": 0}}),
        );
        json!({"type": "TemplateProcessing", "single": [token, text],
               "pair": [token, text, {"Sequence": {"id": "B", "type_id": 1}}],
               "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}})
    });
    let prefix = config["add_prefix_space"] == true;
    let whole = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true},
        "post_processor": processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": ids, "merges": merges}
    });
    Ok(whole.to_string().into_bytes())
}
