//! The figures as a table and as JSON.
//!
//! Ratios come with the figures: they are comparable across computers, times are not.

use std::fmt::Write;
use std::fs;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::figures::{Figure, Figures, Kind, Place, Spread};
use super::host::Mode;
use super::{analysis, by_hand, clones, cuckoo3};

/// With fewer samples, the 99th percentile is the maximum.
const MIN_P99_SAMPLES: usize = 100;

/// A value computed from several figures.
struct Ratio {
    /// The description.
    what: String,
    value: f64,
    /// The unit.
    unit: &'static str,
}

/// Returns the figures and ratios as a table.
pub fn table(figures: &Figures) -> String {
    let mut text = String::new();
    for (name, value) in about(figures) {
        line(&mut text, &format!("{name}: {value}"));
    }
    for place in figures.places() {
        line(&mut text, &format!("\n{place}"));
        line(
            &mut text,
            &format!("  {:32}{:>12}  {:>23}{:>14}   what is measured", "", "median", "least … most", "p99"),
        );
        figures.at(place).for_each(|figure| line(&mut text, &row(figure)));
    }
    line(&mut text, "\nwhat they say together, of medians");
    for ratio in ratios(figures) {
        line(&mut text, &format!("  {:10.2} {:8}{}", ratio.value, ratio.unit, ratio.what));
    }
    text
}

/// Returns all samples and the ratios as JSON.
pub fn json(figures: &Figures) -> String {
    let about: Map<String, Value> =
        about(figures).into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    let ratios: Vec<Value> = ratios(figures)
        .into_iter()
        .map(|ratio| json!({"what": ratio.what, "value": ratio.value, "unit": ratio.unit}))
        .collect();
    format!("{:#}\n", json!({"about": about, "figures": figures.json(), "ratios": ratios}))
}

fn row(figure: &Figure) -> String {
    let (spread, unit) = (figure.spread(), figure.kind.unit.to_string());
    let p99 =
        if figure.samples.len() < MIN_P99_SAMPLES { String::new() } else { with_unit(spread.p99, &unit) };
    let extremes = format!("{} … {}", number(spread.least), with_unit(spread.most, &unit));
    format!(
        "  {:32}{:>12}  {extremes:>23}{p99:>14}   {} ({}×)",
        figure.kind,
        with_unit(spread.median, &unit),
        figure.kind.what,
        figure.samples.len()
    )
}

/// Returns the computer and other conditions of the measurements.
fn about(figures: &Figures) -> Vec<(&'static str, String)> {
    let first_with = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut about = figures.about.clone();
    // Each number of clones has the same guest, whose RAM is as its system has left it.
    let is_of_clones = figures.places().iter().any(|place| matches!(place, Place::Clones(..)));
    let guests =
        if is_of_clones { "emulated (TCG)" } else { "emulated (TCG), half of their RAM filled with noise" };
    about.push(("guests", guests.to_owned()));
    about.push(("processor", format!("{cores} × {}", first_with("/proc/cpuinfo", "model name"))));
    about.push(("memory", first_with("/proc/meminfo", "MemTotal")));
    about.push(("kernel", kernel.trim().to_owned()));
    about.push(("seconds since 1970", now.to_string()));
    about
}

fn ratios(figures: &Figures) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for place in figures.places() {
        at_place(figures, place, &mut ratios);
    }
    growth(figures, Mode::Instant.restore(), &mut ratios);
    growth(figures, by_hand::restore(Mode::Instant), &mut ratios);
    pooled_p99(figures, Mode::Standby.restore(), &mut ratios);
    pooled_p99(figures, by_hand::restore(Mode::Standby), &mut ratios);
    ratios
}

