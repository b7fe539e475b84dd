//! Preference data from file to packed token rows, to the token as TRL prepares it.
//!
//! ```text
//! file -> Record -> (chat template, tokenizer) -> PairTokens -> truncate/drop -> Packed
//! ```
//!
//! No tensor, no network, no clock: everything here is a function of its input.

mod error;
mod pack;
mod python;
mod read;
mod record;
mod template;
mod tokenize;
mod write;

pub use error::Error;
pub use pack::{Packed, PackedRow, Side};
pub use read::{read_jsonl, read_records, split_files};
pub use record::{Message, Record, Text, row_id};
pub use template::{CHATML, ChatTemplate, Extras, SIMPLE};
pub use tokenize::{PairTokens, Prepared, PreparedRow, Tokenizer, TokenizerSource, prepare};
pub use write::{JsonlAppender, hash_file, write_atomic, write_jsonl, write_parquet_pairs};
