//! Generation: sequences of any length run together over one paged cache, and each leaves it as it ends.
//!
//! A step runs one pass over the newest token of every sequence that is being completed and over pieces of the prompts
//! of those that are about to be, packed without padding. Prompts with the same beginning compute it once.

use std::collections::VecDeque;
use std::sync::Arc;

use fused_ops::{Cache, PAGE, Span, cached_attention};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::model::to_vec;
use crate::pages::Pages;
use crate::sampling::History;
use crate::{Decoder, Sampling};

/// Tokens of prompts in a step, beside one of each running sequence.
const PROMPT_TOKENS: usize = 512;

/// One prompt to complete.
#[derive(Debug, Clone)]
pub struct Request {
    /// Whatever the caller wants back with the result.
    pub index: usize,
    /// Token ids of the prompt; not empty.
    pub prompt: Vec<u32>,
    /// New tokens at most; at least 1.
    pub max_new_tokens: usize,
    /// Seed of this request alone: what is drawn does not depend on its neighbours, but for rounding in the
    /// logits on devices other than the CPU.
    pub seed: u64,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An end-of-sequence token came.
    Eos,
    /// The caller's condition was met.
    Text,
    /// The token limit was reached.
    Length,
    /// The model gave logits that are no numbers.
    NotFinite,
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

/// What a step did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// New tokens.
    pub made: usize,
    /// Tokens of prompts that were computed.
    pub read: usize,
    /// Tokens of prompts that were found in the cache.
    pub shared: usize,
    /// Sequences that run.
    pub running: usize,
}

/// Tells of the index of a request and its new tokens whether it is to end there.
pub type IsEnd<'a> = &'a dyn Fn(usize, &[u32]) -> bool;

/// How completions end.
pub struct Ends<'a> {
    /// End-of-sequence tokens.
    pub eos: Vec<u32>,
    /// Looks at the new tokens of a request, the newest included, and tells whether it is to end there.
    pub text: Option<IsEnd<'a>>,
}

struct Active {
    request: Request,
    /// The prompt and what was made of it.
    tokens: Vec<u32>,
    /// Tokens that are in the cache.
    computed: usize,
    pages: Vec<u32>,
    history: History,
    rng: ChaCha8Rng,
    is_broken: bool,
}

impl Active {
    fn new_tokens(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }
}

/// Completes requests, many at a time.
pub struct Generator {
    model: Decoder,
    sampling: Sampling,
    caches: Vec<Option<Cache>>,
    pages: Pages,
    /// Prompts are computed at once and never shared: their rotary embedding depends on their length.
    whole: bool,
    /// Length beyond which a sequence is computed anew.
    switch: Option<usize>,
    count: usize,
}

impl Generator {
    /// `cache_tokens` is room for the prompts and completions of all sequences that run together. The model's matrices
    /// are laid out anew: whoever keeps them as well needs the room twice. `narrow` holds weights and cache in 16 bits
    /// where the backend computes in 32 otherwise.
    pub fn new(model: Decoder, sampling: Sampling, cache_tokens: usize, narrow: bool) -> Self {
        let whole = model.config().depends_on_length();
        let switch = model.config().switches_after();
        let model = model.packed(narrow);
        let count = cache_tokens.div_ceil(PAGE).max(1);
        let like = model.activation();
        let heads = model.config().heads;
        let caches =
            model.config().layers.iter().map(|_| Some(Cache::new(&like, narrow, count, heads))).collect();
        Self { model, sampling, caches, pages: Pages::new(count, !whole), whole, switch, count }
    }

    /// Tokens of prompt and completion that one request may have.
    pub fn capacity(&self) -> usize {
        self.count * PAGE
    }

    /// Completes every request, in any order; `done` gets each as it finishes. `progress` is told of each step and
    /// stops the run by returning false. A request beyond [`Generator::capacity`] is a panic.
    pub fn run(
        &mut self,
        requests: impl IntoIterator<Item = Request>,
        ends: &Ends,
        mut done: impl FnMut(Completion),
        mut progress: impl FnMut(Progress) -> bool,
    ) {
        let mut waiting: VecDeque<Request> = requests.into_iter().collect();
        let mut active: Vec<Active> = Vec::new();
        loop {
            let mut step = Progress { shared: self.admit(&mut waiting, &mut active), ..Progress::default() };
            if active.is_empty() {
                return;
            }
            let spans = self.plan(&active);
            // From inside the pool: each parallel loop would wake it and be waited for otherwise.
            rayon::scope(|_| self.pass(&mut active, &spans, &mut step));
            let mut i = 0;
            active.retain_mut(|sequence| {
                let chosen = spans[i].is_some() && sequence.computed + 1 == sequence.tokens.len();
                i += 1;
                let Some(stop) = chosen.then(|| end(sequence, ends)).flatten() else {
                    if chosen && self.switch.is_some_and(|length| sequence.tokens.len() == length + 1) {
                        sequence.computed = 0;
                    }
                    return true;
                };
                self.pages.give_back(&sequence.pages);
                let tokens = sequence.new_tokens().to_vec();
                done(Completion { index: sequence.request.index, tokens, stop });
                false
            });
            step.running = active.len();
            if !progress(step) {
                active.iter().for_each(|sequence| self.pages.give_back(&sequence.pages));
                return;
            }
        }
    }

