//! Runs of an earlier host, at the start of this host: a plugin has adopted them, or they are lost.
//!
//! Both are errors of the run of a task: for some time, nobody watched it.

use std::sync::Arc;

use machinery::State;

use super::capture;
use super::context::ActionContext;
use crate::fleet::{Fleet, Machine};
use crate::plugin::call::CallResult;

/// Continues what an earlier host did for the runs that this one has adopted, and reports the others as lost.
pub async fn resume_runs(fleet: &Fleet, context: &ActionContext) {
    // The machines have their locks and quarantines by now.
    for machine in fleet.roster().machines() {
        if machine.status().own_run {
            resume(machine, context).await;
        } else if context.run_marks.has_run(machine) {
            report_lost(machine, context, "the host has ended during its run, which nobody has continued")
                .await;
        }
    }
}

async fn resume(machine: &Arc<Machine>, context: &ActionContext) {
    machine.set_adopted();
    update_state(machine, context).await;
    if machine.status().state == State::Poweroff {
        return report_lost(machine, context, "its run has ended while it was adopted").await;
    }
    let error = machine.error("another host has taken the machine over during its run, which went on");
    machine.run_incomplete(&error);
    if let Some(settings) = &context.settings().capture {
        capture::resume(machine, settings, &context.folders, &context.captures).await;
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

async fn report_lost(machine: &Machine, context: &ActionContext, reason: &str) {
    let error = machine.error(reason);
    tracing::warn!(machine = machine.name(), error, "its run is lost");
    machine.add_error(&error);
    machine.run_lost(&error);
    context.run_ended(machine).await;
}

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::*;
    use crate::config::Heal;
    use crate::fleet::availability::TaskLock;
    use machinery::ErrorKind;

    #[tokio::test(start_paused = true)]
    async fn adopted_run_goes_on_with_the_state_that_the_plugin_answers() {
        let lab = Lab::new("");
        lab.start_own_run();
        lab.plugin.set_state("m", State::Paused);
        resume_runs(&lab.fleet, &lab.context).await;
        let status = lab.machine.status();
        assert_eq!((status.state, status.errors.len()), (State::Paused, 0));
        assert!(status.started_well);
    }

    #[tokio::test(start_paused = true)]
    async fn adopted_run_that_has_ended_meanwhile_is_an_error_of_its_machine() {
        let lab = Lab::new("");
        lab.start_own_run();
        lab.plugin.set_state("m", State::Poweroff);
        resume_runs(&lab.fleet, &lab.context).await;
        let status = lab.machine.status();
        assert_eq!(status.state, State::Poweroff);
        assert!(status.errors[0].contains("has ended while it was adopted"), "{:?}", status.errors);
    }

    #[tokio::test(start_paused = true)]
    async fn run_of_a_task_has_an_error_when_another_host_adopts_it_or_finds_it_ended() {
        for (adopted, expected) in
            [(true, "another host has taken the machine over"), (false, "the host has ended during its run")]
        {
            let lab = Lab::new("");
            lab.machine.lock(&TaskLock { task_id: "t".into(), ..TaskLock::default() }).unwrap();
            lab.context.run_marks.begin(&lab.machine);
            if adopted {
                lab.start_own_run();
            }
            resume_runs(&lab.fleet, &lab.context).await;
            let errors = lab.machine.status().availability.run_errors;
            assert!(matches!(&errors[..], [error] if error.contains(expected)), "{errors:?}");
            assert_eq!(lab.context.run_marks.has_run(&lab.machine), adopted);
            assert_eq!(lab.saved().contains("run_errors"), !adopted);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn run_of_somebody_else_is_not_resumed() {
        let lab = Lab::new("");
        lab.start_foreign_run();
        resume_runs(&lab.fleet, &lab.context).await;
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
