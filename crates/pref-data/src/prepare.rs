//! From files to token rows: read, parsed and tokenized block by block on all cores, kept in a cache.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::encode::Words;
use crate::layout::unpair;
use crate::read::layout_of;
use crate::rows::{Block, Text, read_blocks};
use crate::token_file::TokenWriter;
use crate::{Error, Kind, Layout, PairTokens, Row, TokenSet, Tokenizer, hash_file, write_atomic};

/// Rows that TRL unpairs at a time.
const UNPAIRED_TOGETHER: usize = 1000;
/// One row in so many is tokenized twice, the second time by the `tokenizers` crate alone.
const CHECKED_EVERY: usize = 997;
/// Skipped rows that are reported one by one.
const REPORTED: usize = 5;

/// What to read, and how.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// Files with rows of the same kind, in reading order.
    pub files: Vec<PathBuf>,
    /// Columns whose names differ from their roles.
    pub columns: BTreeMap<String, String>,
    /// Take pairs apart into completions with labels.
    pub unpaired: bool,
    /// Leave out rows that cannot be used, instead of stopping at the first.
    pub skip_invalid: bool,
}

/// Token rows of a source.
#[derive(Debug)]
pub struct Tokenized {
    /// The rows.
    pub set: TokenSet,
    /// What the columns hold.
    pub layout: Layout,
    /// Hash of the files.
    pub data_hash: String,
    /// The rows were in the cache.
    pub cached: bool,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// How far tokenization is, in rows.
pub type Progress<'a> = &'a (dyn Fn(usize) + Sync);

/// Token rows of a source: from the cache directory, or tokenized into it.
pub fn tokenize(
    source: &Source,
    tokenizer: &Tokenizer,
    cache: &Path,
    progress: Progress,
) -> Result<Tokenized, Error> {
    let layout = layout_of(&source.files, &source.columns)?;
    let mut warnings = Vec::new();
    let hashes: Vec<String> =
        source.files.iter().map(|file| known_hash(file, cache)).collect::<Result<_, _>>()?;
    let data_hash = blake3::hash(hashes.concat().as_bytes()).to_hex().to_string();
    let options = (&layout, source.unpaired, source.skip_invalid, env!("CARGO_PKG_VERSION"));
    let key = blake3::Hasher::new()
        .update(tokenizer.hash().as_bytes())
        .update(data_hash.as_bytes())
        .update(serde_json::to_string(&options).unwrap_or_default().as_bytes())
        .finalize();
    let name = format!("{}.tokens", &key.to_hex()[..32]);
    let path = cache.join(&name);
    if path.exists() {
        match TokenSet::open(&path) {
            Ok(set) => return Ok(Tokenized { set, layout, data_hash, cached: true, warnings }),
            Err(error) => warnings.push(format!("cached tokens are made anew: {error}")),
        }
    }
    // Without a place to keep them the tokens live as long as this process.
    let writable = fs::create_dir_all(cache).and_then(|()| tempfile::tempfile_in(cache));
    let (path, _unkept) = match writable {
        Ok(_) => (path, None),
        Err(error) => {
            warnings.push(format!(
                "{}: cannot be written ({error}), so tokens are not kept; --token-cache-dir names another directory",
                cache.display()
            ));
            let unkept = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
            (unkept.path().join(&name), Some(unkept))
        }
    };
    let mut job = Job { source, layout: &layout, tokenizer, path: &path, progress, warnings: &mut warnings };
    if !job.run()? {
        tokenizer.distrust();
        job.warnings.push(
            "the fast tokenization differed from the tokenizers crate's and is not used; please report this tokenizer"
                .into(),
        );
        job.run()?;
    }
    let set = TokenSet::open(&path)?;
    Ok(Tokenized { set, layout, data_hash, cached: false, warnings })
}

/// The user's cache directory: `XDG_CACHE_HOME`, or `.cache` in the home directory.
pub fn user_cache_dir() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || var("HOME").or_else(|| var("USERPROFILE")).map(|home| home.join(".cache"));
    var("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir)
}

/// Where our own caches go.
pub fn default_cache_dir(name: &str) -> PathBuf {
    user_cache_dir().join("clair-apo").join(name)
}

/// Hash of a file's bytes, remembered for as long as its size and time of change stay the same.
fn known_hash(file: &Path, cache: &Path) -> Result<String, Error> {
    #[derive(Serialize, Deserialize)]
    struct Known {
        file: PathBuf,
        size: u64,
        modified_ns: u128,
        hash: String,
    }
    let full = file.canonicalize().map_err(Error::io(file))?;
    let name = blake3::hash(full.as_os_str().as_encoded_bytes()).to_hex();
    let note = cache.join(format!("{}.file.json", &name[..32]));
    let meta = fs::metadata(file).map_err(Error::io(file))?;
    let modified = meta.modified().ok();
    let modified_ns = modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
    // A file that changed just before its note was written may have changed again at the same time of change.
    let noted = fs::metadata(&note).and_then(|meta| meta.modified()).ok();
    let settled = matches!((noted, modified), (Some(noted), Some(modified))
        if noted.duration_since(modified).is_ok_and(|age| age.as_secs() >= 2));
    let known = fs::read(&note).ok().and_then(|text| serde_json::from_slice::<Known>(&text).ok());
    if let Some(known) = known.filter(|known| {
        settled && known.file == full && known.size == meta.len() && known.modified_ns == modified_ns
    }) {
        return Ok(known.hash);
    }
    let known = Known { file: full, size: meta.len(), modified_ns, hash: hash_file(file)? };
    let text = serde_json::to_vec(&known).unwrap_or_default();
    // Without the note the file is read again the next time.
    write_atomic(&note, |out| out.write_all(&text)).ok();
    Ok(known.hash)
}

struct Job<'a> {
    source: &'a Source,
    layout: &'a Layout,
    tokenizer: &'a Tokenizer,
    path: &'a Path,
    progress: Progress<'a>,
    warnings: &'a mut Vec<String>,
}

