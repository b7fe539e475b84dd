//! What the HTTP client alone takes: the requests of a reply log are sent once more, so many at a time, and the replies
//! thrown away. Takes an address, a log and a number, prints seconds and seconds of CPU (Linux): the floor that
//! `cargo xtask bench generate --only speed` shows below its own figures.

use std::error::Error;
use std::time::Instant;

use bytes::Bytes;
use chat_client::StoredReply;
use futures_util::StreamExt;

/// Of this process so far, in hundredths of seconds.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].iter().filter_map(|&i| fields.get(i)?.parse::<f64>().ok()).sum::<f64>() / 100.0
}

#[tokio::main(worker_threads = 1)]
#[allow(clippy::print_stdout)]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (url, log) = (args.next().ok_or("address?")?, args.next().ok_or("log?")?);
    let in_flight: usize = args.next().ok_or("how many at a time?")?.parse()?;
    let text = std::fs::read_to_string(log)?;
    let body = |line| Ok(Bytes::from(serde_json::from_str::<StoredReply>(line)?.request.get().to_owned()));
    let bodies = text.lines().map(body).collect::<Result<Vec<_>, serde_json::Error>>()?;
    drop(text);
    // Only fails when a provider is there already.
    rustls::crypto::ring::default_provider().install_default().ok();
    let client = reqwest::Client::builder().pool_max_idle_per_host(in_flight).tcp_nodelay(true).build()?;
    let (started, before) = (Instant::now(), cpu());
    let sent = bodies.into_iter().map(|body| {
        let request = client.post(&url).header("content-type", "application/json").body(body);
        async move { request.send().await?.error_for_status()?.bytes().await }
    });
    let replies = futures_util::stream::iter(sent).buffer_unordered(in_flight);
    let failed = replies.filter(|reply| std::future::ready(reply.is_err())).count().await;
    println!("{} {} {failed}", started.elapsed().as_secs_f64(), cpu() - before);
    Ok(())
}
