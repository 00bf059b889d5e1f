//! The guest of a run begins to run.

use std::sync::atomic::Ordering;

use machinery::{Deadline, Result};
use qapi::qmp;

use super::{Purpose, RESUME_EVENT_VALIDITY, Run};
use crate::qmp::wait;

impl Run {
    /// Resumes the guest, and returns once it runs.
    ///
    /// # Errors
    /// QEMU does not resume the guest in time.
    pub fn resume(&self, deadline: Deadline) -> Result<()> {
        *self.purpose() = Purpose::Run;
        self.process.begin_step();
        let events = self.qmp.listen();
        self.qmp.execute(&qmp::cont {}, deadline)?;
        wait(&events, deadline, "the guest to run", |event| (event.name == "RESUME").then_some(()))?;
        self.started.store(true, Ordering::SeqCst);
        self.record.set_running();
        Ok(())
    }

    /// Makes an adopted run one whose guest was resumed.
    pub fn set_adopted(&self) {
        *self.purpose() = Purpose::Run;
        self.has_run.store(true, Ordering::SeqCst);
        self.started.store(true, Ordering::SeqCst);
        self.record.set_running();
    }

    /// Reports whether QEMU's last event, a moment ago, was that the guest runs. True for one call only.
    pub fn has_just_resumed(&self) -> bool {
        let resumed = self.resumed().take();
        resumed.is_some_and(|resumed| resumed.elapsed() < RESUME_EVENT_VALIDITY) && !self.qmp.is_closed()
    }
}
