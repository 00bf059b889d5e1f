//! The state of a machine, as far as the plugin keeps it. libvirt has the state of the domain.

use std::sync::{Arc, Mutex};

use machinery_backend::{Operation, WorkState};

use crate::call::Call;
use crate::foreign::DiskFile;
use crate::standby::StandbyDomain;
use crate::states::StateReport;

/// A machine's state.
#[derive(Default)]
pub struct MachineState {
    /// True if the domain has an own run, as far as is known.
    pub has_run: bool,
    /// The domain's id in the run that an earlier host has left, until it is adopted.
    pub left_run: Option<u32>,
    /// The number of ends of runs that libvirt has reported.
    pub end_count: u64,
    /// True from the start of a run until the event of that start. Until then the event of an end may be of an earlier run.
    pub awaits_start: bool,
    /// The last event of the start under way.
    pub start_event: Option<StateReport>,
    /// A start or a preparation that timed out, until it returns.
    pub abandoned: Option<AbandonedCall>,
    /// The standby for the next restore.
    pub standby: Option<StandbyDomain>,
    /// The disks of the own run's domain, once the domain is marked.
    pub run_disks: Option<Vec<DiskFile>>,
    /// True if libvirt has reported only own runs since the last own run ended.
    pub only_own_runs: bool,
    /// True if the last own run was saved, so that somebody may resume it.
    pub was_saved: bool,
    /// True if the host knows that the machine runs, so that no report is needed.
    pub host_knows_running: bool,
    /// True if the domain was reset since the last operation began.
    pub was_reset: bool,
    /// True if the connection was lost since the last operation began.
    pub connection_lost: bool,
    /// The foreign work that was last logged as the reason not to prepare the machine.
    pub logged_foreign_work: Option<String>,
    /// True if the preparation is postponed until libvirt is back.
    pub is_postponed: bool,
    /// Why no save image is made any more, once one has failed.
    pub image_disabled: Option<String>,
    /// The number of save images whose creation was cancelled.
    pub cancelled_images: u32,
    /// The number of save images in a row that have failed at a restore.
    pub failed_images: u32,
    /// Why the next run writes to the domain's own disk, if it is known to do so.
    pub own_disk: Option<String>,
}

impl MachineState {
    /// Forgets the events of earlier operations: another one begins.
    pub fn forget_events(&mut self) {
        self.start_event = None;
        self.was_reset = false;
        self.connection_lost = false;
    }
}

/// Reports whether the domain is hidden from the host: the machine counts as off, although its domain may be
/// on.
pub fn is_hidden(state: &WorkState<MachineState>) -> bool {
    state.operation().is_hidden()
        || state.standby.is_some()
        || state.abandoned.as_ref().is_some_and(|call| !call.is_start)
}

/// The part of the state that any action changes. Two equal values mean that there was no action between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    pub has_run: bool,
    pub operation: Operation,
    pub end_count: u64,
}

impl Activity {
    pub fn of(state: &WorkState<MachineState>) -> Activity {
        Activity { has_run: state.has_run, operation: state.operation(), end_count: state.end_count }
    }
}

/// A start or a preparation that timed out and is still under way.
#[derive(Clone)]
pub struct AbandonedCall {
    pub call: Arc<Mutex<Call<()>>>,
    pub is_start: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Calls;
    use crate::machine::lab::{MachineLab, soon};

    fn abandoned(is_start: bool) -> Option<AbandonedCall> {
        let call = Calls::default().start(|| Ok(())).unwrap();
        Some(AbandonedCall { call: Arc::new(Mutex::new(call)), is_start })
    }

    #[test]
    fn domain_is_hidden_while_its_next_restore_is_prepared() {
        let lab = MachineLab::new("state-hidden");
        let hidden = || is_hidden(&lab.machine.lock());
        assert!(!hidden());
        for (operation, expected) in [
            (Operation::Starting, false),
            (Operation::Stopping, false),
            (Operation::Preparing, true),
            (Operation::Discarding, true),
        ] {
            let _under_way = lab.machine.begin(operation, soon()).unwrap();
            assert_eq!(hidden(), expected, "{operation:?}");
        }
        lab.machine.lock().abandoned = abandoned(true);
        assert!(!hidden(), "a start that goes on");
        lab.machine.lock().abandoned = abandoned(false);
        assert!(hidden(), "a preparation that goes on");
        lab.machine.lock().abandoned = None;
        lab.prepare();
        assert!(hidden(), "a standby");
    }

    #[test]
    fn operation_begins_without_the_events_of_earlier_ones() {
        let mut state = MachineState {
            start_event: Some((machinery::State::Running, String::new())),
            was_reset: true,
            connection_lost: true,
            ..MachineState::default()
        };
        state.forget_events();
        assert!(state.start_event.is_none() && !state.was_reset && !state.connection_lost);
    }
}