/// Returns the compared kinds: each first one in relation to the second. Kinds by hand have the same names
/// for every machinery.
fn pairs() -> Vec<(Kind, Kind)> {
    let modes = [Mode::Plain, Mode::Instant, Mode::Standby];
    let mut pairs: Vec<(Kind, Kind)> = Vec::new();
    pairs.extend(modes.map(|mode| (mode.restore(), by_hand::restore(mode))));
    pairs.extend(modes.map(|mode| (mode.stop(), by_hand::STOP)));
    pairs.extend(modes.map(|mode| (mode.answer(), by_hand::answer(mode))));
    for mode in [Mode::Instant, Mode::Standby] {
        pairs.push((Mode::Plain.restore(), mode.restore()));
        pairs.push((cuckoo3::RESTORE, mode.restore()));
        pairs.push((cuckoo3::STOP, mode.stop()));
        pairs.push((cuckoo3::ANSWER, mode.answer()));
    }
    pairs.extend(analysis::pairs());
    pairs.extend(clones::pairs());
    pairs
}

fn at_place(figures: &Figures, place: Place, ratios: &mut Vec<Ratio>) {
    for (kind, other) in pairs() {
        if let (Some(one), Some(two)) = (figures.median(place, kind), figures.median(place, other)) {
            let what = format!("{place}: {kind} / {other}");
            ratios.push(Ratio { what, value: one / two, unit: "×" });
        }
    }
}

/// Adds the growth of a restore's time for each GiB of RAM, from the smallest machine to the largest.
fn growth(figures: &Figures, kind: Kind, ratios: &mut Vec<Ratio>) {
    let mut medians: Vec<(u32, f64)> = Vec::new();
    for place in figures.places() {
        if let (Place::Qemu(ram), Some(median)) = (place, figures.median(place, kind)) {
            medians.push((ram, median));
        }
    }
    medians.sort_by_key(|(ram, _)| *ram);
    if let [(least, first), .., (most, last)] = medians.as_slice()
        && least < most
    {
        let value = (last - first) * 1024.0 / f64::from(most - least);
        let what = format!("{kind}: growth from {least} to {most} MiB of RAM");
        ratios.push(Ratio { what, value, unit: "ms/GiB" });
    }
}

/// Adds the 99th percentile over all sizes, because one size has too few samples.
fn pooled_p99(figures: &Figures, kind: Kind, ratios: &mut Vec<Ratio>) {
    let samples = figures.pooled(kind);
    if !samples.is_empty() {
        let what = format!("{kind}: p99 of all {} samples, of all sizes", samples.len());
        ratios.push(Ratio { what, value: Spread::of(&samples).p99, unit: "ms" });
    }
}

fn with_unit(value: f64, unit: &str) -> String {
    format!("{} {unit}", number(value))
}

/// Returns a number with three digits or more.
fn number(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

fn line(text: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}", line.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_computed_from_medians() {
        let mut figures = Figures::default();
        for (ram, host, by_hand) in [(256, 100.0, 80.0), (1280, 130.0, 90.0)] {
            figures.add(Place::Qemu(ram), Mode::Instant.restore(), host);
            figures.add(Place::Qemu(ram), by_hand::restore(Mode::Instant), by_hand);
        }
        let said: Vec<String> =
            ratios(&figures).iter().map(|it| format!("{:.2} {} {}", it.value, it.unit, it.what)).collect();
        let expected = [
            "1.25 × qemu, 256 MiB: instant restore_start / floor: instant restore",
            "1.44 × qemu, 1280 MiB: instant restore_start / floor: instant restore",
            "30.00 ms/GiB instant restore_start: growth from 256 to 1280 MiB of RAM",
            "10.00 ms/GiB floor: instant restore: growth from 256 to 1280 MiB of RAM",
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn p99_is_shown_when_there_are_enough_samples() {
        let row_of = |count: u8| {
            let mut figures = Figures::default();
            (1..=count).for_each(|ms| figures.add(Place::Qemu(256), by_hand::STOP, f64::from(ms)));
            figures.of(Place::Qemu(256), by_hand::STOP).map(row).unwrap_or_default()
        };
        assert!(!row_of(99).contains("99.0 ms   QEMU"), "{}", row_of(99));
        assert!(row_of(100).contains("99.0 ms   QEMU"), "{}", row_of(100));
    }
}
