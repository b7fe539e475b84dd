//! TensorBoard event files: scalars in the record format of TensorFlow (`tensorboard/compat/proto/event.proto`,
//! `tensorflow/core/lib/io/record_writer.cc`).

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// Writes one event file.
pub struct EventWriter {
    file: File,
}

impl EventWriter {
    /// Opens a new file in `dir`, which is made. Events of earlier files beyond `step` are void: a run that
    /// goes on from there writes them again.
    pub fn create(dir: &Path, step: usize) -> Result<Self> {
        let context = || format!("{}: cannot write TensorBoard events", dir.display());
        fs::create_dir_all(dir).with_context(context)?;
        let name = format!("events.out.tfevents.{:.0}.{}.trainer", now(), std::process::id());
        let mut writer = Self { file: File::create(dir.join(name)).with_context(context)? };
        writer.push(&event(0, |event| bytes(event, 3, b"brain.Event:2")))?;
        // SessionLog { status: START }.
        writer.push(&event(step as u64 + 1, |event| bytes(event, 7, &[0x08, 1])))?;
        Ok(writer)
    }

    /// Writes the numbers of a log entry under `train/` or `eval/`.
    pub fn scalars(&mut self, split: &str, entry: &Map<String, Value>) -> Result<()> {
        let step = entry.get("step").and_then(Value::as_u64).unwrap_or(0);
        let mut summary = Vec::new();
        for (key, value) in entry {
            let Some(number) = value.as_f64().filter(|_| key != "step") else { continue };
            let name = key.strip_prefix(&format!("{split}_")).unwrap_or(key);
            let mut scalar = Vec::new();
            bytes(&mut scalar, 1, format!("{split}/{name}").as_bytes());
            scalar.push(2 << 3 | 5);
            scalar.extend((number as f32).to_le_bytes());
            bytes(&mut summary, 1, &scalar);
        }
        self.push(&event(step, |event| bytes(event, 5, &summary)))
    }

    fn push(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked(crc32c::crc32c(&length)).to_le_bytes());
        record.extend(event);
        record.extend(masked(crc32c::crc32c(event)).to_le_bytes());
        self.file.write_all(&record).context("cannot write TensorBoard events")
    }
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// An event with its time and step, and what `fill` adds.
fn event(step: u64, fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(now().to_le_bytes());
    event.push(2 << 3);
    varint(&mut event, step);
    fill(&mut event);
    event
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field of a length and bytes.
fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// ```python
    /// from tensorboard.compat.proto.event_pb2 import Event
    /// from tensorboard.compat.proto.summary_pb2 import Summary
    /// Event(step=300, summary=Summary(value=[Summary.Value(tag="train/loss", simple_value=0.5)])).SerializeToString().hex()
    /// # '10ac022a13 0a11 0a0a747261696e2f6c6f7373 150000003f'
    /// ```
    #[test]
    fn an_event_is_the_bytes_of_the_reference() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 0).unwrap();
        let entry = json!({"step": 300, "loss": 0.5});
        writer.scalars("train", entry.as_object().unwrap()).unwrap();
        let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let all = fs::read(path).unwrap();
        let mut records = Vec::new();
        let mut at = 0;
        while at < all.len() {
            let length = u64::from_le_bytes(all[at..at + 8].try_into().unwrap()) as usize;
            let data = &all[at + 12..at + 12 + length];
            let crc = u32::from_le_bytes(all[at + 12 + length..at + 16 + length].try_into().unwrap());
            assert_eq!(crc, masked(crc32c::crc32c(data)));
            records.push(data.to_vec());
            at += 16 + length;
        }
        let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
        assert_eq!(records.len(), 3);
        // Behind the nine bytes of the time.
        assert_eq!(hex(&records[2][9..]), "10ac022a130a110a0a747261696e2f6c6f7373150000003f");
        assert_eq!(hex(&records[1][9..]), "10013a020801");
    }
}
