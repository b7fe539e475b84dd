//! A look at the first rows before training: how sequences start and end.

use crate::{Dataset, Tokenizer};

/// Rows looked at.
const ROWS: usize = 100;
/// Tokens shown at each end.
const SHOWN: usize = 4;

/// What the first rows look like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audit {
    /// First and last tokens of the columns of the first row.
    pub lines: Vec<String>,
    /// What is probably wrong, with its remedy.
    pub warnings: Vec<String>,
}

/// Looks at how the first hundred rows start and end.
pub fn audit(tokenizer: &Tokenizer, rows: &Dataset) -> Audit {
    let mut audit = Audit::default();
    let (mut doubled, mut endless) = (0, 0);
    let looked_at = rows.len().min(ROWS);
    for i in 0..looked_at {
        let tokens = rows.row(i).tokens;
        if i == 0 {
            let columns: [(&str, &[u32]); 3] =
                [("prompt", &tokens.prompt), ("chosen", &tokens.chosen), ("rejected", &tokens.rejected)];
            let filled = columns.iter().filter(|(name, ids)| *name != "rejected" || !ids.is_empty());
            for (name, ids) in filled {
                audit.lines.push(format!("{name} ({} tokens): {}", ids.len(), ends(tokenizer, ids)));
            }
        }
        if let Some(bos) = tokenizer.bos_id() {
            doubled += usize::from(tokens.prompt.starts_with(&[bos, bos]));
        }
        if let Some(eos) = tokenizer.eos_id() {
            // Chat templates may write a line end after the token that ends a turn. A cut row ends anywhere.
            let ends = |ids: &[u32]| ids.iter().rev().take(3).any(|&id| id == eos);
            let whole = rows.lengths(i).longest() < rows.max_length();
            endless += usize::from(
                whole && !(ends(&tokens.chosen) && (rows.is_unpaired() || ends(&tokens.rejected))),
            );
        }
    }
    if doubled > 0 {
        audit.warnings.push(format!(
            "{doubled} of the first {looked_at} prompts start with two beginning-of-sequence tokens: the data holds the \
             token's text and the tokenizer adds it too; remove it from the data"
        ));
    }
    if endless > 0 {
        audit.warnings.push(format!(
            "{endless} of the first {looked_at} rows have a completion that does not end with the end-of-sequence token {:?}: the \
             model will not learn to stop; give a --chat-template that writes it after each answer, or check eos_token \
             in tokenizer_config.json",
            tokenizer.eos().unwrap_or_default()
        ));
    }
    audit
}

fn ends(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let show = |ids: &[u32]| {
        ids.iter().map(|&id| format!("{:?}", tokenizer.token(id))).collect::<Vec<_>>().join(" ")
    };
    if ids.len() <= 2 * SHOWN {
        return show(ids);
    }
    format!("{} … {}", show(&ids[..SHOWN]), show(&ids[ids.len() - SHOWN..]))
}
