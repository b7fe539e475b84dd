//! Rows of one file, block by block: JSON Lines, JSON, CSV and Parquet, plain or compressed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::Error;
use crate::parquet_rows::parquet;
use crate::splits::format_of;

/// Bytes of text in a block.
pub(crate) const BLOCK: usize = 4 << 20;
/// Rows in a block of a Parquet file, or of one that is parsed while it is read.
pub(crate) const ROWS: usize = 1024;

/// Formats of data that are known by name and not read.
const OTHER_FORMATS: [&str; 8] = [".tsv", ".arrow", ".feather", ".xlsx", ".xml", ".zip", ".tar", ".pkl"];

/// Consecutive rows.
#[derive(Debug)]
pub enum Block {
    /// Whole lines of JSON, the first with this number from 1.
    Lines(usize, Vec<u8>),
    /// Parsed rows, the first with this number from 1.
    Values(usize, Vec<Value>),
}

impl Block {
    /// The rows with their line or element numbers; blank lines are skipped.
    pub fn rows(&self) -> Vec<(usize, Text<'_>)> {
        match self {
            Self::Lines(first, bytes) => {
                let lines = bytes.split(|&b| b == b'\n').enumerate();
                let lines = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
                lines.map(|(i, line)| (first + i, Text::Json(line))).collect()
            }
            Self::Values(first, values) => {
                values.iter().enumerate().map(|(i, value)| (first + i, Text::Value(value))).collect()
            }
        }
    }
}

/// One row, parsed or not.
#[derive(Debug, Clone, Copy)]
pub enum Text<'a> {
    /// JSON text.
    Json(&'a [u8]),
    /// A value.
    Value(&'a Value),
}

impl Text<'_> {
    /// The row as a value.
    pub fn value(self) -> Result<Value, String> {
        match self {
            Self::Json(line) => serde_json::from_slice(line)
                .or_else(|e| without_nan(line).and_then(|text| serde_json::from_slice(&text).ok()).ok_or(e))
                .map_err(|e| format!("not valid JSON: {e}")),
            Self::Value(value) => Ok(value.clone()),
        }
    }
}

/// A line with Python's `NaN` and `Infinity`, which JSON does not have, as null; `None` if it has none.
fn without_nan(line: &[u8]) -> Option<Vec<u8>> {
    let (mut out, mut rest, mut in_text, mut found) = (Vec::with_capacity(line.len()), line, false, false);
    while let Some((&byte, after)) = rest.split_first() {
        let word = [b"-Infinity".as_slice(), b"Infinity", b"NaN"].into_iter().find(|w| rest.starts_with(w));
        match word.filter(|_| !in_text) {
            Some(word) => {
                out.extend(b"null");
                found = true;
                rest = &rest[word.len()..];
            }
            None if in_text && byte == b'\\' && !after.is_empty() => {
                out.extend(&rest[..2]);
                rest = &rest[2..];
            }
            None => {
                in_text ^= byte == b'"';
                out.push(byte);
                rest = after;
            }
        }
    }
    found.then_some(out)
}

/// Receives the blocks of a file; stops the reading with `Ok(false)`.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(Block) -> Result<bool, Error>;

/// Reads a file's rows in blocks. Of a Parquet file only `columns` are read, where they are given.
pub fn read_blocks(path: &Path, columns: Option<&[&str]>, sink: Sink) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unsupported = |what: &str| Error::Dataset {
        path: path.into(),
        reason: format!(
            "{what} files are not read; use JSON Lines, JSON, CSV or Parquet (.gz and .zst but for Parquet)"
        ),
    };
    let format = format_of(&name);
    if format == Some("parquet") {
        let plain = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"));
        return if plain { parquet(path, columns, sink) } else { Err(unsupported("compressed Parquet")) };
    }
    if let Some(other) = OTHER_FORMATS.into_iter().find(|other| name.to_ascii_lowercase().ends_with(other)) {
        return Err(unsupported(other));
    }
    let mut input = open(path)?;
    match format {
        Some("csv") => csv(path, input, sink),
        Some("json") if starts_with_array(&mut input).map_err(Error::io(path))? => {
            json_array(path, input, sink)
        }
        // Unknown extensions too: JSON Lines by any name.
        _ => lines(path, input, sink),
    }
}

/// The first rows of a file, for detecting its layout. Malformed ones are passed over, unless there are no
/// others.
pub fn first_rows(path: &Path, n: usize) -> Result<Vec<Value>, Error> {
    let (mut first, mut failure) = (Vec::new(), None);
    read_blocks(path, None, &mut |block| {
        for (line, row) in block.rows() {
            match row.value() {
                Ok(row) => first.push(row),
                Err(reason) => {
                    failure.get_or_insert(Error::Record { path: path.into(), line, reason });
                }
            }
            if first.len() == n {
                break;
            }
        }
        Ok(first.len() < n)
    })?;
    match failure {
        Some(failure) if first.is_empty() => Err(failure),
        _ => Ok(first),
    }
}

