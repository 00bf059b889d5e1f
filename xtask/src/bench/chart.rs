//! The chart of medians: one bar each, by size of RAM, on a logarithmic scale.
//!
//! The chart has no background, and only colours that are visible on black and on white.

use std::fmt::Display;

use super::figures::{Figures, Kind, Place};
use super::host::Mode;
use super::{by_hand, cuckoo3, parallel};

const TITLE: &str = "Restoring and stopping machines of each size: median in milliseconds, logarithmic scale";
const WIDTH: f64 = 800.0;
/// The begin of the bars, and their maximum length; values follow them.
const BARS: (f64, f64) = (200.0, 500.0);
const BAR: f64 = 16.0;
/// The height of a group's name, with the space above it.
const GROUP: f64 = 34.0;
const HEAD: f64 = 60.0;
const TEXT: &str = "#7d8590";
const HOST: &str = "#3d86e0";
const BY_HAND: &str = "#8b949e";
const CUCKOO3: &str = "#d9822b";
const LEGEND: [(&str, &str, f64); 3] = [
    ("this host, at its socket", HOST, 0.0),
    ("the hypervisor alone, by hand", BY_HAND, 220.0),
    ("Cuckoo3's own manager and client", CUCKOO3, 460.0),
];

/// Returns the bars of a group, from top to bottom.
fn kinds() -> [(Kind, &'static str); 12] {
    [
        (cuckoo3::RESTORE, CUCKOO3),
        (Mode::Plain.restore(), HOST),
        (by_hand::restore(Mode::Plain), BY_HAND),
        (Mode::Instant.restore(), HOST),
        (by_hand::restore(Mode::Instant), BY_HAND),
        (Mode::Standby.restore(), HOST),
        (by_hand::restore(Mode::Standby), BY_HAND),
        (parallel::restores(Mode::Instant), HOST),
        (parallel::restores(Mode::Standby), HOST),
        (cuckoo3::STOP, CUCKOO3),
        (Mode::Plain.stop(), HOST),
        (by_hand::STOP, BY_HAND),
    ]
}

/// The name, the milliseconds and the colour of a bar.
type Bar = (&'static str, f64, &'static str);
/// Returns the chart as SVG.
pub fn svg(figures: &Figures) -> String {
    let groups: Vec<(Place, Vec<Bar>)> =
        figures.places().into_iter().map(|place| (place, bars(figures, place))).collect();
    let scale = Scale::of(groups.iter().flat_map(|(_, bars)| bars.iter().map(|(_, ms, _)| *ms)));
    let (mut body, mut y) = (String::new(), HEAD);
    for (place, bars) in groups.iter().filter(|(_, bars)| !bars.is_empty()) {
        y += GROUP;
        body += &text(0.0, y - 8.0, "start", 13, place);
        for (name, ms, colour) in bars {
            let (width, middle) = (scale.length(*ms).max(1.0), y + BAR * 0.75);
            body += &text(BARS.0 - 8.0, middle, "end", 12, name);
            body += &rect(BARS.0, y + 2.0, width, BAR - 4.0, colour);
            let value = if *ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") };
            body += &text(BARS.0 + width + 6.0, middle, "start", 12, &value);
            y += BAR;
        }
    }
    let (page, height) = (head() + &scale.lines(y) + &body, y + 24.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         font-family=\"sans-serif\" fill=\"{TEXT}\">\n{page}</svg>\n"
    )
}

fn bars(figures: &Figures, place: Place) -> Vec<Bar> {
    let bar = |(kind, colour): (Kind, &'static str)| {
        figures.median(place, kind).filter(|ms| *ms > 0.0).map(|ms| (kind.name, ms, colour))
    };
    kinds().into_iter().filter_map(bar).collect()
}

fn head() -> String {
    let entry =
        |(name, colour, x)| rect(x, 30.0, 12.0, 12.0, colour) + &text(x + 18.0, 40.0, "start", 12, &name);
    text(0.0, 16.0, "start", 14, &TITLE) + &LEGEND.map(entry).concat()
}

/// The powers of ten that enclose all values.
struct Scale(f64, f64);

impl Scale {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let powers = values.map(f64::log10).fold((f64::MAX, f64::MIN), |(a, b), it| (it.min(a), it.max(b)));
        // Without values, any two will do.
        if powers.0 > powers.1 { Scale(0.0, 1.0) } else { Scale(powers.0.floor(), powers.1.floor() + 1.0) }
    }

    fn length(&self, ms: f64) -> f64 {
        (ms.log10() - self.0) / (self.1 - self.0) * BARS.1
    }

    fn lines(&self, bottom: f64) -> String {
        let line = |step: i32| {
            let ms = 10f64.powf(self.0 + f64::from(step));
            let x = BARS.0 + self.length(ms);
            rect(x, HEAD, 0.5, bottom - HEAD + 4.0, TEXT)
                + &text(x, bottom + 18.0, "middle", 12, &format!("{ms} ms"))
        };
        (0..=(self.1 - self.0) as i32).map(line).collect()
    }
}

/// Returns a filled rectangle.
pub fn rect(x: f64, y: f64, width: f64, height: f64, colour: &str) -> String {
    format!("<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{height}\" fill=\"{colour}\"/>\n")
}

/// Returns a text element. The text must not contain characters of XML's own.
pub fn text(x: f64, y: f64, anchor: &str, size: u8, text: &dyn Display) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{text}</text>\n")
}
