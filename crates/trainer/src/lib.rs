//! Aligns a language model on preference pairs: the loop, and what surrounds it.
//!
//! `run::run` is the whole story, `train` its loop; read them first. Data comes from `pref-data`, the model from `decoder`,
//! the losses from `apo-loss`.

pub mod args;
pub mod settings;

mod best;
mod card;
mod checkpoint;
mod checksums;
pub mod data;
pub mod data_args;
mod evaluate;
mod hints;
mod host_memory;
mod inspect;
mod logs;
pub mod loss;
pub mod loss_args;
mod memory;
mod metrics;
mod optimizer;
mod output;
mod packing;
pub mod peft_args;
mod pending;
mod plan;
mod policy;
mod precision;
mod preflight;
pub mod profile;
pub mod recipe;
mod reference;
mod references;
mod rules;
pub mod run;
mod run_info;
mod samples;
pub mod schedule;
mod step;
mod tensorboard;
pub mod train;
