//! Token rows, memory-mapped from the file that [`crate::token_file`] describes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use memmap2::Mmap;

use crate::token_file::{
    BLOCK, ENTRY, Entry, Lengths, MAGIC, TRAILER, Trailer, block_hashes, u32_at, u64_at,
};
use crate::{Error, PairTokens};

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
        PairTokens { prompt, chosen, rejected, boundary: entry.boundary as usize, context: [0; 2] }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token_file::TokenWriter;
    use std::fs;

    fn rows() -> Vec<(String, PairTokens, bool)> {
        let row = |id: &str, prompt: &[u32], chosen: &[u32], rejected: &[u32], label| {
            let tokens = PairTokens {
                prompt: prompt.into(),
                chosen: chosen.into(),
                rejected: rejected.into(),
                boundary: prompt.len() % 2,
                context: [0; 2],
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
