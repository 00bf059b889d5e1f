//! The readiness of machines for their next restore.
//!
//! [`Machinery::prepare`](crate::Machinery::prepare) prepares a machine. A plugin reports the machine's readiness by
//! [`Host::ready`](crate::Host::ready), and the host displays it.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::config::checked;

/// A machine's readiness for its next restore.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestoreReadiness {
    /// The mode of the next restore.
    pub mode: Readiness,
    /// The reason why the restore will not be faster, for people; empty if it is the fastest.
    pub reason: String,
    /// The memory that is held for it, in bytes.
    pub memory: u64,
    /// The disk space that is held for it, in bytes.
    pub disk: u64,
}

/// The mode of a restore, from the slowest to the fastest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readiness {
    /// The restore reads the whole snapshot.
    #[default]
    Plain,
    /// The restore maps most of the snapshot from a file, without reading it.
    Instant,
    /// The machine is loaded and paused; a restore only resumes it.
    Standby,
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Readiness::Plain => "plain",
            Readiness::Instant => "instant",
            Readiness::Standby => "standby",
        })
    }
}

/// The units of a size.
const UNITS: [(&str, u64); 3] = [("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Formats a size for people, such as `1.9 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    let (unit, size) = UNITS.into_iter().rev().find(|(_, size)| bytes >= *size).unwrap_or(UNITS[0]);
    let tenths = bytes.saturating_mul(10) / size;
    if tenths.is_multiple_of(10) {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

/// Reads a size such as `16 GiB` as bytes, and `0` without a unit, for a field's `deserialize_with`.
///
/// # Errors
/// The value is not a size.
pub fn parse_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    checked(deserializer, |text| {
        if text.trim().is_empty() || text == "~" || text == "null" {
            return Ok(None);
        }
        if text == "0" {
            return Ok(Some(0));
        }
        let number_and_unit = UNITS.iter().find_map(|(unit, size)| Some((text.strip_suffix(unit)?, size)));
        let bytes =
            number_and_unit.and_then(|(number, size)| number.trim().parse::<u64>().ok()?.checked_mul(*size));
        bytes.map(Some).ok_or_else(|| {
            format!("'{text}' is not a size: write a whole number of MiB, GiB or TiB, such as 16 GiB")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_formatted_with_its_unit() {
        assert_eq!(
            (format_bytes(1 << 30), format_bytes((19 << 30) / 10)),
            ("1 GiB".into(), "1.8 GiB".into())
        );
        assert_eq!((format_bytes(0), format_bytes(3 << 19)), ("0 MiB".into(), "1.5 MiB".into()));
    }

    #[derive(Debug, Deserialize)]
    struct Sized {
        #[serde(default, deserialize_with = "parse_bytes")]
        size: Option<u64>,
    }

    #[test]
    fn size_is_read_with_its_unit() {
        let read = |text: &str| serde_yaml::from_str::<Sized>(text).map(|sized| sized.size);
        assert_eq!(read("size: 16 GiB").unwrap(), Some(16 << 30));
        assert_eq!(read("size: 5MiB").unwrap(), Some(5 << 20));
        assert_eq!((read("size: 0").unwrap(), read("size: 0 GiB").unwrap()), (Some(0), Some(0)));
        assert_eq!(read("size:").unwrap(), None);
        assert_eq!(read("{}").unwrap(), None);
        for wrong in ["size: 16", "size: 1.5 GiB", "size: -1 GiB", "size: 16 GB", "size: [1]"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
