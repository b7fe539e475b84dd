//! Preference data from file to packed token rows, to the token as TRL prepares it.
//!
//! ```text
//! files -> rows -> Layout -> Record -> (chat template, tokenizer) -> TokenSet -> Dataset -> Batches -> Packed
//! ```
//!
//! No tensor, no network, no clock: everything here is a function of its input.

mod audit;
mod batches;
mod card;
mod contrast;
mod dataset;
mod encode;
mod error;
mod gpt2;
mod layout;
mod pack;
mod parquet_rows;
mod prepare;
mod python;
mod read;
mod rows;
mod splits;
mod template;
mod text;
mod token_file;
mod tokenize;
mod tokenizer;
mod tokens;
mod write;

pub use audit::{Audit, audit};
pub use batches::{Batches, Bound, Order};
pub use card::Card;
pub use contrast::{Contrast, jaccard, levenshtein};
pub use dataset::{Dataset, Keep, PreparedRow, hold_out, mix};
pub use error::Error;
pub use layout::{Kind, Layout, ROLES, Record, Row, Unpaired, unpair};
pub use pack::{Packed, PackedRow, Side};
pub use prepare::{Progress, Source, Tokenized, default_cache_dir, tokenize, user_cache_dir};
pub use read::{Splits, each_jsonl, layout_of, read_jsonl};
pub use rows::{Block, Text as RowText, first_rows, read_blocks};
pub use splits::{SplitFiles, is_data_file, resolve};
pub use template::{CHATML, ChatTemplate, Extras, SIMPLE};
pub use text::{Message, Text, row_id};
pub use token_file::Lengths;
pub use tokenize::{PairTokens, kl_rows};
pub use tokenizer::{TemplateSource, Tokenizer, read_chat_template};
pub use tokens::TokenSet;
pub use write::{JsonlAppender, hash_file, write_atomic, write_jsonl, write_parquet_pairs};
