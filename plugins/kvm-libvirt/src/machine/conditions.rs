//! The conditions of a preparation: no run, and no foreign work that it would discard.

use machinery::{Deadline, Error, Result, State};
use machinery_backend::{PrepareOrigin, Standby};
use virt::domain::Domain;

use super::base::{END_EVENT_TIMEOUT, Machine};
use super::state::Activity;
use crate::dsn::is_local;
use crate::foreign;

impl Machine {
    /// Returns the reason why the configuration allows no standby, if it does not.
    pub(super) fn no_standby_reason(&self) -> Option<&'static str> {
        match self.keys.standby {
            Standby::Auto if !is_local(&self.keys.dsn) => Some(
                "libvirt is on another computer, whose free memory the host does not know; set standby: on to have a standby",
            ),
            Standby::On | Standby::Auto => None,
            Standby::Off => Some("standby is off"),
        }
    }

    /// Expects that the machine has no run. Waits for the event of a run's end: libvirt may answer that the
    /// run is over before the event arrives.
    ///
    /// # Errors
    /// The machine runs.
    pub(super) fn ensure_no_run(&self, deadline: Deadline) -> Result<()> {
        let Activity { has_run, end_count, .. } = self.activity();
        let soon = deadline.within(END_EVENT_TIMEOUT);
        if has_run
            && self.query_state(soon).is_ok_and(|(state, _)| state == State::Poweroff)
            && !self.wait_for_end(end_count, soon)
        {
            self.record_end();
        }
        match self.has_run() {
            true => Err(Error::unexpected_state("the machine is running").advice("Stop it first")),
            false => Ok(()),
        }
    }

    /// Describes the foreign work in the domain, which is off, if a revert would discard it without a request.
    pub(super) fn foreign_work_reason(&self, domain: &Domain, origin: PrepareOrigin) -> Option<String> {
        let only_own_runs = self.lock().only_own_runs;
        let work = match origin {
            PrepareOrigin::Request => None,
            PrepareOrigin::Automatic => self.disk_record.foreign_work(domain, only_own_runs),
        };
        let why = work.map(|work| foreign::advice(self.name(), &work));
        let logged = std::mem::replace(&mut self.lock().logged_foreign_work, why.clone());
        if let Some(why) = &why
            && logged.as_ref() != Some(why)
        {
            tracing::warn!(machine = self.name(), "{why}");
        }
        why
    }
}
