//! The tests of CAPE's machinery module `integrations/cape`, with the host that was built here.
//!
//! CAPE's own code runs, with a PostgreSQL of the test, when `$CAPE_SOURCE` names a checkout of CAPEv2 and `$CAPE_PYTHON`
//! the Python of an environment with its packages. Neither is on PyPI.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;

/// Returns CAPE's Python, unless this test is skipped.
fn cape_python() -> Option<PathBuf> {
    let given = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let (source, python) = requirement::CAPE.or_skip(given("CAPE_SOURCE").zip(given("CAPE_PYTHON")))?;
    for path in [&source, &python] {
        assert!(path.is_absolute(), "CAPE_SOURCE and CAPE_PYTHON must be absolute paths: {}", path.display());
    }
    Some(python)
}

/// Runs a Python module of tests; those of real machines get the CWD.
fn run(python: &Path, tests: &str, cwd: Option<&Path>) {
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../integrations/cape");
    let mut command = Command::new(python);
    // Python must not write into the sources.
    command.args(["-B", "-W", "error::ResourceWarning", "-m", "unittest", "-v", tests]).current_dir(package);
    command.env("CUCKOO_MACHINERY", artifacts::program().unwrap());
    if let Some(cwd) = cwd {
        command.env("MACHINERY_CWD", cwd);
    }
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {}: {error}", python.display()));
    let stderr = String::from_utf8_lossy(&output.stderr);
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{command:?}:\n{stderr}");
    eprint!("{stderr}");
}

fn run_on_double(tests: &str) {
    let Some(python) = cape_python() else { return };
    artifacts::plugin("double").unwrap();
    run(&python, tests, None);
}

/// Makes machines of QEMU, which CAPE uses as Linux machines.
fn lab(guest: Guest, names: &[&str]) -> Lab {
    let machines: Vec<_> = names.iter().map(|name| (*name, guest, SnapshotFormat::Plain)).collect();
    let lab = Lab::new(&machines).unwrap();
    let as_linux = lab.yaml().unwrap().replace("platform: windows", "platform: linux");
    lab.write_yaml(&as_linux.replace("os_version: 10", "os_version: 12")).unwrap();
    lab
}

#[test]
fn cape_uses_machines_of_the_host() {
    run_on_double("tests.test_machines");
}

#[test]
fn failures_take_one_task_and_no_machine() {
    run_on_double("tests.test_failures");
}

#[test]
fn machines_start_when_starts_of_others_hang() {
    run_on_double("tests.test_parallel");
}

#[test]
fn cape_uses_machines_of_qemu() {
    let Some(python) = cape_python() else { return };
    let lab = lab(Guest::Micro, &["m1", "m2", "m3"]);
    run(&python, "tests.on_qemu", Some(lab.cwd().root()));
    lab.assert_clean();
}
