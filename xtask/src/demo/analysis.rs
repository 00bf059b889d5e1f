//! `cargo xtask demo --analysis`: a whole analysis by Cuckoo3 on a real machine.
//!
//! Cuckoo3's own programs run on the host, in a network of their own. A sample copies itself twice, looks up a name, and
//! opens a page. The demo prints the facts of Cuckoo3's report, and the time line of its task.

use std::env;
use std::path::PathBuf;

use machinery_testkit::guest::analysis::{Agent, CUCKOO_AGENT};
use machinery_testkit::lab::{AnalysisLab, Manager, Report, SAMPLE_NAME};

use super::print::{note, say};
use super::times::{shown, timed};
use crate::run::Result;

/// Shows the analysis.
pub fn show() -> Result<()> {
    let python = env::var_os("CUCKOO3_PYTHON").filter(|python| !python.is_empty()).map(PathBuf::from);
    let python = python.ok_or_else(|| {
        "CUCKOO3_PYTHON names no Python with Cuckoo3: make one with `cargo xtask cuckoo3-env DIR`".to_owned()
    })?;
    let agent = if Agent::Cuckoo.is_known() { Agent::Cuckoo } else { Agent::Own };
    say("An analysis machine is made: a Linux with an agent, booted once and saved as it runs.");
    note(&match agent {
        Agent::Cuckoo => "its agent is Cuckoo's".to_owned(),
        Agent::Own => format!("its agent is a substitute: {CUCKOO_AGENT} names no agent of Cuckoo"),
    });
    let (lab, took) = timed(|| Ok(AnalysisLab::new(&python, 1, agent)?))?;
    let lab = lab.ok_or_else(|| "the demo of an analysis needs root, for a network of its own".to_owned())?;
    note(&format!("ready after {} (it is cached)", shown(took)));
    say("Cuckoo3 is started: its main process, its node, and the machinery host.");
    let cuckoo = lab.start(Manager::Host)?;
    say(&format!("{SAMPLE_NAME} is submitted. It runs for 20 seconds."));
    let analyses = lab.submit(&["demo"])?;
    for analysis in &analyses {
        let report = lab.wait(&cuckoo, analysis)?;
        print_facts(&analysis.id, &report);
    }
    say("Cuckoo3 is ended.");
    cuckoo.end()?;
    let left = lab.lab().leftovers()?;
    match left.is_empty() {
        true => note("no process, no socket and no disk is left"),
        false => return Err(format!("the host ended and left {left:?}").into()),
    }
    Ok(())
}

fn print_facts(id: &str, report: &Report) {
    say(&format!("Cuckoo3's report of the analysis {id}:"));
    let sizes = |files: &std::collections::BTreeMap<String, Vec<u8>>| {
        let files = files.iter().map(|(name, content)| format!("{name} ({} bytes)", content.len()));
        files.collect::<Vec<_>>().join(", ")
    };
    let facts = [
        ("machine", report.machine.clone()),
        ("processes", report.processes.join(", ")),
        ("dropped files", sizes(&report.dropped)),
        ("domains", report.domains.join(", ")),
        ("URLs", report.urls.join(", ")),
        ("screenshots", sizes(&report.screenshots)),
        ("score", report.score.to_string()),
        ("errors", if report.errors.is_empty() { "none".to_owned() } else { report.errors.join(", ") }),
    ];
    for (name, fact) in facts {
        println!("  {name:14} {fact}");
    }
    say("The time line of its task:");
    print!("{}", report.timeline);
}
