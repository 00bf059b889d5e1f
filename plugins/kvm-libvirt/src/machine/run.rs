//! An own run of the machine: its marker, its disks, and its end.
//!
//! The run is marked before libvirt is asked to start the domain, and until the run is known to have ended.
//! So the next host knows a run that a killed host has left.

use machinery::{Error, Result};
use machinery_backend::Operation;
use virt::connect::Connect;
use virt::domain::Domain;

use super::base::Machine;
use super::state::MachineState;
use crate::domain;
use crate::errors::{explain, is_no_domain};
use crate::foreign::{DiskFile, disks_of, has_managed_save};

impl Machine {
    /// Finds the domain; `None` if there is no such domain, which a diagnosis reports.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn find(&self, connect: &Connect) -> Result<Option<Domain>> {
        match connect.lookup_domain_by_name(self.label()) {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if is_no_domain(&error) => Ok(None),
            Err(error) => Err(explain("look up the domain", &error).machine(self.name())),
        }
    }

    /// Finds the domain, and adopts the run that an earlier host has left; returns whether there was one. Ends everything
    /// else that is left.
    ///
    /// # Errors
    /// As [`find`](Machine::find); the run has ended.
    pub(super) fn adopt_run(&self, connect: &Connect) -> Result<bool> {
        let left = self.lock().left_run.take();
        let Some(id) = left else {
            return self.end_leftover_run(connect).map(|()| false);
        };
        let found = self.find(connect)?.filter(|domain| domain.id() == Some(id));
        let domain = match found {
            Some(domain) if self.marker.matches(&domain)? => domain,
            _ => {
                self.end_leftover_run(connect)?;
                return Err(Error::failed(
                    "its domain has ended, or was started anew, while no host watched it",
                ));
            }
        };
        let disks = self.own_disks_of(&domain)?;
        let mut state = self.lock();
        (state.has_run, state.run_disks) = (true, Some(disks));
        tracing::info!(machine = self.name(), "the run of an earlier host is adopted");
        Ok(true)
    }

    /// Finds the domain of a new machine, and ends a run that an earlier host has left.
    ///
    /// # Errors
    /// As [`find`](Machine::find); the run does not end.
    pub fn end_leftover_run(&self, connect: &Connect) -> Result<()> {
        let found = self.find(connect)?;
        let is_own = found.as_ref().map_or(Ok(false), |domain| self.marker.matches(domain));
        if !is_own.map_err(|error| error.machine(self.name()))? {
            self.marker.set_aside_if_elsewhere()?;
        }
        let Some(domain) = found else { return self.marker.end_run_elsewhere(connect, None) };
        let uuid = domain::uuid(&domain)?;
        self.marker.end_run_elsewhere(connect, Some(&uuid))?;
        if self.marker.matches(&domain).map_err(|error| error.machine(self.name()))? {
            tracing::warn!(machine = self.name(), "a run that an earlier host has left is stopped");
            let disks = self.own_disks_of(&domain).unwrap_or_default();
            domain::destroy(&domain).map_err(|error| error.machine(self.name()))?;
            self.record_disks(&disks);
        } else if domain.is_active().unwrap_or(false) {
            tracing::warn!(machine = self.name(), "its domain runs already, started by somebody else");
        }
        // Somebody may resume an own run that was saved.
        if !has_managed_save(&domain) {
            self.marker.remove();
        }
        Ok(())
    }

    /// Records that the domain is about to be started.
    pub(super) fn begin_marker(&self, domain: &Domain) -> Result<()> {
        {
            let mut state = self.lock();
            (state.was_saved, state.awaits_start) = (false, true);
        }
        self.marker.begin(domain)
    }

    /// Marks the domain, which was started and is paused, as an own run. Looks the domain up again, because a
    /// reverted domain object does not know its new id.
    pub(super) fn mark_run(&self, connect: &Connect) -> Result<Domain> {
        let domain = domain::domain(connect, self.label())?;
        self.marker.mark(&domain)?;
        let disks = self.own_disks_of(&domain)?;
        self.lock().run_disks = Some(disks);
        Ok(domain)
    }

    /// Returns the domain's own disks that the run can write to, without the overlays.
    fn own_disks_of(&self, domain: &Domain) -> Result<Vec<DiskFile>> {
        let overlays = self.marker.overlays();
        let is_overlay = |disk: &DiskFile| disk.as_ref().is_some_and(|disk| overlays.contains(disk));
        Ok(disks_of(domain)?.into_iter().filter(|disk| !is_overlay(disk)).collect())
    }

    /// Expects that the domain was not reset since the operation began.
    ///
    /// # Errors
    /// It was, so its guest is not at the snapshot.
    pub(super) fn ensure_no_reset(&self) -> Result<()> {
        match self.lock().was_reset {
            true => Err(Error::unexpected_state("somebody has reset the domain before it was resumed")),
            false => Ok(()),
        }
    }

    /// Records the end of the own run, and wakes the threads that wait for it.
    pub(super) fn record_end(&self) {
        self.close_run();
        self.signal_end();
    }

    /// Records the end of the own run, if there was one.
    pub(super) fn close_run(&self) {
        self.close(&mut self.lock());
    }

    /// Records the end of the own run, unless a start has begun meanwhile, whose run this one is not. The event of an end
    /// may come late.
    pub(super) fn close_run_unless_starting(&self) {
        let mut state = self.lock();
        if state.operation() != Operation::Starting {
            self.close(&mut state);
        }
    }

    fn close(&self, state: &mut MachineState) {
        if let Some(disks) = state.run_disks.take() {
            self.disk_record.save(&disks);
            state.only_own_runs = true;
        }
        if !state.was_saved {
            self.marker.remove();
        }
        state.has_run = false;
        state.host_knows_running = false;
    }

    /// Removes the marker of a run that has ended. A run that was saved is still an own run when somebody
    /// resumes it.
    pub(super) fn remove_marker(&self) {
        if !self.lock().was_saved {
            self.marker.remove();
        }
    }

    /// Records the state of the disks at the end of an own run.
    fn record_disks(&self, disks: &[DiskFile]) {
        self.disk_record.save(disks);
        self.lock().only_own_runs = true;
    }
}

