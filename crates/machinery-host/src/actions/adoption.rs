//! Runs of an earlier host that a plugin has adopted, at the start of this host.

use super::capture;
use super::context::ActionContext;
use crate::fleet::Fleet;
use crate::plugin::call::CallResult;

/// Continues what an earlier host did for the runs that this one has adopted.
pub async fn resume_adopted_runs(fleet: &Fleet, context: &ActionContext) {
    let settings = context.settings();
    for machine in fleet.roster().machines().iter().filter(|machine| machine.status().own_run) {
        if let Some(settings_of_capture) = &settings.capture {
            capture::resume(machine, settings_of_capture, &context.folders, &context.captures).await;
        }
        // A report that came before the machine was known is lost.
        let limit = settings.timeouts.state;
        let (reports, called) = (
            machine.status().reports,
            machine
                .call(limit, |machine, deadline| machine.machinery.instance.state(machine.name(), deadline)),
        );
        if let CallResult::Returned(Ok(state)) = called.await {
            machine.set_answered(state, reports);
        }
    }
}
