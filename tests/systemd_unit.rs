//! The units for systemd are accepted, alone and with their drop-in.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use machinery_testkit::host;
use machinery_testkit::requirement;

const UNIT: &str = include_str!("../integrations/systemd/cuckoo-machinery.service");
const CLEANUP: &str = include_str!("../integrations/systemd/cuckoo-machinery-cleanup.service");
const DROP_IN: &str = include_str!("../integrations/systemd/plain-user.conf");

/// Returns the messages of `systemd-analyze verify`; `None` where there is no systemd.
fn verify(folder: &Path) -> Option<String> {
    let mut command = Command::new("systemd-analyze");
    command.arg("verify");
    for (name, text) in [("cuckoo-machinery", UNIT), ("cuckoo-machinery-cleanup", CLEANUP)] {
        let unit = folder.join(format!("{name}.service"));
        // The program need not be installed, and its path is checked.
        fs::write(&unit, text.replace("/usr/local/bin/cuckoo-machinery", "/bin/true")).unwrap();
        command.arg(unit);
    }
    let ran = requirement::SYSTEMD.or_skip(host::run_command(command).ok())?;
    // A container may lack units that systemd itself needs, which is no message about this one.
    let messages = ran.stderr.lines().filter(|line| line.contains("cuckoo-machinery"));
    Some(messages.map(|line| format!("{line}\n")).collect())
}

#[test]
fn units_are_accepted_alone_and_with_their_drop_in() {
    let folder = tempfile::tempdir().unwrap();
    let Some(messages) = verify(folder.path()) else { return };
    assert_eq!(messages, "");
    let drop_ins = ["cuckoo-machinery", "cuckoo-machinery-cleanup"]
        .map(|unit| folder.path().join(format!("{unit}.service.d")));
    for drop_ins in &drop_ins {
        fs::create_dir(drop_ins).unwrap();
        fs::write(drop_ins.join("plain-user.conf"), DROP_IN).unwrap();
    }
    assert_eq!(verify(folder.path()).unwrap(), "");
    // The control: an unknown key is reported.
    for drop_ins in &drop_ins {
        fs::write(drop_ins.join("wrong.conf"), "[Service]\nNoNewPrivilege=yes\n").unwrap();
        assert!(verify(folder.path()).unwrap().contains("NoNewPrivilege"));
        fs::remove_file(drop_ins.join("wrong.conf")).unwrap();
    }
}

/// Returns the settings of a unit's service, without those of these keys.
fn settings<'a>(unit: &'a str, without: &[&str]) -> Vec<&'a str> {
    let (_, service) = unit.split_once("[Service]").unwrap();
    let service = service.split("[Install]").next().unwrap_or(service);
    let settings = service.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    settings.filter(|line| !without.iter().any(|key| line.starts_with(&format!("{key}=")))).collect()
}

#[test]
fn cleanup_is_confined_as_the_host_and_starts_when_no_host_follows() {
    let of_a_host = [
        "Type",
        "NotifyAccess",
        "ExecStart",
        "ExecReload",
        "ExecStopPost",
        "Restart",
        "RestartSec",
        "WatchdogSec",
        "KillMode",
        "TimeoutStopSec",
        "TasksMax",
        "OOMPolicy",
        "OOMScoreAdjust",
        "Nice",
        "Delegate",
        "RuntimeDirectory",
        "RuntimeDirectoryPreserve",
    ];
    let of_the_cleanup = ["Type", "ExecCondition", "ExecStart"];
    assert_eq!(settings(UNIT, &of_a_host), settings(CLEANUP, &of_the_cleanup));
    for trigger in ["OnSuccess", "OnFailure"] {
        assert!(UNIT.lines().any(|line| line == format!("{trigger}=cuckoo-machinery-cleanup.service")));
    }
    // A restart of the host comes first.
    assert!(CLEANUP.lines().any(|line| line == "After=cuckoo-machinery.service"));
}

#[test]
fn unit_has_a_watchdog_that_restarts_the_host_and_spares_it_when_memory_runs_out() {
    let lines: Vec<&str> = UNIT.lines().collect();
    // `on-failure` includes the watchdog. Source: systemd.service(5).
    for setting in
        ["Type=notify", "NotifyAccess=main", "WatchdogSec=60", "Restart=on-failure", "OOMScoreAdjust=-500"]
    {
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

#[test]
fn host_alone_makes_the_folder_of_the_documented_wall_and_keeps_it() {
    let has = |unit: &str, setting: &str| unit.lines().any(|line| line == setting);
    let folder = "RuntimeDirectory=cuckoo-machinery";
    assert!(has(UNIT, folder) && has(UNIT, "RuntimeDirectoryPreserve=yes"));
    assert!(!has(CLEANUP, folder), "its end would remove the folder of a host that serves");
    assert!(include_str!("../docs/wall.md").contains("web_listen: /run/cuckoo-machinery/wall.sock"));
}
