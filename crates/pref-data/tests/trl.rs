//! Token ids against TRL 1.16 (fixtures/tokenization, see fixtures/README.md).

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use pref_data::{
    Dataset, Packed, PairTokens, Source, Splits, TemplateSource, TokenSet, Tokenizer, kl_rows, tokenize,
};
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

fn tokenizer(model: &str) -> Tokenizer {
    Tokenizer::load(&fixtures().join("models").join(model), None, jiff::civil::DateTime::MIN).unwrap()
}

/// Tokens of a split, through the cache.
fn tokens(tokenizer: &Tokenizer, dataset: &str, split: &str, unpaired: bool) -> TokenSet {
    let splits = Splits::find(&fixtures().join("data").join(dataset), None).unwrap();
    let files = splits.split(split).unwrap().to_vec();
    let cache = tempfile::tempdir().unwrap();
    let source = Source { files, unpaired, ..Source::default() };
    tokenize(&source, tokenizer, cache.path(), &|_| {}).unwrap().set
}

fn check(model: &str, dataset: &str, split: &str, expected: &str) {
    check_with(&tokenizer(model), model, dataset, split, expected);
}

fn check_with(tokenizer: &Tokenizer, model: &str, dataset: &str, split: &str, expected: &str) {
    let set = tokens(tokenizer, dataset, split, false);
    let expected = json(fixtures().join(format!("tokenization/{model}.{expected}.json")));
    let rows = expected["rows"].as_array().unwrap();
    assert_eq!(rows.len(), set.len());
    for (i, row) in rows.iter().enumerate() {
        let PairTokens { prompt, chosen, rejected, .. } = set.tokens(i);
        assert_eq!(prompt, ids(&row["prompt_ids"]), "{model} {dataset}: prompt of row {i}");
        assert_eq!(chosen, ids(&row["chosen_ids"]), "{model} {dataset}: chosen of row {i}");
        assert_eq!(rejected, ids(&row["rejected_ids"]), "{model} {dataset}: rejected of row {i}");
    }
}

const MODELS: [&str; 6] =
    ["tiny-qwen2", "tiny-llama", "tiny-mistral", "tiny-opt", "tiny-qwen3", "tiny-gemma2"];

#[test]
fn every_layout_of_the_same_pairs_gives_trls_tokens() {
    for model in MODELS {
        for dataset in ["clair_mini", "clair_mini_noprompt", "clair_mini_explicit", "clair_mini_parquet"] {
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
fn a_tokenizer_of_vocabulary_and_merges_is_the_same() {
    // As facebook/opt-125m has it; the chat template is 'simple', as tiny-opt's own.
    let tokenizer = tokenizer("tiny-opt-hub");
    assert!(tokenizer.is_fast() && tokenizer.template_source() == TemplateSource::Simple);
    for (dataset, expected) in [
        ("clair_mini", "clair_mini.train"),
        ("clair_mini_standard", "clair_mini_standard.train"),
        ("edge_cases_standard", "edge_cases_standard"),
    ] {
        check_with(&tokenizer, "tiny-opt", dataset, "train", expected);
    }
}

#[test]
fn edge_cases() {
    for model in ["tiny-qwen2", "tiny-llama", "tiny-opt"] {
        check(model, "edge_cases", "train", "edge_cases");
    }
}

#[test]
fn completions_with_labels_and_pairs_taken_apart_give_trls_kto_rows() {
    let tokenizer = tokenizer("tiny-qwen2");
    for (dataset, unpaired) in [("clair_mini_kto", false), ("clair_mini_noprompt", true)] {
        let set = tokens(&tokenizer, dataset, "train", unpaired);
        assert!(set.is_unpaired());
        let expected = json(fixtures().join(format!("tokenization/tiny-qwen2.kto.{dataset}.train.json")));
        let rows = expected["rows"].as_array().unwrap();
        let batch = expected["per_device_train_batch_size"].as_u64().unwrap() as usize;
        assert_eq!(rows.len(), set.len());
        for (i, other) in kl_rows(set.len(), batch).into_iter().enumerate() {
            let (row, tokens) = (&rows[i], set.tokens(i));
            assert_eq!(tokens.prompt, ids(&row["prompt_ids"]), "{dataset}: prompt of row {i}");
            assert_eq!(tokens.chosen, ids(&row["completion_ids"]), "{dataset}: completion of row {i}");
            assert_eq!(set.tokens(other).chosen, ids(&row["KL_completion_ids"]), "{dataset}: KL of row {i}");
            assert_eq!(set.label(i), row["label"].as_bool().unwrap());
        }
    }
}

#[test]
fn the_fast_way_is_taken_where_it_exists() {
    for model in MODELS {
        assert!(tokenizer(model).is_fast(), "{model}");
    }
}

#[test]
fn long_rows_are_dropped_and_cut_as_the_collator_does() {
    let tokenizer = tokenizer("tiny-qwen2");
    for max_length in [24, 48] {
        let expected = json(fixtures().join(format!("tokenization/tiny-qwen2.max_length_{max_length}.json")));
        let set = tokens(&tokenizer, "clair_mini", "train", false);
        let all = set.len();
        let dataset = Dataset::whole(set, Some(max_length));
        let kept: Vec<u32> = dataset.iter().map(|row| row.row as u32).collect();
        assert_eq!(kept, ids(&expected["kept_rows"]));
        assert_eq!(dataset.dropped + kept.len(), all);
        let batch = &expected["first_batch"];
        for i in 0..8 {
            let mask = ids(&batch["attention_mask"][i]);
            let real = mask.iter().filter(|&&m| m == 1).count();
            let tokens = dataset.row(i % 4).tokens;
            let lengths = dataset.lengths(i % 4);
            assert_eq!(
                [tokens.prompt.len(), tokens.chosen.len(), tokens.rejected.len()],
                [lengths.prompt, lengths.chosen, lengths.rejected]
            );
            assert_eq!(Packed::new([&tokens]).tokens.len(), lengths.packed());
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
    let dataset = Dataset::whole(tokens(&tokenizer("tiny-qwen2"), "clair_mini", "train", false), None);
    let rows: Vec<PairTokens> = (0..4).map(|i| dataset.row(i).tokens).collect();
    let packed = Packed::new(&rows);
    // num_tokens of step 1 of every trajectory.
    assert_eq!(packed.num_tokens, 724);
    let shared: usize = packed.rows.iter().map(|row| row.shared).sum();
    assert_eq!(packed.tokens.len() + shared, 724, "what both sequences share is stored once");
    assert!(shared > 150);
}
