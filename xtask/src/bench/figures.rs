//! What was measured: samples, each of a kind, at a place.

use std::fmt;

use serde_json::{Value, json};

/// All that a run has measured, in the order in which it came to each kind.
#[derive(Default)]
pub struct Figures {
    /// What was measured with: names and their values.
    pub about: Vec<(&'static str, String)>,
    all: Vec<Figure>,
}

/// The samples of one kind at one place.
pub struct Figure {
    /// Where.
    pub place: Place,
    /// What.
    pub kind: Kind,
    /// In the order in which they came.
    pub samples: Vec<f64>,
}

/// What is measured. Two with the same name are the same.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Short, for tables.
    pub name: &'static str,
    /// In words.
    pub what: &'static str,
    /// What its numbers count.
    pub unit: Unit,
}

/// What a number counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Mebibytes.
    MiB,
    /// Times in a second.
    PerSecond,
}

/// On which machines something is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// One QEMU process with that much RAM.
    Qemu(u32),
    /// One domain of libvirt with that much RAM.
    Kvm(u32),
    /// So many QEMU processes with that much RAM each.
    AtOnce(usize, u32),
    /// So many machines of the double machinery.
    Double(usize),
}

impl Figures {
    /// Adds a sample.
    pub fn add(&mut self, place: Place, kind: Kind, sample: f64) {
        let known = self.all.iter().position(|figure| figure.is(place, kind));
        let index = known.unwrap_or_else(|| {
            self.all.push(Figure { place, kind, samples: Vec::new() });
            self.all.len() - 1
        });
        // Of a thousandth of anything here, the rest is noise.
        self.all[index].samples.push((sample * 1000.0).round() / 1000.0);
    }

    /// Those of one kind at one place, if there are any.
    pub fn of(&self, place: Place, kind: Kind) -> Option<&Figure> {
        self.all.iter().find(|figure| figure.is(place, kind))
    }

    /// The median of those.
    pub fn median(&self, place: Place, kind: Kind) -> Option<f64> {
        Some(self.of(place, kind)?.spread().median)
    }

    /// All places, in the order in which they were measured.
    pub fn places(&self) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::new();
        for figure in &self.all {
            if !places.contains(&figure.place) {
                places.push(figure.place);
            }
        }
        places
    }

    /// All of one place.
    pub fn at(&self, place: Place) -> impl Iterator<Item = &Figure> {
        self.all.iter().filter(move |figure| figure.place == place)
    }

    /// All samples of one kind, wherever they were taken, as if they were of one figure.
    pub fn pooled(&self, kind: Kind) -> Vec<f64> {
        let of_kind = |figure: &&Figure| figure.kind.name == kind.name;
        self.all.iter().filter(of_kind).flat_map(|figure| figure.samples.iter().copied()).collect()
    }

    /// Everything.
    pub fn json(&self) -> Vec<Value> {
        self.all.iter().map(Figure::json).collect()
    }
}

impl Figure {
    fn is(&self, place: Place, kind: Kind) -> bool {
        self.place == place && self.kind.name == kind.name
    }

    /// What the samples have in common.
    pub fn spread(&self) -> Spread {
        Spread::of(&self.samples)
    }

    fn json(&self) -> Value {
        let (machines, ram_mib) = match self.place {
            Place::Qemu(ram) | Place::Kvm(ram) => (1, Some(ram)),
            Place::AtOnce(machines, ram) => (machines, Some(ram)),
            Place::Double(machines) => (machines, None),
        };
        json!({
            "place": self.place.to_string(),
            "machines": machines,
            "ram_mib": ram_mib,
            "name": self.kind.name,
            "what": self.kind.what,
            "unit": self.kind.unit.to_string(),
            "median": self.spread().median,
            "samples": self.samples,
        })
    }
}

/// What samples have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The smallest.
    pub least: f64,
    /// The one in the middle.
    pub median: f64,
    /// The one that 99 of 100 do not exceed.
    pub p99: f64,
    /// The largest.
    pub most: f64,
}

impl Spread {
    /// That of `samples`; not a number where there are none.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        // The nearest rank: a value that was measured, none in between.
        let at = |rank: usize| sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN);
        let count = sorted.len();
        Spread {
            least: at(1),
            median: at(count.div_ceil(2)),
            p99: at((count * 99).div_ceil(100)),
            most: at(count),
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Ms => "ms",
            Unit::MiB => "MiB",
            Unit::PerSecond => "/s",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Qemu(ram) => write!(f, "qemu, {}", size(*ram)),
            Place::Kvm(ram) => write!(f, "kvm, {}", size(*ram)),
            Place::AtOnce(machines, ram) => write!(f, "qemu, {machines} machines of {} at once", size(*ram)),
            Place::Double(machines) => write!(f, "double, {machines} machines"),
        }
    }
}

/// An amount of memory as people say it.
pub fn size(mib: u32) -> String {
    if mib.is_multiple_of(1024) { format!("{} GiB", mib / 1024) } else { format!("{mib} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_has_only_measured_values() {
        let spread = |samples: &[f64]| Spread::of(samples);
        assert_eq!(spread(&[3.0]), Spread { least: 3.0, median: 3.0, p99: 3.0, most: 3.0 });
        assert_eq!(spread(&[4.0, 1.0, 3.0, 2.0]), Spread { least: 1.0, median: 2.0, p99: 4.0, most: 4.0 });
        let hundreds: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(spread(&hundreds), Spread { least: 1.0, median: 100.0, p99: 198.0, most: 200.0 });
    }

    #[test]
    fn samples_are_grouped_by_kind_and_place() {
        let kind = |name| Kind { name, what: "", unit: Unit::Ms };
        let mut figures = Figures::default();
        figures.add(Place::Qemu(256), kind("a"), 1.0);
        figures.add(Place::Qemu(1024), kind("a"), 2.0);
        figures.add(Place::Qemu(256), kind("a"), 3.0);
        figures.add(Place::Qemu(256), kind("b"), 4.0);
        let samples = |place, name| figures.of(place, kind(name)).map(|figure| figure.samples.clone());
        assert_eq!(samples(Place::Qemu(256), "a"), Some(vec![1.0, 3.0]));
        assert_eq!(samples(Place::Qemu(1024), "b"), None);
        assert_eq!(figures.places(), [Place::Qemu(256), Place::Qemu(1024)]);
        assert_eq!(figures.pooled(kind("a")), [1.0, 3.0, 2.0]);
    }
}
