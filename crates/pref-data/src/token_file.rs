//! The file of token rows, and its writer.
//!
//! ```text
//! token ids, 2 or 4 bytes each, row by row: prompt, chosen, rejected
//! index, 32 bytes a row                       (Entry)
//! ids of the rows as text with offsets, unless every id is the row's number
//! trailer, 128 bytes: sizes, the hash of the hashes of each 4 MiB of what stands above, its own hash
//! ```
//! All numbers are little-endian.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use rayon::prelude::*;

use crate::PairTokens;
use crate::tokenize::common_prefix;
use crate::write::readable;

pub(crate) const MAGIC: [u8; 8] = *b"clairtk2";
pub(crate) const BLOCK: u64 = 4 << 20;
pub(crate) const ENTRY: usize = 32;
pub(crate) const TRAILER: usize = 128;
/// Start of the names of files that are being written.
const UNFINISHED: &str = ".unfinished-";

/// Tokens of a row without reading them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lengths {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of the chosen completion.
    pub chosen: usize,
    /// Tokens of the rejected completion.
    pub rejected: usize,
    /// Tokens at the start of both completions that are the same.
    pub common: usize,
}

impl Lengths {
    /// After cutting both sequences to `max` tokens at the end.
    #[must_use]
    pub fn cut(self, max: usize) -> Self {
        let room = max.saturating_sub(self.prompt);
        let [chosen, rejected, common] = [self.chosen, self.rejected, self.common].map(|n| n.min(room));
        Self { prompt: self.prompt, chosen, rejected, common }
    }

    /// After cutting both sequences to `max` tokens at the start. Where different parts of the prompt are left it
    /// is no longer common, and counts with each completion.
    #[must_use]
    pub fn cut_start(self, max: usize) -> Self {
        let [chosen, rejected] = [self.chosen, self.rejected].map(|n| (self.prompt + n).saturating_sub(max));
        if chosen != rejected {
            let [chosen, rejected] = [self.chosen, self.rejected].map(|n| (self.prompt + n).min(max));
            return Self { prompt: 0, chosen, rejected, common: 0 };
        }
        let beyond = chosen.saturating_sub(self.prompt);
        let [a, b, common] = [self.chosen, self.rejected, self.common].map(|n| n.saturating_sub(beyond));
        Self { prompt: self.prompt.saturating_sub(chosen), chosen: a, rejected: b, common }
    }

    /// Tokens of the longer sequence.
    pub fn longest(self) -> usize {
        self.prompt + self.chosen.max(self.rejected)
    }

    /// Tokens of the packed row, common ones once.
    pub fn packed(self) -> usize {
        self.prompt + self.chosen + self.rejected - self.common
    }

    /// Tokens of both sequences (of an unpaired row, of its one).
    pub fn both(self, unpaired: bool) -> usize {
        self.prompt * (2 - usize::from(unpaired)) + self.chosen + self.rejected
    }
}

/// One row's place in the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub start: u64,
    pub lengths: Lengths,
    pub boundary: u32,
    pub label: bool,
}

impl Entry {
    pub fn bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.start.to_le_bytes());
        let Lengths { prompt, chosen, rejected, common } = self.lengths;
        let numbers = [prompt, chosen, rejected, common].map(|n| n as u32);
        let flags = self.boundary << 1 | u32::from(self.label);
        for (place, number) in bytes[8..28].chunks_exact_mut(4).zip(numbers.into_iter().chain([flags])) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    pub fn read(bytes: &[u8]) -> Self {
        let number = |i: usize| u32_at(bytes, 8 + 4 * i);
        let length = |i: usize| number(i) as usize;
        Self {
            start: u64_at(bytes, 0),
            lengths: Lengths { prompt: length(0), chosen: length(1), rejected: length(2), common: length(3) },
            boundary: number(4) >> 1,
            label: number(4) & 1 == 1,
        }
    }
}

/// Writes token rows.
pub(crate) struct TokenWriter {
    data: BufWriter<tempfile::NamedTempFile>,
    index: BufWriter<File>,
    ids: BufWriter<File>,
    id_bytes: u64,
    numbered: bool,
    wide: bool,
    unpaired: bool,
    rows: u64,
    tokens: u64,
    largest: u32,
    skipped: u64,
}

/// Numbers of the trailer, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub rows: u64,
    pub width: u64,
    pub tokens: u64,
    pub largest: u64,
    pub id_bytes: u64,
    pub unpaired: u64,
    pub skipped: u64,
}

impl Trailer {
    pub fn numbers(self) -> [u64; 7] {
        [self.rows, self.width, self.tokens, self.largest, self.id_bytes, self.unpaired, self.skipped]
    }

    /// Bytes before the trailer.
    pub fn body(&self) -> Option<u64> {
        let ids =
            if self.id_bytes == 0 { 0 } else { self.id_bytes.checked_add(self.rows.checked_mul(8)?)? };
        let index = self.rows.checked_mul(ENTRY as u64)?;
        self.tokens.checked_mul(self.width)?.checked_add(index)?.checked_add(ids)
    }
}

