//! Adopts the run or the standby that an earlier host has left, and leaves them to the next host.
//!
//! ```text
//! record ─▶ its process lives ─▶ its monitor answers ─┬─ the guest was resumed ─▶ the machine is on
//!    │              │                    │            └─ a fresh standby, and memory for it ─▶ standby
//!    └──────────────┴────────────────────┴──────────────── otherwise: ended, everything removed
//! ```
//!
//! The process is recognized by its [identity](machinery_backend::process::ProcessIdentity), which code inside QEMU
//! cannot forge. The monitor's socket lies in a folder where only the host makes sockets, so what answers there is that
//! process, or one that has inherited the socket from it.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, Result, State};
use machinery_backend::process::Process;
use machinery_backend::sync::lock;
use machinery_backend::{Backend, Operation, Overlays};
use qapi::qmp;
use serde::Deserialize;
use serde_json::Value;

use super::base::Machine;
use super::state::{MachineOperation, MachineState, finish};
use crate::console::kind_of;
use crate::isolation::spec_of;
use crate::launch::{QEMU, reconnect};
use crate::run::record::{Progress, Record};
use crate::run::start_error::Stage;
use crate::run::{Parts, Run};
use crate::standby::{Standby, StandbyRecord};
use crate::states::state_of_status;

/// The time that a QEMU has to answer a new host. A busy one answers after its work at hand.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

impl Machine {
    /// Adopts the machine's run, or its standby, and removes everything else that is left of it; returns whether there was
    /// a run.
    ///
    /// # Errors
    /// There was a run that cannot be adopted; it has ended, or is ended.
    pub(super) fn adopt_run(self: &Arc<Self>, deadline: Deadline) -> Result<bool> {
        *lock(&self.leftovers) = Some(Ok(()));
        let (progress, record) = match self.record.read() {
            Some((progress, record)) if progress != Progress::Starting => (progress, record),
            _ => return self.end_what_is_left(),
        };
        let (operation, ()) = self.work.begin(Operation::Starting, deadline, |_| Ok(()))?;
        let adopted = self.connected(&record, deadline);
        let adopted = adopted.and_then(|run| self.continued(&operation, progress, record, run, deadline));
        drop(operation);
        let Err(error) = adopted else { return adopted };
        self.clear_leftovers()?;
        match progress {
            Progress::Running => Err(error),
            Progress::Standby | Progress::Starting => {
                tracing::info!(machine = self.name(), %error, "the standby of an earlier host is not used");
                Ok(false)
            }
        }
    }

    /// Ends a start that was under way, or a run whose record this host cannot read. Returns that there is no run.
    fn end_what_is_left(&self) -> Result<bool> {
        let is_unreadable = self.record.is_of_run();
        self.clear_leftovers()?;
        match is_unreadable {
            true => Err(Error::failed("its record is that of another version, or is damaged")),
            false => Ok(false),
        }
    }

    /// Returns the run of that record, whose monitor answers.
    fn connected(&self, record: &Record, deadline: Deadline) -> Result<Arc<Run>> {
        let process = Process::adopt(&record.process, QEMU, self.name(), kind_of)?;
        let ended = || Error::failed("QEMU has ended while no host watched it");
        let (process, deadline) = (process.ok_or_else(ended)?, deadline.within(ANSWER_TIMEOUT));
        let stream = match reconnect(&self.socket, process.handle(), deadline) {
            Ok(stream) => stream,
            Err(error) => {
                process.end(Duration::ZERO);
                return Err(error);
            }
        };
        if let Some(interface) = &record.interface {
            self.cell.adopt(interface, process.handle().pid(), spec_of(self.files()).as_ref());
        }
        let mut overlays = Overlays::adopt(&record.overlays);
        overlays.set_keep(self.files().keep_disk);
        let parts = Parts {
            machine: self.name().to_owned(),
            version: record.version,
            overlays,
            writes: record.writes.clone(),
            sockets: record.sockets.clone(),
            cgroup: self.jail.adopted_cgroup(&self.policy()),
            tpm: None,
            cell: self.cell.clone(),
            record: self.record.clone(),
        };
        let run = Run::adopt(process, stream, parts, &self.shared.host)?;
        match run.negotiate(deadline) {
            Ok(()) => Ok(run),
            Err(error) => Err(run.fail_start(error, Stage::Run).error),
        }
    }

