//! The medians as a picture: a bar each, by size of RAM, on a logarithmic scale.
//!
//! Nobody knows on which background it is looked at. So it has none of its own, and only colours that are
//! far enough from black and from white.

use std::fmt::Write;

use super::at_once;
use super::figures::{Figures, Kind, Place, Unit};
use super::hosted::Mode;
use super::{cuckoo3, floor};

const WIDTH: f64 = 800.0;
/// Where bars begin, and the farthest they reach; values stand behind them.
const BARS: (f64, f64) = (200.0, 700.0);
const BAR: f64 = 16.0;
const TITLE: f64 = 64.0;
/// The name of a group, and the space above it.
const GROUP: f64 = 34.0;

const TEXT: &str = "#7d8590";
const OTHERS: &str = "#d9822b";
const HOST: &str = "#3d86e0";
const BY_HAND: &str = "#8b949e";

/// Its name, its length in milliseconds and its colour.
type Bar = (&'static str, f64, &'static str);

/// What is drawn, from the top down, and how.
fn kinds() -> [(Kind, &'static str); 12] {
    [
        (cuckoo3::RESTORE, OTHERS),
        (Mode::Plain.restore(), HOST),
        (floor::PLAIN, BY_HAND),
        (Mode::Instant.restore(), HOST),
        (floor::INSTANT, BY_HAND),
        (Mode::Standby.restore(), HOST),
        (floor::STANDBY, BY_HAND),
        (cuckoo3::STOP, OTHERS),
        (Mode::Plain.stop(), HOST),
        (floor::STOP, BY_HAND),
        (at_once::restores(Mode::Instant), HOST),
        (at_once::restores(Mode::Standby), HOST),
    ]
}

/// The picture, as SVG.
pub fn svg(figures: &Figures) -> String {
    let groups = groups(figures);
    let values = groups.iter().flat_map(|(_, bars)| bars.iter().map(|(_, value, _)| *value));
    let (least, most) = values.fold((f64::MAX, f64::MIN), |(least, most), it| (it.min(least), it.max(most)));
    // Whole powers of ten; nothing measured is one as well.
    let (from, to) = if least > most { (0.0, 1.0) } else { (least.log10().floor(), most.log10().ceil()) };
    let x = |value: f64| BARS.0 + (value.log10() - from) / (to - from).max(1.0) * (BARS.1 - BARS.0);
    let mut body = String::new();
    let mut y = TITLE;
    for (place, bars) in &groups {
        y += GROUP;
        text(&mut body, (0.0, y - 8.0), "start", "font-weight=\"bold\"", &place.to_string());
        for (name, value, colour) in bars {
            let (middle, width) = (y + BAR * 0.75, (x(*value) - BARS.0).max(1.0));
            text(&mut body, (BARS.0 - 8.0, middle), "end", "", name);
            put(&mut body, &rect((BARS.0, y + 2.0), (width, BAR - 4.0), colour));
            text(&mut body, (BARS.0 + width + 6.0, middle), "start", "", &value_text(*value));
            y += BAR;
        }
    }
    let (height, mut page) = (y + 24.0, String::new());
    put(
        &mut page,
        &format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\""
        ),
    );
    put(&mut page, &format!("  font-family=\"sans-serif\" font-size=\"12\" fill=\"{TEXT}\">"));
    let title =
        "Restoring and stopping a machine, by its RAM: median time in milliseconds, logarithmic scale";
    text(&mut page, (0.0, 16.0), "start", "font-size=\"14\" font-weight=\"bold\"", title);
    legend(&mut page);
    for power in 0..=(to - from) as i32 {
        let value = 10f64.powf(from + f64::from(power));
        let at = x(value);
        let line =
            format!("<path d=\"M{at:.1} {TITLE}V{}\" stroke=\"{TEXT}\" stroke-opacity=\"0.3\"/>", y + 4.0);
        put(&mut page, &line);
        text(&mut page, (at, y + 18.0), "middle", "", &format!("{value} ms"));
    }
    page + &body + "</svg>\n"
}

/// What is drawn of each place: names, milliseconds and colours.
fn groups(figures: &Figures) -> Vec<(Place, Vec<Bar>)> {
    let bars = |place| {
        let bar = |(kind, colour): (Kind, &'static str)| {
            let median = figures.median(place, kind)?;
            (kind.unit == Unit::Ms && median > 0.0).then_some((kind.name, median, colour))
        };
        kinds().into_iter().filter_map(bar).collect::<Vec<_>>()
    };
    let groups = figures.places().into_iter().map(|place| (place, bars(place)));
    groups.filter(|(_, bars)| !bars.is_empty()).collect()
}

fn legend(page: &mut String) {
    let mut x = 0.0;
    for (name, colour) in [
        ("this host, at its socket", HOST),
        ("the hypervisor alone, by hand", BY_HAND),
        ("Cuckoo3's own manager", OTHERS),
    ] {
        put(page, &rect((x, 31.0), (12.0, 12.0), colour));
        text(page, (x + 18.0, 41.0), "start", "", name);
        x += 220.0;
    }
}

fn value_text(value: f64) -> String {
    if value < 10.0 { format!("{value:.1} ms") } else { format!("{value:.0} ms") }
}

fn rect(at: (f64, f64), size: (f64, f64), colour: &str) -> String {
    let ((x, y), (width, height)) = (at, size);
    format!("<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>")
}

/// Text without characters that XML takes for its own.
fn text(page: &mut String, at: (f64, f64), anchor: &str, more: &str, text: &str) {
    put(
        page,
        &format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" {more}>{text}</text>", at.0, at.1),
    );
}

fn put(page: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(page, "{line}");
}
