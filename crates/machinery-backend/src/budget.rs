//! The memory for standbys, and the keys of the configuration that control it.
//!
//! ```text
//!  standby: on    ─▶ standby_memory_limit ─────────────────────────────▶ share
//!  standby: auto  ─▶ standby_memory_limit ─▶ standby_memory_reserve ─┬─▶ share ─▶ pressure: given back ─┐
//!                                                                    └─▶ the machine waits ◀────────────┘
//!                                                                            └─▶ memory is free: the host prepares it
//! ```
//!
//! The [keeper](crate::keeper) looks at the memory. A share of `auto` is given back under pressure, and the machine with the
//! fewest restores gives back first. A machine that waits is prepared once its standby fits, the one with the most restores
//! first.

mod computer;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use machinery::format_bytes;
use serde::Deserialize;

pub use computer::Memory;

use crate::sync::lock;

/// The key `standby` in `machinery-host.yaml`: it controls which machines get a standby.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standby {
    /// No machine.
    Off,
    /// Every machine, as long as the memory limit allows it.
    On,
    /// The machines for which the computer has free memory.
    #[default]
    Auto,
}

/// The memory limits for all standbys.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicU64,
    pub(crate) reserve: AtomicU64,
    pub(crate) claims: Mutex<Claims>,
    /// Wakes the keeper when it gets work, or its end.
    pub(crate) woken: Condvar,
}

/// The part of a [`Budget`] that one standby holds. Dropping it returns the memory.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    number: u64,
    bytes: u64,
}

/// The shares, and the machines that wait for one.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    pub(crate) held: BTreeMap<u64, Held>,
    pub(crate) last_number: u64,
    /// The memory that each waiting machine needs, in bytes.
    pub(crate) waiting: BTreeMap<String, u64>,
    /// The number of restores of each machine.
    pub(crate) restores: BTreeMap<String, u64>,
    /// The memory at the last look, and its time.
    pub(crate) seen: Option<(Instant, Memory)>,
    /// The time of the last pressure.
    pub(crate) pressed: Option<Instant>,
    /// True once the keeper is dropped.
    pub(crate) is_unkept: bool,
}

/// A share, as the budget keeps it.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) machine: String,
    pub(crate) bytes: u64,
    pub(crate) is_automatic: bool,
    /// True until the standby has touched its memory.
    pub(crate) is_loading: bool,
    /// The number of requests for its return. One that is still held is asked again after all others.
    pub(crate) asked_back: u32,
}

impl Budget {
    /// Creates a budget: `limit` bytes for all standbys, by default half the memory of this computer, and `reserve` bytes
    /// that automatic standbys leave free, by default an eighth of the memory and at least 1 GiB.
    pub fn new(limit: Option<u64>, reserve: Option<u64>) -> Arc<Budget> {
        let budget = Budget {
            limit: AtomicU64::default(),
            reserve: AtomicU64::default(),
            claims: Mutex::default(),
            woken: Condvar::new(),
        };
        budget.set_limits(limit, reserve);
        Arc::new(budget)
    }

    /// Changes the limits. Existing shares are kept, even if they exceed the limit; those of automatic standbys are given
    /// back if the reserve asks for it.
    pub fn set_limits(&self, limit: Option<u64>, reserve: Option<u64>) {
        let total = Memory::now().unwrap_or_default().total;
        self.limit.store(limit.unwrap_or(total / 2), Ordering::SeqCst);
        self.reserve.store(reserve.unwrap_or_else(|| Memory::default_reserve(total)), Ordering::SeqCst);
        // Pressure by the old reserve may be none by the new one.
        lock(&self.claims).pressed = None;
    }

    /// Takes a share of that many bytes for a standby of the machine. An automatic one that the reserve refuses is prepared
    /// once there is enough free memory.
    ///
    /// # Errors
    /// The share would exceed the limit, or an automatic one would use the reserve. The text contains the numbers.
    pub fn take(self: &Arc<Self>, machine: &str, mode: Standby, bytes: u64) -> Result<Share, String> {
        let memory = if mode == Standby::Auto { Memory::now() } else { None };
        let mut claims = lock(&self.claims);
        claims.waiting.remove(machine);
        let refused = self.excess(&claims, bytes, 0).or_else(|| self.shortage(&claims, memory?, bytes, 0));
        if let Some(why) = refused {
            if mode == Standby::Auto {
                claims.waiting.insert(machine.to_owned(), bytes);
                self.woken.notify_all();
            }
            return Err(why);
        }
        Ok(self.add(&mut claims, machine, mode, bytes))
    }

    /// Takes a share for a standby that exists already, and therefore needs no free memory.
    ///
    /// # Errors
    /// The share would exceed the limit. The text contains the limit and the memory in use.
    pub fn hold(self: &Arc<Self>, machine: &str, mode: Standby, bytes: u64) -> Result<Share, String> {
        let mut claims = lock(&self.claims);
        self.excess(&claims, bytes, 0).map_or(Ok(()), Err)?;
        Ok(self.add(&mut claims, machine, mode, bytes))
    }