    /// Makes the run that of the machine, or its standby; returns whether its guest was resumed.
    fn continued(
        &self,
        operation: &MachineOperation,
        progress: Progress,
        record: Record,
        run: Arc<Run>,
        deadline: Deadline,
    ) -> Result<bool> {
        let continued = self.as_it_was(operation, progress, record, &run, deadline);
        continued.or_else(|error| {
            // Waits for the end, so that its cleanup does not meet a start that follows.
            finish(operation, run.end(deadline).map(|()| None))?;
            Err(error)
        })
    }

    fn as_it_was(
        &self,
        operation: &MachineOperation,
        progress: Progress,
        record: Record,
        run: &Arc<Run>,
        deadline: Deadline,
    ) -> Result<bool> {
        let status = run.execute(&qmp::query_status {}, deadline)?;
        let state = state_of_status(status["status"].as_str().unwrap_or(""))?;
        match (progress, state) {
            (Progress::Standby, State::Paused) => {
                let standby = self.standby_of(Arc::clone(run), record.standby)?;
                let readiness = self.readiness.with_standby(standby.memory());
                operation.lock().standby = Some(Box::new(standby));
                self.readiness.report_as(&readiness);
                return Ok(false);
            }
            // The earlier host died between the resumption and its record.
            (Progress::Running, _) | (Progress::Standby, State::Running) => {}
            (_, other) => return Err(Error::unexpected_state(format!("the standby is {other}"))),
        }
        run.set_adopted();
        if run.has_ended() {
            return Err(Error::failed("QEMU has ended as soon as its run was adopted"));
        }
        self.shared.space.watch(run.as_disk_writer());
        operation.lock().run = Some(Arc::clone(run));
        tracing::info!(machine = self.name(), %state, "the run of an earlier host is adopted");
        Ok(true)
    }

    /// Makes a standby of an adopted run.
    ///
    /// # Errors
    /// It is stale, or there is no memory for it.
    fn standby_of(&self, run: Arc<Run>, record: Value) -> Result<Standby> {
        let origin = StandbyRecord::deserialize(&record);
        let StandbyRecord { identity: then, ram, keys, memory } =
            origin.map_err(|error| Error::failed(format!("its record does not have its origin: {error}")))?;
        if keys != self.checksum() {
            return Err(Error::failed("the machine's configuration or its jail has changed"));
        }
        let identity = self.identity()?;
        if let Some(template) = self.template(&identity) {
            self.set_instant(template.disk);
        }
        let share = self
            .shared
            .budget
            .hold(self.name(), self.files().prepare.standby, memory)
            .map_err(Error::environment)?;
        run.set_standby(self.readiness.without_standby(), share, record);
        let standby = Standby::new(run, then, ram, memory);
        match standby.stale_reason(&identity) {
            None => Ok(standby),
            Some(why) => {
                standby.leave();
                Err(Error::failed(why))
            }
        }
    }