    /// Takes requests up as long as there is room; returns the tokens of their prompts that are there already.
    fn admit(&mut self, waiting: &mut VecDeque<Request>, active: &mut Vec<Active>) -> usize {
        let mut shared = 0;
        let ahead = |active: &[Active]| {
            active.iter().map(|s| s.request.prompt.len().saturating_sub(s.computed)).sum()
        };
        let mut unread: usize = ahead(active);
        while unread < PROMPT_TOKENS
            && let Some(request) = waiting.front()
        {
            let tokens = request.prompt.len() + request.max_new_tokens;
            let room = match self.pages.take(&request.prompt, tokens) {
                Ok(room) => room,
                Err(reason) => {
                    assert!(
                        !active.is_empty(),
                        "{tokens} tokens do not fit into {} ({reason:?})",
                        self.capacity()
                    );
                    break;
                }
            };
            let request = waiting.pop_front().expect("looked at just now");
            unread += request.prompt.len() - room.shared;
            shared += room.shared;
            active.push(Active {
                tokens: request.prompt.clone(),
                computed: room.shared,
                pages: room.pages,
                history: History::of(&request.prompt, &self.sampling),
                rng: ChaCha8Rng::seed_from_u64(request.seed),
                is_broken: false,
                request,
            });
        }
        shared
    }

    /// How many tokens of each sequence the next pass computes.
    fn plan(&self, active: &[Active]) -> Vec<Option<usize>> {
        let mut left = PROMPT_TOKENS;
        let part = |sequence: &Active| {
            let missing = sequence.tokens.len() - sequence.computed;
            if missing == 1 {
                return Some(1);
            }
            let part = if self.whole { missing } else { missing.min(left) };
            left = left.saturating_sub(part);
            (part > 0).then_some(part)
        };
        active.iter().map(part).collect()
    }

    /// One pass; sequences whose tokens are all computed get one more.
    fn pass(&mut self, active: &mut [Active], parts: &[Option<usize>], step: &mut Progress) {
        let (mut spans, mut ids, mut positions, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (sequence, part) in active.iter_mut().zip(parts) {
            let Some(len) = *part else { continue };
            let (seen, end) = (sequence.computed, sequence.computed + len);
            spans.push(Span { query: ids.len(), len, seen, pages: sequence.pages.clone() });
            ids.extend_from_slice(&sequence.tokens[seen..end]);
            positions.extend(seen as u32..end as u32);
            step.read += sequence.request.prompt.len().min(end).saturating_sub(seen);
            if end == sequence.tokens.len() {
                rows.push(ids.len() as u32 - 1);
            }
        }
        let lengths: Vec<usize> = spans.iter().map(|span| span.len).collect();
        let spans = Arc::new(spans);
        let Self { model, caches, .. } = self;
        let (heads, config) = (model.config().heads, model.config());
        let hidden = model.run(&ids, &positions, Some(&lengths), |layer, q, k, v| {
            let cache = caches[layer].take().expect("put back below");
            let (out, cache) = cached_attention([q, k, v], cache, &spans, heads, config.scores(layer));
            caches[layer] = Some(cache);
            out
        });
        let logits = if rows.is_empty() { Vec::new() } else { to_vec(model.logits(hidden, &rows)) };
        step.made = rows.len();
        let mut chosen = Vec::new();
        for (sequence, part) in active.iter_mut().zip(parts) {
            let Some(len) = *part else { continue };
            sequence.computed += len;
            let prompt = sequence.computed.min(sequence.request.prompt.len());
            self.pages.computed(&sequence.pages, prompt);
            if sequence.computed == sequence.tokens.len() {
                chosen.push(sequence);
            }
        }
        let vocab = self.model.config().vocab;
        chosen.into_par_iter().zip(logits.par_chunks_exact(vocab)).for_each(|(sequence, logits)| {
            let next = self.sampling.choose(logits, &sequence.history, &mut sequence.rng);
            sequence.is_broken = !logits[next as usize].is_finite();
            sequence.history.add(next);
            sequence.tokens.push(next);
        });
    }
}

/// Why a sequence that has just got a token ends, if it does; an end-of-sequence token is taken away again.
fn end(sequence: &mut Active, ends: &Ends) -> Option<Stop> {
    if sequence.is_broken {
        return Some(Stop::NotFinite);
    }
    let last = sequence.tokens.last().expect("a token was added");
    if ends.eos.contains(last) {
        sequence.tokens.pop();
        return Some(Stop::Eos);
    }
    if ends.text.is_some_and(|is_end| is_end(sequence.request.index, sequence.new_tokens())) {
        return Some(Stop::Text);
    }
    (sequence.new_tokens().len() >= sequence.request.max_new_tokens).then_some(Stop::Length)
}
