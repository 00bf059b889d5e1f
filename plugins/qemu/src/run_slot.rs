//! The state of one machine: its run, its standby, or a preparation. Every change happens here.
//!
//! ```text
//!        ┌──────────── stop, end of the run ────────────┐
//!        ▼                                              │
//!  ┌──▶ off ── begin_start ─▶ starting ── finish_start ─▶ on
//!  │     │                       ▲
//!  │     │ begin_prepare         │ begin_start
//!  │     ▼                       │
//!  │  preparing ─ finish_prepare ─▶ ready (a standby)
//!  └──── discard_standby ───────────┘
//! ```
//!
//! A machine is powered off for the host in all states but *starting* and *on*. A start takes the standby; a
//! discard cancels a preparation first.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{Deadline, Error, Result, State};
use qapi::qmp;

use crate::run::Run;
use crate::run::start_error::StartError;
use crate::standby::Standby;
use crate::states::state_of_status;

/// The grace of the QEMU of a cancelled preparation, before it is killed.
const CANCEL_GRACE: Duration = Duration::from_secs(3);

enum RunState {
    Off,
    Starting,
    On(Arc<Run>),
    Preparing {
        /// The run of the preparation, once it exists.
        run: Option<Arc<Run>>,
        cancelled: bool,
    },
    Ready(Box<Standby>),
}

impl RunState {
    /// The state after an action that left this run behind.
    fn off_or_on(still_running: Option<Arc<Run>>) -> RunState {
        // A QEMU that does not end still has the disk and the socket.
        still_running.map_or(RunState::Off, RunState::On)
    }

    /// Replaces the state of a machine that is off; returns its standby.
    fn replace_off(&mut self, next: RunState) -> Option<Box<Standby>> {
        match std::mem::replace(self, next) {
            RunState::Ready(standby) => Some(standby),
            _ => None,
        }
    }
}

/// The state of one machine, for several threads.
pub struct RunSlot {
    state: Mutex<RunState>,
    /// Wakes those who wait for the end of a preparation.
    changed: Condvar,
}

impl Default for RunSlot {
    fn default() -> Self {
        RunSlot { state: Mutex::new(RunState::Off), changed: Condvar::new() }
    }
}

impl RunSlot {
    /// Returns the machine's state, from QEMU if the machine is on.
    ///
    /// # Errors
    /// QEMU does not answer, and has not ended.
    pub fn state(&self, deadline: Deadline) -> Result<State> {
        let run = match &*self.lock() {
            RunState::Off | RunState::Preparing { .. } | RunState::Ready(_) => return Ok(State::Poweroff),
            RunState::Starting => return Ok(State::Starting),
            RunState::On(run) if run.has_just_resumed() => return Ok(State::Running),
            RunState::On(run) => Arc::clone(run),
        };
        match run.execute(&qmp::query_status {}, deadline) {
            Ok(status) => state_of_status(status["status"].as_str().unwrap_or("")),
            Err(error) => {
                // A monitor that fails is the first sign of the end.
                if run.ends_within_grace(deadline) { Ok(State::Poweroff) } else { Err(error) }
            }
        }
    }

    /// Returns the run, if the machine is on.
    pub fn running(&self) -> Option<Arc<Run>> {
        match &*self.lock() {
            RunState::On(run) if !run.has_ended() => Some(Arc::clone(run)),
            _ => None,
        }
    }

    pub fn is_off(&self) -> bool {
        matches!(&*self.lock(), RunState::Off)
    }

    /// Reports whether the machine is on or starts, after the end of a run that is just ending.
    pub fn is_on(&self, deadline: Deadline) -> bool {
        self.wait_for_pending_end(deadline);
        match &*self.lock() {
            RunState::Starting => true,
            RunState::On(run) => !run.has_ended(),
            RunState::Off | RunState::Preparing { .. } | RunState::Ready(_) => false,
        }
    }

    /// Reports whether the next restore is prepared or being prepared.
    pub fn is_prepared(&self) -> bool {
        matches!(&*self.lock(), RunState::Preparing { .. } | RunState::Ready(_))
    }

    /// Reports whether the machine has a QEMU, or is about to have one.
    pub fn has_qemu(&self) -> bool {
        match &*self.lock() {
            RunState::Off => false,
            RunState::On(run) => !run.has_ended(),
            RunState::Starting | RunState::Preparing { .. } | RunState::Ready(_) => true,
        }
    }

    /// Begins a start, and returns the standby. Waits while another machine discards it.
    ///
    /// # Errors
    /// The machine is not off.
    pub fn begin_start(&self, deadline: Deadline) -> Result<Option<Box<Standby>>> {
        let is_discarded =
            |state: &mut RunState| matches!(state, RunState::Preparing { cancelled: true, .. });
        let waited = self.changed.wait_timeout_while(self.lock(), deadline.remaining(), is_discarded);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let busy = match &*state {
            RunState::Off | RunState::Ready(_) => false,
            RunState::Starting | RunState::Preparing { .. } => true,
            RunState::On(run) => !run.has_ended(),
        };
        if busy {
            return Err(Error::unexpected_state("the machine is not powered off").advice("Stop it first"));
        }
        Ok(state.replace_off(RunState::Starting))
    }

