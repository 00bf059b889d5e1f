//! The keeper of the automatic standbys: a thread that looks at the memory, gives standbys back and asks for new ones.
//!
//! ```text
//!          ┌─ pressure ─────────────────────▶ the standby with the fewest restores is given back
//!  look ───┼─ calm, a waiting one fits ─────▶ the host prepares it
//!  (1 s)   └─ calm, it would fit without the standbys of machines with
//!             far fewer restores ───────────▶ the least restored of these is given back
//! ```
//!
//! Without an automatic standby, and without a machine that waits for one, the thread sleeps: an idle host needs no processor.
//!
//! Pressure is a lack of free memory, or processes that wait for memory while little is free. Waits alone are none: the
//! page cache causes them on a computer that reads much, and a standby less would not end them.

use std::cmp::Reverse;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use machinery::Deadline;

use crate::budget::{Budget, Claims, Held, Memory};
use crate::sync::{lock, wait_while};

/// The time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// The part of the time that a process may wait for memory: 1 of that many.
const STALL_PART: u32 = 10;
/// The time without pressure before a standby is made again.
const CALM: Duration = Duration::from_secs(30);

/// The keeper's step after a look.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Ends the standby of that machine, for that reason.
    GiveBack(String, &'static str),
    /// Asks the host to prepare that machine.
    Ask(String),
}

/// The machines, as the keeper changes them.
pub trait Standbys: Send + 'static {
    /// Ends the machine's standby, for that reason.
    fn give_back(&self, machine: &str, why: &str);
    /// Asks the host to prepare the machine, for that reason.
    fn ask(&self, machine: &str, why: &str);
}

/// The thread, which ends when this value is dropped.
#[derive(Debug)]
pub struct Keeper(Arc<Budget>);

impl Keeper {
    /// Starts the thread; `None` if the computer has no thread for it, so that nothing is given back.
    pub fn start(budget: Arc<Budget>, standbys: impl Standbys) -> Option<Keeper> {
        let keeper = Keeper(Arc::clone(&budget));
        let keep = move || {
            while budget.wait_for_look() {
                budget.keep(&standbys);
            }
        };
        let started = thread::Builder::new().name("standbys".to_owned()).spawn(keep);
        started.inspect_err(|error| tracing::error!(%error, "automatic standbys are not given back")).ok()?;
        Some(keeper)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        lock(&self.0.claims).is_unkept = true;
        self.0.woken.notify_all();
    }
}

impl Budget {
    /// Waits until the keeper has to look at the memory; false if it has to end.
    fn wait_for_look(&self) -> bool {
        let is_idle = |claims: &mut Claims| !claims.is_unkept && !claims.need_looks();
        let claims = self.woken.wait_while(lock(&self.claims), is_idle);
        let claims = claims.unwrap_or_else(PoisonError::into_inner);
        let next = Deadline::after(INTERVAL);
        !wait_while(&self.woken, claims, next, |claims| !claims.is_unkept).is_unkept
    }

    fn keep(&self, standbys: &impl Standbys) {
        let Some(memory) = Memory::now() else { return };
        // The claims are free again while the standby ends, which returns its share.
        let step = self.look(&mut lock(&self.claims), memory, Instant::now());
        match step {
            Some(Step::GiveBack(machine, why)) => standbys.give_back(&machine, why),
            Some(Step::Ask(machine)) => standbys.ask(&machine, "there is free memory for its standby"),
            None => {}
        }
    }

    fn look(&self, claims: &mut Claims, memory: Memory, now: Instant) -> Option<Step> {
        if self.is_under_pressure(claims, memory, now) {
            claims.pressed = Some(now);
            return claims.give_back_least(u64::MAX, "the computer needs its memory");
        }
        if claims.pressed.is_some_and(|pressed| now - pressed < CALM) {
            return None;
        }
        claims
            .most_wanted()
            .into_iter()
            .find_map(|(machine, bytes)| self.serve(claims, memory, machine, bytes))
    }

