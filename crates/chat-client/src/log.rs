//! The reply log's form: `{"crc32c":"…","key":"…",…}` lines, the checksum over everything after it; and the index,
//! records of 32 bytes with key (0 for a damaged line), offset, length and a checksum of their own.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Result, Seek, SeekFrom, Write};
use std::path::Path;

use rustc_hash::FxBuildHasher;

use crate::store::NewReply;

/// `{"crc32c":"` and the digits and `",` after it.
const START: &[u8] = br#"{"crc32c":""#;
const PREFIX: usize = START.len() + 8 + 2;

/// `"key":"`, which follows.
const KEY: &[u8] = br#""key":""#;

const RECORD: usize = 32;

/// Where a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Bytes before it.
    pub offset: u64,
    /// Its bytes, the line break among them.
    pub len: u32,
}

/// Lines by key. Keys are hashes: nothing is gained by hashing them well again.
pub type Index = HashMap<u128, Place, FxBuildHasher>;

/// A log that was read.
#[derive(Debug)]
pub struct Opened {
    /// Its lines.
    pub index: Index,
    /// The index file, at its end.
    pub index_file: File,
    /// Where the log's last whole line ends.
    pub end: u64,
    /// Bytes cut off after it.
    pub torn: usize,
    /// Lines with a wrong checksum.
    pub damaged: usize,
}

/// A key as a number.
pub fn number(key: &str) -> Option<u128> {
    u128::from_str_radix(key, 16).ok()
}

/// Appends a reply's line.
pub fn push_line(bytes: &mut Vec<u8>, reply: &NewReply) {
    let start = bytes.len();
    bytes.extend_from_slice(START);
    bytes.extend_from_slice(b"00000000\",");
    let body = bytes.len();
    // Keys are hexadecimal digits, and the two texts are JSON: nothing needs to be escaped.
    for part in [
        KEY,
        reply.key.as_bytes(),
        br#"","request":"#,
        &reply.request,
        br#","reply":"#,
        reply.reply.as_bytes(),
        format!(r#","latency_ms":{},"attempts":{}}}"#, reply.latency_ms, reply.attempts).as_bytes(),
    ] {
        bytes.extend_from_slice(part);
    }
    let sum = format!("{:08x}", crc32c::crc32c(&bytes[body..]));
    bytes[start + START.len()..start + START.len() + 8].copy_from_slice(sum.as_bytes());
    bytes.push(b'\n');
}

/// True when a line's checksum fits what follows it. Lines of version 0.1.0 have none and pass.
pub fn is_whole(line: &[u8]) -> bool {
    if line.starts_with(b"{\"key\":\"") {
        return true;
    }
    let sum = line.strip_prefix(START).and_then(|rest| rest.get(..8));
    let sum = sum.and_then(|digits| u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
    let body = line.strip_suffix(b"\n").and_then(|line| line.get(PREFIX..));
    matches!((sum, body), (Some(sum), Some(body)) if crc32c::crc32c(body) == sum)
}

/// The key in a line.
fn key(line: &[u8]) -> Option<u128> {
    let rest = if line.starts_with(START) { line.get(PREFIX..)? } else { line.get(1..)? };
    number(std::str::from_utf8(rest.strip_prefix(KEY)?.get(..32)?).ok()?)
}

/// Records of the index.
pub fn records(places: &[(u128, Place)]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(places.len() * RECORD);
    for (key, place) in places {
        let start = bytes.len();
        bytes.extend_from_slice(&key.to_le_bytes());
        bytes.extend_from_slice(&place.offset.to_le_bytes());
        bytes.extend_from_slice(&place.len.to_le_bytes());
        let sum = crc32c::crc32c(&bytes[start..]);
        bytes.extend_from_slice(&sum.to_le_bytes());
    }
    bytes
}

fn record(bytes: &[u8]) -> Option<(u128, Place)> {
    let (body, sum) = bytes.split_at_checked(RECORD - 4)?;
    if crc32c::crc32c(body).to_le_bytes() != sum {
        return None;
    }
    let (key, rest) = body.split_first_chunk::<16>()?;
    let (offset, len) = rest.split_first_chunk::<8>()?;
    let place = Place { offset: u64::from_le_bytes(*offset), len: u32::from_le_bytes(len.try_into().ok()?) };
    Some((u128::from_le_bytes(*key), place))
}

/// Reads the index, then what the log has beyond it, and cuts off a torn last line.
pub fn open(log: &mut File, index_path: &Path) -> Result<Opened> {
    let mut index_file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(index_path)?;
    let (mut index, covered, records_read) = read_index(log, &mut index_file)?;
    index_file.set_len(records_read * RECORD as u64)?;
    index_file.seek(SeekFrom::End(0))?;
    log.seek(SeekFrom::Start(covered))?;
    let scanned = scan(log, covered)?;
    index_file.write_all(&records(&scanned.places))?;
    scanned.places.into_iter().for_each(|(key, place)| insert(&mut index, key, place));
    let torn = log.metadata()?.len() - scanned.end;
    log.set_len(scanned.end)?;
    log.seek(SeekFrom::Start(scanned.end))?;
    Ok(Opened { index, index_file, end: scanned.end, torn: torn as usize, damaged: scanned.damaged })
}

/// The index with the bytes of the log that it covers and its number of good records. Empty where it is not of
/// this log.
fn read_index(log: &mut File, index_file: &mut File) -> Result<(Index, u64, u64)> {
    let mut bytes = Vec::new();
    index_file.read_to_end(&mut bytes)?;
    let mut index = Index::with_capacity_and_hasher(bytes.len() / RECORD, FxBuildHasher);
    let (mut covered, mut count, mut last) = (0, 0, None);
    for (key, place) in bytes.chunks_exact(RECORD).map_while(record) {
        if place.offset != covered {
            break;
        }
        covered = place.offset + u64::from(place.len);
        count += 1;
        last = Some((key, place));
        insert(&mut index, key, place);
    }
    let Some((last_key, place)) = last else { return Ok((index, 0, 0)) };
    let mut line = vec![0; place.len as usize];
    log.seek(SeekFrom::Start(place.offset))?;
    let is_there = log.read_exact(&mut line).is_ok() && line.ends_with(b"\n");
    let is_of_log = is_there && (last_key == 0 || is_whole(&line) && key(&line) == Some(last_key));
    Ok(if is_of_log { (index, covered, count) } else { (Index::default(), 0, 0) })
}

fn insert(index: &mut Index, key: u128, place: Place) {
    if key != 0 {
        index.insert(key, place);
    }
}

struct Scanned {
    places: Vec<(u128, Place)>,
    end: u64,
    damaged: usize,
}

fn scan(log: &File, mut end: u64) -> Result<Scanned> {
    let mut reader = BufReader::with_capacity(1 << 20, log);
    let (mut places, mut damaged, mut line) = (Vec::new(), 0, Vec::new());
    loop {
        line.clear();
        let len = reader.read_until(b'\n', &mut line)?;
        if len == 0 || line.last() != Some(&b'\n') {
            return Ok(Scanned { places, end, damaged });
        }
        let key = key(&line).filter(|_| is_whole(&line));
        damaged += usize::from(key.is_none());
        places.push((key.unwrap_or(0), Place { offset: end, len: len as u32 }));
        end += len as u64;
    }
}