    /// Leaves the run and the standby to the next host, and ends a preparation.
    ///
    /// # Errors
    /// The preparation does not end in time.
    pub(super) fn leave(&self, deadline: Deadline) -> Result<()> {
        self.cancel_preparation(deadline);
        let take = |state: &mut MachineState| Ok((state.standby.take(), state.running().is_some()));
        let (_leaving, (standby, is_on)) = self.work.begin(Operation::Discarding, deadline, take)?;
        if standby.is_none() && !is_on {
            self.cell.close(self.name());
        }
        standby.into_iter().for_each(|standby| standby.leave());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    use machinery::{FreeSpaceReserve, Host};
    use machinery_backend::jail::JailMode;
    use machinery_backend::process::ProcessIdentity;
    use machinery_backend::sync::lock;
    use machinery_backend::{Budget, DiskSpace, QemuImg, Standby as StandbyMode};
    use rustix::process::{Pid, Signal, kill_process};
    use tempfile::TempDir;

    use crate::config::MachineFiles;
    use crate::config::tests::machine_in;
    use crate::peers::Peers;
    use crate::prepare::SharedTemplates;
    use crate::run::fake_qemu::{answer, soon};
    use crate::shared::Qemu;
    use crate::version::{Program, Version};

    const MEMORY: u64 = 5 << 20;

    /// A machine, and the QEMU that an earlier host has left: a process that only waits, and a thread at the socket.
    struct Left {
        machine: Arc<Machine>,
        process: ProcessIdentity,
        child: Child,
        /// True once a host has connected to the monitor.
        connected: Arc<AtomicBool>,
        folder: TempDir,
    }

    impl Drop for Left {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    impl Left {
        /// Has a QEMU left whose guest has that status.
        fn new(progress: Progress, status: &'static str) -> Self {
            let left = Left::recorded(progress, |_| ());
            left.serve(status);
            left
        }

        /// Has a QEMU left without a monitor. `change` changes the record of its standby.
        fn recorded(progress: Progress, change: fn(&mut StandbyRecord)) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let machine = machine(folder.path());
            let child = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
            let process = ProcessIdentity::of(Pid::from_child(&child)).unwrap();
            let version = Version::new(7, 2, 0);
            machine.record.begin(&Record::new(process.clone(), version, Vec::new(), Vec::new(), Vec::new()));
            let (identity, keys) = (machine.identity().unwrap(), machine.checksum());
            let mut standby = StandbyRecord { identity, ram: None, keys, memory: MEMORY };
            change(&mut standby);
            match progress {
                Progress::Starting => {}
                Progress::Standby => machine.record.set_standby(serde_json::to_value(&standby).unwrap()),
                Progress::Running => machine.record.set_running(),
            }
            Left { machine, process, child, connected: Arc::default(), folder }
        }

        /// Answers the next host on the monitor's socket.
        fn serve(&self, status: &'static str) {
            let listener = UnixListener::bind(&self.machine.socket).unwrap();
            let (connected, process) = (Arc::clone(&self.connected), Pid::from_child(&self.child));
            std::thread::spawn(move || {
                let (monitor, _) = listener.accept().unwrap();
                connected.store(true, Ordering::SeqCst);
                std::io::Write::write_all(&mut &monitor, b"{\"QMP\": {}}\n").unwrap();
                let kill = || kill_process(process, Signal::KILL).unwrap();
                answer(&monitor, status, kill);
            });
        }

        fn adopt(&self) -> Result<bool> {
            self.machine.adopt_run(soon())
        }

        fn is_alive(&self) -> bool {
            self.process.open().is_some()
        }

        fn progress(&self) -> Option<Progress> {
            self.machine.record.read().map(|(progress, _)| progress)
        }

        fn has_standby(&self) -> bool {
            self.machine.work.lock().standby.is_some()
        }

        fn is_removed(&self) -> bool {
            let nothing = !self.has_standby() && self.machine.work.lock().running().is_none();
            nothing && !self.is_alive() && self.progress().is_none()
        }
    }

    fn machine(folder: &std::path::Path) -> Arc<Machine> {
        let mut files = MachineFiles { jail: JailMode::Off, ..machine_in(folder) };
        files.prepare.instant = false;
        let program = Program::new("/bin/sh".as_ref(), Version::new(7, 2, 0)).unwrap();
        let shared = Qemu {
            qemu_img: QemuImg::new("/bin/sh"),
            program,
            instant_dir: folder.join("templates"),
            state_dir: folder.to_owned(),
            templates: OnceLock::new(),
            shared_templates: SharedTemplates::default(),
            has_cells: AtomicBool::new(false),
            peers: Peers::default(),
            budget: Budget::new(Some(MEMORY), Some(0)),
            space: DiskSpace::new(FreeSpaceReserve::default()),
            host: Host::detached(),
        };
        Machine::new(files, folder, folder, Arc::new(shared))
    }

    #[test]
    fn run_of_an_earlier_host_is_adopted_in_each_state_of_its_guest() {
        for status in ["running", "paused", "suspended"] {
            let left = Left::new(Progress::Running, status);
            assert!(left.adopt().unwrap(), "{status}");
            assert!(left.machine.work.lock().running().is_some() && !left.has_standby());
            assert!(left.is_alive() && left.progress() == Some(Progress::Running));
        }
    }

    #[test]
    fn run_is_ended_when_its_state_is_unknown() {
        let left = Left::new(Progress::Running, "levitating");
        assert!(left.adopt().unwrap_err().to_string().contains("levitating"));
        assert!(left.is_removed());
    }

    #[test]
    fn standby_is_adopted_and_left_to_the_next_host() {
        let left = Left::new(Progress::Standby, "paused");
        assert!(!left.adopt().unwrap());
        assert_eq!(left.machine.work.lock().standby.as_ref().map(|standby| standby.memory()), Some(MEMORY));
        assert!(
            left.machine.shared.budget.take("m", StandbyMode::On, 1).is_err(),
            "it has its share of the memory"
        );
        left.machine.leave(soon()).unwrap();
        assert!(!left.has_standby() && left.is_alive());
        assert_eq!(left.progress(), Some(Progress::Standby));
    }

    #[test]
    fn standby_whose_guest_was_just_resumed_is_adopted_as_a_run() {
        let left = Left::new(Progress::Standby, "running");
        assert!(left.adopt().unwrap());
        assert!(left.machine.work.lock().running().is_some() && !left.has_standby());
        assert_eq!(left.progress(), Some(Progress::Running));
    }

    #[test]
    fn standby_is_ended_when_it_cannot_be_used() {
        let suspended = Left::new(Progress::Standby, "suspended");
        let other_keys = Left::recorded(Progress::Standby, |standby| standby.keys ^= 1);
        let too_large = Left::recorded(Progress::Standby, |standby| standby.memory += 1);
        let stale = Left::recorded(Progress::Standby, |_| ());
        fs::write(stale.folder.path().join("snapshot"), "QEVM again").unwrap();
        for left in [&other_keys, &too_large, &stale] {
            left.serve("paused");
        }
        for left in [suspended, other_keys, too_large, stale] {
            assert!(!left.adopt().unwrap());
            assert!(left.connected.load(Ordering::SeqCst) && left.is_removed());
        }
    }

    #[test]
    fn start_that_was_under_way_is_ended_without_its_monitor() {
        let left = Left::new(Progress::Starting, "paused");
        assert!(!left.adopt().unwrap());
        assert!(left.is_removed() && !left.connected.load(Ordering::SeqCst));
        assert!(!left.adopt().unwrap(), "nothing is left");
        assert!(matches!(*lock(&left.machine.leftovers), Some(Ok(()))));
    }

    #[test]
    fn run_is_not_adopted_when_its_record_is_unreadable_or_its_qemu_has_ended() {
        let damaged = Left::new(Progress::Running, "running");
        fs::write(damaged.folder.path().join("m.run"), "{}").unwrap();
        let error = damaged.adopt().unwrap_err().to_string();
        assert!(error.contains("another version, or is damaged"), "{error}");
        assert!(!damaged.adopt().unwrap(), "it is known once");
        let mut ended = Left::new(Progress::Running, "running");
        ended.child.kill().unwrap();
        ended.child.wait().unwrap();
        assert!(ended.adopt().unwrap_err().to_string().contains("ended while no host watched it"));
        assert!(ended.is_removed());
    }
}
