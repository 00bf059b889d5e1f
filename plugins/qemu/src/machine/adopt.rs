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
use super::state::{MachineOperation, finish};
use crate::console::kind_of;
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
        let mut overlays = Overlays::adopt(&record.overlays);
        overlays.set_keep(self.files().keep_disk);
        let parts = Parts {
            machine: self.name().to_owned(),
            version: record.version,
            overlays,
            writes: record.writes.clone(),
            sockets: record.sockets.clone(),
            cgroup: self.jail.adopted_cgroup(&self.policy()),
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
            self.readiness.set_instant(template.disk);
        }
        let share = self.shared.budget.take(memory).map_err(Error::environment)?;
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
        let (_leaving, standby) =
            self.work.begin(Operation::Discarding, deadline, |state| Ok(state.standby.take()))?;
        standby.into_iter().for_each(|standby| standby.leave());
        Ok(())
    }
}
