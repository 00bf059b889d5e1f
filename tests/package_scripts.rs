//! The scripts of the Debian package, with stand-ins for the programs that they call.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

const POSTINST: &str = include_str!("../packaging/debian/cuckoo-machinery.postinst");

/// Runs the script of an upgrade. `timeout` is the stand-in for that program.
fn upgrade(timeout: &str) -> (Output, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let calls = path("calls");
    let systemctl = "case $* in *is-active*) ;; *Environment*) echo 'A=b \"CUCKOO_CWD=/srv/my cwd\" C=d';; *) exit 1;; esac";
    let record = format!("printf '%s|' \"$@\" >> {}", calls.display());
    for (name, script) in
        [("systemctl", systemctl), ("cuckoo-machinery", record.as_str()), ("timeout", timeout)]
    {
        fs::write(path(name), format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path(name), Permissions::from_mode(0o755)).unwrap();
    }
    let booted = folder.path().display().to_string();
    fs::write(path("postinst"), POSTINST.replace("/run/systemd/system", &booted)).unwrap();
    let search = format!("{}:/usr/bin:/bin", folder.path().display());
    let ran = Command::new("sh").arg(path("postinst")).arg("triggered").env("PATH", search).output().unwrap();
    (ran, fs::read_to_string(calls).unwrap_or_default())
}

#[test]
fn upgrade_asks_the_host_of_the_units_cwd_and_has_a_time_limit() {
    let (ran, calls) = upgrade("[ $1 = 120 ] && shift && exec \"$@\"");
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
    assert_eq!(calls, "--quiet|--cwd|/srv/my cwd|upgrade|");
    for (code, words) in [(124, "within 120 s"), (1, "serves on with its earlier files")] {
        let (ran, _) = upgrade(&format!("exit {code}"));
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success() && said.contains(words), "{code}: {said}");
    }
}
