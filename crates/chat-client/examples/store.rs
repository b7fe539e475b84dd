//! How long a store of many replies takes to start, to look a reply up, and to tell what is missing: the figures of
//! `cargo xtask bench generate --only store`. Takes a number of replies and a directory, prints seconds.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use chat_client::{NewReply, ReplyStore};

fn key(i: usize) -> String {
    format!("{:032x}", (i as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

fn line(i: usize) -> NewReply {
    let text = format!("reply {i} ").repeat(60);
    let reply = format!(
        r#"{{"choices": [{{"message": {{"role": "assistant", "content": "{text}"}}, "finish_reason": "stop"}}]}}"#
    );
    let request = format!(r#"{{"model": "m", "messages": [{{"role": "user", "content": "{text}"}}]}}"#);
    NewReply { key: key(i), request: request.into(), reply, latency_ms: 1000, attempts: 1 }
}

async fn fill(dir: &Path, replies: usize) -> Result<(), Box<dyn Error>> {
    let (store, _) = ReplyStore::open(dir)?;
    for start in (store.len()..replies).step_by(10_000) {
        let lines = (start..replies.min(start + 10_000)).map(line);
        // Together, so that they are written in groups.
        futures_util::future::try_join_all(lines.map(|line| store.put(line))).await?;
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
#[allow(clippy::print_stdout)]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let replies: usize = args.next().ok_or("number of replies?")?.parse()?;
    let dir = args.next().ok_or("directory?")?;
    fill(Path::new(&dir), replies).await?;
    let started = Instant::now();
    let (store, found) = ReplyStore::open(Path::new(&dir))?;
    let start = started.elapsed().as_secs_f64();
    assert_eq!((store.len(), found.torn, found.damaged), (replies, 0, 0));
    let sample = 20_000;
    let started = Instant::now();
    for i in 0..sample {
        let i = i * 7919 % replies;
        assert!(store.get(&key(i))?.is_some());
    }
    let look_up = started.elapsed().as_secs_f64() / sample as f64;
    drop(store);
    let started = Instant::now();
    let (store, _) = ReplyStore::open(Path::new(&dir))?;
    let missing = (0..replies + 1000).filter(|&i| !store.has(&key(i))).count();
    let resume = started.elapsed().as_secs_f64();
    assert_eq!(missing, 1000);
    println!("start {start:.3} look_up {look_up:.9} resume {resume:.3}");
    Ok(())
}
