//! Aligns a language model on preference pairs: the loop, and what surrounds it.
//!
//! `train::run` is the whole story; read it first. Data comes from `pref-data`, the model from `decoder`,
//! the losses from `apo-loss`.

pub mod args;
pub mod settings;

mod backend;
mod checkpoint;
pub mod data;
pub mod data_args;
mod evaluate;
mod inspect;
mod logs;
pub mod loss;
mod metrics;
mod optimizer;
mod plan;
mod preflight;
pub mod recipe;
mod reference;
mod references;
mod run_info;
pub mod schedule;
mod step;
pub mod train;
