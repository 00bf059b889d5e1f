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
use machinery_testkit::requirement;

/// Runs the unit tests in a folder of the package's tests.
fn run(python: &str, tests: &str) {
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../integrations/cuckoo3");
    artifacts::plugin("double").unwrap();
    let mut command = Command::new(python);
    // Python must not write into the sources.
    command.args(["-B", "-W", "error::ResourceWarning", "-m", "unittest", "discover", "-v", "-t", "."]);
    command.args(["-s", tests]).current_dir(package).env("CUCKOO_MACHINERY", artifacts::program().unwrap());
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {python}: {error}"));
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
    let python = std::env::var("CUCKOO3_PYTHON").ok().filter(|python| !python.is_empty());
    let Some(python) = requirement::CUCKOO3.or_skip(python) else { return };
    assert!(Path::new(&python).is_absolute(), "CUCKOO3_PYTHON must be an absolute path, and is {python}");
    run(&python, "tests/with_cuckoo3");
}
