//! Decoder language models on packed token rows.
//!
//! One [`Decoder`] serves every family: a file in `arch` maps a Hugging Face `config.json` onto a
//! [`Config`] and names the weights; the blocks are shared. Weights are plain tensors in one list, so
//! that the optimizer, the checkpoint writer and the gradient reader walk the same order.

mod adapter;
mod arch;
mod batch;
mod block;
mod checkpoint;
mod config;
mod cost;
mod error;
mod generate;
mod layout;
mod lora;
mod model;
mod pages;
mod random;
mod recompute;
mod rope;
mod sampling;
mod weights;

pub use adapter::adapter_base;
pub use batch::{Batch, TokenScores};
pub use checkpoint::{Companions, SaveDtype, eos_ids};
pub use config::{Config, Layer, Mlp, Norm, Positions, QkNorm};
pub use cost::Footprint;
pub use error::Error;
pub use generate::{Completion, Ends, Generator, Progress, Request, Stop};
pub use layout::{Role, Spec};
pub use lora::{Lora, LoraSettings, Targets};
pub use model::{Decoder, Weight};
pub use recompute::{Recompute, add_gradient};
pub use rope::{Rope, RopeKind};
pub use sampling::Sampling;
pub use weights::model_hash;
