//! The memory of this computer.

use std::fs;
use std::time::Duration;

use crate::process::bytes_of;

/// The smallest default of the memory that automatic standbys leave free, in bytes.
const MIN_RESERVE: u64 = 1 << 30;
/// The default leaves this part of the memory free.
const RESERVE_PART: u64 = 8;

/// The memory of this computer at one time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it, in bytes.
    pub total: u64,
    /// The memory that a new process can have without swapping, in bytes.
    pub available: u64,
    /// The time since the boot in which a process has waited for memory.
    pub stalled: Duration,
}

impl Memory {
    /// Reads it; `None` without /proc. Sources: `MemTotal` and `MemAvailable` in proc_meminfo(5), the line `some` of
    /// /proc/pressure/memory in the kernel's documentation of PSI, which a kernel may lack.
    pub fn now() -> Option<Memory> {
        let table = fs::read_to_string("/proc/meminfo").ok()?;
        let pressure = fs::read_to_string("/proc/pressure/memory").unwrap_or_default();
        Some(Memory {
            total: bytes_of(&table, "MemTotal:")?,
            available: bytes_of(&table, "MemAvailable:")?,
            stalled: stalled(&pressure).unwrap_or_default(),
        })
    }

    /// Returns the default of the memory that automatic standbys leave free, for a computer with that memory.
    pub(super) fn default_reserve(total: u64) -> u64 {
        MIN_RESERVE.max(total / RESERVE_PART)
    }
}

fn stalled(pressure: &str) -> Option<Duration> {
    let some = pressure.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = some.split(' ').find_map(|value| value.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_that_of_the_kernel() {
        let memory = Memory::now().unwrap();
        assert!(memory.total >= memory.available && memory.available > 1 << 20, "{memory:?}");
        assert_eq!(Memory::default_reserve(4 << 30), 1 << 30);
        assert_eq!(Memory::default_reserve(64 << 30), 8 << 30);
    }

    #[test]
    fn stall_is_that_of_some_process() {
        let text = "some avg10=0.12 avg60=0.00 avg300=0.00 total=254482158\nfull avg10=0.00 total=7\n";
        assert_eq!(stalled(text), Some(Duration::from_micros(254_482_158)));
        assert_eq!(stalled(""), None);
    }
}