/// A row on its way: what became of it, and where it stands.
type Outcome = Result<(String, PairTokens, bool), Error>;

thread_local! {
    /// Pieces that this thread has seen, and the tokenizer they belong to.
    static WORDS: RefCell<(Option<blake3::Hash>, Words)> = RefCell::default();
}

impl Job<'_> {
    /// Writes the token file; `false` if the fast tokenization proved wrong and nothing was written.
    fn run(&mut self) -> Result<bool, Error> {
        let unpaired = self.layout.kind == Kind::Unpaired || self.source.unpaired;
        let dir = self.path.parent().unwrap_or(Path::new("."));
        let vocabulary = self.tokenizer.vocab_size();
        let mut writer = TokenWriter::new(dir, vocabulary, unpaired).map_err(Error::io(self.path))?;
        let take_apart = self.source.unpaired && self.layout.kind == Kind::Pairs;
        let (mut rows, mut waiting) = (0, Vec::new());
        let trusted = std::thread::scope(|scope| {
            let (send, receive) = sync_channel(2);
            let (files, columns) = (&self.source.files, self.layout.used_columns());
            scope.spawn(move || read_all(files, &columns, &send));
            for block in receive {
                let (file, block) = block?;
                let texts = block.rows();
                if take_apart {
                    let parsed =
                        texts.par_iter().enumerate().map(|(i, row)| self.parse(file, *row, rows + i));
                    for row in parsed.collect::<Vec<_>>() {
                        match row {
                            Ok(Row::Pair(record)) => waiting.push(record),
                            Ok(Row::Unpaired(_)) => {}
                            Err(error) => self.skip(error, &mut writer)?,
                        }
                        if waiting.len() == UNPAIRED_TOGETHER
                            && !self.completions(std::mem::take(&mut waiting), &mut writer)?
                        {
                            return Ok(false);
                        }
                    }
                } else {
                    let outcomes = texts.par_iter().enumerate().map(|(i, row)| {
                        self.parse(file, *row, rows + i).map(|parsed| self.tokens(&parsed, rows + i))
                    });
                    if !self.write(outcomes.collect(), &mut writer)? {
                        return Ok(false);
                    }
                }
                rows += texts.len();
                (self.progress)(rows);
            }
            if waiting.is_empty() { Ok(true) } else { self.completions(waiting, &mut writer) }
        })?;
        if trusted {
            writer.finish(self.path).map_err(Error::io(self.path))?;
        }
        Ok(trusted)
    }

    fn parse(&self, file: usize, (line, text): (usize, Text), number: usize) -> Result<Row, Error> {
        let wrong = |reason| Error::Record { path: self.source.files[file].clone(), line, reason };
        let value: Value = text.value().map_err(wrong)?;
        self.layout.parse(value, number).map_err(wrong)
    }

    /// Tokens of a row; `None` if the fast way gave others than the crate.
    fn tokens(&self, row: &Row, number: usize) -> Option<Outcome> {
        let (id, label) = match row {
            Row::Pair(record) => (&record.id, false),
            Row::Unpaired(row) => (&row.id, row.label),
        };
        let tokens = WORDS.with_borrow_mut(|(owner, words)| {
            if *owner != Some(self.tokenizer.hash()) {
                (*owner, *words) = (Some(self.tokenizer.hash()), Words::default());
            }
            self.tokenizer.row_with(row, words)
        });
        let checked = number.is_multiple_of(CHECKED_EVERY) || number < 16;
        if checked && self.tokenizer.is_fast() {
            let mut exact = Words::exact();
            let again = self.tokenizer.row_with(row, &mut exact);
            if matches!((&tokens, &again), (Ok(a), Ok(b)) if a != b) {
                return None;
            }
        }
        Some(tokens.map(|tokens| (id.clone(), tokens, label)))
    }

    fn completions(&mut self, records: Vec<crate::Record>, writer: &mut TokenWriter) -> Result<bool, Error> {
        let rows: Vec<Row> = unpair(records).into_iter().map(Row::Unpaired).collect();
        let outcomes = rows.par_iter().enumerate().map(|(i, row)| Ok(self.tokens(row, i)));
        self.write(outcomes.collect(), writer)
    }

    fn write(
        &mut self,
        outcomes: Vec<Result<Option<Outcome>, Error>>,
        writer: &mut TokenWriter,
    ) -> Result<bool, Error> {
        for outcome in outcomes {
            match outcome {
                Ok(None) => return Ok(false),
                Ok(Some(Ok((id, tokens, label)))) => {
                    writer.push(&id, &tokens, label).map_err(Error::io(self.path))?;
                }
                Ok(Some(Err(error))) | Err(error) => self.skip(error, writer)?,
            }
        }
        Ok(true)
    }

    /// Leaves a row out, or stops.
    fn skip(&mut self, error: Error, writer: &mut TokenWriter) -> Result<(), Error> {
        if !self.source.skip_invalid {
            return Err(error);
        }
        writer.skip();
        if self.warnings.len() < REPORTED {
            let cause =
                std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            self.warnings.push(format!("left out: {error}{cause}"));
        }
        Ok(())
    }
}