    /// Returns the step that helps a waiting machine, if there is one.
    fn serve(&self, claims: &mut Claims, memory: Memory, machine: String, bytes: u64) -> Option<Step> {
        let is_refused = |claims: &Claims, given| {
            self.excess(claims, bytes, given)
                .or_else(|| self.shortage(claims, memory, bytes, given))
                .is_some()
        };
        if !is_refused(claims, 0) {
            claims.waiting.remove(&machine);
            return Some(Step::Ask(machine));
        }
        // Clearly fewer, so that two machines do not take turns.
        let fewer = claims.restores_of(&machine) / 2;
        let given = claims.loaded(fewer).map(|(_, held)| held.bytes).sum();
        if is_refused(claims, given) {
            return None;
        }
        claims.give_back_least(fewer, "another machine with more restores needs its memory")
    }

    fn is_under_pressure(&self, claims: &mut Claims, memory: Memory, now: Instant) -> bool {
        let reserve = self.reserve.load(Ordering::SeqCst);
        let stalls = claims.seen.replace((now, memory)).is_some_and(|(then, before)| {
            memory.stalled.saturating_sub(before.stalled) * STALL_PART > now - then
        });
        memory.available < reserve / 2 || stalls && memory.available < reserve.saturating_mul(2)
    }
}

impl Claims {
    fn need_looks(&self) -> bool {
        !self.waiting.is_empty() || self.held.values().any(|held| held.is_automatic)
    }

    /// Returns the waiting machines and the memory that each needs, the one with the most restores first.
    fn most_wanted(&self) -> Vec<(String, u64)> {
        let mut waiting: Vec<_> = self.waiting.iter().map(|(name, bytes)| (name.clone(), *bytes)).collect();
        waiting.sort_by_key(|(machine, _)| Reverse(self.restores_of(machine)));
        waiting
    }

    /// Returns the numbers of the automatic standbys that are loaded, of machines with fewer restores than that.
    fn loaded(&self, fewer_than: u64) -> impl Iterator<Item = (u64, &Held)> {
        let held = self.held.iter().map(|(number, held)| (*number, held));
        held.filter(move |(_, held)| {
            held.is_automatic && !held.is_loading && self.restores_of(&held.machine) < fewer_than
        })
    }

