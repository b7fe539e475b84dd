//! Budgets a minute, kept as hosted servers keep them: by buckets that fill evenly and hold two seconds' worth.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Seconds of a budget that a bucket holds.
const HOLDS: f64 = 2.0;

#[derive(Debug)]
struct Bucket {
    a_second: f64,
    level: f64,
}

impl Bucket {
    fn new(a_minute: f64) -> Option<Self> {
        (a_minute > 0.0).then(|| Self { a_second: a_minute / 60.0, level: a_minute / 60.0 * HOLDS })
    }

    fn fill(&mut self, seconds: f64) {
        self.level = (self.level + seconds * self.a_second).min(HOLDS * self.a_second);
    }
}

/// The budgets of a server.
#[derive(Debug)]
pub struct Limits(Mutex<(Instant, Option<Bucket>, Option<Bucket>)>);

/// Whether a request passes, and what its headers tell: of requests and of tokens, limit, remaining and seconds to
/// the whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// It passes.
    pub passes: bool,
    /// What the headers tell.
    pub told: [Option<[f64; 3]>; 2],
}

impl Limits {
    /// Requests and tokens a minute; 0 is without limit.
    pub fn new(rpm: f64, tpm: f64) -> Self {
        Self(Mutex::new((Instant::now(), Bucket::new(rpm), Bucket::new(tpm))))
    }

    /// Takes one request of so many tokens.
    pub fn take(&self, tokens: f64) -> Decision {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, requests, all_tokens) = &mut *guard;
        let seconds = last.elapsed().as_secs_f64();
        *last = Instant::now();
        let mut buckets = [(requests.as_mut(), 1.0), (all_tokens.as_mut(), tokens)];
        for (bucket, _) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.fill(seconds);
            }
        }
        let fits = |(bucket, units): &(Option<&mut Bucket>, f64)| {
            bucket.as_ref().is_none_or(|bucket| bucket.level >= *units)
        };
        let passes = buckets.iter().all(fits);
        let told = buckets.map(|(bucket, units)| {
            let bucket = bucket?;
            bucket.level -= if passes { units } else { 0.0 };
            let limit = 60.0 * bucket.a_second;
            let missing = HOLDS * bucket.a_second - bucket.level;
            Some([limit, limit - missing, missing / bucket.a_second])
        });
        Decision { passes, told }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_budget_is_refused() {
        let limits = Limits::new(600.0, 0.0);
        let passed = (0..100).filter(|_| limits.take(5.0).passes).count();
        assert!((20..=21).contains(&passed), "{passed}");
        let told = limits.take(5.0).told;
        assert!(told[1].is_none() && told[0].is_some_and(|[limit, ..]| limit == 600.0));
    }
}
