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
