//! Histograms as SVG, self-contained.

use std::fmt::Write;

use serde::Serialize;

const BARS: usize = 24;
const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 90.0;

/// A picture of how values spread.
#[derive(Debug, Serialize)]
pub struct Chart {
    /// What is counted.
    pub title: String,
    /// The picture.
    pub svg: String,
    /// Mean, median and 95th percentile in words.
    pub caption: String,
}

impl Chart {
    /// Of some values; `None` for none.
    pub fn of(title: &str, mut values: Vec<f64>, digits: usize) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let (&low, &most) = (values.first()?, values.last()?);
        let at = |p: f64| values[((values.len() - 1) as f64 * p).round() as usize];
        // A few far-off values would squeeze all others into one bar: they go into the last.
        let high = most.min(at(0.5) + 6.0 * (at(0.9) - at(0.1)).max(f64::MIN_POSITIVE)).max(low);
        let width = (high - low) / BARS as f64;
        let mut counts = [0_usize; BARS];
        for value in &values {
            let bar = if width > 0.0 { ((value - low) / width) as usize } else { 0 };
            counts[bar.min(BARS - 1)] += 1;
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let caption =
            format!("mean {mean:.digits$}, median {:.digits$}, 95 % below {:.digits$}", at(0.5), at(0.95));
        let over = if most > high { "≥ " } else { "" };
        let ends = [format!("{low:.digits$}"), format!("{over}{high:.digits$}")];
        Some(Self { title: title.into(), svg: picture(&counts, &ends), caption })
    }
}

fn picture(counts: &[usize], ends: &[String; 2]) -> String {
    let most = counts.iter().copied().max().unwrap_or(1).max(1) as f64;
    let each = WIDTH / counts.len() as f64;
    let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {}" role="img">"#, HEIGHT + 16.0);
    for (i, &count) in counts.iter().enumerate() {
        let height = HEIGHT * count as f64 / most;
        let (x, y) = (i as f64 * each, HEIGHT - height);
        write!(
            svg,
            r#"<rect class="bar" x="{x:.1}" y="{y:.1}" width="{:.1}" height="{height:.1}"><title>{count}</title></rect>"#,
            each - 1.0
        )
        .ok();
    }
    let y = HEIGHT + 13.0;
    let [low, high] = ends;
    write!(
        svg,
        r#"<text x="0" y="{y}">{low}</text><text x="{WIDTH}" y="{y}" text-anchor="end">{high}</text></svg>"#
    )
    .ok();
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_hold_all_values() {
        let chart = Chart::of("x", (0..100).map(f64::from).collect(), 0).unwrap();
        let counts: usize = chart
            .svg
            .split("<title>")
            .skip(1)
            .map(|s| s.split('<').next().unwrap().parse::<usize>().unwrap())
            .sum();
        assert_eq!(counts, 100);
        assert!(
            chart.caption.contains("median 50") || chart.caption.contains("median 49"),
            "{}",
            chart.caption
        );
        let far = Chart::of("x", vec![1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 1e9], 0).unwrap();
        assert!(far.svg.contains('≥'), "{}", far.svg);
        assert!(Chart::of("x", vec![], 0).is_none() && Chart::of("x", vec![4.0; 3], 1).is_some());
    }
}
