//! Pictures of the reports.

use anyhow::{Result, anyhow};
use plotters::prelude::{
    ChartBuilder, IntoDrawingArea, LineSeries, PathElement, RGBColor, SVGBackend, SeriesLabelPosition,
};
use plotters::style::{BLACK, Color, TRANSPARENT};

/// Lines get these colours, which the page's own take the place of.
const COLOURS: [(RGBColor, &str); 4] = [
    (RGBColor(47, 138, 80), "var(--good)"),
    (RGBColor(192, 74, 74), "var(--bad)"),
    (RGBColor(52, 101, 164), "var(--accent)"),
    (RGBColor(102, 102, 102), "var(--muted)"),
];

/// A line: its name and its points, in order.
pub type Series = (String, Vec<(f64, f64)>);

/// Lines over a common axis as SVG in the colours of the page; nothing for lines without points.
pub fn lines(title: &str, x: &str, series: &[Series]) -> Result<Option<String>> {
    let points = || series.iter().flat_map(|(_, points)| points).filter(|(_, y)| y.is_finite());
    let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let (low, high) = points().map(of).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        let room = if high > low { (high - low) * 0.04 } else { 0.5 };
        low - room..high + room
    };
    if points().next().is_none() {
        return Ok(None);
    }
    let mut svg = String::new();
    draw(&mut svg, title, x, series, [range(&|p| p.0), range(&|p| p.1)])
        .map_err(|e| anyhow!("{title}: {e}"))?;
    for (colour, name) in COLOURS {
        svg = svg.replace(&format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2), name);
    }
    Ok(Some(svg.replace("#000000", "currentColor")))
}

fn draw(
    svg: &mut String,
    title: &str,
    x: &str,
    series: &[Series],
    [xs, ys]: [std::ops::Range<f64>; 2],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (620, 270)).into_drawing_area();
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 17))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(58)
        .build_cartesian_2d(xs, ys)?;
    chart
        .configure_mesh()
        .x_desc(x)
        .x_labels(8)
        .y_labels(6)
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .label_style(("sans-serif", 12))
        .draw()?;
    for ((name, points), (colour, _)) in series.iter().zip(COLOURS.iter().cycle()) {
        let points = points.iter().copied().filter(|(_, y)| y.is_finite());
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    if series.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .label_font(("sans-serif", 12))
            .draw()?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_take_the_colours_of_the_page() {
        let series = [
            ("chosen".to_string(), vec![(0.0, -3.0), (1.0, -2.5), (2.0, f64::NAN)]),
            ("rejected".to_string(), vec![(0.0, -3.0), (1.0, -4.0)]),
        ];
        let svg = lines("likelihood", "step", &series).unwrap().unwrap();
        assert!(svg.contains("<svg") && svg.contains("var(--good)") && svg.contains("var(--bad)"));
        assert!(svg.contains("chosen") && svg.contains("currentColor") && !svg.contains("#000000"));
        assert_eq!(lines("nothing", "step", &[("x".into(), Vec::new())]).unwrap(), None);
    }
}
