//! Generation on every tiny model: against transformers' own (`fixtures/make/greedy.py`), against the whole sequence,
//! and against itself with other company.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use backend::under_test;
use decoder::{Batch, Completion, Decoder, Ends, Generator, Progress, Request, Sampling, Stop};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn load(name: &str) -> Decoder {
    Decoder::load(&fixtures().join(name), &under_test().device).unwrap()
}

struct Run {
    tokens: usize,
    sampling: Sampling,
    narrow: bool,
}

impl Default for Run {
    fn default() -> Self {
        Self { tokens: 512, sampling: Sampling::GREEDY, narrow: false }
    }
}

fn run(model: &Decoder, prompts: &[Vec<u32>], new: usize, how: &Run) -> (Vec<Completion>, Progress) {
    let requests = prompts.iter().enumerate().map(|(index, prompt)| Request {
        index,
        prompt: prompt.clone(),
        max_new_tokens: new,
        seed: index as u64,
    });
    let mut all = BTreeMap::new();
    let mut total = Progress::default();
    Generator::new(model.clone(), how.sampling, how.tokens, how.narrow).run(
        requests,
        &Ends { eos: Vec::new(), text: None },
        |done| assert!(all.insert(done.index, done).is_none()),
        |step| {
            (total.read, total.made) = (total.read + step.read, total.made + step.made);
            total.shared += step.shared;
            true
        },
    );
    assert_eq!(all.len(), prompts.len());
    (all.into_values().collect(), total)
}

fn tokens(completions: &[Completion]) -> Vec<&[u32]> {
    completions.iter().map(|done| &done.tokens[..]).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn greedy_tokens_are_those_of_transformers_alone_and_together() {
    let text = fs::read_to_string(fixtures().join("greedy.json")).unwrap();
    let all: BTreeMap<String, Vec<Value>> = serde_json::from_str(&text).unwrap();
    assert!(all.len() >= 25);
    for (name, rows) in all {
        let model = load(&name);
        let prompts: Vec<Vec<u32>> = rows.iter().map(|row| ids(&row["prompt"])).collect();
        let (together, _) = run(&model, &prompts, 40, &Run::default());
        // Two implementations differ by 1e-5 in a logit at most.
        for ((row, prompt), done) in rows.iter().zip(&prompts).zip(&together) {
            assert!(row["gap"].as_f64().unwrap() > 5e-5, "{name}: the fixture decides nothing");
            assert_eq!(done.tokens, ids(&row["tokens"]), "{name}, {} tokens together", prompt.len());
            let (alone, _) = run(&model, std::slice::from_ref(prompt), 40, &Run::default());
            assert_eq!(alone[0].tokens, done.tokens, "{name}, {} tokens alone", prompt.len());
        }
    }
}

#[test]
fn a_cache_gives_what_the_whole_sequence_says() {
    let model = load("models/tiny-qwen3");
    let prompt: Vec<u32> = (0..30).map(|i| 3 + (i * 31) % 90).collect();
    let (done, _) = run(&model, std::slice::from_ref(&prompt), 24, &Run::default());
    let mut ids = prompt;
    for &token in &done[0].tokens {
        let logits = model.logits(model.forward(&Batch::of_sequence(&ids)), &[ids.len() as u32 - 1]);
        let best = logits.argmax(1).into_data().iter::<i64>().next().unwrap() as u32;
        assert_eq!(token, best, "after {} tokens", ids.len());
        ids.push(token);
    }
}

/// Prompts with a common beginning, of every length around the pages' borders.
fn similar() -> Vec<Vec<u32>> {
    let prompt = |i: u32| (0..40 + 5 * i).map(move |j| if j < 70 { 3 + j } else { 3 + (j * (i + 7)) % 90 });
    (0..12).map(|i| prompt(i).collect()).collect()
}

#[test]
fn results_do_not_depend_on_what_runs_together() {
    if !under_test().backend.is_on_host() {
        return;
    }
    let drawn = Sampling { temperature: 0.9, top_p: 0.95, ..Sampling::GREEDY };
    for name in ["models/tiny-llama", "models/tiny-gemma2", "families/qwen3-window"] {
        let model = load(name);
        for narrow in [false, true] {
            let how = |tokens| Run { tokens, sampling: drawn, narrow };
            let (together, shared) = run(&model, &similar(), 20, &how(2048));
            let (crowded, _) = run(&model, &similar(), 20, &how(160));
            assert_eq!(tokens(&together), tokens(&crowded), "{name}, narrow {narrow}");
            assert!(shared.shared > 0, "{name}: pages are shared");
            let all: usize = similar().iter().map(Vec::len).sum();
            assert_eq!((shared.read + shared.shared, shared.made), (all, 12 * 20));
            for (i, prompt) in similar().iter().enumerate() {
                let mut requests = vec![vec![5]; i];
                requests.push(prompt.clone());
                let (alone, _) = run(&model, &requests, 20, &how(128));
                assert_eq!(alone[i].tokens, together[i].tokens, "{name}, narrow {narrow}, prompt {i}");
            }
        }
    }
}

#[test]
fn completions_end_where_they_are_told_to() {
    let model = load("models/tiny-llama");
    let prompt: Vec<u32> = (3..20).collect();
    let (free, _) = run(&model, std::slice::from_ref(&prompt), 12, &Run::default());
    assert_eq!((free[0].stop, free[0].tokens.len()), (Stop::Length, 12));
    let end = |ends: &Ends| {
        let mut all = Vec::new();
        let request = Request { index: 3, prompt: prompt.clone(), max_new_tokens: 12, seed: 0 };
        let mut generator = Generator::new(model.clone(), Sampling::GREEDY, 64, false);
        generator.run([request], ends, |done| all.push(done), |_| true);
        all.remove(0)
    };
    let tokens = &free[0].tokens;
    let first = |token| tokens.iter().position(|&t| t == token).unwrap();
    let eos = end(&Ends { eos: vec![tokens[4]], text: None });
    assert_eq!((eos.stop, eos.index, &eos.tokens[..]), (Stop::Eos, 3, &tokens[..first(tokens[4])]));
    let text = end(&Ends { eos: Vec::new(), text: Some(&|index, new: &[u32]| index == 3 && new.len() == 7) });
    assert_eq!((text.stop, &text.tokens[..]), (Stop::Text, &tokens[..7]));
}

#[test]
fn an_interrupted_run_leaves_the_generator_usable() {
    let model = load("models/tiny-llama");
    let mut generator = Generator::new(model, Sampling::GREEDY, 128, false);
    let request = |index| Request { index, prompt: (3..40).collect(), max_new_tokens: 20, seed: 0 };
    let ends = Ends { eos: Vec::new(), text: None };
    for _ in 0..8 {
        let mut steps = 0;
        generator.run(
            [request(0), request(1)],
            &ends,
            |_| panic!("nothing is done yet"),
            |_| {
                steps += 1;
                steps < 5
            },
        );
    }
    let mut done = 0;
    generator.run([request(0), request(1)], &ends, |_| done += 1, |_| true);
    assert_eq!(done, 2);
}