#[cfg(test)]
mod tests {
    use crate::domain::state;
    use crate::leftovers::RunMarker;
    use crate::machine::lab::MachineLab;
    use machinery::State;

    fn is_on(lab: &MachineLab) -> bool {
        state(&lab.domain.domain).unwrap().0 != State::Poweroff
    }

    #[test]
    fn domain_is_found_unless_there_is_none() {
        let lab = MachineLab::new("run-find");
        let find = |label: &str| lab.with_label(label).find(&lab.domain.connect);
        assert_eq!(find("run-find").unwrap().unwrap().name().unwrap(), "run-find");
        assert!(find("run-find-none").unwrap().is_none());
        let error = find("not a\0name").err().unwrap().to_string();
        assert!(error.contains("machine 'run-find': libvirt cannot look up the domain"), "{error}");
    }

    #[test]
    fn run_of_an_earlier_host_is_adopted_once() {
        let mut lab = MachineLab::new("run-adopt");
        assert!(!lab.machine.adopt_run(&lab.domain.connect).unwrap());
        lab.run();
        lab.replace_host();
        assert!(lab.machine.adopt_run(&lab.domain.connect).unwrap());
        assert!(is_on(&lab) && lab.machine.marker.exists());
        let state = lab.machine.lock();
        assert!(state.has_run && state.run_disks.is_some() && state.left_run.is_none());
    }

