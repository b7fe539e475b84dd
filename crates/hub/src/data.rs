//! Token rows of a data set by its name: resolved, downloaded if need be, tokenized or found in the cache.

use std::collections::BTreeMap;
use std::path::Path;

use pref_data::{Source, Splits, Tokenized, Tokenizer, tokenize};

use crate::{Error, Hub};

/// A data set, and how to read it.
#[derive(Debug, Clone, Default)]
pub struct DataRequest {
    /// A path, a pattern or a Hub id.
    pub name: String,
    /// Revision on the Hub.
    pub revision: Option<String>,
    /// Configuration of its card.
    pub config: Option<String>,
    /// Columns whose names differ from their roles.
    pub columns: BTreeMap<String, String>,
    /// Take pairs apart into completions with labels.
    pub unpaired: bool,
    /// Leave out rows that cannot be used.
    pub skip_invalid: bool,
}

impl DataRequest {
    /// The files of the data set: those of the wanted splits, if it is on the Hub.
    pub fn find(&self, hub: &Hub, wanted: &[&str], say: &dyn Fn(&str)) -> Result<Splits, Error> {
        let progress = announce(say);
        hub.dataset(&self.name, self.revision.as_deref(), self.config.as_deref(), wanted, &progress)
    }

    /// Token rows of one split; `say` is told what is read and how, and everything suspicious.
    pub fn tokens(
        &self,
        splits: &Splits,
        split: &str,
        tokenizer: &Tokenizer,
        cache: &Path,
        say: &(dyn Fn(&str) + Sync),
    ) -> Result<Tokenized, Error> {
        let source = Source {
            files: splits.split(split)?.to_vec(),
            columns: self.columns.clone(),
            unpaired: self.unpaired,
            skip_invalid: self.skip_invalid,
        };
        let every = std::sync::atomic::AtomicUsize::new(0);
        let progress = |rows: usize| {
            // A line now and then: a large set takes a while the first time.
            if rows / 50_000 > every.fetch_max(rows / 50_000, std::sync::atomic::Ordering::Relaxed) {
                say(&format!("tokenizing {}: {rows} rows", self.name));
            }
        };
        let tokenized = tokenize(&source, tokenizer, cache, &progress)?;
        say(&format!(
            "data set {} ({split}): {} rows{}, {}",
            self.name,
            tokenized.set.len(),
            if tokenized.cached { ", tokens from the cache" } else { "" },
            tokenized.layout
        ));
        for warning in &tokenized.warnings {
            say(&format!("WARNING: {warning}"));
        }
        if tokenized.set.skipped() > 0 {
            say(&format!(
                "WARNING: {} unusable rows of {} are left out (--skip-invalid-rows)",
                tokenized.set.skipped(),
                self.name
            ));
        }
        Ok(tokenized)
    }
}

/// A line at the start of each large download and at every tenth of it.
pub fn announce(say: &dyn Fn(&str)) -> impl Fn(&str, u64, u64) + '_ {
    let told = std::cell::Cell::new(u64::MAX);
    move |file, done, all| {
        let tenth = (done * 10).checked_div(all).unwrap_or(10);
        if all > 10_000_000 && told.replace(tenth) != tenth {
            say(&format!("downloading {file}: {:.0} of {:.0} MB", done as f64 / 1e6, all as f64 / 1e6));
        }
    }
}

/// `D`, or `D=WEIGHT`.
pub fn name_and_weight(given: &str) -> Result<(String, Option<f64>), String> {
    let Some((name, weight)) = given.rsplit_once('=').filter(|_| !Path::new(given).exists()) else {
        return Ok((given.into(), None));
    };
    match weight.parse::<f64>() {
        Ok(weight) if weight.is_finite() && weight >= 0.0 => Ok((name.into(), Some(weight))),
        // `lang=en/*.jsonl` is a path.
        _ if weight.contains(['/', '*']) => Ok((given.into(), None)),
        _ => Err(format!("{given}: the weight {weight:?} is not a number of 0 or more")),
    }
}

/// `ROLE=COLUMN` pairs.
pub fn columns(given: &[String]) -> Result<BTreeMap<String, String>, String> {
    given
        .iter()
        .map(|pair| {
            let roles = pref_data::ROLES.join(", ");
            let (role, column) = pair
                .split_once('=')
                .ok_or_else(|| format!("{pair:?}: expected ROLE=COLUMN, with a role of {roles}"))?;
            if pref_data::ROLES.contains(&role) {
                Ok((role.to_string(), column.to_string()))
            } else {
                Err(format!("{role:?} is no role; there are {roles}"))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_columns() {
        assert_eq!(name_and_weight("a/b=0.5"), Ok(("a/b".into(), Some(0.5))));
        assert_eq!(name_and_weight("a/b"), Ok(("a/b".into(), None)));
        assert!(name_and_weight("a/b=x").is_err() && name_and_weight("a=-1").is_err());
        assert_eq!(columns(&["chosen=better".into()]).unwrap()["chosen"], "better");
        assert!(columns(&["better".into()]).is_err() && columns(&["x=y".into()]).is_err());
    }
}
