//! Whole analyses
#![allow(clippy::unwrap_used, clippy::panic)]
use std::path::Path;
use machinery_testkit::guest::analysis::Agent;
use machinery_testkit::lab::{AnalysisLab, Manager};

#[test]
fn analysis_is_reported() {
    let python = std::env::var("CUCKOO3_PYTHON").unwrap();
    let agent = if std::env::var("CUCKOO_AGENT").is_ok() { Agent::Cuckoo } else { Agent::Own };
    let lab = AnalysisLab::new(Path::new(&python), 1, agent).unwrap().unwrap();
    let cuckoo = lab.start(Manager::Host).unwrap();
    let a = lab.submit(&["one"]).unwrap();
    let r = lab.wait(&cuckoo, &a[0]).unwrap();
    println!("{r:?}");
    cuckoo.end().unwrap();
}