impl TokenWriter {
    /// In the directory of the file that is to be. Ids below `vocabulary` are written.
    pub fn new(dir: &Path, vocabulary: usize, unpaired: bool) -> io::Result<Self> {
        sweep(dir);
        let data = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(dir)?;
        data.as_file().lock()?;
        let scratch = || Ok::<_, io::Error>(BufWriter::new(tempfile::tempfile_in(dir)?));
        Ok(Self {
            data: BufWriter::with_capacity(1 << 20, data),
            index: scratch()?,
            ids: scratch()?,
            id_bytes: 0,
            numbered: true,
            wide: vocabulary > 1 << 16,
            unpaired,
            rows: 0,
            tokens: 0,
            largest: 0,
            skipped: 0,
        })
    }

    pub fn push(&mut self, id: &str, tokens: &PairTokens, label: bool) -> io::Result<()> {
        let lengths = Lengths {
            prompt: tokens.prompt.len(),
            chosen: tokens.chosen.len(),
            rejected: tokens.rejected.len(),
            common: common_prefix(&tokens.chosen, &tokens.rejected),
        };
        let entry = Entry { start: self.tokens, lengths, boundary: tokens.boundary as u32, label };
        self.index.write_all(&entry.bytes())?;
        for &id in [&tokens.prompt, &tokens.chosen, &tokens.rejected].into_iter().flatten() {
            self.largest = self.largest.max(id);
            if self.wide {
                self.data.write_all(&id.to_le_bytes())?;
            } else {
                self.data.write_all(&(id as u16).to_le_bytes())?;
            }
        }
        self.numbered &= id == self.rows.to_string();
        // A zero byte ends each id.
        let id = id.replace('\0', "\u{fffd}");
        self.ids.write_all(id.as_bytes())?;
        self.ids.write_all(&[0])?;
        self.id_bytes += id.len() as u64 + 1;
        self.tokens += (lengths.prompt + lengths.chosen + lengths.rejected) as u64;
        self.rows += 1;
        Ok(())
    }

    /// Counts a row that cannot be used.
    pub fn skip(&mut self) {
        self.skipped += 1;
    }

    /// Completes the file and moves it to `path`.
    pub fn finish(self, path: &Path) -> io::Result<()> {
        let mut data = self.data;
        copy_back(self.index, &mut data)?;
        let mut trailer = Trailer {
            rows: self.rows,
            width: if self.wide { 4 } else { 2 },
            tokens: self.tokens,
            largest: u64::from(self.largest),
            id_bytes: 0,
            unpaired: u64::from(self.unpaired),
            skipped: self.skipped,
        };
        if !self.numbered {
            trailer.id_bytes = self.id_bytes;
            write_ids(self.ids, &mut data)?;
        }
        data.flush()?;
        let mut file = data.into_inner().map_err(io::IntoInnerError::into_error)?;
        let body = trailer.body().unwrap_or(0);
        let hashes = block_hashes(file.as_file(), body)?;
        let mut end = Vec::with_capacity(TRAILER);
        end.extend(MAGIC);
        trailer.numbers().iter().for_each(|number| end.extend(number.to_le_bytes()));
        end.extend(blake3::hash(hashes.as_flattened()).as_bytes());
        let own = blake3::hash(&end);
        end.extend(own.as_bytes());
        file.write_all(&end)?;
        file.as_file().sync_all()?;
        readable(file.as_file())?;
        file.persist(path)?;
        Ok(())
    }
}

/// Deletes what killed processes left: files that nobody holds the lock of.
fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
        let free = || File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if unfinished && free() {
            // Another process may have been faster.
            std::fs::remove_file(entry.path()).ok();
        }
    }
}

fn copy_back(from: BufWriter<File>, to: &mut impl Write) -> io::Result<()> {
    let mut file = from.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.seek(SeekFrom::Start(0))?;
    io::copy(&mut file, to)?;
    Ok(())
}

/// The ids end with a zero byte each; their ends come first, then the bytes.
fn write_ids(ids: BufWriter<File>, to: &mut impl Write) -> io::Result<()> {
    let mut file = ids.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.seek(SeekFrom::Start(0))?;
    let mut end = 0_u64;
    for byte in io::BufReader::new(&file).bytes() {
        end += 1;
        if byte? == 0 {
            to.write_all(&end.to_le_bytes())?;
        }
    }
    file.seek(SeekFrom::Start(0))?;
    io::copy(&mut file, to)?;
    Ok(())
}

/// Hashes of the blocks of the first `len` bytes, on all cores, read rather than mapped: memory stays small.
pub(crate) fn block_hashes(file: &File, len: u64) -> io::Result<Vec<[u8; 32]>> {
    (0..len.div_ceil(BLOCK))
        .into_par_iter()
        .map_init(Vec::new, |buffer, i| {
            buffer.resize(BLOCK.min(len - i * BLOCK) as usize, 0);
            read_at(file, buffer, i * BLOCK)?;
            Ok(*blake3::hash(buffer).as_bytes())
        })
        .collect()
}

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
}