    fn add(self: &Arc<Self>, claims: &mut Claims, machine: &str, mode: Standby, bytes: u64) -> Share {
        claims.last_number += 1;
        let number = claims.last_number;
        let is_automatic = mode == Standby::Auto;
        let held = Held { machine: machine.to_owned(), bytes, is_automatic, is_loading: true, asked_back: 0 };
        claims.held.insert(number, held);
        self.woken.notify_all();
        Share { budget: Arc::clone(self), number, bytes }
    }

    /// Counts a restore of the machine. The machines with the most restores have standbys first.
    pub fn count_restore(&self, machine: &str) {
        let mut claims = lock(&self.claims);
        *claims.restores.entry(machine.to_owned()).or_default() += 1;
        // Its next preparation asks again.
        claims.waiting.remove(machine);
    }

    /// Describes how a standby of that size would exceed the limit, if it would once others have given `given` bytes back.
    pub(crate) fn excess(&self, claims: &Claims, bytes: u64, given: u64) -> Option<String> {
        let (used, limit) = (claims.used().saturating_sub(given), self.limit.load(Ordering::SeqCst));
        (used.saturating_add(bytes) > limit).then(|| {
            format!(
                "a standby would need {} of memory, and {} of the {} for standbys are in use (standby_memory_limit)",
                format_bytes(bytes),
                format_bytes(used),
                format_bytes(limit)
            )
        })
    }

    /// Describes the lack of free memory for an automatic standby of that size, if there is one once others have given
    /// `given` bytes back.
    pub(crate) fn shortage(&self, claims: &Claims, memory: Memory, bytes: u64, given: u64) -> Option<String> {
        let reserve = self.reserve.load(Ordering::SeqCst);
        let free = memory.available.saturating_sub(claims.loading()).saturating_add(given);
        (free < bytes.saturating_add(reserve)).then(|| {
            format!(
                "a standby would need {} of memory, {} are free, and {} stay free (standby_memory_reserve)",
                format_bytes(bytes),
                format_bytes(free),
                format_bytes(reserve)
            )
        })
    }
}

impl Claims {
    fn used(&self) -> u64 {
        self.held.values().map(|held| held.bytes).sum()
    }

    /// Returns the memory that standbys will have taken once they are loaded, in bytes.
    fn loading(&self) -> u64 {
        self.held.values().filter(|held| held.is_loading).map(|held| held.bytes).sum()
    }

    pub(crate) fn restores_of(&self, machine: &str) -> u64 {
        self.restores.get(machine).copied().unwrap_or(0)
    }
}

impl Share {
    /// Returns the size of the share, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sets the size to the memory that the loaded standby holds, which is only known afterwards.
    pub fn set_actual(&mut self, bytes: u64) {
        if let Some(held) = lock(&self.budget.claims).held.get_mut(&self.number) {
            (held.bytes, held.is_loading) = (bytes, false);
        }
        self.bytes = bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        lock(&self.budget.claims).held.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_refuses_a_share_when_the_limit_is_reached() {
        let budget = Budget::new(Some(100 << 20), Some(u64::MAX));
        let take = |mib: u64| budget.take("m", Standby::On, mib << 20);
        let mut first = take(60).unwrap();
        let refused = take(50).unwrap_err();
        assert!(refused.contains("50 MiB") && refused.contains("60 MiB of the 100 MiB"), "{refused}");
        first.set_actual(20 << 20);
        let second = take(50).unwrap();
        drop((first, second));
        let all = take(100).unwrap();
        assert_eq!(all.bytes(), 100 << 20);
        budget.set_limits(Some(50 << 20), None);
        assert!(take(1).unwrap_err().contains("100 MiB of the 50 MiB"));
        drop(all);
        assert!(take(50).is_ok());
        assert!(Budget::new(None, None).take("m", Standby::On, 1 << 20).is_ok());
    }

    #[test]
    fn budget_refuses_an_automatic_share_when_too_little_memory_is_free() {
        let budget = Budget::new(Some(1 << 40), Some(1 << 50));
        let refused = budget.take("m", Standby::Auto, 1 << 20).unwrap_err();
        assert!(
            refused.contains("1 MiB of memory") && refused.contains("standby_memory_reserve"),
            "{refused}"
        );
        assert!(budget.hold("m", Standby::Auto, 1 << 20).is_ok(), "it has its memory already");
        budget.set_limits(Some(1 << 40), Some(0));
        assert!(budget.take("m", Standby::Auto, 1 << 20).is_ok());
    }

    #[test]
    fn budget_counts_the_memory_of_standbys_that_are_being_loaded() {
        let budget = Budget::new(Some(1 << 40), Some(10));
        let memory = Memory { available: 100, ..Memory::default() };
        let shortage = |bytes| budget.shortage(&lock(&budget.claims), memory, bytes, 0);
        let mut share = budget.take("m", Standby::On, 50).unwrap();
        assert!(shortage(40).is_none() && shortage(41).is_some());
        share.set_actual(70);
        assert!(shortage(90).is_none() && shortage(91).is_some(), "what is loaded is not available any more");
    }
}
