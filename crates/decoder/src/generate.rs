//! Generation with a KV cache: slots of a fixed capacity, refilled as sequences finish.
//!
//! A step runs all active sequences together, one token each; a new sequence is prefilled when a slot
//! is free. Finished sequences cost nothing.

use std::sync::Arc;

use burn::tensor::Tensor;
use fused_ops::{Segment, Segments, attention};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::model::to_vec;
use crate::{Decoder, Sampling};

/// One prompt to complete.
#[derive(Debug, Clone)]
pub struct Request {
    /// Whatever the caller wants back with the result.
    pub index: usize,
    /// Token ids of the prompt; not empty.
    pub prompt: Vec<u32>,
    /// Seed of this request alone: what is drawn does not depend on its neighbours, but for rounding in the
    /// logits.
    pub seed: u64,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An end-of-sequence token came.
    Eos,
    /// The token limit was reached.
    Length,
}

/// A finished completion.
#[derive(Debug, Clone)]
pub struct Completion {
    /// The request's index.
    pub index: usize,
    /// New tokens, without the end-of-sequence token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
}

struct Active {
    request: Request,
    slot: usize,
    tokens: Vec<u32>,
    next: u32,
    rng: ChaCha8Rng,
}

/// Keys and values of all slots, one pair a layer, `[slots · capacity, kv · dim]`.
struct Cache {
    layers: Vec<Option<(Tensor<2>, Tensor<2>)>>,
}

impl Cache {
    /// Writes new rows at `starts` and attends.
    fn attend(&mut self, model: &Decoder, layer: usize, [q, k, v]: [Tensor<2>; 3], plan: &Plan) -> Tensor<2> {
        let (mut keys, mut values) = self.layers[layer].take().expect("put back below");
        let mut row = 0;
        for &(start, len) in &plan.writes {
            keys = keys.slice_assign([start..start + len], k.clone().narrow(0, row, len));
            values = values.slice_assign([start..start + len], v.clone().narrow(0, row, len));
            row += len;
        }
        let config = model.config();
        let (heads, scores) = (config.heads, config.scores(layer));
        let out = attention(q, keys.clone(), values.clone(), &plan.segments, heads, scores);
        self.layers[layer] = Some((keys, values));
        out
    }
}

/// Where one forward pass writes into the cache, and what it sees.
struct Plan {
    writes: Vec<(usize, usize)>,
    segments: Arc<Segments>,
    /// Each token is of a sequence of its own.
    alone: bool,
}

/// Completes requests, several at a time.
pub struct Generator {
    model: Decoder,
    eos: Vec<u32>,
    sampling: Sampling,
    max_new_tokens: usize,
    capacity: usize,
    slots: usize,
}

impl Generator {
    /// `capacity` is the longest prompt plus `max_new_tokens`; as many sequences run together as fit
    /// into `batch_tokens` (at least one).
    pub fn new(
        model: &Decoder,
        eos: Vec<u32>,
        sampling: Sampling,
        max_new_tokens: usize,
        longest_prompt: usize,
        batch_tokens: usize,
    ) -> Self {
        let capacity = longest_prompt + max_new_tokens;
        let slots = (batch_tokens / capacity).max(1);
        Self { model: model.frozen(), eos, sampling, max_new_tokens, capacity, slots }
    }

    /// Sequences that run together.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Completes every request; `done` gets each as it finishes. `tokens` is told at each step how many
    /// were made and stops the run by returning false.
    pub fn run(
        &self,
        requests: impl IntoIterator<Item = Request>,
        mut done: impl FnMut(Completion),
        mut tokens: impl FnMut(usize) -> bool,
    ) {
        let mut waiting = requests.into_iter();
        let mut cache = self.new_cache();
        let mut free: Vec<usize> = (0..self.slots).rev().collect();
        let mut active: Vec<Active> = Vec::new();
        loop {
            while let Some(slot) = free.pop() {
                let Some(request) = waiting.next() else {
                    free.push(slot);
                    break;
                };
                active.push(self.prefill(request, slot, &mut cache));
            }
            if active.is_empty() || !tokens(active.len()) {
                return;
            }
            for i in (0..active.len()).rev() {
                if let Some(stop) = self.accept(&mut active[i]) {
                    let Active { request, slot, tokens, .. } = active.remove(i);
                    free.push(slot);
                    done(Completion { index: request.index, tokens, stop });
                }
            }
            self.step(&mut active, &mut cache);
        }
    }

    fn new_cache(&self) -> Cache {
        let config = self.model.config();
        let shape = [self.slots * self.capacity, config.heads.kv * config.heads.dim];
        let empty = || Tensor::zeros(shape, (&self.model.device(), self.model.compute()));
        Cache { layers: config.layers.iter().map(|_| Some((empty(), empty()))).collect() }
    }

    /// Takes the token just chosen; tells why the sequence ends, if it does.
    fn accept(&self, sequence: &mut Active) -> Option<Stop> {
        if self.eos.contains(&sequence.next) {
            return Some(Stop::Eos);
        }
        sequence.tokens.push(sequence.next);
        (sequence.tokens.len() >= self.max_new_tokens).then_some(Stop::Length)
    }

    fn prefill(&self, request: Request, slot: usize, cache: &mut Cache) -> Active {
        let (len, base) = (request.prompt.len(), slot * self.capacity);
        let mut segments = Segments::default();
        segments.push(Segment { query: 0, len, prefix: base, prefix_len: 0, own: base });
        let plan = Plan { writes: vec![(base, len)], segments: Arc::new(segments), alone: false };
        let positions: Vec<u32> = (0..len as u32).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(request.seed);
        let logits = self.logits(&request.prompt, &positions, &[len as u32 - 1], &plan, cache);
        let next = self.sampling.choose(&logits, &mut rng);
        Active { request, slot, tokens: Vec::new(), next, rng }
    }

    fn step(&self, active: &mut [Active], cache: &mut Cache) {
        if active.is_empty() {
            return;
        }
        let mut segments = Segments::default();
        let (mut writes, mut positions, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        for (query, sequence) in active.iter().enumerate() {
            let base = sequence.slot * self.capacity;
            let seen = sequence.request.prompt.len() + sequence.tokens.len() - 1;
            segments.push(Segment { query, len: 1, prefix: base, prefix_len: seen, own: base + seen });
            writes.push((base + seen, 1));
            positions.push(seen as u32);
            ids.push(sequence.next);
        }
        let plan = Plan { writes, segments: Arc::new(segments), alone: true };
        let rows: Vec<u32> = (0..active.len() as u32).collect();
        let logits = self.logits(&ids, &positions, &rows, &plan, cache);
        let vocab = logits.len() / active.len();
        for (sequence, logits) in active.iter_mut().zip(logits.chunks_exact(vocab)) {
            sequence.next = self.sampling.choose(logits, &mut sequence.rng);
        }
    }

    fn logits(
        &self,
        ids: &[u32],
        positions: &[u32],
        rows: &[u32],
        plan: &Plan,
        cache: &mut Cache,
    ) -> Vec<f32> {
        let attend = |layer, q, k, v| cache.attend(&self.model, layer, [q, k, v], plan);
        let hidden = self.model.run(ids, positions, plan.alone, attend);
        to_vec(self.model.logits(hidden, rows))
    }
}
