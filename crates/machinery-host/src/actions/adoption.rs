//! Runs of an earlier host that a plugin has adopted, at the start of this host.

use std::sync::Arc;

use machinery::{Error, State};

use super::capture;
use super::context::ActionContext;
use crate::fleet::{Fleet, Machine};
use crate::plugin::call::CallResult;

/// Continues what an earlier host did for the runs that this one has adopted.
pub async fn resume_adopted_runs(fleet: &Fleet, context: &ActionContext) {
    for machine in fleet.roster().machines().iter().filter(|machine| machine.status().own_run) {
        // The machine has its lock and its quarantine by now.
        machine.set_adopted();
        update_state(machine, context).await;
        if machine.status().state == State::Poweroff {
            report_lost(machine);
        } else if let Some(settings) = &context.settings().capture {
            capture::resume(machine, settings, &context.folders, &context.captures).await;
        }
    }
}

/// Leaves the machines in quarantine alone that somebody else runs.
pub fn leave_foreign_runs_alone(fleet: &Fleet) {
    for machine in fleet.roster().machines() {
        let status = machine.status();
        let is_off = matches!(status.state, State::Poweroff | State::Error);
        if !is_off && !status.own_run {
            machine.leave_alone();
        }
    }
}

/// Asks the plugin for the state: a report that came before the machine was known is lost.
async fn update_state(machine: &Arc<Machine>, context: &ActionContext) {
    let reports = machine.status().reports;
    if let CallResult::Returned(Ok(state)) = machine.query_state(context.timeouts().state).await {
        machine.set_answered(state, reports);
    }
}

fn report_lost(machine: &Machine) {
    let error = Error::failed("its run has ended while it was adopted").machine(machine.name()).to_string();
    tracing::warn!(machine = machine.name(), error, "its run is lost");
    machine.add_error(&error);
}

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::*;
    use crate::config::Heal;
    use machinery::ErrorKind;

    #[tokio::test(start_paused = true)]
    async fn adopted_run_goes_on_with_the_state_that_the_plugin_answers() {
        let lab = Lab::new("");
        lab.start_own_run();
        lab.plugin.set_state("m", State::Paused);
        resume_adopted_runs(&lab.fleet, &lab.context).await;
        let status = lab.machine.status();
        assert_eq!((status.state, status.errors.len()), (State::Paused, 0));
        assert!(status.started_well);
    }

    #[tokio::test(start_paused = true)]
    async fn adopted_run_that_has_ended_meanwhile_is_an_error_of_its_machine() {
        let lab = Lab::new("");
        lab.start_own_run();
        lab.plugin.set_state("m", State::Poweroff);
        resume_adopted_runs(&lab.fleet, &lab.context).await;
        let status = lab.machine.status();
        assert_eq!(status.state, State::Poweroff);
        assert!(status.errors[0].contains("has ended while it was adopted"), "{:?}", status.errors);
    }

    #[tokio::test(start_paused = true)]
    async fn run_of_somebody_else_is_not_resumed() {
        let lab = Lab::new("");
        lab.start_foreign_run();
        resume_adopted_runs(&lab.fleet, &lab.context).await;
        assert!(!lab.machine.status().started_well);
    }

    #[test]
    fn machine_in_quarantine_is_left_alone_when_somebody_else_runs_it() {
        for (state, own, expected) in [
            (State::Running, false, true),
            (State::Running, true, false),
            (State::Poweroff, false, false),
            (State::Error, false, false),
        ] {
            let lab = Lab::new("");
            lab.machine.take_out(ErrorKind::Failed, "killed", Heal::Auto);
            lab.machine.set_state(state);
            if own {
                lab.machine.set_own_run();
            }
            leave_foreign_runs_alone(&lab.fleet);
            assert_eq!(lab.quarantine().unwrap().is_left_alone, expected, "{state} {own}");
        }
    }
}
