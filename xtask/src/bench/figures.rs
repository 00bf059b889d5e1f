//! Measured samples, by kind and place.

use std::fmt;

use serde_json::{Value, json};

/// The samples of a benchmark, in the order of their kinds' first ones.
#[derive(Default)]
pub struct Figures {
    /// The environment of the benchmark: names and values.
    pub about: Vec<(&'static str, String)>,
    all: Vec<Figure>,
}

/// The samples of one kind at one place.
pub struct Figure {
    /// The place.
    pub place: Place,
    /// The kind.
    pub kind: Kind,
    /// The samples, in the order of their measurement.
    pub samples: Vec<f64>,
}

/// The kind of a measurement, identified by its whole name, such as `host: restore`.
#[derive(Clone, Copy)]
pub struct Kind {
    /// The measured contestant of several ones, which begins the whole name; empty if there is one.
    pub by: &'static str,
    /// A short name, for tables.
    pub name: &'static str,
    /// A description.
    pub what: &'static str,
    /// The unit of the samples.
    pub unit: Unit,
}

/// The unit of a number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Mebibytes.
    MiB,
    /// Number per second.
    PerSecond,
    /// Number per hour.
    PerHour,
}

/// The machines of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// One QEMU process with that much RAM.
    Qemu(u32),
    /// One domain of libvirt with that much RAM.
    Kvm(u32),
    /// A number of QEMU processes with that much RAM each.
    AtOnce(usize, u32),
    /// A number of machines with that much RAM each, of one snapshot or of copies of it.
    Clones(usize, u32),
    /// A number of machines of the double machinery.
    Double(usize),
    /// A number of machines that Cuckoo3 uses for analyses.
    Analyses(usize),
    /// A number of machines with that much RAM each, which CAPE uses for analyses.
    Cape(usize, u32),
}

impl Kind {
    /// Returns the same kind of another contestant.
    pub const fn by(self, contestant: &'static str) -> Self {
        Kind { by: contestant, ..self }
    }

    fn is(self, other: Self) -> bool {
        (self.by, self.name) == (other.by, other.name)
    }
}

impl Figures {
    /// Adds a sample.
    pub fn add(&mut self, place: Place, kind: Kind, sample: f64) {
        let known = self.all.iter().position(|figure| figure.is(place, kind));
        let index = known.unwrap_or_else(|| {
            self.all.push(Figure { place, kind, samples: Vec::new() });
            self.all.len() - 1
        });
        // Further digits are noise.
        self.all[index].samples.push((sample * 1000.0).round() / 1000.0);
    }

    /// Returns the samples of one kind at one place.
    pub fn of(&self, place: Place, kind: Kind) -> Option<&Figure> {
        self.all.iter().find(|figure| figure.is(place, kind))
    }

    /// Returns their median.
    pub fn median(&self, place: Place, kind: Kind) -> Option<f64> {
        Some(self.of(place, kind)?.spread().median)
    }

    /// Returns all places, in the order of their measurement.
    pub fn places(&self) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::new();
        for figure in &self.all {
            if !places.contains(&figure.place) {
                places.push(figure.place);
            }
        }
        places
    }

    /// Returns all samples of one place.
    pub fn at(&self, place: Place) -> impl Iterator<Item = &Figure> {
        self.all.iter().filter(move |figure| figure.place == place)
    }

    /// Returns all samples of one kind, at all places.
    pub fn pooled(&self, kind: Kind) -> Vec<f64> {
        let of_kind = |figure: &&Figure| figure.kind.is(kind);
        self.all.iter().filter(of_kind).flat_map(|figure| figure.samples.iter().copied()).collect()
    }

    /// Returns all samples as JSON.
    pub fn json(&self) -> Vec<Value> {
        self.all.iter().map(Figure::json).collect()
    }
}

impl Figure {
    fn is(&self, place: Place, kind: Kind) -> bool {
        self.place == place && self.kind.is(kind)
    }

    /// Returns the distribution of the samples.
    pub fn spread(&self) -> Spread {
        Spread::of(&self.samples)
    }

    fn json(&self) -> Value {
        let (machines, ram_mib) = match self.place {
            Place::Qemu(ram) | Place::Kvm(ram) => (1, Some(ram)),
            Place::AtOnce(machines, ram) | Place::Clones(machines, ram) | Place::Cape(machines, ram) => {
                (machines, Some(ram))
            }
            Place::Double(machines) | Place::Analyses(machines) => (machines, None),
        };
        json!({
            "place": self.place.to_string(),
            "machines": machines,
            "ram_mib": ram_mib,
            "name": self.kind.to_string(),
            "what": self.kind.what,
            "unit": self.kind.unit.to_string(),
            "median": self.spread().median,
            "samples": self.samples,
        })
    }
}

/// The distribution of samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The minimum.
    pub least: f64,
    /// The median.
    pub median: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The maximum.
    pub most: f64,
}

impl Spread {
    /// Computes the distribution of `samples`; NaN if there are none.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        // The nearest rank is a measured value, not an interpolated one.
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

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.by {
            "" => f.pad(self.name),
            by => f.pad(&format!("{by}: {}", self.name)),
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Ms => "ms",
            Unit::MiB => "MiB",
            Unit::PerSecond => "/s",
            Unit::PerHour => "/h",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Qemu(ram) => write!(f, "qemu, {}", size(*ram)),
            Place::Kvm(ram) => write!(f, "kvm, {}", size(*ram)),
            Place::AtOnce(machines, ram) => write!(f, "qemu, {machines} machines of {} at once", size(*ram)),
            Place::Clones(machines, ram) => {
                write!(f, "qemu, {machines} clones of a machine of {}", size(*ram))
            }
            Place::Double(machines) => write!(f, "double, {machines} machines"),
            Place::Analyses(machines) => write!(f, "analyses by Cuckoo3, {machines} machines"),
            Place::Cape(machines, ram) => {
                write!(f, "analyses by CAPE, {machines} machines of {}", size(*ram))
            }
        }
    }
}

/// Returns an amount of memory as text.
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
        let kind = |name| Kind { by: "", name, what: "", unit: Unit::Ms };
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
        figures.add(Place::Qemu(256), kind("a").by("host"), 5.0);
        assert_eq!(figures.pooled(kind("a").by("host")), [5.0]);
        assert_eq!(figures.pooled(kind("a")), [1.0, 3.0, 2.0]);
        assert_eq!(format!("{:8}|", kind("a").by("host")), "host: a |");
    }
}
