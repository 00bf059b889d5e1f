//! The tests of the Python package `integrations/cuckoo3`, by which Cuckoo3 uses the host, with the host that
//! was built here.
//!
//! The tests without Cuckoo3 always run. The tests with Cuckoo3 run when `$CUCKOO3_PYTHON` names the Python
//! of an environment with Cuckoo3's packages, which are not on PyPI.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::guest::analysis::Agent;
use machinery_testkit::lab::AnalysisLab;
use machinery_testkit::requirement;

/// The network, the mounts and the processes of a test, which end with it.
const OWN_NAMESPACES: [&str; 13] = [
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "sh",
    "-c",
    // The shell reaps orphans.
    "\"$@\"; exit $?",
];

/// Runs the unit tests in a folder of the package's tests.
fn run(python: &str, tests: &str) {
    run_with(&[python], tests, &[]);
}

fn run_with(python: &[&str], tests: &str, environment: &[(&str, &Path)]) {
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../integrations/cuckoo3");
    for plugin in ["double", "example"] {
        artifacts::plugin(plugin).unwrap();
    }
    let mut command = Command::new(python[0]);
    command.args(&python[1..]).envs(environment.iter().copied());
    // Python must not write into the sources.
    command.args(["-B", "-W", "error::ResourceWarning", "-m", "unittest", "discover", "-v", "-t", "."]);
    command.args(["-s", tests]).current_dir(package).env("CUCKOO_MACHINERY", artifacts::program().unwrap());
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {python:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{command:?}:\n{stderr}");
    eprint!("{stderr}");
}

#[test]
fn adapter_tests_pass_when_cuckoo3_is_absent() {
    run("python3", "tests/alone");
}

#[test]
fn adapter_tests_pass_when_cuckoo3_is_installed() {
    let Some(python) = python_with_cuckoo3() else { return };
    run(&python, "tests/with_cuckoo3");
}

#[test]
fn adapter_tests_pass_when_main_has_three_nodes() {
    let Some(python) = python_with_cuckoo3() else { return };
    let lab = AnalysisLab::new(Path::new(&python), 2, Agent::Own).unwrap();
    let Some(lab) = requirement::NETWORK.or_skip(lab) else { return };
    let command: Vec<&str> = OWN_NAMESPACES.into_iter().chain(["sh", &python]).collect();
    run_with(&command, "tests/distributed", &[("QEMU_CWD", lab.lab().cwd().root())]);
}

/// Returns the Python in `$CUCKOO3_PYTHON`; `None` if the test may be skipped.
fn python_with_cuckoo3() -> Option<String> {
    let python = std::env::var("CUCKOO3_PYTHON").ok().filter(|python| !python.is_empty());
    let python = requirement::CUCKOO3.or_skip(python)?;
    assert!(Path::new(&python).is_absolute(), "CUCKOO3_PYTHON must be an absolute path, and is {python}");
    Some(python)
}