type Sent = Result<(usize, Block), Error>;

/// Reads all files in order into the channel, until its other end is gone.
fn read_all(files: &[PathBuf], columns: &[&str], send: &SyncSender<Sent>) {
    for (i, file) in files.iter().enumerate() {
        let mut open = true;
        let read = read_blocks(file, Some(columns), &mut |block| {
            open = send.send(Ok((i, block))).is_ok();
            Ok(open)
        });
        if let Err(error) = read {
            // The receiver may have stopped by itself.
            send.send(Err(error)).ok();
            return;
        }
        if !open {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/tiny-qwen2");
        Tokenizer::load(&dir, None, jiff::civil::DateTime::MIN).unwrap()
    }

    fn rows(dir: &Path, text: &str) -> Source {
        let file = dir.join("rows.jsonl");
        fs::write(&file, text).unwrap();
        Source { files: vec![file], ..Source::default() }
    }

    const TWO: &str =
        "{\"chosen\": \"a b\", \"rejected\": \"a c\"}\n{\"chosen\": \"x\", \"rejected\": \"y\"}\n";

    #[test]
    fn the_second_start_is_cached_and_a_damaged_cache_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (rows(dir.path(), TWO), dir.path().join("cache"));
        let get = || tokenize(&source, &tokenizer(), &cache, &|_| {}).unwrap();
        let (first, second) = (get(), get());
        assert!(!first.cached && second.cached);
        assert_eq!(first.set.tokens(1), second.set.tokens(1));
        let file = fs::read_dir(&cache)
            .unwrap()
            .map(|e| e.unwrap().path())
            .find(|p| p.extension().unwrap() == "tokens");
        let file = file.unwrap();
        let mut bytes = fs::read(&file).unwrap();
        bytes[0] ^= 1;
        fs::write(&file, bytes).unwrap();
        let third = get();
        assert!(!third.cached && third.warnings[0].contains("checksum"), "{:?}", third.warnings);
        assert_eq!(first.set.hash(), third.set.hash());
        fs::write(cache.join(".unfinished-of-a-killed-process"), "x").unwrap();
        rows(dir.path(), &TWO.replace('x', "z"));
        assert!(!get().cached, "the file changed");
        assert!(!cache.join(".unfinished-of-a-killed-process").exists());
    }

    #[test]
    fn without_a_place_to_keep_them_tokens_are_made_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let source = rows(dir.path(), TWO);
        let cache = dir.path().join("rows.jsonl");
        let tokenized = tokenize(&source, &tokenizer(), &cache, &|_| {}).unwrap();
        assert_eq!(tokenized.set.len(), 2);
        assert!(tokenized.warnings[0].contains("--token-cache-dir"));
        assert!(!tokenized.set.tokens(1).chosen.is_empty(), "the mapped file outlives its name");
    }

    #[test]
    fn unusable_rows_stop_or_are_left_out_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut source =
            rows(dir.path(), &format!("{{\"chosen\": \n{TWO}{{\"chosen\": null, \"rejected\": \"b\"}}\n"));
        let cache = dir.path().join("cache");
        let error = tokenize(&source, &tokenizer(), &cache, &|_| {}).unwrap_err().to_string();
        assert!(error.contains("rows.jsonl:1: not valid JSON"), "{error}");
        source.skip_invalid = true;
        let tokenized = tokenize(&source, &tokenizer(), &cache, &|_| {}).unwrap();
        assert_eq!((tokenized.set.len(), tokenized.set.skipped()), (2, 2));
        assert_eq!(tokenized.warnings.len(), 2);
        assert_eq!(tokenized.set.id(0), "1", "rows keep their numbers");
    }
}
