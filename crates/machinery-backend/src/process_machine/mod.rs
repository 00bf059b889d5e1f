//! A machine that is one process of its hypervisor: while it runs, and while it is a standby.
//!
//! ```text
//!          command ─▶ loading ─▶ loaded ── resume ─────────▶ running
//!             ▲                    │                          │ stop, acpi_stop, or by itself, which is reported
//!             │                  prepare ─▶ standby ─ resume ─▶│
//!             └── the process is reaped, its folder removed ◀──┘
//! ```
//!
//! The author describes the process by [`GuestProcess`]. The process is forgotten in one place only: in `on_end`, when it is
//! reaped and its folder is removed. Each action that ends a process waits for that, so that nothing is left when an action
//! has failed. The reason of a failure has the last lines of the process.
//!
//! The next load ends a process that a killed host has left: it is not adopted, because the pipes of its console have ended
//! with that host.

mod slot;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Host, Result, State};
use machinery_images::FileId;

use crate::budget::Share;
use crate::process::LineKind;
use crate::readiness::ReadinessReport;
use crate::refuse;
use crate::run_folder::RunFolder;
use crate::steps::Steps;
use crate::work::{Operation, UnderWay, Work};

pub use slot::Guest;
use slot::{Current, Phase, Slot};

/// The process of a machine, as its hypervisor runs it.
pub trait GuestProcess: Send + Sync + 'static {
    /// Returns the command of a process that loads the snapshot, or boots without one, and then waits for
    /// [`resume`](GuestProcess::resume). It will run in the folder. Make it with [`machinery::command`].
    ///
    /// # Errors
    /// The files of the run cannot be created.
    fn command(&self, folder: &RunFolder, snapshot: Option<&Path>, deadline: Deadline) -> Result<Command>;

    /// Classifies a line of the console.
    fn kind_of(line: &str) -> LineKind;

    /// Waits until the guest is loaded and paused, by [`wait_for_line`](crate::process::Handle::wait_for_line) or
    /// [`wait_until`](crate::process::Handle::wait_until).
    ///
    /// # Errors
    /// The process ends, or does not load the guest in time.
    fn wait_until_loaded(&self, guest: &Guest, deadline: Deadline) -> Result<()>;

    /// Resumes the guest, and returns once it runs, by [`ask`](crate::process::Handle::ask).
    ///
    /// # Errors
    /// The process ends, or does not resume the guest in time.
    fn resume(&self, guest: &Guest, deadline: Deadline) -> Result<()>;
}

/// The maximum time to resume a standby, after which the snapshot is loaded: many times its duration, and a small part of
/// an action's deadline.
const RESUME_TIMEOUT: Duration = Duration::from_secs(5);

/// A machine that is one process. The methods with the name of an action are those of
/// [`Backend`](crate::Backend).
#[derive(Debug)]
pub struct ProcessMachine<P> {
    slot: Arc<Slot>,
    process: P,
}

impl<P: GuestProcess> ProcessMachine<P> {
    /// Creates the machine of that name, which is off. Its run folders are in the state folder.
    pub fn new(host: &Host, machine: &str, state_dir: &Path, process: P) -> Self {
        let readiness = ReadinessReport::new(host, machine);
        let (host, machine, state_dir) = (host.clone(), machine.to_owned(), state_dir.to_owned());
        let slot = Slot { host, machine, state_dir, readiness, work: Work::new(None) };
        ProcessMachine { slot: Arc::new(slot), process }
    }

    /// Returns the state. A guest whose process is stopped by a signal is paused.
    pub fn state(&self) -> State {
        self.slot.state()
    }

    /// Returns the guest, if the machine runs.
    ///
    /// # Errors
    /// The machine is off.
    pub fn running(&self) -> Result<Arc<Guest>> {
        self.slot.running()
    }

