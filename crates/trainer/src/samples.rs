//! What the model answers to held-out prompts as it is trained: `samples.jsonl`.

use std::sync::atomic::Ordering;

use anyhow::Result;
use backend::Backend;
use decoder::{Completion, Decoder, Ends, Generator, Request, Sampling, Stop};
use pref_data::{Dataset, Tokenizer};
use serde_json::{Value, json};

use crate::train::INTERRUPTED;

/// Which prompts are answered.
pub struct Samples {
    tokenizer: Tokenizer,
    eos: Vec<u32>,
    /// Rows of the test set, from its start.
    count: usize,
    /// New tokens of an answer.
    tokens: usize,
    backend: Backend,
}

impl Samples {
    /// The first `count` rows, with at most `tokens` new tokens each.
    pub fn new(
        tokenizer: Tokenizer,
        mut eos: Vec<u32>,
        [count, tokens]: [usize; 2],
        backend: Backend,
    ) -> Self {
        eos.extend(tokenizer.eos_id());
        Self { tokenizer, eos, count, tokens, backend }
    }

    /// Answers of the model, the most likely token each time; nothing where the run is interrupted meanwhile. A prompt
    /// that leaves the model no room is passed over.
    pub fn of(&self, model: &Decoder, rows: &Dataset, step: usize) -> Result<Vec<Value>> {
        let longest = model.config().longest();
        let request = |index: usize| {
            let prompt = rows.row(index).tokens.prompt;
            let room = longest.saturating_sub(prompt.len()).min(self.tokens);
            let fits =
                !prompt.is_empty() && room > 0 && model.check_sequence(&prompt, prompt.len() + room).is_ok();
            fits.then_some(Request { index, prompt, max_new_tokens: room, seed: 0 })
        };
        let requests: Vec<Request> = (0..self.count.min(rows.len())).filter_map(request).collect();
        let room: usize = requests
            .iter()
            .map(|r| (r.prompt.len() + r.max_new_tokens).next_multiple_of(fused_ops::PAGE))
            .sum();
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let prompts: Vec<String> =
            requests.iter().map(|r| self.tokenizer.decode(&r.prompt)).collect::<Result<_, _>>()?;
        let places: Vec<usize> = requests.iter().map(|r| r.index).collect();
        let mut done: Vec<Completion> = Vec::new();
        let ends = Ends { eos: self.eos.clone(), text: None };
        let model = model.frozen().merged();
        let activations = self.backend.generates_in(model.compute());
        let mut generator = Generator::new(model.computing_in(activations), Sampling::GREEDY, room, false);
        generator.run(
            requests,
            &ends,
            |completion| done.push(completion),
            |_| !INTERRUPTED.load(Ordering::Relaxed),
        );
        if done.len() < places.len() {
            return Ok(Vec::new());
        }
        done.sort_unstable_by_key(|completion| completion.index);
        let row = |(completion, prompt): (&Completion, &String)| -> Result<Value> {
            Ok(json!({
                "step": step,
                "id": rows.id(completion.index),
                "prompt": prompt,
                "response": self.tokenizer.decode(&completion.tokens)?,
                "finish_reason": if completion.stop == Stop::Length { "length" } else { "stop" },
            }))
        };
        done.iter().zip(&prompts).map(row).collect()
    }
}
