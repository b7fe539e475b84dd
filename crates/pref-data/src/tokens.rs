//! Token rows in a file: written once, row after row, then memory-mapped.
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

use memmap2::Mmap;
use rayon::prelude::*;

use crate::tokenize::common_prefix;
use crate::{Error, PairTokens};

const MAGIC: [u8; 8] = *b"clairtk2";
const BLOCK: u64 = 4 << 20;
const ENTRY: usize = 32;
const TRAILER: usize = 128;

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
    pub fn cut(self, max: usize) -> Self {
        let room = max.saturating_sub(self.prompt);
        let [chosen, rejected, common] = [self.chosen, self.rejected, self.common].map(|n| n.min(room));
        Self { prompt: self.prompt, chosen, rejected, common }
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
struct Entry {
    start: u64,
    lengths: Lengths,
    boundary: u32,
    label: bool,
}

impl Entry {
    fn bytes(self) -> [u8; ENTRY] {
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

    fn read(bytes: &[u8]) -> Self {
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
struct Trailer {
    rows: u64,
    width: u64,
    tokens: u64,
    largest: u64,
    id_bytes: u64,
    unpaired: u64,
    skipped: u64,
}

impl Trailer {
    fn numbers(self) -> [u64; 7] {
        [self.rows, self.width, self.tokens, self.largest, self.id_bytes, self.unpaired, self.skipped]
    }

    /// Bytes before the trailer.
    fn body(&self) -> Option<u64> {
        let ids =
            if self.id_bytes == 0 { 0 } else { self.id_bytes.checked_add(self.rows.checked_mul(8)?)? };
        let index = self.rows.checked_mul(ENTRY as u64)?;
        self.tokens.checked_mul(self.width)?.checked_add(index)?.checked_add(ids)
    }
}

impl TokenWriter {
    /// In the directory of the file that is to be. Ids below `vocabulary` are written.
    pub fn new(dir: &Path, vocabulary: usize, unpaired: bool) -> io::Result<Self> {
        let scratch = || Ok::<_, io::Error>(BufWriter::new(tempfile::tempfile_in(dir)?));
        Ok(Self {
            data: BufWriter::with_capacity(1 << 20, tempfile::NamedTempFile::new_in(dir)?),
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
        file.persist(path)?;
        Ok(())
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
fn block_hashes(file: &File, len: u64) -> io::Result<Vec<[u8; 32]>> {
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

/// Token rows, memory-mapped.
#[derive(Debug)]
pub struct TokenSet {
    map: Mmap,
    trailer: Trailer,
    hash: [u8; 32],
}

impl TokenSet {
    /// Opens a file and checks it whole; the error says why it is not usable.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Self, Error> {
        let broken = |reason: &str| Error::Dataset { path: path.into(), reason: reason.into() };
        let mut file = File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let mut end = [0; TRAILER];
        let at = len.checked_sub(TRAILER as u64).ok_or_else(|| broken("too short"))?;
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut end)).map_err(Error::io(path))?;
        let (numbers, own) = end.split_at(TRAILER - 32);
        if numbers[..8] != MAGIC || blake3::hash(numbers).as_bytes() != own {
            return Err(broken("its end is damaged, or it is of another version"));
        }
        let number = |i: usize| u64_at(numbers, 8 + 8 * i);
        let trailer = Trailer {
            rows: number(0),
            width: number(1),
            tokens: number(2),
            largest: number(3),
            id_bytes: number(4),
            unpaired: number(5),
            skipped: number(6),
        };
        let body = trailer.body().filter(|&body| matches!(trailer.width, 2 | 4) && body == at);
        let body = body.ok_or_else(|| broken("its size does not fit its contents"))?;
        let hashes = block_hashes(&file, body).map_err(Error::io(path))?;
        let hash: [u8; 32] = numbers[64..96].try_into().unwrap_or_default();
        if *blake3::hash(hashes.as_flattened()).as_bytes() != hash {
            return Err(broken("its contents are damaged (checksum)"));
        }
        // The file was made whole and renamed into place, and nobody writes to it afterwards.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let set = Self { map, trailer, hash };
        set.check_index().then_some(set).ok_or_else(|| broken("its index is damaged"))
    }

    /// A file of these bytes, of which the last hold the sizes, with checksums that fit: for tests of what
    /// stands behind the checksums.
    #[doc(hidden)]
    pub fn seal(bytes: &[u8]) -> Vec<u8> {
        let (body, sizes) = bytes.split_at(bytes.len().saturating_sub(56));
        let mut hasher = blake3::Hasher::new();
        for block in body.chunks(BLOCK as usize) {
            hasher.update(blake3::hash(block).as_bytes());
        }
        let mut end = MAGIC.to_vec();
        end.extend(sizes);
        end.resize(64, 0);
        end.extend(hasher.finalize().as_bytes());
        let own = blake3::hash(&end);
        [body, &end, own.as_bytes()].concat()
    }

    /// Every row lies inside the tokens.
    fn check_index(&self) -> bool {
        let inside = (0..self.len()).all(|row| {
            let entry = self.entry(row);
            let Lengths { prompt, chosen, rejected, common } = entry.lengths;
            let end = entry.start.checked_add((prompt + chosen + rejected) as u64);
            end.is_some_and(|end| end <= self.trailer.tokens) && common <= chosen.min(rejected)
        });
        let ids = self.trailer.id_bytes == 0
            || (0..self.len())
                .try_fold(0, |from, row| {
                    let end = self.id_end(row);
                    (end > from && end <= self.trailer.id_bytes).then_some(end)
                })
                .is_some();
        inside && ids
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.trailer.rows as usize
    }

    /// There are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rows are completions with labels.
    pub fn is_unpaired(&self) -> bool {
        self.trailer.unpaired == 1
    }

    /// Largest token id.
    pub fn largest_id(&self) -> u32 {
        self.trailer.largest as u32
    }

    /// Rows of the source that could not be used.
    pub fn skipped(&self) -> usize {
        self.trailer.skipped as usize
    }

    /// Hash of the contents.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    fn entry(&self, row: usize) -> Entry {
        let index = (self.trailer.tokens * self.trailer.width) as usize + row * ENTRY;
        Entry::read(&self.map[index..index + ENTRY])
    }

    /// Lengths of a row.
    pub fn lengths(&self, row: usize) -> Lengths {
        self.entry(row).lengths
    }

    /// The label of an unpaired row.
    pub fn label(&self, row: usize) -> bool {
        self.entry(row).label
    }

    /// Tokens at the end of the prompt that prompt + completion tokenizes differently.
    pub fn boundary(&self, row: usize) -> usize {
        self.entry(row).boundary as usize
    }

    /// Tokens of a row.
    pub fn tokens(&self, row: usize) -> PairTokens {
        let entry = self.entry(row);
        let width = self.trailer.width as usize;
        let mut from = entry.start as usize * width;
        let mut part = |len: usize| -> Vec<u32> {
            let bytes = &self.map[from..from + len * width];
            from += len * width;
            if width == 2 {
                bytes.chunks_exact(2).map(|two| u32::from(u16::from_le_bytes([two[0], two[1]]))).collect()
            } else {
                bytes.chunks_exact(4).map(|four| u32_at(four, 0)).collect()
            }
        };
        let Lengths { prompt, chosen, rejected, .. } = entry.lengths;
        let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(&mut part);
        PairTokens { prompt, chosen, rejected, boundary: entry.boundary as usize }
    }

    fn ids_start(&self) -> usize {
        (self.trailer.tokens * self.trailer.width) as usize + self.len() * ENTRY
    }

    fn id_end(&self, row: usize) -> u64 {
        u64_at(&self.map, self.ids_start() + 8 * row)
    }

    /// Id of a row.
    pub fn id(&self, row: usize) -> String {
        if self.trailer.id_bytes == 0 {
            return row.to_string();
        }
        let from = if row == 0 { 0 } else { self.id_end(row - 1) as usize };
        let bytes = self.ids_start() + 8 * self.len();
        // Each id ends with a zero byte.
        let id = &self.map[bytes + from..bytes + self.id_end(row) as usize - 1];
        String::from_utf8_lossy(id).into_owned()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn rows() -> Vec<(String, PairTokens, bool)> {
        let row = |id: &str, prompt: &[u32], chosen: &[u32], rejected: &[u32], label| {
            let tokens = PairTokens {
                prompt: prompt.into(),
                chosen: chosen.into(),
                rejected: rejected.into(),
                boundary: prompt.len() % 2,
            };
            (id.to_string(), tokens, label)
        };
        vec![
            row("0", &[1, 2, 3], &[4, 5], &[4, 6, 7], false),
            row("é x", &[], &[65_535], &[], true),
            row("", &[9], &[], &[], false),
        ]
    }

    fn write(path: &Path, vocabulary: usize) {
        let mut writer = TokenWriter::new(path.parent().unwrap(), vocabulary, false).unwrap();
        for (id, tokens, label) in rows() {
            writer.push(&id, &tokens, label).unwrap();
        }
        writer.finish(path).unwrap();
    }

    #[test]
    fn rows_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        for vocabulary in [1 << 16, 1 << 20] {
            write(&path, vocabulary);
            let set = TokenSet::open(&path).unwrap();
            assert_eq!((set.len(), set.largest_id()), (3, 65_535));
            for (i, (id, tokens, label)) in rows().into_iter().enumerate() {
                assert_eq!((set.id(i), set.tokens(i), set.label(i)), (id, tokens, label));
            }
            assert_eq!(set.lengths(0), Lengths { prompt: 3, chosen: 2, rejected: 3, common: 1 });
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        write(&path, 100_000);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, &bytes).unwrap();
            assert!(TokenSet::open(&path).is_err(), "byte {at}");
        }
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(TokenSet::open(&path).is_err(), "cut to {len}");
        }
    }
}
