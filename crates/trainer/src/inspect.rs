//! `--inspect N`: rows token by token, as the loss sees them.

use std::io::{Result, Write};

use pref_data::{Dataset, Tokenizer};

/// Prints the first `n` rows: each token with its id, its text, and which completion it is scored for.
pub fn print(out: &mut impl Write, tokenizer: &Tokenizer, rows: &Dataset, n: usize) -> Result<()> {
    for row in rows.iter().take(n) {
        let tokens = &row.tokens;
        let ([a, b], shared) = (tokens.context, tokens.common());
        writeln!(
            out,
            "row {} (id {}): prompt {}, chosen {}, rejected {}, shared start of the completions {shared}",
            row.row,
            row.id,
            tokens.prompt.len(),
            tokens.chosen.len(),
            tokens.rejected.len()
        )?;
        let mut section = |mask: &str, start: usize, ids: &[u32]| -> Result<()> {
            for (i, &id) in ids.iter().enumerate() {
                writeln!(out, "{mask:9} {:5} {id:7} {:?}", start + i, tokenizer.token(id))?;
            }
            Ok(())
        };
        let prompt = tokens.prompt.len();
        section("-", 0, &tokens.prompt)?;
        section("both", prompt, &tokens.chosen[..shared])?;
        section("-", 0, &tokens.chosen[..a])?;
        section("chosen", prompt + shared + a, &tokens.chosen[shared + a..])?;
        section("-", 0, &tokens.rejected[..b])?;
        section("rejected", prompt + shared + b, &tokens.rejected[shared + b..])?;
    }
    Ok(())
}
