//! Which failures are worth another attempt, and when.

use std::time::{Duration, SystemTime};

use rand::Rng;

/// Longest wait between two attempts, whatever the server asks for.
const LONGEST: Duration = Duration::from_mins(2);

/// True for statuses that may change when the same request is sent again.
pub fn is_transient(status: u16) -> bool {
    matches!(status, 408 | 409 | 425 | 429) || (500..600).contains(&status)
}

/// True for statuses that say that the server has too much to do.
pub fn is_overload(status: u16) -> bool {
    matches!(status, 429 | 503 | 529)
}

/// `Retry-After` as seconds or as a date.
pub fn retry_after(header: Option<&str>, now: SystemTime) -> Option<Duration> {
    let text = header?.trim();
    if let Ok(seconds) = text.parse::<f64>() {
        return (seconds >= 0.0).then(|| Duration::from_secs_f64(seconds.min(LONGEST.as_secs_f64())));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(now).unwrap_or_default().min(LONGEST))
}

/// Wait before attempt `attempt` (from 1): exponential with jitter between half and all of it, and at
/// least what the server asked for.
pub fn delay(attempt: u32, base: Duration, asked: Option<Duration>) -> Duration {
    let exponential = base.saturating_mul(1 << attempt.saturating_sub(1).min(10)).min(LONGEST / 2);
    let jittered = exponential.mul_f64(rand::rng().random_range(0.5..=1.0));
    asked.map_or(jittered, |asked| asked.min(LONGEST) + jittered / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let parse = |text| retry_after(Some(text), now);
        assert_eq!(parse("3"), Some(Duration::from_secs(3)));
        assert_eq!(parse("0.25"), Some(Duration::from_millis(250)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:40 GMT"), Some(Duration::from_secs(3)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:30 GMT"), Some(Duration::ZERO));
        assert_eq!([parse("soon"), parse("-1"), parse("NaN")], [None, None, None]);
        assert_eq!(parse("999999"), Some(LONGEST));
    }

    #[test]
    fn waits_grow_and_respect_the_server() {
        let base = Duration::from_millis(100);
        for attempt in 1..8 {
            let wait = delay(attempt, base, None);
            let full = base * (1 << (attempt - 1));
            assert!(wait >= full / 2 && wait <= full, "{attempt}: {wait:?}");
        }
        assert!(delay(1, base, Some(Duration::from_secs(2))) >= Duration::from_secs(2));
        assert!([408, 409, 429, 500, 502, 503, 529].into_iter().all(is_transient));
        assert!(![200, 400, 401, 403, 404, 422].into_iter().any(is_transient));
    }
}
