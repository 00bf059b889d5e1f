//! One machine in memory.
//!
//! A real plugin waits for its hypervisor's confirmation where this one waits out a delay; the
//! shape is the same: look at the state, act, wait until the deadline at most, report what happens
//! by itself.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Host, Readiness, Ready, Result, State};

use crate::config::{Action, Fault, OwnKeys};

pub struct Machine {
    name: String,
    keys: OwnKeys,
    host: Host,
    now: Mutex<Now>,
    /// Wakes those who wait for the end of a run, or of a preparation.
    ended: Condvar,
}

struct Now {
    run: Option<Run>,
    /// Numbers the runs, so that the end of an old one cannot be taken for that of a new one.
    runs: u64,
    faults_left: Option<u32>,
    /// What the next restore will find, if it has been seen to.
    prepared: Prepared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prepared {
    No,
    UnderWay,
    Yes,
}

struct Run {
    number: u64,
    /// The counter's value when the run began.
    counter: u32,
    since: Instant,
}

impl Machine {
    pub fn new(name: String, keys: OwnKeys, host: Host) -> Self {
        let now = Now { run: None, runs: 0, faults_left: keys.fault_times, prepared: Prepared::No };
        Machine { name, keys, host, now: Mutex::new(now), ended: Condvar::new() }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn state(&self, deadline: Deadline) -> Result<State> {
        self.wait_out(Action::State, deadline)?;
        if self.fault(Action::State).is_some() {
            return Err(Error::failed("configured to fail").machine(&self.name));
        }
        Ok(self.current())
    }

    pub fn start(self: &Arc<Self>, action: Action, deadline: Deadline) -> Result<()> {
        if self.current() != State::Poweroff {
            return Err(Error::unexpected_state("the machine is running, and a start needs it powered off")
                .machine(&self.name)
                .advice("Stop it first"));
        }
        let prepared = self.unprepare() && action == Action::RestoreStart;
        if !prepared && self.suffer(action, deadline)? == Some(Fault::Lie) {
            return Ok(());
        }
        let mut now = self.lock();
        now.runs += 1;
        let number = now.runs;
        let counter = if action == Action::RestoreStart { self.keys.snapshot } else { 0 };
        now.run = Some(Run { number, counter, since: Instant::now() });
        drop(now);
        tracing::debug!(machine = self.name, run = number, "in memory and running");
        self.die_later(number);
        Ok(())
    }

    pub fn stop(&self, action: Action, deadline: Deadline) -> Result<()> {
        if self.current() == State::Poweroff {
            self.unprepare();
            return Err(Error::state_reached("the machine is powered off already").machine(&self.name));
        }
        if self.suffer(action, deadline)? == Some(Fault::Lie) {
            return Ok(());
        }
        self.forget();
        Ok(())
    }

    /// Does what the next restore will need. A stop that comes meanwhile ends it.
    pub fn prepare(&self, deadline: Deadline) -> Result<()> {
        if self.current() != State::Poweroff {
            return Err(Error::unexpected_state("the machine is running")
                .machine(&self.name)
                .advice("Stop it first"));
        }
        if self.fault(Action::Prepare).is_some() {
            return Err(Error::failed("configured to fail").machine(&self.name));
        }
        let delay = self.delay(Action::Prepare).min(deadline.remaining());
        let mut now = self.lock();
        now.prepared = Prepared::UnderWay;
        let goes_on = |now: &mut Now| now.prepared == Prepared::UnderWay;
        let waited = self.ended.wait_timeout_while(now, delay, goes_on);
        let (mut now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !goes_on(&mut now) {
            return Err(Error::failed("preparing was given up for a stop").machine(&self.name));
        }
        now.prepared = Prepared::Yes;
        drop(now);
        self.host.ready(&self.name, &Ready { how: Readiness::Standby, ..Ready::default() });
        Ok(())
    }

    /// Lets go of what was prepared; tells whether there was anything.
    fn unprepare(&self) -> bool {
        let mut now = self.lock();
        let before = std::mem::replace(&mut now.prepared, Prepared::No);
        drop(now);
        self.ended.notify_all();
        if before == Prepared::Yes {
            self.host.ready(&self.name, &Ready::default());
        }
        before == Prepared::Yes
    }

    /// Writes the counter, where a real machine would have its memory.
    pub fn dump_memory(&self, path: &Path, deadline: Deadline) -> Result<()> {
        self.suffer(Action::DumpMemory, deadline)?;
        let counter = self.counter()?;
        self.host.progress(&self.name, 0.5);
        let written = std::fs::write(path, format!("counter {counter}\n"));
        written.map_err(|error| Error::io("write the memory dump to", path, &error).machine(&self.name))?;
        self.host.progress(&self.name, 1.0);
        Ok(())
    }

    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        self.suffer(Action::Screenshot, deadline)?;
        self.counter()?;
        let written = std::fs::write(path, ONE_PIXEL);
        written.map_err(|error| Error::io("write the screenshot to", path, &error).machine(&self.name))
    }

    /// Ends the run, if there is one.
    pub fn forget(&self) {
        self.lock().run = None;
        self.ended.notify_all();
    }

    fn counter(&self) -> Result<u32> {
        let now = self.lock();
        let run = now.run.as_ref().ok_or_else(|| {
            Error::unexpected_state("the machine is powered off").machine(&self.name).advice("Start it first")
        })?;
        let ticks = u32::try_from(run.since.elapsed().as_millis() / 50).unwrap_or(u32::MAX);
        Ok(run.counter.saturating_add(1).saturating_add(ticks))
    }

    fn current(&self) -> State {
        if self.lock().run.is_some() { State::Running } else { State::Poweroff }
    }

    fn wait_out(&self, action: Action, deadline: Deadline) -> Result<()> {
        thread::sleep(self.delay(action).min(deadline.remaining()));
        deadline.check("the configured delay").map_err(|error| error.machine(&self.name))
    }

    fn delay(&self, action: Action) -> Duration {
        Duration::from_millis(self.keys.delays_ms.get(&action).copied().unwrap_or(0))
    }

    /// Waits out the configured delay, then does what is configured to go wrong.
    fn suffer(&self, action: Action, deadline: Deadline) -> Result<Option<Fault>> {
        self.wait_out(action, deadline)?;
        let fault = self.fault(action);
        match fault {
            None | Some(Fault::Lie) => Ok(fault),
            Some(Fault::Fail) => Err(Error::failed("configured to fail").machine(&self.name)),
            Some(Fault::Panic) => panic_as_configured(),
            Some(Fault::Hang) => {
                thread::sleep(Duration::from_secs(600));
                Err(Error::failed("hung as configured").machine(&self.name))
            }
            Some(Fault::Timeout) => {
                thread::sleep(deadline.remaining());
                Err(deadline.timeout("something that was configured never to happen").machine(&self.name))
            }
        }
    }

    fn fault(&self, action: Action) -> Option<Fault> {
        let fault = self.keys.faults.get(&action).copied()?;
        let mut now = self.lock();
        match &mut now.faults_left {
            None => Some(fault),
            Some(0) => None,
            Some(left) => {
                *left -= 1;
                Some(fault)
            }
        }
    }

    /// The guest that powers itself off: reported at once, as every plugin must.
    fn die_later(self: &Arc<Self>, number: u64) {
        let Some(after) = self.keys.dies_after_ms else { return };
        let machine = Arc::clone(self);
        thread::spawn(move || {
            if machine.die(number, Duration::from_millis(after)) {
                machine.host.state_changed(&machine.name, State::Poweroff, "the machine powered itself off");
            }
        });
    }

    /// Ends that run after a time; false if it has ended before.
    fn die(&self, number: u64, after: Duration) -> bool {
        let alive = |now: &mut Now| now.run.as_ref().is_some_and(|run| run.number == number);
        let waited = self.ended.wait_timeout_while(self.lock(), after, alive);
        let (mut now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let dies = alive(&mut now);
        if dies {
            now.run = None;
        }
        dies
    }

    /// A panic while it is held leaves the data whole, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[allow(clippy::panic)] // The one panic that is wanted.
fn panic_as_configured() -> ! {
    panic!("configured to panic")
}

/// A PNG of one black pixel.
const ONE_PIXEL: &[u8] = &[
    0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a, 0, 0, 0, 13, b'I', b'H', b'D', b'R', 0, 0, 0, 1, 0, 0, 0,
    1, 8, 0, 0, 0, 0, 0x3a, 0x7e, 0x9b, 0x55, 0, 0, 0, 10, b'I', b'D', b'A', b'T', 0x78, 0x9c, 0x63, 0x60, 0,
    0, 0, 2, 0, 1, 0x48, 0xaf, 0xa4, 0x71, 0, 0, 0, 0, b'I', b'E', b'N', b'D', 0xae, 0x42, 0x60, 0x82,
];

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;

    fn machine(faults: &[(Action, Fault)]) -> Arc<Machine> {
        let keys = OwnKeys {
            label: "m".into(),
            snapshot: 7,
            delays_ms: Default::default(),
            faults: faults.iter().copied().collect(),
            fault_times: Some(1),
            dies_after_ms: None,
        };
        Arc::new(Machine::new("m".into(), keys, Host::detached()))
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    #[test]
    fn a_restore_goes_on_from_the_snapshot() {
        let machine = machine(&[]);
        machine.start(Action::RestoreStart, soon()).unwrap();
        assert!(machine.counter().unwrap() >= 8);
        machine.stop(Action::Stop, soon()).unwrap();
        machine.start(Action::NorestoreStart, soon()).unwrap();
        assert!(machine.counter().unwrap() < 7);
    }

    #[test]
    fn a_fault_shows_as_often_as_configured() {
        let machine = machine(&[(Action::RestoreStart, Fault::Fail)]);
        let error = machine.start(Action::RestoreStart, soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Failed);
        machine.start(Action::RestoreStart, soon()).unwrap();
        assert_eq!(machine.state(soon()).unwrap(), State::Running);
    }

    #[test]
    fn what_is_prepared_is_started_without_delay_and_once() {
        let machine = machine(&[(Action::RestoreStart, Fault::Fail)]);
        machine.prepare(soon()).unwrap();
        machine.start(Action::RestoreStart, soon()).unwrap();
        assert_eq!(machine.prepare(soon()).unwrap_err().kind(), ErrorKind::UnexpectedState);
        machine.stop(Action::Stop, soon()).unwrap();
        assert!(machine.start(Action::RestoreStart, soon()).is_err());
    }

    #[test]
    fn an_old_run_cannot_end_a_new_one() {
        let machine = machine(&[]);
        machine.start(Action::RestoreStart, soon()).unwrap();
        machine.forget();
        machine.start(Action::RestoreStart, soon()).unwrap();
        assert!(!machine.die(1, Duration::ZERO));
        assert!(machine.die(2, Duration::ZERO));
    }
}
