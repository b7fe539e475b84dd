//! Rows of a Parquet file as lines of JSON.

use std::fs::File;
use std::path::Path;

use arrow_json::WriterBuilder;
use arrow_json::writer::LineDelimited;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::metadata::ParquetMetaData;

use crate::Error;
use crate::rows::{BLOCK, Block, ROWS, Sink};

/// Gives the rows of the wanted columns, row group by row group.
pub(crate) fn parquet(path: &Path, columns: Option<&[&str]>, sink: Sink) -> Result<(), Error> {
    let broken = |reason: String| Error::Dataset {
        path: path.into(),
        reason: format!("not a usable Parquet file: {reason}"),
    };
    let file = File::open(path).map_err(Error::io(path))?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    let open = || {
        let mut builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
        check_places(builder.metadata(), size)?;
        if let Some(columns) = columns {
            let mask = ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
            builder = builder.with_projection(mask);
        }
        builder.with_batch_size(ROWS).build().map_err(|e| e.to_string())
    };
    let mut batches = guarded(open).map_err(broken)?;
    let mut first = 1;
    while let Some(batch) =
        guarded(|| batches.next().transpose().map_err(|e| e.to_string())).map_err(broken)?
    {
        let mut text = Vec::with_capacity(BLOCK);
        let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut text);
        writer.write(&batch).and_then(|()| writer.finish()).map_err(|e| broken(e.to_string()))?;
        if !sink(Block::Lines(first, text))? {
            return Ok(());
        }
        first += batch.num_rows();
    }
    Ok(())
}

/// The parquet crate panics on some damaged files: those are errors too.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err("it is damaged".into()))
}

/// Every column chunk lies inside the file (the crate asserts it later).
fn check_places(metadata: &ParquetMetaData, size: u64) -> Result<(), String> {
    for group in metadata.row_groups() {
        for column in group.columns() {
            let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
            let place = u64::try_from(start).ok().zip(u64::try_from(column.compressed_size()).ok());
            if place.and_then(|(start, len)| start.checked_add(len)).is_none_or(|end| end > size) {
                return Err(format!(
                    "column {:?} does not lie inside the file",
                    column.column_path().string()
                ));
            }
        }
    }
    Ok(())
}
