//! The ways to end a run: a stop, the power button, a failed start, a discard.
//!
//! QEMU is asked first (`quit`, SIGTERM), so that it and its helpers clean up, and killed if it does not end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use qapi::qmp;

use super::start_error::{Stage, StartError};
use super::{EXIT_GRACE, KILL_TIMEOUT, Run};
use crate::launch::with_output;

/// The grace of a QEMU that was asked to `quit`, before it is killed.
const QUIT_GRACE: Duration = Duration::from_secs(3);

impl Run {
    /// Ends a run whose start failed at that stage, and adds QEMU's own message to the error.
    pub fn fail_start(self: &Arc<Self>, error: Error, at: Stage) -> StartError {
        let error = self.end_with_output(error);
        StartError { error, at, still_running: (!self.has_ended()).then(|| Arc::clone(self)) }
    }

    fn end_with_output(&self, error: Error) -> Error {
        self.stopping.store(true, Ordering::SeqCst);
        // A QEMU that is about to end by itself gets the time to print its reason.
        if self.wait_end(EXIT_GRACE).is_none() {
            self.end_soon();
        }
        match self.wait_end(KILL_TIMEOUT) {
            Some(end) => with_output(error, &end),
            None => error.detail(&format!("and QEMU (pid {}) does not end", self.process.pid())),
        }
    }

    /// Asks QEMU to end, so that its helpers end too, and kills it if it does not end soon.
    pub fn end_soon(&self) {
        self.process.terminate();
        if self.wait_end(EXIT_GRACE).is_none() {
            self.process.kill();
        }
    }

    /// Ends a run that was only for preparation.
    ///
    /// # Errors
    /// The process does not end.
    pub fn end(self: &Arc<Self>, deadline: Deadline) -> Result<(), StartError> {
        let still_running =
            |error| StartError { error, at: Stage::Run, still_running: Some(Arc::clone(self)) };
        self.stop(deadline).map_err(still_running)
    }

    /// Asks QEMU to end, as `quit` does, also if its monitor is not connected. Does not wait for the end. Source:
    /// `qemu_system_killed` in QEMU's softmmu/runstate.c.
    pub fn terminate(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.process.terminate();
    }

    /// Kills a QEMU that was asked to end.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Ends the run in another thread.
    pub fn discard(self: &Arc<Self>) {
        let run = Arc::clone(self);
        let end = move || run.stop(Deadline::after(QUIT_GRACE));
        if std::thread::Builder::new().name("qemu-discard".to_owned()).spawn(end).is_err() {
            self.terminate();
            self.kill();
        }
    }

    /// Pulls the plug.
    ///
    /// # Errors
    /// The process does not end.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        self.stopping.store(true, Ordering::SeqCst);
        let grace = deadline.within(QUIT_GRACE);
        let quit = self.qmp.execute(&qmp::quit {}, grace);
        if let Err(error) = &quit {
            tracing::debug!(machine = self.machine, %error, "QEMU did not answer quit");
        }
        if self.wait_end(grace.remaining()).is_some() {
            return Ok(());
        }
        let pid = self.process.pid();
        tracing::warn!(machine = self.machine, pid, "QEMU does not quit: killing it");
        self.process.kill();
        match self.wait_end(KILL_TIMEOUT) {
            Some(_) => Ok(()),
            None => Err(Error::timeout(format!("QEMU (pid {pid}) does not end, not even by SIGKILL"))
                .advice("It hangs in the kernel: look at its disk and at dmesg")),
        }
    }

    /// Presses the power button, and waits until the guest has powered off.
    ///
    /// # Errors
    /// The guest does not power off in time.
    pub fn power_button(&self, deadline: Deadline) -> Result<()> {
        self.qmp.execute(&qmp::system_powerdown {}, deadline)?;
        match self.wait_end(deadline.remaining()) {
            Some(_) => Ok(()),
            None => Err(deadline.timeout("the guest to react to its power button")),
        }
    }
}
