//! What a run will need at most, and how many blocks are computed again so that it stays within a limit.

use backend::Backend;
use burn::tensor::DType;
use decoder::{Decoder, Footprint, Weight};
use serde::Serialize;

use crate::settings::Settings;

/// The program, its tokenizer and the data's index.
const PROGRAM: usize = 160 << 20;

/// LibTorch, of which a process on the CPU touches so much.
const LIBRARY: usize = 200 << 20;

/// What comes and goes takes more than its size: gaps between blocks.
const GAPS: f64 = 1.08;

/// Logits that the head holds at a time.
fn logits(backend: Backend) -> usize {
    match backend {
        Backend::Flex | Backend::Tch => 8 << 20,
        // Two buffers, and their gradient in 16 bits.
        Backend::Cuda => 640 << 20,
        _ => 64 << 20,
    }
}

/// What rounding of weights to 16 bits keeps on a CUDA device.
const THRESHOLDS: usize = 256 << 20;

/// Part of what it can hold that a run takes when it is given no limit.
const SHARE: f64 = 0.92;

/// Part of the operations of a run's blocks that may be done again for less memory when it is given no limit: the
/// largest micro-batches are rare.
const AGAIN: f64 = 0.025;

/// About the part of a block's forward pass that is done again: its last product mostly is not.
const OF_FORWARD: f64 = 0.75;

/// Expected memory in bytes, for the most tokens that are computed together.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MemoryPlan {
    /// Of the model, an adapter, and a reference that is kept.
    pub weights: usize,
    pub gradients: usize,
    pub optimizer: usize,
    /// The most packed tokens of a micro-batch, or of a part of one, in the first epoch.
    pub tokens: usize,
    /// What their backward pass needs, and temporaries.
    pub activations: usize,
    /// The most at any time: the gradients come while the activations go.
    pub peak: usize,
    /// Not to be passed, for more tokens neither: what was asked for, can be had, or is reached at little cost.
    pub limit: Option<usize>,
    /// Blocks whose activations are not kept but computed again, for the most tokens.
    pub recomputed_blocks: usize,
    #[serde(skip)]
    cost: Cost,
}

/// What tokens and steps cost, in bytes.
#[derive(Debug, Clone, Copy)]
struct Cost {
    blocks: usize,
    /// Every block is computed again.
    all: bool,
    /// Kept of one block for one token.
    block: usize,
    /// Input of a block, for one token.
    input: usize,
    /// Temporaries of one block's backward pass, for one token.
    temporary: usize,
    /// Logits that are there at a time.
    logits: usize,
    /// Gradient of the head, while the activations are there.
    head: usize,
    /// Sets of gradients that are held while others are computed: from one micro-batch, and from one part, to the next.
    held: usize,
    /// Weights, optimizer and program.
    fixed: usize,
    gradients: usize,
    /// Weights of the two ends that are one: their gradients are added.
    ends: usize,
}

impl Cost {
    fn new(settings: &Settings, model: &Decoder, fixed: usize, gradients: usize) -> Self {
        let config = model.config();
        let width = settings.precision.compute().size();
        let Footprint { stream, products, temporary } = model.footprint();
        let table = 4 * config.vocab * config.hidden;
        let trained = model.lora().is_none();
        // One that is held in 16 bits is widened while it is used, in parts on the CPU.
        let narrow_head = !settings.backend.is_on_host()
            && model.weights().iter().any(|weight| weight.tensor.dtype() == DType::BF16);
        Self {
            blocks: config.layers.len(),
            all: settings.gradient_checkpointing,
            block: 4 * stream + width * products,
            input: 4 * config.hidden,
            temporary: width * temporary,
            logits: logits(settings.backend),
            head: if trained || narrow_head { table } else { 0 },
            held: usize::from(settings.accumulation > 1) + usize::from(settings.scoring().part < usize::MAX),
            fixed: fixed
                + match settings.backend {
                    Backend::Cuda if width < 4 => THRESHOLDS,
                    Backend::Tch => LIBRARY,
                    _ => 0,
                },
            gradients,
            ends: if trained { 2 * table } else { 0 },
        }
    }

    /// Activations of `tokens` with `again` blocks computed again.
    fn activations(&self, tokens: usize, again: usize) -> usize {
        // One of those that are computed again is there at a time.
        let kept = self.blocks - again;
        let one = if again > 0 && kept == 0 { self.block } else { 0 };
        tokens * (kept * self.block + one + (again + 3) * self.input)
    }

    fn peak(&self, tokens: usize, again: usize) -> usize {
        let temporary = (tokens * self.temporary).max(self.logits);
        let full = self.activations(tokens, again) + self.head + temporary;
        let before = self.held * self.gradients;
        let last =
            self.gradients + self.ends + tokens * (self.block + 2 * self.input) * usize::from(again > 0);
        self.fixed + (GAPS * (before + full.max(last)) as f64) as usize
    }

    /// The fewest blocks that fit; all of them where nothing fits.
    fn again(&self, tokens: usize, limit: Option<usize>) -> usize {
        let fits = |&again: &usize| limit.is_none_or(|limit| self.peak(tokens, again) <= limit);
        if self.all { self.blocks } else { (0..self.blocks).find(fits).unwrap_or(self.blocks) }
    }

