//! Whole analyses by Cuckoo3, on the host and on Cuckoo3's own manager.
//!
//! Both managers get the same CWD. The steps are those of Cuckoo3's log.

use std::path::Path;

use machinery_testkit::guest::analysis::Agent;
use machinery_testkit::lab::{AnalysisLab, Manager, Report};

use super::agent;
use super::steps::{CUCKOO3, HOST, RESTORE, RUN, STOP, TASKS, step};
use crate::bench::figures::{Figures, Kind, Place};
use crate::bench::plan::Plan;
use crate::bench::turns::ms;
use crate::run::{Context, Result, note};

/// The steps of a task: their first and their last moments in Cuckoo3's log.
const STEPS: [(&str, &str, Kind); 6] = [
    (
        "submitted",
        "restore begins",
        step("until the restore", "a task's identification, its preparation, and its wait for a machine"),
    ),
    (
        "restore begins",
        "machine runs",
        step(RESTORE, "Cuckoo3 requests the start of a machine, until it has the answer"),
    ),
    (
        "machine runs",
        "agent answers",
        step("agent", "the machine runs, until its agent accepts a connection"),
    ),
    (
        "payload is delivered",
        "sample runs",
        step("payload", "the agent gets the payload, and starts the sample"),
    ),
    (
        "stop begins",
        "machine is off",
        step(STOP, "Cuckoo3 requests the stop of a machine, until it has the answer"),
    ),
    ("machine is off", "report", step("report", "the machine is off, until the report is written")),
];

/// Measures with the Python that has Cuckoo3.
pub fn measure(python: &Path, plan: &Plan, figures: &mut Figures) -> Result<()> {
    let agent = if Agent::Cuckoo.is_known() { Agent::Cuckoo } else { Agent::Own };
    figures.about.push(("agent", format!("{agent:?}")));
    let machines = u8::try_from(plan.machines).context(|| "counting the machines".to_owned())?;
    let lab = AnalysisLab::new(python, machines, agent)?;
    let mut lab =
        lab.ok_or_else(|| "analyses by Cuckoo3 need root, for a network of their own".to_owned())?;
    figures.about.push(("qemu", lab.lab().qemu().version()?));
    lab.run_for(RUN);
    agent::measure(lab.lab(), plan, figures)?;
    lab.lab().ahead("instant: auto, standby: on")?;
    for (manager, contestant) in [(Manager::Host, HOST), (Manager::Cuckoo, CUCKOO3)] {
        note(&format!("{} analyses by Cuckoo3 on {machines} machines: {contestant}", plan.analyses));
        measure_analyses(&lab, manager, contestant, plan, figures)?;
    }
    Ok(())
}

fn measure_analyses(
    lab: &AnalysisLab,
    manager: Manager,
    contestant: &'static str,
    plan: &Plan,
    figures: &mut Figures,
) -> Result<()> {
    let place = Place::Analyses(plan.machines);
    let cuckoo = lab.start(manager)?;
    let tokens: Vec<_> = (1..=plan.analyses).map(|number| format!("{manager:?}-{number}")).collect();
    let analyses = lab.submit(&tokens.iter().map(String::as_str).collect::<Vec<_>>())?;
    let reports =
        analyses.iter().map(|analysis| Ok(lab.wait(&cuckoo, analysis)?)).collect::<Result<Vec<_>>>()?;
    cuckoo.end()?;
    if manager == Manager::Cuckoo {
        // Cuckoo3 leaves the disks of its last runs.
        for disk in lab.lab().names().map(|name| lab.lab().disposable(name)).filter(|disk| disk.exists()) {
            std::fs::remove_file(&disk).context(|| format!("removing {}", disk.display()))?;
        }
    }
    let ended = |report: &Report| Some(report.timeline.begun + report.timeline.at("report")?);
    let begun = reports.iter().map(|report| report.timeline.begun).min();
    if let (Some(begun), Some(ended)) = (begun, reports.iter().filter_map(ended).max()) {
        let hours = ended.duration_since(begun).as_secs_f64() / 3600.0;
        figures.add(place, TASKS.by(contestant), reports.len() as f64 / hours);
    }
    for report in &reports {
        for (from, to, kind) in STEPS {
            if let Some(took) = report.timeline.between(from, to) {
                figures.add(place, kind.by(contestant), ms(took));
            }
        }
    }
    let complete =
        reports.iter().filter(|report| report.dropped.len() == 3 && report.errors.is_empty()).count();
    note(&format!("{complete} of {} analyses have all files, and no error", reports.len()));
    Ok(())
}
