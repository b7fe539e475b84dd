//! Makes CLAIR preference pairs (arXiv 2408.06266): a stronger model reasons about the target model's
//! answer and minimally revises it; the revision is the chosen, the answer the rejected completion.
//!
//! `run::generate` is the whole story; read it first.

pub mod args;
pub mod input;
pub mod output;
pub mod parse;
pub mod prompt;
pub mod replay;
pub mod report;
pub mod run;
