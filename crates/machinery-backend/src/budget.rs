//! The memory for standbys, and the keys of the configuration that control it.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use machinery::config::checked;
use machinery::format_bytes;
use serde::{Deserialize, Deserializer};

use crate::sync::lock;

/// The key `standby` in `machinery-host.yaml`: it controls which machines get a standby.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standby {
    /// No machine.
    Off,
    /// Every machine, as long as the memory limit allows it.
    On,
    /// The machines whose standby needs little memory.
    #[default]
    Auto,
}

/// The memory limit for all standbys.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicU64,
    used: Mutex<u64>,
}

/// The part of a [`Budget`] that one standby holds. Dropping it returns the memory.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    /// Creates a budget of that many bytes; `None` means half the memory of this computer.
    pub fn new(limit: Option<u64>) -> Arc<Budget> {
        Arc::new(Budget { limit: AtomicU64::new(bytes_of(limit)), used: Mutex::new(0) })
    }

    /// Changes the limit. Existing shares are kept, even if they exceed it.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.limit.store(bytes_of(limit), Ordering::SeqCst);
    }

    /// Takes a share of that many bytes.
    ///
    /// # Errors
    /// The share would exceed the limit. The text contains the limit and the memory in use.
    pub fn take(self: &Arc<Self>, bytes: u64) -> Result<Share, String> {
        let mut used = lock(&self.used);
        let limit = self.limit.load(Ordering::SeqCst);
        if used.saturating_add(bytes) > limit {
            return Err(format!(
                "a standby would need {} of memory, and {} of the {} for standbys are in use (standby_memory_limit)",
                format_bytes(bytes),
                format_bytes(*used),
                format_bytes(limit)
            ));
        }
        *used += bytes;
        Ok(Share { budget: Arc::clone(self), bytes })
    }
}

impl Share {
    /// Returns the size of the share, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sets the size to the memory that is actually held, which is only known afterwards.
    pub fn set_actual(&mut self, bytes: u64) {
        let mut used = lock(&self.budget.used);
        *used = used.saturating_sub(self.bytes).saturating_add(bytes);
        self.bytes = bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut used = lock(&self.budget.used);
        *used = used.saturating_sub(self.bytes);
    }
}

fn bytes_of(limit: Option<u64>) -> u64 {
    limit.unwrap_or_else(|| total_memory() / 2)
}

/// Returns the memory of this computer, or 0 if it is unknown. Source: `MemTotal` in proc_meminfo(5), in KiB.
fn total_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The units of a size.
const UNITS: [(&str, u64); 3] = [("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Reads a size such as `16 GiB` as bytes, for a field's `deserialize_with`.
///
/// # Errors
/// The value is not a size.
pub fn parse_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    checked(deserializer, |text| {
        if text.trim().is_empty() || text == "~" || text == "null" {
            return Ok(None);
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
    fn budget_refuses_a_share_when_the_limit_is_reached() {
        let budget = Budget::new(Some(100 << 20));
        let mut first = budget.take(60 << 20).unwrap();
        let refused = budget.take(50 << 20).unwrap_err();
        assert!(refused.contains("50 MiB") && refused.contains("60 MiB of the 100 MiB"), "{refused}");
        first.set_actual(20 << 20);
        let second = budget.take(50 << 20).unwrap();
        drop((first, second));
        let all = budget.take(100 << 20).unwrap();
        assert_eq!(all.bytes(), 100 << 20);
        budget.set_limit(Some(50 << 20));
        assert!(budget.take(1).unwrap_err().contains("100 MiB of the 50 MiB"));
        drop(all);
        assert!(budget.take(50 << 20).is_ok());
        assert!(Budget::new(None).take(1 << 20).is_ok());
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
        assert_eq!(read("size:").unwrap(), None);
        assert_eq!(read("{}").unwrap(), None);
        for wrong in ["size: 16", "size: 1.5 GiB", "size: -1 GiB", "size: 16 GB", "size: [1]"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
