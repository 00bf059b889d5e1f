//! The state of one machine: its run, and its standby. The operation under way is in the
//! [`Work`](machinery_backend::Work) around them.
//!
//! ```text
//!   run │ standby │ the machine is
//!   ────┼─────────┼───────────────────────────────────────────────
//!    –  │    –    │ off
//!    –  │   yes   │ off for the host, and a restore resumes the standby
//!   yes │    –    │ on; also after a failed action whose QEMU does not end
//! ```
//!
//! An operation takes the standby out, and puts one in again or a run in its place.

use std::sync::{Arc, Weak};

use machinery::Result;
use machinery_backend::{UnderWay, refuse};

use crate::run::Run;
use crate::run::start_error::StartError;
use crate::standby::Standby;

/// The run and the standby of a machine.
#[derive(Default)]
pub struct MachineState {
    /// The run. It may have ended by itself.
    pub run: Option<Arc<Run>>,
    /// The run of the operation under way, once it exists.
    pub begun: Weak<Run>,
    pub standby: Option<Box<Standby>>,
}

impl MachineState {
    /// Returns the run, if the machine is on.
    pub fn running(&self) -> Option<Arc<Run>> {
        self.run.clone().filter(|run| !run.has_ended())
    }

    /// Takes the standby of a machine that is off.
    ///
    /// # Errors
    /// The machine is on.
    pub fn take_standby(&mut self) -> Result<Option<Box<Standby>>> {
        if self.running().is_some() {
            return Err(refuse::not_off());
        }
        self.run = None;
        Ok(self.standby.take())
    }
}

/// An operation on a machine, until it is dropped.
pub type MachineOperation = UnderWay<MachineState>;

/// Ends an operation in which QEMU was started or a standby was ended. A QEMU that does not end still has the disk and
/// the socket, so the machine is on then.
pub fn finish(operation: &MachineOperation, outcome: Result<Option<Arc<Run>>, StartError>) -> Result<()> {
    let (run, outcome) = match outcome {
        Ok(run) => (run, Ok(())),
        Err(StartError { error, still_running, .. }) => (still_running, Err(error)),
    };
    operation.lock().run = run;
    outcome
}

/// Has a cancellation of the operation end this run.
pub fn end_when_cancelled(operation: &MachineOperation, run: &Arc<Run>) {
    let begun = Arc::downgrade(run);
    operation.lock().begun = Weak::clone(&begun);
    operation.cancellation().on_cancel(move || begun.upgrade().iter().for_each(|run| run.terminate()));
}
