//! The chart of growth: lines over the number of clones, on logarithmic scales. A dashed line is the same by hand.
//!
//! As the [`chart`](super::chart) of medians, it has no background, and only colours that are visible on black and on white.

use super::chart::{rect, text};
use super::clones::{self, Line};
use super::figures::{Figures, Place, Unit};

/// The panels: title, unit, and the values of a unit of the scale.
const PANELS: [(&str, Unit, &str, f64); 2] =
    [("Time of all clones", Unit::Ms, "s", 1000.0), ("Memory of all clones", Unit::MiB, "MiB", 1.0)];
const TITLE: &str = "Clones of one snapshot, by their number; logarithmic scales; dashed: QEMU by hand";
const WIDTH: f64 = 800.0;
/// The left edge, the width and the height of a panel.
const PANEL: (f64, f64, f64) = (60.0, 480.0, 220.0);
const SPACE: f64 = 60.0;
const HEAD: f64 = 60.0;
const COLOURS: [&str; 4] = ["#3d86e0", "#2e9e5b", "#d9822b", "#a371f7"];
const TEXT: &str = "#7d8590";

/// Returns the chart as SVG.
pub fn svg(figures: &Figures) -> String {
    let mut body = text(0.0, 16.0, "start", 14, &TITLE);
    let mut top = HEAD;
    for (title, unit, word, divisor) in PANELS {
        body += &panel(figures, top, (title, unit, word, divisor));
        top += PANEL.2 + SPACE;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" width=\"{WIDTH}\" \
         font-family=\"sans-serif\" fill=\"{TEXT}\">\n{body}</svg>\n"
    )
}

fn panel(figures: &Figures, top: f64, (title, unit, word, divisor): (&str, Unit, &str, f64)) -> String {
    let lines: Vec<(Line, Vec<(f64, f64)>)> = clones::lines(unit)
        .into_iter()
        .map(|line| (line, points(figures, line, divisor)))
        .filter(|(_, points)| !points.is_empty())
        .collect();
    let all = || lines.iter().flat_map(|(_, points)| points);
    let (x, y) = (Scale::of(all().map(|point| point.0)), Scale::of(all().map(|point| point.1)));
    let (left, width, height) = PANEL;
    let (across, up) = (|value| left + x.part(value) * width, |value| top + (1.0 - y.part(value)) * height);
    let mut svg = text(left, top - 8.0, "start", 12, &format!("{title}, in {word}"));
    for power in y.powers() {
        svg += &rect(left, up(power), width, 0.5, TEXT);
        svg += &text(left - 6.0, up(power) + 4.0, "end", 11, &power);
    }
    for power in x.powers() {
        svg += &rect(across(power), top, 0.5, height, TEXT);
        svg += &text(across(power), top + height + 16.0, "middle", 11, &power);
    }
    for (index, (line, points)) in lines.iter().enumerate() {
        let points: Vec<String> =
            points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y))).collect();
        // A kind has two lines, one after the other.
        let colour = COLOURS[index / 2 % COLOURS.len()];
        let dashes = if line.is_by_hand { " stroke-dasharray=\"5 4\"" } else { "" };
        svg += &format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>\n",
            points.join(" ")
        );
        let y = top + 12.0 + index as f64 * 18.0;
        svg += &rect(left + width + 12.0, y - 9.0, 12.0, 9.0, colour);
        svg += &text(left + width + 30.0, y, "start", 11, &line.kind);
    }
    svg
}

/// Returns the medians of a line: the number of clones, and the value.
fn points(figures: &Figures, line: Line, divisor: f64) -> Vec<(f64, f64)> {
    let point = |place| match place {
        Place::Clones(count, _) => {
            let value = figures.median(place, line.kind).filter(|value| *value > 0.0)?;
            Some((count as f64, value / divisor))
        }
        _ => None,
    };
    let mut points: Vec<(f64, f64)> = figures.places().into_iter().filter_map(point).collect();
    points.sort_by(|one, other| one.0.total_cmp(&other.0));
    points
}

/// The powers of ten that enclose all values.
struct Scale(i32, i32);

impl Scale {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let powers = values.map(f64::log10).fold((f64::MAX, f64::MIN), |(a, b), it| (it.min(a), it.max(b)));
        // Without values, any two will do.
        if powers.0 > powers.1 {
            return Scale(0, 1);
        }
        let low = powers.0.floor() as i32;
        Scale(low, (powers.1.ceil() as i32).max(low + 1))
    }

    /// Returns the place of a value, from 0 to 1.
    fn part(&self, value: f64) -> f64 {
        (value.log10() - f64::from(self.0)) / f64::from(self.1 - self.0)
    }

    fn powers(&self) -> impl Iterator<Item = f64> {
        (self.0..=self.1).map(|power| 10f64.powi(power))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chart_has_a_line_for_each_measured_kind_and_none_without_figures() {
        let mut figures = Figures::default();
        let empty = svg(&figures);
        assert!(!empty.contains("NaN") && !empty.contains("polyline"), "{empty}");
        let line = clones::lines(Unit::Ms)[0];
        for (count, ms) in [(10, 2000.0), (1, 100.0), (100, 30_000.0)] {
            figures.add(Place::Clones(count, 256), line.kind, ms);
        }
        let chart = svg(&figures);
        // 100 ms and 100 s are the edges, so the values are at their logarithms between them.
        let expected = "points=\"60.0,280.0 300.0,184.6 540.0,98.3\"";
        assert!(chart.contains(expected) && !chart.contains("NaN"), "{chart}");
        assert_eq!(chart.matches("polyline").count(), 1);
    }
}
