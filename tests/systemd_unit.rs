//! The unit for systemd is accepted, alone and with its drop-in.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use machinery_testkit::host;
use machinery_testkit::requirement;

const UNIT: &str = include_str!("../integrations/systemd/cuckoo-machinery.service");
const DROP_IN: &str = include_str!("../integrations/systemd/plain-user.conf");

/// Returns the messages of `systemd-analyze verify`; `None` where there is no systemd.
fn verify(folder: &Path) -> Option<String> {
    let unit = folder.join("cuckoo-machinery.service");
    // The program need not be installed, and its path is checked.
    fs::write(&unit, UNIT.replace("/usr/local/bin/cuckoo-machinery", "/bin/true")).unwrap();
    let mut command = Command::new("systemd-analyze");
    command.arg("verify").arg(&unit);
    let ran = requirement::SYSTEMD.or_skip(host::run_command(command).ok())?;
    // A container may lack units that systemd itself needs, which is no message about this one.
    let messages = ran.stderr.lines().filter(|line| line.contains("cuckoo-machinery"));
    Some(messages.map(|line| format!("{line}\n")).collect())
}

#[test]
fn unit_is_accepted_alone_and_with_its_drop_in() {
    let folder = tempfile::tempdir().unwrap();
    let Some(messages) = verify(folder.path()) else { return };
    assert_eq!(messages, "");
    let drop_ins = folder.path().join("cuckoo-machinery.service.d");
    fs::create_dir(&drop_ins).unwrap();
    fs::write(drop_ins.join("plain-user.conf"), DROP_IN).unwrap();
    assert_eq!(verify(folder.path()).unwrap(), "");
    // The control: an unknown key is reported.
    fs::write(drop_ins.join("wrong.conf"), "[Service]\nNoNewPrivilege=yes\n").unwrap();
    assert!(verify(folder.path()).unwrap().contains("NoNewPrivilege"));
}

#[test]
fn unit_has_a_watchdog_that_restarts_the_host() {
    let lines: Vec<&str> = UNIT.lines().collect();
    // `on-failure` includes the watchdog. Source: systemd.service(5).
    for setting in ["Type=notify", "NotifyAccess=main", "WatchdogSec=60", "Restart=on-failure"] {
        assert!(lines.contains(&setting), "{setting}");
    }
}

#[test]
fn unit_delegates_its_control_group_and_leaves_it_writable() {
    let lines: Vec<&str> = UNIT.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(lines.contains(&"Delegate=cpu memory pids"));
    for breaks_the_jail in ["ProtectControlGroups", "PrivateDevices", "MemoryDenyWriteExecute", "ProtectProc"]
    {
        assert!(!lines.iter().any(|line| line.starts_with(breaks_the_jail)), "{breaks_the_jail}");
    }
}
