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
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::lab::{Lab, TestNetwork};
use machinery_testkit::requirement;
use machinery_testkit::scratch::ScratchCwd;
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

/// Runs a Python module of tests; `change` may change its environment.
fn run(python: &Path, tests: &str, change: impl FnOnce(&mut Command)) {
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../integrations/cape");
    let mut command = Command::new(python);
    // Python must not write into the sources.
    command.args(["-B", "-W", "error::ResourceWarning", "-m", "unittest", "-v", tests]).current_dir(package);
    command.env("CUCKOO_MACHINERY", artifacts::program().unwrap());
    change(&mut command);
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {}: {error}", python.display()));
    let stderr = String::from_utf8_lossy(&output.stderr);
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{command:?}:\n{stderr}");
    eprint!("{stderr}");
}

fn run_on_double(tests: &str) {
    let Some(python) = cape_python() else { return };
    artifacts::plugin("double").unwrap();
    run(&python, tests, |_| ());
}

/// Returns the text of the lab's `qemu.yaml` with Linux machines: CAPE has an analyser for each platform.
fn as_linux(lab: &Lab) -> String {
    let yaml = lab.yaml().unwrap().replace("platform: windows", "platform: linux");
    yaml.replace("os_version: 10", "os_version: 12")
}

#[test]
fn export_has_each_machine_of_a_running_host() {
    let cwd = ScratchCwd::double(&[("m", "tags: [office]"), ("n", "")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let exported = host::run(&cwd, &["export", "cape"]).unwrap();
    assert_eq!(exported.code, Some(0), "{exported:?}");
    let socket = format!("socket = {}\n", cwd.socket().display());
    for words in
        ["[hosted]\nmachines = m,n\n", &socket, "[m]\nlabel = m\n", "tags = office,x64\n", "[n]\nlabel = n\n"]
    {
        assert!(exported.stdout.contains(words), "{words}: {}", exported.stdout);
    }
    drop(host);
    let failed = host::run(&cwd, &["export", "cape"]).unwrap();
    assert_eq!((failed.code, failed.stdout.as_str()), (Some(1), ""), "{failed:?}");
    assert!(failed.stderr.contains("no machinery host answers"), "{}", failed.stderr);
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
    let lab = Lab::new(&["m1", "m2", "m3"].map(|name| (name, Guest::Micro, SnapshotFormat::Plain))).unwrap();
    lab.write_yaml(&as_linux(&lab)).unwrap();
    run(&python, "tests.on_qemu", |command| {
        command.env("MACHINERY_CWD", lab.cwd().root());
    });
    lab.assert_clean();
}

#[test]
fn linux_analyses_run_in_parallel() {
    let Some(python) = cape_python() else { return };
    let Some(network) = TestNetwork::new().unwrap() else {
        requirement::NETWORK.is_met(false);
        return;
    };
    network.add_machines(2).unwrap();
    let machines = [1, 2].map(|number| (format!("m{number}"), Guest::Cape { number }));
    let lab =
        Lab::new(&machines.each_ref().map(|(name, guest)| (name.as_str(), *guest, SnapshotFormat::Plain)))
            .unwrap();
    let mut yaml = as_linux(&lab).replace("interface: lo", &format!("interface: {}", TestNetwork::BRIDGE));
    for (name, number) in [("m1", 1), ("m2", 2)] {
        yaml = yaml.replace(
            &format!("ip: {}", lab.folder(name).ip),
            &format!("ip: {}", TestNetwork::machine(number)),
        );
    }
    lab.write_yaml(&yaml).unwrap();
    lab.cwd()
        .change_cuckoo_yaml("listen_ip: 127.0.0.1", &format!("listen_ip: {}", TestNetwork::HOST))
        .unwrap();
    run(&python, "tests.on_linux", |command| {
        network.attach(command);
        command
            .env("MACHINERY_CWD", lab.cwd().root())
            .env("CAPE_RESULTSERVER", TestNetwork::HOST.to_string());
    });
    lab.assert_clean();
}
