//! The reply store: what was stored is there again, whatever happened in between.

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use chat_client::{Found, NewReply, ReplyStore};

fn key(i: usize) -> String {
    format!("{i:032x}")
}

fn line(i: usize) -> NewReply {
    NewReply {
        key: key(i),
        request: format!("{{\"n\": {i}}}").into(),
        reply: format!("{{\"text\": \"reply {i}\", \"price\": 0.1000}}"),
        latency_ms: 7,
        attempts: 1,
    }
}

async fn fill(dir: &Path, rows: std::ops::Range<usize>) {
    let (store, _) = ReplyStore::open(dir).unwrap();
    let puts = rows.map(|i| store.put(line(i)));
    for put in puts {
        put.await.unwrap();
    }
}

fn check(dir: &Path, rows: usize, want: Found) -> ReplyStore {
    let (store, found) = ReplyStore::open(dir).unwrap();
    assert_eq!((store.len(), found), (rows, want));
    store
}

#[tokio::test]
async fn replies_are_there_again_with_and_without_the_index() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 1..21).await;
    for index in ["kept", "deleted", "cut", "garbage", "of another log"] {
        let path = dir.path().join("replies.index");
        let bytes = fs::read(&path).unwrap();
        match index {
            "deleted" => fs::remove_file(&path).unwrap(),
            "cut" => fs::write(&path, &bytes[..100]).unwrap(),
            "garbage" => fs::write(&path, [7; 64]).unwrap(),
            "of another log" => fs::write(&path, &bytes[32..]).unwrap(),
            _ => {}
        }
        let store = check(dir.path(), 20, Found::default());
        let stored = store.get(&key(13)).unwrap().unwrap();
        // To the byte: 0.1000 is not 0.1.
        assert_eq!(stored.reply.get(), "{\"text\": \"reply 13\", \"price\": 0.1000}", "{index}");
        assert!(store.has(&key(1)) && !store.has(&key(21)) && store.get(&key(21)).unwrap().is_none());
    }
}

#[tokio::test]
async fn a_torn_line_is_cut_off_and_a_damaged_one_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 1..6).await;
    let path = dir.path().join("replies.jsonl");
    OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"crc32c\":\"12").unwrap();
    drop(check(dir.path(), 5, Found { torn: 13, damaged: 0 }));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("reply 2", "reply 9")).unwrap();
    // The index knows the line; its checksum is looked at when it is read.
    let store = check(dir.path(), 5, Found::default());
    assert!(store.get(&key(2)).unwrap().is_none() && store.get(&key(3)).unwrap().is_some());
    store.put(line(2)).await.unwrap();
    assert!(store.get(&key(2)).unwrap().is_some());
    drop(store);
    fs::remove_file(dir.path().join("replies.index")).unwrap();
    drop(check(dir.path(), 5, Found { torn: 0, damaged: 1 }));
}

#[tokio::test]
async fn a_store_is_held_by_one_run_and_takes_lines_of_earlier_versions() {
    let dir = tempfile::tempdir().unwrap();
    let old =
        format!("{{\"key\":\"{}\",\"request\":1,\"reply\":{{}},\"latency_ms\":1,\"attempts\":1}}\n", key(3));
    fs::write(dir.path().join("replies.jsonl"), old).unwrap();
    let store = check(dir.path(), 1, Found::default());
    assert_eq!(store.get(&key(3)).unwrap().unwrap().request.get(), "1");
    let second = ReplyStore::open(dir.path()).unwrap_err();
    assert!(second.to_string().contains("in use by another run"), "{second}");
}
