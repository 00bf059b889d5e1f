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

use crate::prepare::Identity;
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
    /// The identity of the machine when its network was opened, for the restore that follows.
    pub identity: Option<Identity>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prepare::identity_of_a_test;
    use crate::run::fake_qemu::{FakeQemu, soon};
    use crate::run::start_error::Stage;
    use machinery::{Error, ErrorKind};
    use machinery_backend::{Operation, Work};
    use std::time::Duration;

    fn standby(qemu: &FakeQemu) -> Box<Standby> {
        Box::new(Standby::new(Arc::clone(&qemu.run), identity_of_a_test(qemu.folder.path()), None, 7))
    }

    #[test]
    fn machine_is_on_until_its_run_ends() {
        let qemu = FakeQemu::new();
        let mut state = MachineState::default();
        assert!(state.running().is_none());
        state.run = Some(Arc::clone(&qemu.run));
        assert!(state.running().is_some_and(|run| Arc::ptr_eq(&run, &qemu.run)));
        qemu.end();
        assert!(state.running().is_none());
    }

    #[test]
    fn standby_is_taken_when_the_machine_is_off() {
        let (qemu, other) = (FakeQemu::new(), FakeQemu::new());
        let mut state = MachineState { run: Some(Arc::clone(&qemu.run)), ..MachineState::default() };
        state.standby = Some(standby(&other));
        assert_eq!(state.take_standby().err().unwrap().kind(), ErrorKind::UnexpectedState);
        qemu.end();
        assert_eq!(state.take_standby().unwrap().unwrap().memory(), 7);
        assert!(state.run.is_none() && state.take_standby().unwrap().is_none());
    }

    #[test]
    fn machine_is_on_after_an_operation_whose_qemu_does_not_end() {
        let qemu = FakeQemu::new();
        let work: Arc<Work<MachineState>> = Work::new(MachineState::default());
        let (operation, ()) = work.begin(Operation::Stopping, soon(), |_| Ok(())).unwrap();
        let has_run = || work.lock().run.is_some();
        finish(&operation, Ok(Some(Arc::clone(&qemu.run)))).unwrap();
        assert!(has_run());
        finish(&operation, Ok(None)).unwrap();
        assert!(!has_run());
        let still_running = Some(Arc::clone(&qemu.run));
        let failed = StartError { error: Error::failed("it hangs"), at: Stage::Run, still_running };
        assert_eq!(finish(&operation, Err(failed)).unwrap_err().reason(), "it hangs");
        assert!(has_run());
    }

    #[test]
    fn cancellation_ends_the_run_of_its_operation() {
        let qemu = FakeQemu::new();
        let work: Arc<Work<MachineState>> = Work::new(MachineState::default());
        let (operation, ()) = work.begin(Operation::Preparing, soon(), |_| Ok(())).unwrap();
        end_when_cancelled(&operation, &qemu.run);
        assert!(operation.lock().begun.upgrade().is_some_and(|run| Arc::ptr_eq(&run, &qemu.run)));
        assert!(!qemu.run.process().wait(Duration::ZERO));
        work.cancel_preparation();
        assert!(qemu.run.process().wait(Duration::from_secs(30)));
    }
}