fn open(path: &Path) -> Result<Box<dyn BufRead>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    let extension = path.extension().unwrap_or_default();
    if extension == "gz" {
        return Ok(Box::new(BufReader::with_capacity(1 << 16, flate2::read::MultiGzDecoder::new(file))));
    }
    if extension == "zst" {
        let decoder = zstd::Decoder::new(file).map_err(Error::io(path))?;
        return Ok(Box::new(BufReader::with_capacity(1 << 16, decoder)));
    }
    Ok(Box::new(BufReader::with_capacity(1 << 16, file)))
}

/// Skips a byte-order mark and white space; `true` if an array follows. A `.json` file of JSON Lines is
/// common on the Hub.
fn starts_with_array(input: &mut dyn BufRead) -> io::Result<bool> {
    loop {
        let bytes = input.fill_buf()?;
        match bytes.iter().position(|b| !matches!(b, b' ' | b'\t' | b'\r' | b'\n' | 0xef | 0xbb | 0xbf)) {
            Some(at) => return Ok(bytes[at] == b'['),
            None if bytes.is_empty() => return Ok(false),
            None => {
                let read = bytes.len();
                input.consume(read);
            }
        }
    }
}

fn lines(path: &Path, mut input: Box<dyn BufRead>, sink: Sink) -> Result<(), Error> {
    let mut first = 1;
    let mut pending = Vec::new();
    loop {
        let mut block = std::mem::take(&mut pending);
        let wanted = (BLOCK as u64).max(block.len() as u64);
        let read = (&mut input).take(wanted).read_to_end(&mut block).map_err(Error::io(path))?;
        if first == 1 && block.starts_with(b"\xef\xbb\xbf") {
            block.drain(..3);
        }
        let ended = (read as u64) < wanted;
        if !ended {
            // The last line is read on in the next block; without a line end all of it is.
            let cut = block.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
            pending = block.split_off(cut);
        }
        let count = memchr::memchr_iter(b'\n', &block).count();
        if !block.is_empty() && !sink(Block::Lines(first, block))? {
            return Ok(());
        }
        first += count;
        if ended {
            return Ok(());
        }
    }
}

fn json_array(path: &Path, input: Box<dyn BufRead>, sink: Sink) -> Result<(), Error> {
    struct Rows<'a, 'b> {
        sink: Sink<'a>,
        stopped: &'b mut Option<Result<(), Error>>,
    }
    impl<'de> DeserializeSeed<'de> for Rows<'_, '_> {
        type Value = ();
        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
            deserializer.deserialize_seq(self)
        }
    }
    impl<'de> Visitor<'de> for Rows<'_, '_> {
        type Value = ();
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an array of rows")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
            let (mut first, mut rows) = (1, Vec::new());
            loop {
                let row: Option<Value> = seq.next_element()?;
                let ended = row.is_none();
                rows.extend(row);
                if rows.len() == ROWS || (ended && !rows.is_empty()) {
                    let block = Block::Values(first, std::mem::take(&mut rows));
                    first += ROWS;
                    match (self.sink)(block) {
                        Ok(true) => {}
                        end => {
                            *self.stopped = Some(end.map(|_| ()));
                            return Err(serde::de::Error::custom("stopped"));
                        }
                    }
                }
                if ended {
                    return Ok(());
                }
            }
        }
    }
    let mut stopped = None;
    let mut json = serde_json::Deserializer::from_reader(input);
    let read = Rows { sink, stopped: &mut stopped }.deserialize(&mut json).and_then(|()| json.end());
    match (stopped, read) {
        (Some(end), _) => end,
        (None, Ok(())) => Ok(()),
        (None, Err(e)) if e.is_io() => Err(Error::io(path)(e.into())),
        (None, Err(e)) => {
            Err(Error::Record { path: path.into(), line: e.line(), reason: format!("not valid JSON: {e}") })
        }
    }
}