    /// Gives back the automatic standby with the fewest restores, if they are fewer than that. Its machine waits then.
    fn give_back_least(&mut self, fewer_than: u64, why: &'static str) -> Option<Step> {
        let order = |(_, held): &(u64, &Held)| (held.asked_back, self.restores_of(&held.machine));
        let (number, _) = self.loaded(fewer_than).min_by_key(order)?;
        let held = self.held.get_mut(&number)?;
        held.asked_back += 1;
        self.waiting.insert(held.machine.clone(), held.bytes);
        Some(Step::GiveBack(held.machine.clone(), why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Share, Standby};

    const RESERVE: u64 = 100;

    struct Lab {
        budget: Arc<Budget>,
        now: Instant,
        stalled: Duration,
    }

    impl Lab {
        fn new() -> Lab {
            let budget = Budget::new(Some(1 << 40), Some(0));
            Lab { budget, now: Instant::now(), stalled: Duration::ZERO }
        }

        /// Returns loaded standbys of these machines, which had that many restores. The reserve holds from then on.
        fn standbys(&self, machines: &[(&str, u64)]) -> Vec<Share> {
            let share = |(machine, restores): &(&str, u64)| {
                (0..*restores).for_each(|_| self.budget.count_restore(machine));
                let mut share = self.budget.take(machine, Standby::Auto, 10).unwrap();
                share.set_actual(10);
                share
            };
            let shares = machines.iter().map(share).collect();
            self.budget.set_limits(Some(1 << 40), Some(RESERVE));
            shares
        }

        /// Makes the machine wait for a standby of that many bytes.
        fn wait(&self, machine: &str, restores: u64, bytes: u64) {
            (0..restores).for_each(|_| self.budget.count_restore(machine));
            lock(&self.budget.claims).waiting.insert(machine.to_owned(), bytes);
        }

        fn look_after(&mut self, time: Duration, available: u64) -> Option<Step> {
            self.now += time;
            let memory = Memory { total: 1000, available, stalled: self.stalled };
            self.budget.look(&mut lock(&self.budget.claims), memory, self.now)
        }

        fn look(&mut self, available: u64) -> Option<Step> {
            self.look_after(INTERVAL, available)
        }
    }

    fn machine_of(step: Option<Step>) -> Option<String> {
        step.map(|step| match step {
            Step::GiveBack(machine, _) => format!("-{machine}"),
            Step::Ask(machine) => format!("+{machine}"),
        })
    }

    #[test]
    fn least_restored_machine_gives_back_first_when_memory_is_short() {
        let mut lab = Lab::new();
        let mut shares = lab.standbys(&[("often", 5), ("seldom", 1), ("never", 0)]);
        assert_eq!(lab.look(RESERVE / 2), None);
        for machine in ["-never", "-seldom", "-often"] {
            assert_eq!(machine_of(lab.look(RESERVE / 2 - 1)).as_deref(), Some(machine));
            shares.pop();
        }
        assert_eq!(lab.look(0), None);
    }

    #[test]
    fn standby_of_an_operators_choice_is_kept_when_memory_is_short() {
        let mut lab = Lab::new();
        let _share = lab.budget.take("m", Standby::On, 10).unwrap();
        lab.budget.set_limits(None, Some(RESERVE));
        assert_eq!(lab.look(0), None);
    }

    #[test]
    fn machine_waits_for_calm_when_its_standby_was_given_back() {
        let mut lab = Lab::new();
        let shares = lab.standbys(&[("m", 0)]);
        assert_eq!(machine_of(lab.look(0)).as_deref(), Some("-m"));
        drop(shares);
        assert_eq!(lab.look(1000), None);
        assert_eq!(lab.look_after(CALM, RESERVE + 9), None, "there is too little memory");
        assert_eq!(machine_of(lab.look(RESERVE + 10)).as_deref(), Some("+m"));
        assert_eq!(lab.look(1000), None, "it is asked once");
    }

    #[test]
    fn most_restored_machine_is_prepared_first_when_several_wait() {
        let mut lab = Lab::new();
        drop(lab.standbys(&[]));
        lab.wait("seldom", 1, 10);
        lab.wait("often", 3, 20);
        lab.wait("never", 9, 1 << 41);
        for machine in ["+often", "+seldom"] {
            assert_eq!(machine_of(lab.look(RESERVE + 20)).as_deref(), Some(machine));
        }
        assert_eq!(lab.look(1 << 42), None, "a standby larger than the limit helps nobody");
    }

    #[test]
    fn standby_gives_way_when_a_waiting_machine_has_twice_its_restores() {
        let mut lab = Lab::new();
        let shares = lab.standbys(&[("standby", 3)]);
        lab.wait("waiting", 7, 10);
        assert_eq!(lab.look(RESERVE), None);
        lab.wait("waiting", 1, 10);
        assert_eq!(machine_of(lab.look(RESERVE)).as_deref(), Some("-standby"));
        drop(shares);
        assert_eq!(machine_of(lab.look(RESERVE + 10)).as_deref(), Some("+waiting"));
    }

    #[test]
    fn standby_is_kept_when_its_memory_is_not_enough_for_the_waiting_machine() {
        let mut lab = Lab::new();
        let _shares = lab.standbys(&[("standby", 0)]);
        lab.wait("large", 9, 100);
        assert_eq!(lab.look(RESERVE + 80), None);
        assert_eq!(machine_of(lab.look(RESERVE + 90)).as_deref(), Some("-standby"));
    }

    #[test]
    fn next_machine_gives_back_when_one_does_not() {
        let mut lab = Lab::new();
        let _shares = lab.standbys(&[("busy", 0), ("other", 1)]);
        for machine in ["-busy", "-other", "-busy"] {
            assert_eq!(machine_of(lab.look(0)).as_deref(), Some(machine));
        }
    }

    #[test]
    fn stalls_are_pressure_only_when_little_memory_is_free() {
        let mut lab = Lab::new();
        let _shares = lab.standbys(&[("m", 0)]);
        assert_eq!(lab.look(1000), None);
        lab.stalled += Duration::from_millis(101);
        assert_eq!(lab.look(2 * RESERVE), None);
        lab.stalled += Duration::from_millis(100);
        assert_eq!(lab.look(2 * RESERVE - 1), None, "it is no longer than a tenth");
        lab.stalled += Duration::from_millis(101);
        assert_eq!(machine_of(lab.look(2 * RESERVE - 1)).as_deref(), Some("-m"));
    }
}