    #[test]
    fn run_is_not_adopted_when_the_domain_was_started_anew() {
        let mut lab = MachineLab::new("run-again");
        lab.run();
        lab.domain.domain.destroy().unwrap();
        lab.domain.start();
        // As a domain that was saved and resumed, it has the token of the run.
        lab.machine.marker.mark(&lab.domain.look_up()).unwrap();
        lab.replace_host();
        let error = lab.machine.adopt_run(&lab.domain.connect).unwrap_err().to_string();
        assert!(error.contains("has ended, or was started anew"), "{error}");
        assert!(!is_on(&lab) && !lab.machine.marker.exists() && !lab.machine.has_run());
        assert!(lab.machine.lock().only_own_runs, "the disks are those of an own run");
    }

    #[test]
    fn domain_of_somebody_else_is_neither_adopted_nor_ended() {
        let mut lab = MachineLab::new("run-other");
        lab.domain.start();
        let domain = lab.domain.look_up();
        lab.machine.marker.begin(&domain).unwrap();
        // It has the id of the run, and not its token.
        lab.machine.marker.set_resumed(&domain);
        lab.replace_host();
        assert!(lab.machine.adopt_run(&lab.domain.connect).is_err());
        assert!(is_on(&lab) && !lab.machine.marker.exists() && !lab.machine.has_run());
        assert!(!lab.machine.lock().only_own_runs);
    }

    #[test]
    fn leftover_run_is_ended_and_its_disks_are_recorded() {
        let mut lab = MachineLab::new("run-left");
        lab.run();
        lab.replace_host();
        lab.machine.end_leftover_run(&lab.domain.connect).unwrap();
        assert!(!is_on(&lab) && !lab.machine.marker.exists());
        assert!(lab.machine.lock().only_own_runs);
    }

    #[test]
    fn marker_of_a_saved_run_is_kept_for_its_resumption() {
        let mut lab = MachineLab::new("run-saved");
        lab.run();
        lab.domain.domain.managed_save(0).unwrap();
        lab.replace_host();
        lab.machine.end_leftover_run(&lab.domain.connect).unwrap();
        assert!(lab.machine.marker.exists());
        lab.domain.domain.managed_save_remove(0).unwrap();
        lab.machine.end_leftover_run(&lab.domain.connect).unwrap();
        assert!(!lab.machine.marker.exists());
    }

    #[test]
    fn marker_is_written_before_the_start_and_removed_with_the_run() {
        let lab = MachineLab::new("run-marker");
        lab.machine.lock().was_saved = true;
        lab.machine.begin_marker(&lab.domain.domain).unwrap();
        assert!(lab.machine.marker.exists() && !lab.machine.lock().was_saved);
        lab.domain.start();
        let domain = lab.machine.mark_run(&lab.domain.connect).unwrap();
        assert!(lab.machine.marker.matches(&domain).unwrap());
        assert!(lab.machine.lock().run_disks.is_some());
        lab.machine.lock().was_saved = true;
        lab.machine.remove_marker();
        assert!(lab.machine.marker.exists());
        lab.machine.lock().was_saved = false;
        lab.machine.record_end();
        assert!(!lab.machine.marker.exists());
        let state = lab.machine.lock();
        assert!(state.only_own_runs && state.run_disks.is_none() && state.end_count == 1);
    }

    #[test]
    fn reset_before_the_resumption_is_an_error() {
        let lab = MachineLab::new("run-reset");
        lab.machine.ensure_no_reset().unwrap();
        lab.machine.lock().was_reset = true;
        let error = lab.machine.ensure_no_reset().unwrap_err().to_string();
        assert!(error.contains("somebody has reset the domain"), "{error}");
    }

    #[test]
    fn marker_is_read_before_any_event() {
        let mut lab = MachineLab::new("run-read");
        lab.run();
        let id = lab.domain.look_up().id();
        lab.replace_host();
        assert_eq!((lab.machine.lock().left_run, id.is_some()), (id, true));
        assert_eq!(RunMarker::of("run-read", lab.state_dir()).resumed_id(), id);
    }
}
