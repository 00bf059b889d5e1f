//! The memory for standbys, and the keys of the configuration that control it.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use machinery::format_bytes;
use serde::Deserialize;

use crate::process::bytes_of;
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
        Arc::new(Budget { limit: AtomicU64::new(or_half_of_memory(limit)), used: Mutex::new(0) })
    }

    /// Changes the limit. Existing shares are kept, even if they exceed it.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.limit.store(or_half_of_memory(limit), Ordering::SeqCst);
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

fn or_half_of_memory(limit: Option<u64>) -> u64 {
    limit.unwrap_or_else(|| total_memory() / 2)
}

/// Returns the memory of this computer, or 0 if it is unknown. Source: `MemTotal` in proc_meminfo(5).
fn total_memory() -> u64 {
    let table = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    bytes_of(&table, "MemTotal:").unwrap_or(0)
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
}