    /// Restores the snapshot, from a standby of it if there is one, or boots without a snapshot. Returns once the guest
    /// runs.
    ///
    /// # Errors
    /// The machine is on. The process ends, or does not load the guest in time; nothing of it is left then.
    pub fn start(&self, snapshot: Option<&Path>, deadline: Deadline) -> Result<()> {
        let (_starting, standby) =
            self.slot.work.begin(Operation::Starting, deadline, |current| match current {
                Some(Current { phase: Phase::Running, .. }) => Err(refuse::not_off()),
                current => {
                    let is_usable = |current: &&Current| snapshot.is_some_and(|of| current.is_standby_of(of));
                    Ok(current.as_ref().filter(is_usable).map(|current| Arc::clone(&current.guest)))
                }
            })?;
        let mut steps = Steps::new(&self.slot.host, &self.slot.machine);
        let resumed =
            standby.map(|standby| self.resume(&standby, &mut steps, deadline.within(RESUME_TIMEOUT)));
        let started = match resumed {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) if deadline.passed() => Err(error),
            failed => {
                if let Some(Err(error)) = failed {
                    let machine = &self.slot.machine;
                    tracing::warn!(machine, %error, "cannot resume the standby: loading the snapshot");
                }
                self.load_and_resume(snapshot, &mut steps, deadline)
            }
        };
        // The standby is used now, or gone.
        self.slot.readiness.report();
        started.inspect_err(|_| self.slot.clean_up())
    }

    fn load_and_resume(&self, snapshot: Option<&Path>, steps: &mut Steps, deadline: Deadline) -> Result<()> {
        self.slot.end_process(|guest| guest.kill(), deadline)?;
        let guest = self.launch(snapshot, deadline)?;
        steps.done("launch");
        self.process.wait_until_loaded(&guest, deadline)?;
        steps.done("load");
        self.resume(&guest, steps, deadline)
    }

    fn resume(&self, guest: &Guest, steps: &mut Steps, deadline: Deadline) -> Result<()> {
        self.process.resume(guest, deadline)?;
        steps.done("resume");
        self.slot.set_phase(Phase::Running, None)
    }

    /// Ends the run, the standby or the preparation.
    ///
    /// # Errors
    /// There was no run: the machine was off already. The process does not end.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        self.slot.work.cancel_preparation();
        let phase = |current: &mut Option<Current>| Ok(current.as_ref().map(|current| current.phase));
        let (_stopping, phase) = self.slot.work.begin(Operation::Stopping, deadline, phase)?;
        self.slot.end_process(|guest| guest.kill(), deadline)?;
        if phase == Some(Phase::Standby) {
            self.slot.readiness.report();
        }
        if phase == Some(Phase::Running) { Ok(()) } else { Err(refuse::off_already()) }
    }

    /// Asks the guest to power itself off, with that function, and waits until the process has ended.
    ///
    /// # Errors
    /// The machine is off already; the guest does not react in time.
    pub fn acpi_stop(&self, press: impl FnOnce(&Guest) -> Result<()>, deadline: Deadline) -> Result<()> {
        let (_stopping, guest) =
            self.slot.work.begin(Operation::Stopping, deadline, |current| match current {
                Some(Current { phase: Phase::Running, guest, .. }) => Ok(Arc::clone(guest)),
                _ => Err(refuse::off_already()),
            })?;
        // A guest that has just ended by itself is what the action wants.
        press(&guest).or_else(|error| if guest.wait(Duration::ZERO) { Ok(()) } else { Err(error) })?;
        self.slot.wait_for_end(deadline, "the guest to power off")
    }

    /// Loads the snapshot, and leaves the guest paused: a standby, which a restore only resumes. `share` takes the memory
    /// for it, or returns why there is no standby. A later restore compares the snapshot's file with that of the standby,
    /// and nothing else: give a snapshot of several files a file that changes with each of them.
    ///
    /// # Errors
    /// The machine is on; the guest is not loaded in time; another action cancels the preparation.
    pub fn prepare(
        &self,
        snapshot: &Path,
        share: impl FnOnce() -> std::result::Result<Share, String>,
        deadline: Deadline,
    ) -> Result<()> {
        let (preparing, is_prepared) =
            self.slot.work.begin(Operation::Preparing, deadline, |current| match current {
                Some(Current { phase: Phase::Running, .. }) => Err(refuse::not_off()),
                current => Ok(current.as_ref().is_some_and(|current| current.is_standby_of(snapshot))),
            })?;
        if is_prepared {
            return Ok(());
        }
        // There may be a standby of an older snapshot.
        self.slot.end_process(|guest| guest.kill(), deadline)?;
        let share = match share() {
            Ok(share) => share,
            Err(why) => {
                self.slot.readiness.set_plain(&why);
                self.slot.readiness.report();
                return Ok(());
            }
        };
        self.load_standby(&preparing, snapshot, share, deadline).map_err(|error| {
            self.slot.clean_up();
            self.slot.readiness.report();
            preparing.cancellation().ensure_wanted().err().unwrap_or(error)
        })
    }

    fn load_standby(
        &self,
        preparing: &UnderWay<Option<Current>>,
        snapshot: &Path,
        mut share: Share,
        deadline: Deadline,
    ) -> Result<()> {
        let mut steps = Steps::new(&self.slot.host, &self.slot.machine);
        let guest = self.launch(Some(snapshot), deadline)?;
        // The cancellation outlives the preparation, and must not hold the descriptors of its guest.
        let cancelled = Arc::downgrade(&guest);
        preparing.cancellation().on_cancel(move || {
            if let Some(guest) = cancelled.upgrade() {
                guest.kill();
            }
        });
        self.process.wait_until_loaded(&guest, deadline)?;
        steps.done("load");
        share.set_actual(guest.memory().unwrap_or(share.bytes()));
        let readiness = self.slot.readiness.with_standby(share.bytes());
        self.slot.set_phase(Phase::Standby, Some(share))?;
        preparing.cancellation().ensure_wanted()?;
        self.slot.readiness.set_plain("");
        self.slot.readiness.report_as(&readiness);
        // Its end may have been reported before its readiness.
        if self.slot.is_standby(&guest) {
            return Ok(());
        }
        Err(Error::failed("the standby has just ended").detail(&guest.last_lines()))
    }

    /// Expects that the machine is off, for a reload. It may have a standby.
    ///
    /// # Errors
    /// The machine is on.
    pub fn ensure_off(&self) -> Result<()> {
        match self.slot.state() {
            State::Poweroff => Ok(()),
            _ => Err(refuse::on_in_reload(&self.slot.machine)),
        }
    }

    /// Cancels a preparation and ends the standby, for a reload.
    ///
    /// # Errors
    /// The process does not end.
    pub fn discard_standby(&self, deadline: Deadline) -> Result<()> {
        match self.stop(deadline) {
            Err(error) if error.kind() == ErrorKind::StateReached => Ok(()),
            ended => ended,
        }
    }

    /// Ends the standby whose memory is needed, and reports that reason. It waits for no other action.
    ///
    /// # Errors
    /// The process does not end; another action is under way.
    pub fn give_standby_back(&self, why: &str, deadline: Deadline) -> Result<()> {
        let is_standby = |current: &mut Option<Current>| {
            Ok(current.as_ref().is_some_and(|current| current.phase == Phase::Standby))
        };
        let now = Deadline::after(Duration::ZERO);
        let (_discarding, is_standby) = self.slot.work.begin(Operation::Discarding, now, is_standby)?;
        if !is_standby {
            return Ok(());
        }
        self.slot.end_process(|guest| guest.kill(), deadline)?;
        self.slot.readiness.set_plain(why);
        self.slot.readiness.report();
        Ok(())
    }

    /// Ends the process of a host that was killed, and removes its folder.
    ///
    /// # Errors
    /// The process does not end; the folder cannot be removed.
    pub fn clear_leftovers(&self) -> Result<()> {
        RunFolder::clear_leftovers(&self.slot.state_dir, &self.slot.machine)
    }

    fn launch(&self, snapshot: Option<&Path>, deadline: Deadline) -> Result<Arc<Guest>> {
        let folder = RunFolder::create(&self.slot.state_dir, &self.slot.machine)?;
        let of = snapshot.and_then(|snapshot| FileId::of(snapshot).ok());
        let command = self.process.command(&folder, snapshot, deadline)?;
        self.slot.launch(command, folder, of, P::kind_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Budget, Standby};
    use crate::sync::lock;
    use machinery::{GUEST_POWERED_OFF, HostServices, LogLevel, LogRecord, RestoreReadiness};
    use std::fs;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;
    use tempfile::TempDir;

    /// A guest that loads, waits for its resumption, and runs until the next command ends it.
    const GUEST: &str = "echo loaded; read a; echo running; read a; exit 0";

    struct Shell(Mutex<String>);

    impl GuestProcess for Shell {
        fn command(&self, _: &RunFolder, snapshot: Option<&Path>, _: Deadline) -> Result<Command> {
            let mut command = machinery::command("/bin/sh");
            command.arg("-c").arg(&*lock(&self.0)).args(snapshot);
            Ok(command)
        }

        fn kind_of(_: &str) -> LineKind {
            LineKind::Other
        }

        fn wait_until_loaded(&self, guest: &Guest, deadline: Deadline) -> Result<()> {
            guest.wait_for_line("loaded", deadline).map(drop)
        }

        fn resume(&self, guest: &Guest, deadline: Deadline) -> Result<()> {
            guest.ask("resume", "running", deadline).map(drop)
        }
    }

    /// Sends each event as text.
    struct Events(Mutex<Sender<String>>);

    impl HostServices for Events {
        fn state_changed(&self, _: &str, state: State, reason: &str) {
            lock(&self.0).send(format!("{}: {reason}", state.as_str())).unwrap();
        }

        fn preparation_invalidated(&self, _: &str, reason: &str) {
            lock(&self.0).send(format!("lost: {reason}")).unwrap();
        }

        fn ready(&self, _: &str, ready: &RestoreReadiness) {
            lock(&self.0).send(format!("{}: {}", ready.mode, ready.reason)).unwrap();
        }

        fn log(&self, _: LogRecord) {}

        fn max_level(&self) -> LogLevel {
            LogLevel::Error
        }

        fn progress(&self, _: &str, _: f64) {}

        fn step(&self, _: &str, _: &str, _: Duration) {}
    }

    struct Lab {
        machine: ProcessMachine<Shell>,
        budget: Arc<Budget>,
        events: Receiver<String>,
        folder: TempDir,
    }

    impl Lab {
        fn new(script: &str) -> Lab {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("snapshot"), "a state").unwrap();
            let (sender, events) = channel();
            let host = Host::new(Arc::new(Events(Mutex::new(sender))));
            let shell = Shell(Mutex::new(script.to_owned()));
            let machine = ProcessMachine::new(&host, "m", &folder.path().join("state"), shell);
            Lab { machine, budget: Budget::new(Some(1 << 40), Some(0)), events, folder }
        }

        fn set_script(&self, script: &str) {
            script.clone_into(&mut lock(&self.machine.process.0));
        }

        fn start(&self) -> Result<()> {
            self.machine.start(Some(&self.folder.path().join("snapshot")), soon())
        }

        fn prepare(&self) -> Result<()> {
            let share = || self.budget.take("m", Standby::On, 1);
            self.machine.prepare(&self.folder.path().join("snapshot"), share, soon())
        }

        fn pid(&self) -> u32 {
            self.machine.slot.work.lock().as_ref().unwrap().guest.pid()
        }

        fn event(&self) -> String {
            self.events.recv_timeout(Duration::from_secs(60)).unwrap()
        }

        /// Asserts that neither a process nor a folder is left.
        #[track_caller]
        fn is_clean(&self) {
            assert_eq!(self.machine.state(), State::Poweroff);
            assert!(self.machine.slot.work.lock().is_none());
            assert_eq!(self.folder.path().join("state").read_dir().unwrap().count(), 0);
        }
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    #[test]
    fn machine_runs_until_it_is_stopped() {
        let lab = Lab::new(GUEST);
        for _ in 0..2 {
            lab.start().unwrap();
            assert_eq!(lab.machine.state(), State::Running);
            assert_eq!(lab.start().unwrap_err().kind(), ErrorKind::UnexpectedState);
            assert!(lab.machine.ensure_off().is_err());
            let guest = lab.machine.running().unwrap();
            assert!(guest.file("").is_dir());
            lab.machine.stop(soon()).unwrap();
            lab.is_clean();
            assert_eq!(lab.machine.stop(soon()).unwrap_err().kind(), ErrorKind::StateReached);
        }
        lab.machine.start(None, soon()).unwrap();
        lab.machine.acpi_stop(|guest| guest.send("off"), soon()).unwrap();
        lab.is_clean();
        let events: Vec<String> = lab.events.try_iter().collect();
        assert_eq!(events, ["plain: "; 3], "an end by an action is no event");
    }

    #[test]
    fn start_fails_with_the_last_words_of_a_process_that_dies_while_loading() {
        let lab = Lab::new("echo the snapshot is damaged >&2; exit 1");
        let text = lab.start().unwrap_err().to_string();
        assert!(text.contains("the snapshot is damaged"), "{text}");
        lab.is_clean();
    }

    #[test]
    fn failed_start_leaves_nothing_when_the_process_hangs() {
        let lab = Lab::new("sleep 600");
        for limit in [0, 30] {
            let late = Deadline::after(Duration::from_millis(limit));
            assert_eq!(lab.machine.start(None, late).unwrap_err().kind(), ErrorKind::Timeout);
            lab.is_clean();
        }
    }

    #[test]
    fn end_that_nobody_has_requested_is_reported_with_its_reason() {
        let lab = Lab::new(GUEST);
        lab.start().unwrap();
        assert_eq!(lab.event(), "plain: ");
        lab.machine.running().unwrap().send("off").unwrap();
        assert_eq!(lab.event(), format!("poweroff: {GUEST_POWERED_OFF}"));
        lab.set_script("echo loaded; read a; echo running; read a; echo a bug >&2; kill -9 $$");
        lab.start().unwrap();
        assert_eq!(lab.event(), "plain: ");
        lab.machine.running().unwrap().send("crash").unwrap();
        assert_eq!(lab.event(), "poweroff: sh was killed by signal 9: running; a bug");
        lab.is_clean();
    }

    #[test]
    fn standby_is_hidden_and_resumed_by_a_restore() {
        let lab = Lab::new(GUEST);
        lab.prepare().unwrap();
        assert_eq!((lab.event().as_str(), lab.machine.state()), ("standby: ", State::Poweroff));
        assert_eq!(lab.machine.ensure_off(), Ok(()));
        assert!(lab.machine.running().is_err());
        let standby = lab.pid();
        lab.prepare().unwrap();
        lab.start().unwrap();
        assert_eq!((lab.pid(), lab.machine.state()), (standby, State::Running));
        assert_eq!(lab.event(), "plain: ");
        assert_eq!(lab.prepare().unwrap_err().kind(), ErrorKind::UnexpectedState);
        lab.budget.set_limits(Some(1), None);
        assert!(lab.budget.take("m", Standby::On, 1).is_ok(), "a run has no share");
    }

    #[test]
    fn standby_is_ended_by_a_stop_which_reports_that_the_machine_was_off() {
        let lab = Lab::new(GUEST);
        lab.prepare().unwrap();
        assert_eq!(lab.machine.stop(soon()).unwrap_err().kind(), ErrorKind::StateReached);
        assert_eq!([lab.event(), lab.event()], ["standby: ", "plain: "]);
        lab.is_clean();
    }

    #[test]
    fn standby_is_given_back_and_a_run_is_not() {
        let lab = Lab::new(GUEST);
        lab.prepare().unwrap();
        lab.machine.give_standby_back("memory is short", soon()).unwrap();
        assert_eq!([lab.event(), lab.event()], ["standby: ", "plain: memory is short"]);
        lab.is_clean();
        lab.start().unwrap();
        lab.machine.give_standby_back("memory is short", soon()).unwrap();
        assert_eq!(lab.machine.state(), State::Running);
        lab.machine.stop(soon()).unwrap();
    }

    #[test]
    fn standby_is_not_used_when_the_start_needs_another_state() {
        let lab = Lab::new(GUEST);
        lab.prepare().unwrap();
        let standby = lab.pid();
        lab.machine.start(None, soon()).unwrap();
        assert_ne!(lab.pid(), standby, "a cold start");
        lab.machine.stop(soon()).unwrap();
        lab.prepare().unwrap();
        let standby = lab.pid();
        fs::write(lab.folder.path().join("snapshot"), "another state").unwrap();
        lab.prepare().unwrap();
        assert_ne!(lab.pid(), standby, "a preparation");
        let standby = lab.pid();
        fs::write(lab.folder.path().join("snapshot"), "one more state").unwrap();
        lab.start().unwrap();
        assert_ne!(lab.pid(), standby, "a restore");
    }

    #[test]
    fn restore_loads_the_snapshot_when_the_standby_dies() {
        let lab = Lab::new("echo loaded; read a; exit 1");
        lab.prepare().unwrap();
        lab.set_script(GUEST);
        lab.start().unwrap();
        assert_eq!(lab.machine.state(), State::Running);
        assert_eq!([lab.event(), lab.event()], ["standby: ", "plain: "]);
    }

    #[test]
    fn lost_standby_is_reported() {
        let lab = Lab::new(GUEST);
        lab.prepare().unwrap();
        assert_eq!(lab.event(), "standby: ");
        let pid = rustix::process::Pid::from_raw(lab.pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        assert_eq!([lab.event(), lab.event()], ["plain: ", "lost: sh was killed by signal 9: loaded"]);
        lab.is_clean();
    }

    #[test]
    fn preparation_ends_early_when_the_machine_is_stopped() {
        let lab = Lab::new("echo loading; sleep 600");
        let machine = &lab.machine;
        let stopped = thread::scope(|scope| {
            let stop = scope.spawn(|| {
                // The stop is for the preparation, so it waits until there is a process.
                while machine.slot.work.lock().is_none() {
                    thread::yield_now();
                }
                machine.stop(soon())
            });
            assert_eq!(lab.prepare().unwrap_err().kind(), ErrorKind::Interrupted);
            stop.join().unwrap()
        });
        assert_eq!(stopped.unwrap_err().kind(), ErrorKind::StateReached);
        lab.is_clean();
    }

    #[test]
    fn machine_has_no_standby_when_there_is_no_memory_for_it() {
        let lab = Lab::new(GUEST);
        lab.budget.set_limits(Some(0), None);
        lab.prepare().unwrap();
        assert!(lab.event().starts_with("plain: a standby would need"));
        assert_eq!(lab.machine.state(), State::Poweroff);
        lab.machine.discard_standby(soon()).unwrap();
    }

    #[test]
    fn guest_whose_process_is_stopped_is_paused() {
        let lab = Lab::new("echo loaded; read a; echo running; kill -STOP $$");
        lab.start().unwrap();
        while lab.machine.state() != State::Paused {
            assert_eq!(lab.machine.state(), State::Running);
        }
        lab.machine.stop(soon()).unwrap();
    }
}
