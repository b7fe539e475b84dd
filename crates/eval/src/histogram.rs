//! Histograms for the reports.

use serde::Serialize;

/// Bars of a histogram.
const BINS: usize = 24;

/// One bar.
#[derive(Debug, Serialize)]
pub struct Bar {
    /// Left edge in the picture.
    pub x: f64,
    /// Upper edge.
    pub y: f64,
    /// Height.
    pub height: f64,
    /// Values from here
    pub from: f64,
    /// to here.
    pub to: f64,
    /// Values in the bar.
    pub count: usize,
    /// Most of it is above 0.
    pub right: bool,
}

/// Bars of a 600 × 120 picture.
pub fn histogram(values: &[f64]) -> Vec<Bar> {
    let low = values.iter().copied().fold(0.0, f64::min);
    let high = values.iter().copied().fold(0.0, f64::max);
    if values.is_empty() || high - low <= 0.0 {
        return Vec::new();
    }
    let width = (high - low) / BINS as f64;
    let mut counts = [0_usize; BINS];
    for value in values {
        counts[(((value - low) / width) as usize).min(BINS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let bar = |(i, count): (usize, usize)| {
        let from = low + width * i as f64;
        let height = 120.0 * count as f64 / most as f64;
        Bar {
            x: 600.0 / BINS as f64 * i as f64,
            y: 120.0 - height,
            height,
            from,
            to: from + width,
            count,
            right: from + width / 2.0 > 0.0,
        }
    };
    counts.into_iter().enumerate().map(bar).collect()
}