/// Cells are text; empty ones are null.
fn csv(path: &Path, input: Box<dyn BufRead>, sink: Sink) -> Result<(), Error> {
    let broken = |e: csv::Error| {
        let line = e.position().map_or(1, |position| position.line() as usize);
        Error::Record { path: path.into(), line, reason: e.to_string() }
    };
    let mut reader = csv::Reader::from_reader(input);
    let header = reader.headers().map_err(broken)?.clone();
    let (mut first, mut rows) = (2, Vec::new());
    let mut record = csv::StringRecord::new();
    loop {
        let more = reader.read_record(&mut record).map_err(broken)?;
        if more {
            let cell = |text: &str| if text.is_empty() { Value::Null } else { Value::String(text.into()) };
            let row: Map<String, Value> =
                header.iter().zip(&record).map(|(name, text)| (name.to_string(), cell(text))).collect();
            rows.push(Value::Object(row));
        }
        if rows.len() == ROWS || (!more && !rows.is_empty()) {
            let count = rows.len();
            if !sink(Block::Values(first, std::mem::take(&mut rows)))? {
                return Ok(());
            }
            first += count;
        }
        if !more {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::Write;
    use std::path::PathBuf;

    fn fixture(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/data").join(path)
    }

    fn rows(path: &Path) -> Result<Vec<Value>, Error> {
        let mut all = Vec::new();
        read_blocks(path, None, &mut |block| {
            for (line, row) in block.rows() {
                all.push(row.value().map_err(|reason| Error::Record { path: path.into(), line, reason })?);
            }
            Ok(true)
        })?;
        Ok(all)
    }

    fn written(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn every_format_holds_the_same_rows() {
        let text = std::fs::read(fixture("clair_mini/train.jsonl")).unwrap();
        let want = rows(&fixture("clair_mini/train.jsonl")).unwrap();
        assert_eq!(want.len(), 64);
        let array = serde_json::to_vec_pretty(&want).unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&text).unwrap();
        let zst = zstd::encode_all(text.as_slice(), 1).unwrap();
        let with_mark = [b"\xef\xbb\xbf".as_slice(), &text].concat();
        let windows = String::from_utf8(text.clone()).unwrap().replace('\n', "\r\n\r\n").into_bytes();
        let cases: [(&str, Vec<u8>); 7] = [
            ("a.json", array.clone()),
            ("a.json", text.clone()),
            ("a.jsonl.gz", gz.finish().unwrap()),
            ("a.jsonl.zst", zst),
            ("a.json.zst", zstd::encode_all(array.as_slice(), 1).unwrap()),
            ("a.jsonl", with_mark),
            ("a.jsonl", windows),
        ];
        for (name, bytes) in cases {
            let (_dir, path) = written(name, &bytes);
            assert!(rows(&path).unwrap() == want, "{name}");
        }
        let parquet = rows(&fixture("clair_mini_parquet/train.parquet")).unwrap();
        assert_eq!(parquet.len(), 64);
        assert_eq!(parquet[5]["chosen"], want[5]["chosen"]);
    }

    #[test]
    fn lines_longer_than_a_block_stay_whole() {
        let long = json!({"chosen": "x".repeat(3 * BLOCK + 17), "rejected": "y"});
        let (_dir, path) = written("a.jsonl", format!("{{\"a\": 1}}\n{long}\n{{\"b\": 2}}").as_bytes());
        let rows = rows(&path).unwrap();
        assert_eq!(rows.len(), 3);
        assert!(rows[1] == long);
    }

    #[test]
    fn csv_cells_are_text_and_empty_ones_null() {
        let (_dir, path) = written("a.csv", b"prompt,chosen,rejected\n\"a, \"\"b\"\"\",\"c\nd\",\nx,y\n");
        let error = rows(&path).unwrap_err().to_string();
        assert!(error.contains("a.csv:4") && error.contains("2 fields"), "{error}");
        let (_dir, path) = written("a.csv", b"prompt,chosen,rejected\n\"a, \"\"b\"\"\",\"c\nd\",\n");
        assert_eq!(rows(&path).unwrap(), [json!({"prompt": "a, \"b\"", "chosen": "c\nd", "rejected": null})]);
    }

    #[test]
    fn pythons_numbers_are_null_and_texts_stay() {
        let (_dir, path) = written("a.jsonl", br#"{"a": NaN, "b": [-Infinity, 1], "c": "NaN \" Infinity"}"#);
        assert_eq!(rows(&path).unwrap(), [json!({"a": null, "b": [null, 1], "c": "NaN \" Infinity"})]);
    }

    #[test]
    fn formats_that_are_not_read_are_named() {
        for name in ["a.tsv", "a.parquet.gz", "A.ARROW"] {
            let (_dir, path) = written(name, b"x");
            assert!(rows(&path).unwrap_err().to_string().contains("not read"), "{name}");
        }
    }

    #[test]
    fn errors_name_the_line() {
        let (_dir, path) = written("a.jsonl", b"{}\n\n{\"a\":\n{}\n");
        assert!(rows(&path).unwrap_err().to_string().contains("a.jsonl:3: not valid JSON"));
        let (_dir, path) = written("a.json", b"[{},\n{\"a\": }]");
        assert!(rows(&path).unwrap_err().to_string().contains("a.json:2"));
        let (_dir, path) = written("a.jsonl.gz", b"not gzip at all");
        assert!(rows(&path).is_err());
    }

    #[test]
    fn damaged_parquet_files_are_errors() {
        let whole = std::fs::read(fixture("clair_mini_parquet/test.parquet")).unwrap();
        let (_dir, path) = written("a.parquet", &whole);
        let mut broken = 0;
        for at in (0..whole.len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x81;
            std::fs::write(&path, &bytes).unwrap();
            broken += usize::from(rows(&path).is_err());
        }
        assert!(broken > 20, "{broken}");
    }
}
