//! Replies on disk: an append-only log of JSON lines, written and synced by one thread in groups.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::Error;

const FILE: &str = "replies.jsonl";

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredReply {
    /// Key of the request.
    pub key: String,
    /// The request's body.
    pub request: Value,
    /// The reply's body, as it came.
    pub reply: Value,
    /// Milliseconds from sending the request to the whole reply.
    pub latency_ms: u64,
    /// Attempts it took.
    pub attempts: u32,
}

type Ack = oneshot::Sender<Result<(), String>>;

enum Job {
    Append(Box<StoredReply>, Ack),
}

/// The replies of one run directory. One process at a time holds it.
#[derive(Debug)]
pub struct ReplyStore {
    path: PathBuf,
    index: Arc<Mutex<Index>>,
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
}

/// Offset and length of each key's line.
type Index = HashMap<String, (u64, usize)>;

impl ReplyStore {
    /// Opens or creates the store in `dir`. Returns the bytes of a torn last line that was cut off.
    pub fn open(dir: &Path) -> Result<(Self, usize), Error> {
        let path = dir.join(FILE);
        let failed = |reason: String| Error::Store { path: path.clone(), reason };
        fs::create_dir_all(dir).map_err(|e| failed(e.to_string()))?;
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(|e| failed(e.to_string()))?;
        file.try_lock().map_err(|_| failed("is in use by another run; wait for it or stop it".into()))?;
        let (index, whole) = scan(&file).map_err(failed)?;
        let torn = file.metadata().map_err(|e| failed(e.to_string()))?.len() - whole;
        file.set_len(whole).map_err(|e| failed(e.to_string()))?;
        file.seek(SeekFrom::Start(whole)).map_err(|e| failed(e.to_string()))?;
        let index = Arc::new(Mutex::new(index));
        let (jobs, queue) = mpsc::channel();
        let shared = index.clone();
        let writer = std::thread::spawn(move || write_groups(file, whole, &queue, &shared));
        Ok((Self { path, index, jobs: Some(jobs), writer: Some(writer) }, torn as usize))
    }

    /// Number of replies.
    pub fn len(&self) -> usize {
        lock(&self.index).len()
    }

    /// True when nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The reply to the request with this key.
    pub fn get(&self, key: &str) -> Result<Option<StoredReply>, Error> {
        let Some((offset, len)) = lock(&self.index).get(key).copied() else { return Ok(None) };
        let failed = |reason: String| Error::Store { path: self.path.clone(), reason };
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(offset))?;
            let mut line = vec![0; len];
            file.read_exact(&mut line)?;
            Ok(line)
        };
        let line = read().map_err(|e| failed(e.to_string()))?;
        serde_json::from_slice(&line).map(Some).map_err(|e| failed(format!("byte {offset}: {e}")))
    }

    /// Stores a reply; when this returns it is on the disk.
    pub async fn put(&self, reply: StoredReply) -> Result<(), Error> {
        let failed = |reason: String| Error::Store { path: self.path.clone(), reason };
        let (ack, done) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(|| failed("is closed".into()))?;
        jobs.send(Job::Append(Box::new(reply), ack)).map_err(|_| failed("its writer has ended".into()))?;
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

/// Finds every whole line; returns where each key's line is, and where the last whole line ends.
fn scan(file: &File) -> Result<(Index, u64), String> {
    #[derive(Deserialize)]
    struct Key {
        key: String,
    }
    let (mut index, mut offset) = (HashMap::new(), 0_u64);
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let len = reader.read_until(b'\n', &mut line).map_err(|e| e.to_string())?;
        if len == 0 || line.last() != Some(&b'\n') {
            break;
        }
        let Key { key } =
            serde_json::from_slice(&line).map_err(|e| format!("line {number} is damaged: {e}"))?;
        index.insert(key, (offset, len));
        offset += len as u64;
    }
    Ok((index, offset))
}

/// Writes what has come in the meantime in one go, syncs once, and tells everyone who waits.
fn write_groups(mut file: File, mut offset: u64, queue: &mpsc::Receiver<Job>, index: &Mutex<Index>) {
    while let Ok(first) = queue.recv() {
        let (mut bytes, mut places, mut acks) = (Vec::new(), Vec::new(), Vec::new());
        for Job::Append(reply, ack) in std::iter::once(first).chain(queue.try_iter()) {
            let start = bytes.len();
            serde_json::to_writer(&mut bytes, &reply).expect("a reply serialises");
            bytes.push(b'\n');
            places.push((reply.key, (offset + start as u64, bytes.len() - start)));
            acks.push(ack);
        }
        let result = file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(|e| e.to_string());
        if result.is_ok() {
            offset += bytes.len() as u64;
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
