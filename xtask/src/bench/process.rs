//! Processes that are measured, and the server that they talk to.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cargo::{cargo, root};
use crate::report;

/// Builds the server.
pub fn build_loopback() -> Result<()> {
    let built = cargo(&["build", "--release", "--quiet", "--package", "loopback"]).status();
    ensure!(built.context("cannot run cargo")?.success(), "building failed");
    Ok(())
}

/// A server in a process of its own; it is killed when this goes.
pub struct Loopback {
    child: Child,
    /// Base address.
    pub url: String,
}

impl Loopback {
    pub fn start(flags: &[&str]) -> Result<Self> {
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
        let binary = target.join(format!("release/loopback{}", env::consts::EXE_SUFFIX));
        let mut child = Command::new(&binary).args(flags).stdout(Stdio::piped()).spawn()?;
        let mut url = String::new();
        let out = child.stdout.take().context("the server's output")?;
        BufReader::new(out).read_line(&mut url)?;
        Ok(Self { child, url: url.trim().into() })
    }

    /// What it did, as it tells itself.
    pub fn stats(&self) -> Result<Value> {
        use std::io::{Read, Write};
        let host = self.url.trim_start_matches("http://").trim_end_matches("/v1");
        let mut stream = std::net::TcpStream::connect(host)?;
        write!(stream, "GET /v1/stats HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let body = text.split_once("\r\n\r\n").context("no body")?.1;
        Ok(serde_json::from_str(body)?)
    }

    pub fn count(&self, kind: &str) -> Result<u64> {
        Ok(self.stats()?["counts"]["kinds"][kind].as_u64().unwrap_or(0))
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What a process took.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    pub wall: f64,
    pub cpu: f64,
    pub memory_mb: f64,
    pub is_success: bool,
}

/// Runs a command under `/usr/bin/time`; what it prints goes to a file.
pub fn timed(mut command: Command, log: &Path) -> Result<Took> {
    let program = command.get_program().to_owned();
    let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let mut timed = Command::new("/usr/bin/time");
    timed.args(["-f", "TOOK %e %U %S %M"]).arg(program).args(args);
    timed.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(dir) = command.get_current_dir() {
        timed.current_dir(dir);
    }
    command = timed;
    let output = command.output().context("cannot run /usr/bin/time (Debian: apt-get install time)")?;
    fs::write(log, [&output.stdout[..], &output.stderr[..]].concat())?;
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.rsplit("TOOK ").next().unwrap_or_default();
    let numbers: Vec<f64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let &[wall, user, system, kb] = numbers.as_slice() else { bail!("no times in {}", log.display()) };
    let is_success = output.status.success();
    Ok(Took { wall, cpu: user + system, memory_mb: kb / 1024.0, is_success })
}

/// The allocator with which PyTorch is quickest on the CPU: with the C library's it takes half as long again to train.
fn tcmalloc() -> Option<&'static Path> {
    let places = [
        "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
        "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4",
        "/usr/lib64/libtcmalloc_minimal.so.4",
    ];
    places.map(Path::new).into_iter().find(|path| path.exists())
}

/// A peer with that allocator, where this machine has it.
pub fn with_tcmalloc(command: &mut Command) {
    if let Some(library) = tcmalloc() {
        command.env("LD_PRELOAD", library);
    }
}

/// Says which allocator peers have: their figures are worth little without.
pub fn tell_allocator(peer: &str) {
    report(&match tcmalloc() {
        Some(_) => format!("{peer} with tcmalloc"),
        None => format!(
            "{peer} WITHOUT tcmalloc, slower than it could be (Debian: apt-get install libtcmalloc-minimal4)"
        ),
    });
}
