//! Whole analyses by Cuckoo3, from `cuckoo submit` to the report, on real QEMU machines.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Instant;

use machinery_testkit::client::Client;
use machinery_testkit::guest::analysis::Agent;
use machinery_testkit::lab::{Analysis, AnalysisLab, Manager, Report, SAMPLE_NAME};
use machinery_testkit::requirement;
use rustix::process::{Signal, kill_process};

/// Returns a lab with that many machines, if Cuckoo3 and the agent are there.
fn lab(machines: u8, agent: Agent) -> Option<AnalysisLab> {
    let python = std::env::var_os("CUCKOO3_PYTHON").filter(|python| !python.is_empty());
    let python = requirement::CUCKOO3.or_skip(python.map(PathBuf::from))?;
    assert!(python.is_absolute(), "CUCKOO3_PYTHON must be an absolute path, and is {}", python.display());
    if !requirement::AGENT.is_met(agent.is_known()) {
        return None;
    }
    requirement::NETWORK.or_skip(AnalysisLab::new(&python, machines, agent).unwrap())
}

/// Asserts the facts of an analysis that began on a clean machine.
fn assert_facts(report: &Report, analysis: &Analysis, token: &str) {
    assert_eq!(report.errors, [""; 0], "{report:?}");
    let processes: Vec<_> = report.processes.iter().map(String::as_str).collect();
    assert_eq!(processes, [SAMPLE_NAME, "dropper.exe", "beacon.exe"]);
    let text = |name: &str| String::from_utf8_lossy(&report.dropped[name]);
    let dropped: Vec<_> = report.dropped.keys().map(String::as_str).collect();
    assert_eq!(dropped, ["beacon.exe", "dropper.exe", "marks.txt"]);
    let copy = "# a copy\n";
    assert_eq!(text("dropper.exe"), format!("{}{copy}", analysis.sample));
    assert_eq!(text("beacon.exe"), format!("{}{copy}{copy}", analysis.sample));
    assert_eq!(text("marks.txt"), "/mark: clean\n/dev/vda: clean\n");
    assert_eq!(report.domains, ["c2.example.org"]);
    let url = format!("http://c2.example.org/beacon?id={token}");
    assert_eq!(report.urls.iter().collect::<BTreeSet<_>>(), BTreeSet::from([&url]));
    let [screenshot] = &report.screenshots.values().collect::<Vec<_>>()[..] else { panic!("{report:?}") };
    assert!(screenshot.starts_with(b"\xff\xd8") && screenshot.ends_with(b"\xff\xd9"));
}

/// Runs two analyses on the same machine.
fn assert_analyses(agent: Agent) {
    let Some(lab) = lab(1, agent) else { return };
    let cuckoo = lab.start(Manager::Host).unwrap();
    for token in ["first", "second"] {
        let [analysis] = &lab.submit(&[token]).unwrap()[..] else { panic!("several analyses") };
        let report = lab.wait(&cuckoo, analysis).unwrap();
        assert_facts(&report, analysis, token);
        assert_eq!(report.machine, "m1");
        println!("{token} analysis:\n{}", report.timeline);
    }
    cuckoo.end().unwrap();
    lab.lab().assert_clean();
}

/// Returns the number of analyses of the burst: `$MACHINERY_ANALYSES`, or a few.
fn burst() -> usize {
    std::env::var("MACHINERY_ANALYSES").map_or(6, |number| number.parse().unwrap())
}

#[test]
fn analyses_lack_nothing_when_many_wait_for_the_same_machines() {
    let Some(lab) = lab(4, Agent::Own) else { return };
    let cuckoo = lab.start(Manager::Host).unwrap();
    let tokens: Vec<_> = (1..=burst()).map(|number| format!("burst-{number}")).collect();
    let begun = Instant::now();
    let analyses = lab.submit(&tokens.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    for (analysis, token) in analyses.iter().zip(&tokens) {
        assert_facts(&lab.wait(&cuckoo, analysis).unwrap(), analysis, token);
    }
    println!("{} analyses took {:?}", tokens.len(), begun.elapsed());
    cuckoo.end().unwrap();
    lab.lab().assert_clean();
}

#[test]
fn task_fails_with_the_reason_when_its_machine_is_killed_and_the_next_one_is_clean() {
    let Some(lab) = lab(1, Agent::Own) else { return };
    let cuckoo = lab.start(Manager::Host).unwrap();
    let mut subscriber = Client::connect(&lab.lab().cwd().socket()).unwrap();
    subscriber.subscribe().unwrap();
    let lost = lab.submit(&["lost"]).unwrap().remove(0);
    subscriber.wait_for_state("m1", "running").unwrap();
    kill_process(lab.lab().qemu_of("m1").unwrap(), Signal::KILL).unwrap();
    let (state, errors) = lab.wait_for_failure(&cuckoo, &lost).unwrap();
    assert_eq!(state, "fatal_error", "{errors:?}");
    assert!(errors.iter().any(|error| error.contains("killed by signal 9")), "{errors:?}");
    let next = lab.submit(&["next"]).unwrap().remove(0);
    assert_facts(&lab.wait(&cuckoo, &next).unwrap(), &next, "next");
    cuckoo.end().unwrap();
    lab.lab().assert_clean();
}

#[test]
fn analyses_are_reported_and_begin_clean_when_the_agent_is_cuckoos() {
    assert_analyses(Agent::Cuckoo);
}

#[test]
fn analyses_are_reported_and_begin_clean_when_the_agent_is_ours() {
    assert_analyses(Agent::Own);
}