    /// The least memory that [`AGAIN`] can buy: blocks are computed again in the largest of `parts`, and in the others
    /// so that they need no more. A block's forward pass is one of `passes` as expensive ones in a step.
    fn cheap_limit(&self, parts: &[usize], passes: usize) -> Option<usize> {
        let most = parts.iter().copied().max().unwrap_or(0);
        let all = (passes * self.blocks * parts.iter().sum::<usize>()) as f64;
        let again =
            |limit| parts.iter().map(|&tokens| tokens * self.again(tokens, Some(limit))).sum::<usize>();
        let limits = (0..=self.blocks).map(|again| self.peak(most, again));
        limits.take_while(|&limit| OF_FORWARD * again(limit) as f64 <= AGAIN * all).min()
    }
}

impl MemoryPlan {
    /// For parts of micro-batches of so many packed tokens. `most` is what the device can hold.
    pub fn new(settings: &Settings, model: &Decoder, parts: &[usize], most: Option<usize>) -> Self {
        let bytes = |weights: &[Weight]| weights.iter().map(Weight::bytes).sum::<usize>();
        let (all, gradients) = (bytes(model.weights()), bytes(model.trained()));
        let adapter = if model.lora().is_some() { gradients } else { 0 };
        let second = if settings.live_reference && model.lora().is_none() { all } else { 0 };
        let (weights, optimizer) = (all + adapter + second, settings.optim.states() * gradients);
        let cost = Cost::new(settings, model, weights + optimizer + PROGRAM, gradients);
        let tokens = parts.iter().copied().max().unwrap_or(0);
        let cheap = || {
            // With the gradients of inputs and, where they are trained, of weights.
            let passes = if model.lora().is_some() { 2 } else { 3 };
            settings.backend.is_on_host().then(|| cost.cheap_limit(parts, passes)).flatten()
        };
        let can = most.map(|most| (most as f64 * SHARE) as usize);
        let limit = settings.memory_limit.or_else(|| can.into_iter().chain(cheap()).min());
        let recomputed_blocks = cost.again(tokens, limit);
        Self {
            weights,
            gradients,
            optimizer,
            tokens,
            activations: cost.activations(tokens, recomputed_blocks),
            peak: cost.peak(tokens, recomputed_blocks),
            limit,
            recomputed_blocks,
            cost,
        }
    }

    /// Blocks of a micro-batch of `tokens` packed tokens that are computed again.
    pub fn again(&self, tokens: usize) -> usize {
        self.cost.again(tokens, self.limit)
    }

    /// For people.
    pub fn lines(&self, given: bool) -> Vec<String> {
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let Cost { blocks, .. } = self.cost;
        let mut lines = vec![format!(
            "memory plan: weights {:.2} GiB, gradients {:.2}, optimizer {:.2}, activations {:.2}; at most {:.2} GiB at a \
             time; {} of {blocks} blocks are computed again for the {} tokens that are computed together at most",
            gib(self.weights),
            gib(self.gradients),
            gib(self.optimizer),
            gib(self.activations),
            gib(self.peak),
            self.recomputed_blocks,
            self.tokens
        )];
        if let Some(limit) = self.limit.filter(|&limit| self.peak > limit) {
            let what = if given { "--memory-limit" } else { "what can be had" };
            lines.push(format!(
                "WARNING: {what} is {:.2} GiB, and the run needs about {:.2} GiB even so; smaller micro-batches (with \
                 --gradient-accumulation-steps), a smaller --max-length or an adapter (--use-peft) need less",
                gib(limit),
                gib(self.peak)
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost() -> Cost {
        Cost {
            blocks: 10,
            all: false,
            block: 1000,
            input: 100,
            temporary: 500,
            logits: 0,
            head: 0,
            held: 0,
            fixed: 50_000,
            gradients: 10_000,
            ends: 0,
        }
    }

    /// Part of the operations of all blocks that is done again.
    fn share(cost: &Cost, parts: &[usize], limit: usize) -> f64 {
        let again: usize = parts.iter().map(|&tokens| tokens * cost.again(tokens, Some(limit))).sum();
        OF_FORWARD * again as f64 / (3 * cost.blocks * parts.iter().sum::<usize>()) as f64
    }

    #[test]
    fn the_largest_are_computed_again_where_that_costs_little() {
        let cost = cost();
        let rare = [vec![100; 50], vec![300]].concat();
        let equal = vec![100; 50];
        for parts in [&rare, &equal] {
            let (limit, most) = (cost.cheap_limit(parts, 3).unwrap(), *parts.iter().max().unwrap());
            assert!(limit <= cost.peak(most, 0) && share(&cost, parts, limit) <= AGAIN);
            // One block more would cost too much, or gain nothing.
            let more = cost.peak(most, cost.again(most, Some(limit)) + 1);
            assert!(more >= limit || share(&cost, parts, more) > AGAIN);
        }
        let [of_rare, of_equal] = [&rare, &equal].map(|parts| cost.cheap_limit(parts, 3).unwrap());
        assert!(of_rare < cost.peak(300, 0) / 2, "one row alone would double what the run takes");
        assert!(of_equal > cost.peak(100, 2), "all are as large");
    }

    #[test]
    fn gradients_that_are_held_count_each() {
        let [none, two] = [0, 2].map(|held| Cost { held, ..cost() }.peak(100, 3));
        assert_eq!(two - none, (GAPS * 2.0 * 10_000.0) as usize);
    }

    #[test]
    fn what_is_computed_again_anyway_has_no_cheap_limit() {
        assert_eq!(Cost { all: true, ..cost() }.cheap_limit(&[100, 200], 3), None);
        assert_eq!(cost().cheap_limit(&[], 3), Some(cost().peak(0, 0)));
    }
}
