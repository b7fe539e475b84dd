//! Samples from models and measures them: `sample`, `pairs`, `mixeval`, `choices`, `compare`,
//! `recommend`, `data` and `run`.
//!
//! Never depends on the trainer: a model is what its directory holds.

pub mod args;
pub mod bootstrap;
mod chart;
pub mod choices;
pub mod compare;
pub mod data;
pub mod histogram;
pub mod judge;
pub mod local;
pub mod mixeval;
pub mod models;
pub mod pairs;
pub mod recommend;
pub mod report;
pub mod run;
pub mod sample;
pub mod sampling;
pub mod score;
pub mod served;
