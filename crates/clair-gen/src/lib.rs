//! Makes preference pairs with a language model (arXiv 2408.06266): by default CLAIR, where a stronger model reasons
//! about the target model's answer and minimally revises it; the revision is the chosen, the answer the rejected
//! completion.
//!
//! `run::generate` is the whole story; read it first.

pub mod args;
pub mod asker;
pub mod charts;
pub mod estimate;
pub mod gate;
pub mod input;
pub mod methods;
pub mod output;
pub mod parse;
pub mod progress;
pub mod prompt;
pub mod replay;
pub mod report;
pub mod run;
pub mod setup;
