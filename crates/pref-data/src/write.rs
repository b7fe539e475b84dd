//! Writing: whole files atomically, logs by appending, pairs as Parquet.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Error as Io, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde::Serialize;
use serde_json::Value;

use crate::Error;

/// Rows converted at a time.
const BATCH: usize = 1024;

/// Rows of a Parquet row group: what is held until it is written.
const ROW_GROUP: usize = 4 * BATCH;

/// Writes a file so that it is there whole or not at all: a temporary file beside it, fsync, rename.
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut (dyn Write + Send)) -> std::io::Result<()>,
) -> Result<(), Error> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = || Error::io(path);
    let temporary = tempfile::NamedTempFile::new_in(dir).map_err(failed())?;
    let mut out = BufWriter::new(temporary);
    write(&mut out).map_err(failed())?;
    let temporary = out.into_inner().map_err(|e| failed()(e.into_error()))?;
    temporary.as_file().sync_all().map_err(failed())?;
    readable(temporary.as_file()).map_err(failed())?;
    temporary.persist(path).map_err(|e| failed()(e.error))?;
    Ok(())
}

/// BLAKE3 of a file's bytes, in hex.
pub fn hash_file(path: &Path) -> Result<String, Error> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(Error::io(path))?;
    hasher.update_reader(file).map_err(Error::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Temporary files are private; results are not.
#[cfg(unix)]
pub(crate) fn readable(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
pub(crate) fn readable(_: &File) -> std::io::Result<()> {
    Ok(())
}

/// Writes rows as JSON Lines, atomically.
pub fn write_jsonl<V: Serialize>(path: &Path, rows: impl IntoIterator<Item = V>) -> Result<(), Error> {
    write_atomic(path, |out| {
        rows.into_iter().try_for_each(|row| {
            serde_json::to_writer(&mut *out, &row)?;
            out.write_all(b"\n")
        })
    })
}

/// Appends JSON lines; a torn last line left by a crash is cut off when the file is opened again.
#[derive(Debug)]
pub struct JsonlAppender {
    path: PathBuf,
    file: File,
}

impl JsonlAppender {
    /// Opens or creates a file for appending. Returns the number of bytes of a torn last line, if any.
    pub fn open(path: &Path) -> Result<(Self, usize), Error> {
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = open.map_err(Error::io(path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io(path))?;
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64).map_err(Error::io(path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io(path))?;
        Ok((Self { path: path.into(), file }, bytes.len() - whole))
    }

    /// Appends one row; it reaches the operating system before this returns.
    pub fn push(&mut self, row: &Value) -> Result<(), Error> {
        let line = format!("{row}\n");
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))
    }
}

/// Writes rows with the columns of the published CLAIR sets as Parquet, atomically: `id`, `prompt`,
/// `chosen`, `rejected` (message lists), `rational`, `finish_reason` and the token `usage`; and, where rows have them,
/// `jaccard`, `levenshtein`, `length_change`, `verified`, `tie`, `chosen_score` and `rejected_score`.
pub fn write_parquet_pairs<V: Serialize>(
    path: &Path,
    rows: impl IntoIterator<Item = V>,
) -> Result<(), Error> {
    let schema = Arc::new(pair_schema());
    write_atomic(path, |out| {
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_max_row_group_row_count(Some(ROW_GROUP))
            .build();
        let mut writer = ArrowWriter::try_new(out, schema.clone(), Some(properties)).map_err(Io::other)?;
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            let rows: Vec<V> = rows.by_ref().take(BATCH).collect();
            let mut decoder = arrow_json::ReaderBuilder::new(schema.clone())
                .with_batch_size(rows.len())
                .build_decoder()
                .map_err(Io::other)?;
            decoder.serialize(&rows).map_err(Io::other)?;
            if let Some(batch) = decoder.flush().map_err(Io::other)? {
                writer.write(&batch).map_err(Io::other)?;
            }
        }
        writer.close().map_err(Io::other)?;
        Ok(())
    })
}

fn pair_schema() -> Schema {
    let text = |name: &str| Field::new(name, DataType::Utf8, true);
    let message = DataType::Struct(Fields::from(vec![text("role"), text("content")]));
    let messages = |name: &str| {
        Field::new(name, DataType::List(Arc::new(Field::new("item", message.clone(), true))), true)
    };
    let count = |name: &str| Field::new(name, DataType::Int64, true);
    let number = |name: &str| Field::new(name, DataType::Float64, true);
    let yes = |name: &str| Field::new(name, DataType::Boolean, true);
    let usage = Fields::from(vec![count("prompt_tokens"), count("completion_tokens"), count("total_tokens")]);
    Schema::new(vec![
        text("id"),
        text("prompt"),
        messages("chosen"),
        messages("rejected"),
        text("rational"),
        text("finish_reason"),
        Field::new("usage", DataType::Struct(usage), true),
        number("jaccard"),
        number("levenshtein"),
        number("length_change"),
        yes("verified"),
        yes("tie"),
        number("chosen_score"),
        number("rejected_score"),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_torn_line_is_cut_off_and_appending_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        fs::write(&path, "{\"a\":1}\n{\"b\":").unwrap();
        let (mut log, torn) = JsonlAppender::open(&path).unwrap();
        assert_eq!(torn, 5);
        log.push(&json!({"c": 3})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"a\":1}\n{\"c\":3}\n");
    }

    #[test]
    fn parquet_holds_the_message_lists() {
        use parquet::file::reader::{FileReader, SerializedFileReader};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.parquet");
        let chat = json!([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Ä"}]);
        let row = json!({"id": "1", "prompt": "Q", "chosen": chat, "rejected": chat, "rational": "r",
                         "finish_reason": "stop", "usage": {"prompt_tokens": 3}});
        write_parquet_pairs(&path, [&row, &row]).unwrap();
        let reader = SerializedFileReader::new(File::open(&path).unwrap()).unwrap();
        let rows: Vec<_> = reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_string()).collect();
        assert_eq!(rows.len(), 2);
        assert!(rows[0].contains('Ä') && rows[0].contains("assistant"), "{}", rows[0]);
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert!(write_atomic(&path, |_| Err(std::io::Error::other("no"))).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