    /// Ends a start with its outcome.
    ///
    /// # Errors
    /// The start failed.
    pub fn finish_start(&self, started: Result<Arc<Run>, StartError>) -> Result<()> {
        let (state, result) = match started {
            Ok(run) => (RunState::On(run), Ok(())),
            Err(StartError { error, still_running, .. }) => (RunState::off_or_on(still_running), Err(error)),
        };
        *self.lock() = state;
        result
    }

    /// Notes that the run has ended.
    pub fn set_off(&self) {
        *self.lock() = RunState::Off;
    }

    /// Begins a preparation, and returns the standby of an earlier one.
    ///
    /// # Errors
    /// The machine is not off.
    pub fn begin_prepare(&self, deadline: Deadline) -> Result<Option<Box<Standby>>> {
        self.wait_for_pending_end(deadline);
        let mut state = self.lock();
        match &*state {
            RunState::Off | RunState::Ready(_) => {}
            RunState::On(run) if run.has_ended() => {}
            _ => {
                let on = Error::unexpected_state("the machine is not powered off");
                return Err(on.advice("It is prepared by itself after its next stop"));
            }
        }
        Ok(state.replace_off(RunState::Preparing { run: None, cancelled: false }))
    }

    /// Notes the run of a preparation, so that it can be cancelled.
    pub fn set_preparing_run(&self, new: &Arc<Run>) {
        if let RunState::Preparing { run, cancelled } = &mut *self.lock() {
            *run = Some(Arc::clone(new));
            if *cancelled {
                new.terminate();
            }
        }
    }

    /// Ends a preparation; returns whether it was cancelled.
    pub fn finish_prepare(&self, standby: Option<Box<Standby>>, still_running: Option<Arc<Run>>) -> bool {
        let next = match (standby, still_running) {
            (_, Some(run)) => RunState::On(run),
            (Some(standby), None) => RunState::Ready(standby),
            (None, None) => RunState::Off,
        };
        let before = std::mem::replace(&mut *self.lock(), next);
        self.changed.notify_all();
        matches!(before, RunState::Preparing { cancelled: true, .. })
    }

    /// Checks that the preparation was not cancelled.
    ///
    /// # Errors
    /// The preparation was cancelled.
    pub fn ensure_not_cancelled(&self) -> Result<()> {
        if self.is_cancelled() { Err(RunSlot::cancelled()) } else { Ok(()) }
    }

    pub fn is_cancelled(&self) -> bool {
        matches!(&*self.lock(), RunState::Preparing { cancelled: true, .. })
    }

    /// The error of a preparation that was cancelled.
    pub fn cancelled() -> Error {
        Error::failed("the preparation was cancelled, because of another action on the machine")
    }

    /// Asks the QEMU of the standby to end, without waiting for it.
    pub fn terminate_standby(&self) {
        if let RunState::Ready(standby) = &*self.lock() {
            standby.terminate();
        }
    }

    /// Cancels a preparation, and waits for its end. Returns the locked state.
    ///
    /// # Errors
    /// The preparation does not end in time.
    fn cancel_prepare(&self, deadline: Deadline) -> Result<MutexGuard<'_, RunState>> {
        let mut state = self.lock();
        if let RunState::Preparing { run, cancelled } = &mut *state {
            *cancelled = true;
            run.iter().for_each(|run| run.terminate());
        }
        let is_preparing = |state: &mut RunState| matches!(state, RunState::Preparing { .. });
        let wait = |state, limit| {
            let waited = self.changed.wait_timeout_while(state, limit, is_preparing);
            waited.unwrap_or_else(PoisonError::into_inner)
        };
        let (state, _) = wait(state, deadline.within(CANCEL_GRACE).remaining());
        if let RunState::Preparing { run: Some(run), .. } = &*state {
            run.kill();
        }
        let (state, waited) = wait(state, deadline.remaining());
        if waited.timed_out() {
            return Err(deadline.timeout("the cancelled preparation to end"));
        }
        Ok(state)
    }

    /// Cancels a preparation and ends the standby; returns whether there was a standby.
    ///
    /// # Errors
    /// The preparation does not end in time, or QEMU does not end.
    pub fn discard_standby(&self, deadline: Deadline) -> Result<bool> {
        let mut state = self.cancel_prepare(deadline)?;
        let RunState::Ready(standby) = &*state else { return Ok(false) };
        // Until its QEMU has ended, nobody else may use the machine's files.
        let discarding = RunState::Preparing { run: Some(standby.run()), cancelled: true };
        let standby = state.replace_off(discarding);
        drop(state);
        let (next, ended) = match standby.map_or(Ok(()), |standby| standby.end(deadline)) {
            Ok(()) => (RunState::Off, Ok(true)),
            Err(StartError { error, still_running, .. }) => (RunState::off_or_on(still_running), Err(error)),
        };
        *self.lock() = next;
        self.changed.notify_all();
        ended
    }

    /// Waits for the end of a run whose monitor has closed: the host learns of the end a moment earlier.
    fn wait_for_pending_end(&self, deadline: Deadline) {
        let run = match &*self.lock() {
            RunState::On(run) if run.qmp().is_closed() => Arc::clone(run),
            _ => return,
        };
        run.ends_within_grace(deadline);
    }

    /// Each statement that holds the lock leaves a whole state, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, RunState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
