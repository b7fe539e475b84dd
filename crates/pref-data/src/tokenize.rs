//! Tokenization of rows as TRL's trainers do it.

use crate::encode::Words;
use crate::{Error, Extras, Message, Record, Row, Text, Tokenizer, Unpaired};

/// Token ids of one pair: the common prompt and the two completions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PairTokens {
    /// Common start of prompt, prompt + chosen and prompt + rejected.
    pub prompt: Vec<u32>,
    /// What follows in prompt + chosen; of an unpaired row, the completion.
    pub chosen: Vec<u32>,
    /// What follows in prompt + rejected; of an unpaired row, nothing.
    pub rejected: Vec<u32>,
    /// Tokens at the end of the prompt that prompt + completion tokenizes differently.
    pub boundary: usize,
    /// Tokens at the start of `chosen` and of `rejected` that are of a prompt which the two do not have in common;
    /// nothing is shared then. Only where sequences are cut at their start.
    pub context: [usize; 2],
}

impl PairTokens {
    /// Tokens that both completions start with; none where their contexts differ.
    pub fn common(&self) -> usize {
        if self.context == [0; 2] { common_prefix(&self.chosen, &self.rejected) } else { 0 }
    }
}

impl Tokenizer {
    /// Tokenizes one pair (`DPOTrainer._prepare_dataset`). Plain completions get the end-of-sequence
    /// token where it is missing. The completion starts where the prompt alone and prompt + completion
    /// diverge.
    pub fn pair(&self, record: &Record) -> Result<PairTokens, Error> {
        self.pair_with(record, &mut Words::default())
    }

    /// Tokenizes one completion (`KTOTrainer._prepare_dataset`): in `chosen`, with nothing in `rejected`.
    pub fn unpaired(&self, row: &Unpaired) -> Result<PairTokens, Error> {
        self.unpaired_with(row, &mut Words::default())
    }

    pub(crate) fn row_with(&self, row: &Row, words: &mut Words) -> Result<PairTokens, Error> {
        match row {
            Row::Pair(record) => self.pair_with(record, words),
            Row::Unpaired(row) => self.unpaired_with(row, words),
        }
    }

    fn pair_with(&self, record: &Record, words: &mut Words) -> Result<PairTokens, Error> {
        let completions = [&record.chosen, &record.rejected];
        let [prompt, chosen, rejected] = self
            .sequences(&record.prompt, completions, &record.extras, words)
            .map_err(in_record(&record.id))?;
        let shared = common_prefix(&prompt, &chosen).min(common_prefix(&prompt, &rejected));
        Ok(PairTokens {
            boundary: prompt.len() - shared,
            context: [0; 2],
            prompt: prompt[..shared].to_vec(),
            chosen: chosen[shared..].to_vec(),
            rejected: rejected[shared..].to_vec(),
        })
    }

    fn unpaired_with(&self, row: &Unpaired, words: &mut Words) -> Result<PairTokens, Error> {
        let [prompt, both] =
            self.sequences(&row.prompt, [&row.completion], &row.extras, words).map_err(in_record(&row.id))?;
        let shared = common_prefix(&prompt, &both);
        Ok(PairTokens {
            boundary: prompt.len() - shared,
            context: [0; 2],
            prompt: prompt[..shared].to_vec(),
            chosen: both[shared..].to_vec(),
            rejected: Vec::new(),
        })
    }

    /// Ids of the prompt, and of the prompt with each completion.
    fn sequences<const N: usize, const M: usize>(
        &self,
        prompt: &Text,
        completions: [&Text; N],
        extras: &Extras,
        words: &mut Words,
    ) -> Result<[Vec<u32>; M], Error> {
        let mut all: [Vec<u32>; M] = std::array::from_fn(|_| Vec::new());
        for (i, ids) in all.iter_mut().enumerate() {
            // The prompt alone asks for an answer; with a completion there is nothing to ask for.
            *ids = match (prompt, i.checked_sub(1).map(|i| completions[i])) {
                (Text::Chat(prompt), None) => self.chat(prompt, extras, true, words)?,
                (Text::Chat(prompt), Some(Text::Chat(rest))) => {
                    self.chat(&[prompt.as_slice(), rest].concat(), extras, false, words)?
                }
                (Text::Plain(prompt), None) => self.encode(prompt, true, words)?,
                (Text::Plain(prompt), Some(Text::Plain(completion))) => {
                    let eos = self.eos().filter(|&eos| !completion.ends_with(eos)).unwrap_or("");
                    self.encode(&format!("{prompt}{completion}{eos}"), true, words)?
                }
                _ => return Err(Error::Template("prompt and completions are of different kinds".into())),
            };
        }
        Ok(all)
    }

    fn chat(
        &self,
        messages: &[Message],
        extras: &Extras,
        generation: bool,
        words: &mut Words,
    ) -> Result<Vec<u32>, Error> {
        self.encode(&self.render(messages, extras, generation)?, false, words)
    }
}

/// KTO's mismatched completions: in consecutive batches of `batch` rows each row takes the completion of the
/// one before it, the first that of the last (`KTOTrainer`'s KL rows). Returns the row each one takes it from.
pub fn kl_rows(rows: usize, batch: usize) -> Vec<usize> {
    let starts = (0..rows).step_by(batch.max(1));
    starts
        .flat_map(|start| {
            let end = (start + batch).min(rows);
            std::iter::once(end - 1).chain(start..end - 1)
        })
        .collect()
}

fn in_record(id: &str) -> impl FnOnce(Error) -> Error {
    let record = id.to_string();
    move |source| Error::Tokenize { record, source: Box::new(source) }
}

pub(crate) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_batch_rotates_within_itself() {
        assert_eq!(kl_rows(7, 3), [2, 0, 1, 5, 3, 4, 6]);
        assert_eq!(kl_rows(0, 3), Vec::<usize>::new());
    }
}
