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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::fake_qemu::{FakeQemu, soon};
    use crate::run::record::Progress;
    use machinery::State;
    use std::time::{Duration, Instant};

    #[test]
    fn run_is_recorded_and_reports_its_states_once_its_guest_is_resumed() {
        let qemu = FakeQemu::new();
        qemu.send("SUSPEND");
        assert!(qemu.reports_nothing(), "a step of the start");
        assert_eq!(qemu.progress(), Some(Progress::Starting));
        qemu.run.resume(soon()).unwrap();
        assert_eq!(qemu.progress(), Some(Progress::Running));
        qemu.send("SUSPEND");
        assert_eq!(qemu.reported(), State::Suspended);
        qemu.end();
        assert_eq!((qemu.reported(), qemu.progress()), (State::Poweroff, None));
    }

    #[test]
    fn run_that_is_adopted_is_one_whose_guest_was_resumed() {
        let qemu = FakeQemu::new();
        qemu.run.set_adopted();
        assert_eq!(qemu.progress(), Some(Progress::Running));
        qemu.send("SUSPEND");
        assert_eq!(qemu.reported(), State::Suspended);
        qemu.end();
        assert_eq!(qemu.reported(), State::Poweroff);
    }

    #[test]
    fn resumption_is_known_once_when_it_was_qemus_last_event_a_moment_ago() {
        let qemu = FakeQemu::new();
        assert!(!qemu.run.has_just_resumed());
        // A slow computer does not make a moment of the future too old.
        let just_now = || *qemu.run.resumed() = Some(Instant::now() + Duration::from_secs(60));
        just_now();
        assert!(qemu.run.has_just_resumed());
        assert!(!qemu.run.has_just_resumed(), "it is known once");
        *qemu.run.resumed() = Instant::now().checked_sub(RESUME_EVENT_VALIDITY);
        assert!(!qemu.run.has_just_resumed(), "it was too long ago");
        qemu.send("RESUME");
        assert!(qemu.run.resumed().is_some());
        qemu.send("STOP");
        assert!(qemu.run.resumed().is_none(), "it is not the last event");
        just_now();
        qemu.end();
        assert!(!qemu.run.has_just_resumed(), "QEMU ends");
    }
}
