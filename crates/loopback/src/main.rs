//! The server as a process: prints its address and runs until it is killed. `GET /v1/stats` tells what it did.

use std::io::Write;

use anyhow::Result;
use clap::Parser;
use loopback::{Behaviour, Server};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A local server that behaves like a hosted language model.
#[derive(Debug, Parser)]
#[command(name = "loopback", version)]
struct Args {
    /// Address to listen at; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Threads that work on requests.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[command(flatten)]
    behaviour: Behaviour,
}

#[allow(clippy::print_stdout)]
fn main() -> Result<()> {
    let args = Args::parse();
    let server = Server::start_at(args.behaviour, &args.listen, args.threads)?;
    println!("{}", server.url());
    std::io::stdout().flush()?;
    loop {
        std::thread::park();
    }
}
