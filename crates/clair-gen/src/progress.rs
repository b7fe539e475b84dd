//! What is told while a run goes on.

use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use chat_client::Counts;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::methods::Row;

/// Time between two lines where nobody watches a bar.
const EVERY: Duration = Duration::from_secs(15);

/// A bar on a terminal, lines elsewhere.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: usize,
    pairs: usize,
    failed: usize,
    /// Rows for which the server was asked now.
    asked: usize,
    started: Instant,
    told: Instant,
}

impl Progress {
    /// For so many rows.
    pub fn new(total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} [{elapsed} < {eta}] {msg}");
            ProgressBar::new(total as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        let now = Instant::now();
        Self { bar, total, pairs: 0, failed: 0, asked: 0, started: now, told: now }
    }

    /// A row is done.
    pub fn count(&mut self, row: &Row, is_new: bool) {
        self.asked += usize::from(is_new);
        match row {
            Row::Pair(_) => self.pairs += 1,
            Row::Failed(_) => self.failed += 1,
            Row::Stopped => {}
        }
    }

    /// Tells where the run is, if it is time to.
    #[allow(clippy::print_stderr)]
    pub fn tell(&mut self, counts: &Counts) {
        let done = self.pairs + self.failed;
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            bar.set_message(self.message(counts));
        } else if self.told.elapsed() >= EVERY {
            self.told = Instant::now();
            let left = self.left(done).map_or(String::new(), |left| format!(", {left} left"));
            eprintln!("{done}/{}{left}: {}", self.total, self.message(counts));
        }
    }

    fn left(&self, done: usize) -> Option<HumanDuration> {
        // Rows that were stored took no time.
        let each = self.started.elapsed().checked_div(u32::try_from(self.asked).ok()?)?;
        Some(HumanDuration(each * u32::try_from(self.total.saturating_sub(done)).unwrap_or(u32::MAX)))
    }

    fn message(&self, counts: &Counts) -> String {
        let done = self.pairs + self.failed;
        let tokens = counts.usage.completion_tokens as f64 / self.started.elapsed().as_secs_f64().max(0.001);
        let mut text = format!(
            "{} pairs, {} failed, {} in flight, {tokens:.0} tokens/s",
            self.pairs, self.failed, counts.in_flight
        );
        if counts.refused > 0 {
            write!(text, ", {} refused", counts.refused).ok();
        }
        if let Some(spent) = counts.spent {
            let left = self.total.saturating_sub(done);
            let projected = spent + spent * left as f64 / self.asked.max(1) as f64;
            write!(text, ", ${spent:.2} of about ${projected:.2}").ok();
        }
        text
    }

    /// The bar goes.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
