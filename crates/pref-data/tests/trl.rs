//! Token ids against TRL 1.16 (fixtures/tokenization, see fixtures/README.md).

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use pref_data::{Packed, Tokenizer, prepare, read_records};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn json(path: PathBuf) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn check(model: &str, dataset: &str, split: &str, expected: &str) {
    let tokenizer = Tokenizer::load(&fixtures().join("models").join(model), None).unwrap();
    let records = read_records(&fixtures().join(format!("data/{dataset}/{split}.jsonl"))).unwrap();
    let expected = json(fixtures().join(format!("tokenization/{model}.{expected}.json")));
    let rows = expected["rows"].as_array().unwrap();
    assert_eq!(rows.len(), records.len());
    for (record, row) in records.iter().zip(rows) {
        let tokens = tokenizer.pair(record).unwrap();
        assert_eq!(tokens.prompt, ids(&row["prompt_ids"]), "{model} {dataset}: prompt of {}", record.id);
        assert_eq!(tokens.chosen, ids(&row["chosen_ids"]), "{model} {dataset}: chosen of {}", record.id);
        assert_eq!(
            tokens.rejected,
            ids(&row["rejected_ids"]),
            "{model} {dataset}: rejected of {}",
            record.id
        );
    }
}

#[test]
fn every_layout_of_the_same_pairs_gives_trls_tokens() {
    for model in ["tiny-qwen2", "tiny-llama", "tiny-mistral", "tiny-opt", "tiny-qwen3"] {
        for dataset in ["clair_mini", "clair_mini_noprompt", "clair_mini_explicit"] {
            for split in ["train", "test"] {
                check(model, dataset, split, &format!("clair_mini.{split}"));
            }
        }
    }
}

#[test]
fn plain_text_gets_special_tokens_and_eos() {
    for model in ["tiny-qwen2", "tiny-llama", "tiny-opt"] {
        check(model, "clair_mini_standard", "train", "clair_mini_standard.train");
        check(model, "edge_cases_standard", "train", "edge_cases_standard");
    }
}

#[test]
fn edge_cases() {
    for model in ["tiny-qwen2", "tiny-llama", "tiny-opt"] {
        check(model, "edge_cases", "train", "edge_cases");
    }
}

#[test]
fn long_rows_are_dropped_and_cut_as_the_collator_does() {
    let tokenizer = Tokenizer::load(&fixtures().join("models/tiny-qwen2"), None).unwrap();
    let records = read_records(&fixtures().join("data/clair_mini/train.jsonl")).unwrap();
    for max_length in [24, 48] {
        let expected = json(fixtures().join(format!("tokenization/tiny-qwen2.max_length_{max_length}.json")));
        let prepared = prepare(&tokenizer, &records, Some(max_length)).unwrap();
        let kept: Vec<u32> = prepared.rows.iter().map(|row| row.row as u32).collect();
        assert_eq!(kept, ids(&expected["kept_rows"]));
        assert_eq!(prepared.dropped.len() + kept.len(), records.len());
        let batch = &expected["first_batch"];
        for i in 0..8 {
            let mask = ids(&batch["attention_mask"][i]);
            let real = mask.iter().filter(|&&m| m == 1).count();
            let tokens = &prepared.rows[i % 4].tokens;
            let completion = if i < 4 { &tokens.chosen } else { &tokens.rejected };
            let sequence = [tokens.prompt.as_slice(), completion].concat();
            assert_eq!(sequence, ids(&batch["input_ids"][i])[..real]);
            let completion_mask = ids(&batch["completion_mask"][i]);
            assert_eq!(completion_mask.iter().sum::<u32>() as usize, completion.len());
        }
    }
}

#[test]
fn packing_counts_the_tokens_a_padded_batch_would() {
    let tokenizer = Tokenizer::load(&fixtures().join("models/tiny-qwen2"), None).unwrap();
    let records = read_records(&fixtures().join("data/clair_mini/train.jsonl")).unwrap();
    let prepared = prepare(&tokenizer, &records, None).unwrap();
    let packed = Packed::new(prepared.rows[..4].iter().map(|row| &row.tokens));
    // num_tokens of step 1 of every trajectory.
    assert_eq!(packed.num_tokens, 724);
    let shared: usize = packed.rows.iter().map(|row| row.shared).sum();
    assert_eq!(packed.tokens.len() + shared, 724, "what both sequences share is stored once");
    assert!(shared > 150);
}
