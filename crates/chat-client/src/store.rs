//! Replies on disk: an append-only log of JSON lines with checksums, written and synced by one thread in groups, and
//! an index beside it that makes the start instant. The log alone is the truth; the index can be deleted.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::sync::oneshot;

use crate::Error;
use crate::log::{self, Index, Place};

/// How long the writer waits for further replies.
const GATHER: Duration = Duration::from_millis(5);

const FILE: &str = "replies.jsonl";

/// One line of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StoredReply {
    /// Key of the request.
    pub key: String,
    /// The request's body.
    pub request: Box<RawValue>,
    /// The reply's body, as it came.
    pub reply: Box<RawValue>,
    /// Milliseconds from sending the request to the whole reply.
    pub latency_ms: u64,
    /// Attempts it took.
    pub attempts: u32,
}

/// A reply that is to be stored, with texts that are JSON without a line break: they are written as they are.
#[derive(Debug, Clone)]
pub struct NewReply {
    /// Key of the request.
    pub key: String,
    /// The request's body.
    pub request: Bytes,
    /// The reply's body, as it came.
    pub reply: String,
    /// Milliseconds from sending the request to the whole reply.
    pub latency_ms: u64,
    /// Attempts it took.
    pub attempts: u32,
}

type Ack = oneshot::Sender<Result<(), String>>;

/// What was found when the store was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Bytes of a last line that a crash had cut off; they are gone.
    pub torn: usize,
    /// Lines whose checksum is wrong; they stay in the file and count as not there.
    pub damaged: usize,
}

/// The replies of one run directory. One process at a time holds it.
#[derive(Debug)]
pub struct ReplyStore {
    path: PathBuf,
    index: Arc<Mutex<Index>>,
    reader: Mutex<File>,
    jobs: Option<mpsc::Sender<(Box<NewReply>, Ack)>>,
    writer: Option<JoinHandle<()>>,
}

impl ReplyStore {
    /// Opens or creates the store in `dir`.
    pub fn open(dir: &Path) -> Result<(Self, Found), Error> {
        let path = dir.join(FILE);
        let failed = |reason: String| Error::Store { path: path.clone(), reason };
        fs::create_dir_all(dir).map_err(|e| failed(e.to_string()))?;
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(|e| failed(e.to_string()))?;
        file.try_lock().map_err(|_| failed("is in use by another run; wait for it or stop it".into()))?;
        let opened =
            log::open(&mut file, &path.with_extension("index")).map_err(|e| failed(e.to_string()))?;
        let found = Found { torn: opened.torn, damaged: opened.damaged };
        let index = Arc::new(Mutex::new(opened.index));
        let (jobs, queue) = mpsc::channel();
        let shared = index.clone();
        let reader = File::open(&path).map_err(|e| failed(e.to_string()))?;
        let writer =
            std::thread::spawn(move || write_groups(file, opened.index_file, opened.end, &queue, &shared));
        let store = Self { path, index, reader: Mutex::new(reader), jobs: Some(jobs), writer: Some(writer) };
        Ok((store, found))
    }

    /// Number of replies.
    pub fn len(&self) -> usize {
        lock(&self.index).len()
    }

    /// True when nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when the reply to the request with this key is there.
    pub fn has(&self, key: &str) -> bool {
        log::number(key).is_some_and(|key| lock(&self.index).contains_key(&key))
    }

    /// The reply to the request with this key; `None` too where its line is damaged.
    pub fn get(&self, key: &str) -> Result<Option<StoredReply>, Error> {
        let Some(place) = log::number(key).and_then(|key| lock(&self.index).get(&key).copied()) else {
            return Ok(None);
        };
        let failed = |reason: String| Error::Store { path: self.path.clone(), reason };
        let line = self.read(place).map_err(|e| failed(e.to_string()))?;
        if !log::is_whole(&line) {
            tracing::warn!(key, offset = place.offset, "a stored reply is damaged: it is asked for again");
            log::number(key).map(|key| lock(&self.index).remove(&key));
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).map_err(|e| failed(format!("byte {}: {e}", place.offset)))
    }

    fn read(&self, place: Place) -> std::io::Result<Vec<u8>> {
        let mut file = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(place.offset))?;
        let mut line = vec![0; place.len as usize];
        file.read_exact(&mut line)?;
        Ok(line)
    }

    /// Stores a reply; when this returns it is on the disk.
    pub async fn put(&self, reply: NewReply) -> Result<(), Error> {
        let failed = |reason: String| Error::Store { path: self.path.clone(), reason };
        let (ack, done) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(|| failed("is closed".into()))?;
        jobs.send((Box::new(reply), ack)).map_err(|_| failed("its writer has ended".into()))?;
        done.await.map_err(|_| failed("its writer has ended".into()))?.map_err(failed)
    }
}

impl Drop for ReplyStore {
    fn drop(&mut self) {
        // The writer ends when the last sender is gone.
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            writer.join().ok();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes what has come in the meantime in one go, syncs once, and tells everyone who waits.
fn write_groups(
    mut file: File,
    mut index_file: File,
    mut offset: u64,
    queue: &mpsc::Receiver<(Box<NewReply>, Ack)>,
    index: &Mutex<Index>,
) {
    while let Ok(first) = queue.recv() {
        // A write to the disk costs more than all else that is done for a reply: a few are waited for.
        std::thread::sleep(GATHER);
        let (mut bytes, mut places, mut acks) = (Vec::new(), Vec::new(), Vec::new());
        for (reply, ack) in std::iter::once(first).chain(queue.try_iter()) {
            let start = bytes.len();
            log::push_line(&mut bytes, &reply);
            let key = log::number(&reply.key).unwrap_or_default();
            places.push((key, Place { offset: offset + start as u64, len: (bytes.len() - start) as u32 }));
            acks.push(ack);
        }
        let result = file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(|e| e.to_string());
        if result.is_ok() {
            offset += bytes.len() as u64;
            // What the index lacks is read from the log at the next start.
            index_file.write_all(&log::records(&places)).ok();
            lock(index).extend(places);
        } else {
            // Whatever part was written is not whole; the next group starts where this one did.
            file.set_len(offset).and_then(|()| file.seek(SeekFrom::Start(offset))).ok();
        }
        for ack in acks {
            ack.send(result.clone()).ok();
        }
    }
}
