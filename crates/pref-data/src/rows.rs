//! Rows of one file, block by block: JSON Lines, JSON, CSV and Parquet, plain or compressed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use arrow_json::WriterBuilder;
use arrow_json::writer::LineDelimited;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::Error;
use crate::splits::format_of;

/// Bytes of text in a block.
const BLOCK: usize = 4 << 20;
/// Rows in a block of a Parquet file, or of one that is parsed while it is read.
const ROWS: usize = 1024;

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
            Self::Json(line) => serde_json::from_slice(line).map_err(|e| format!("not valid JSON: {e}")),
            Self::Value(value) => Ok(value.clone()),
        }
    }
}

/// Receives the blocks of a file; stops the reading with `Ok(false)`.
type Sink<'a> = &'a mut dyn FnMut(Block) -> Result<bool, Error>;

/// Reads a file's rows in blocks. Of a Parquet file only `columns` are read, where they are given.
pub fn read_blocks(path: &Path, columns: Option<&[&str]>, sink: Sink) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".parquet") {
        return parquet(path, columns, sink);
    }
    let mut input = open(path)?;
    match format_of(&name) {
        Some("csv") => csv(path, input, sink),
        Some("json") if starts_with_array(&mut input).map_err(Error::io(path))? => {
            json_array(path, input, sink)
        }
        // Unknown extensions too: JSON Lines by any name.
        _ => lines(path, input, sink),
    }
}

/// The first rows of a file, for detecting its layout.
pub fn first_rows(path: &Path, n: usize) -> Result<Vec<Value>, Error> {
    let mut first = Vec::new();
    read_blocks(path, None, &mut |block| {
        for (line, row) in block.rows().into_iter().take(n - first.len()) {
            first.push(row.value().map_err(|reason| Error::Record { path: path.into(), line, reason })?);
        }
        Ok(first.len() < n)
    })?;
    Ok(first)
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
        let count = block.iter().filter(|&&b| b == b'\n').count();
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

fn parquet(path: &Path, columns: Option<&[&str]>, sink: Sink) -> Result<(), Error> {
    let broken = |e: &dyn std::fmt::Display| Error::Dataset {
        path: path.into(),
        reason: format!("not a usable Parquet file: {e}"),
    };
    let file = File::open(path).map_err(Error::io(path))?;
    // The decoder trusts lengths in the file; a broken one must be an error, not a crash.
    let mut builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| broken(&e))?;
    if let Some(columns) = columns {
        let mask = ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
        builder = builder.with_projection(mask);
    }
    let mut first = 1;
    for batch in builder.with_batch_size(ROWS).build().map_err(|e| broken(&e))? {
        let batch = batch.map_err(|e| broken(&e))?;
        let mut text = Vec::with_capacity(BLOCK);
        let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut text);
        writer.write(&batch).and_then(|()| writer.finish()).map_err(|e| broken(&e))?;
        if !sink(Block::Lines(first, text))? {
            return Ok(());
        }
        first += batch.num_rows();
    }
    Ok(())
}
