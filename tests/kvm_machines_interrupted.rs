//! `machine create` and `machine snapshot` for the machinery `kvm` that do not reach their end: by a signal, a kill, or the
//! end of the domain. No domain, snapshot, folder or entry remains.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::process::Command;

use machinery_testkit::guest::Guest;
use machinery_testkit::host;
use machinery_testkit::lab::KvmLab;
use machinery_testkit::logged::LoggedCommand;
use rustix::process::Signal;

/// The steps of a new snapshot, as its log names them.
const STEPS: [&str; 6] = [
    "booting",
    "waiting for",
    "saving the memory",
    "building the save image",
    "restoring",
    "reverting the disk",
];
const MADE_BY: &str = "defining the domain";

/// Creates a lab with a domain in no configuration, whose disk and address are for the new one.
fn lab() -> KvmLab {
    let lab = KvmLab::new(&[("seed", Guest::Micro)]).unwrap();
    let yaml = format!("dsn: {}\ninterface: lo\nmachines: {{}}\n", lab.libvirtd().dsn());
    lab.cwd().write_yaml("kvm", &yaml).unwrap();
    lab.cwd().host_yaml("machineries: {kvm: {instant: on, standby: off}}\n").unwrap();
    lab
}

/// Returns the command that makes the machine `m`.
fn creation(lab: &KvmLab, more: &[&str]) -> Command {
    let seed = lab.machine("seed");
    let mut command = host::command(lab.cwd()).unwrap();
    command.args(["-v", "machine", "create", "m", "--machinery", "kvm", "--ip", &seed.ip, "--user"]);
    command.args(["--accel", "tcg", "--cpus", "1", "--ram", "32M", "--disk"]).arg(&seed.disk).args(more);
    command
}

fn virsh(lab: &KvmLab, arguments: &[&str]) -> Vec<String> {
    let listed = lab.libvirtd().virsh(arguments).unwrap();
    listed.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[track_caller]
fn assert_no_record(lab: &KvmLab, what: &str) {
    let records = lab.cwd().root().join("operational/generated/machinery-host/machines");
    assert_eq!(fs::read_dir(&records).map_or(0, Iterator::count), 0, "{what}");
    lab.assert_clean();
}

/// Expects that nothing of the machine exists.
#[track_caller]
fn assert_nothing_remains(lab: &KvmLab, what: &str) {
    let folder = lab.cwd().root().join("machines");
    let machines: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(machines, ["seed"], "{what}");
    assert_eq!(virsh(lab, &["list", "--all", "--name"]), ["lab-seed"], "{what}");
    assert!(lab.cwd().yaml("kvm").unwrap().ends_with("machines: {}\n"), "{what}");
    assert_no_record(lab, what);
}

#[test]
fn interrupted_creation_leaves_nothing_after_a_signal_at_any_step() {
    let lab = lab();
    let signals = [Signal::INT, Signal::TERM, Signal::HUP].into_iter().cycle();
    for (step, signal) in [MADE_BY].into_iter().chain(STEPS).zip(signals) {
        let mut creating = LoggedCommand::start(creation(&lab, &["--ready-after", "1"]));
        creating.wait_for(step);
        creating.signal(signal);
        let (code, log) = creating.end();
        assert!(code == Some(1) && log.contains("the command was interrupted"), "{step}: {code:?} {log}");
        assert_nothing_remains(&lab, step);
    }
}

#[test]
fn next_command_removes_what_a_killed_one_has_left() {
    let lab = lab();
    for (number, step) in [MADE_BY].into_iter().chain(STEPS).enumerate() {
        let mut creating = LoggedCommand::start(creation(&lab, &["--ready-after", "1"]));
        creating.wait_for(step);
        creating.signal(Signal::KILL);
        assert_eq!(creating.end().0, None);
        let clear: &[&str] = if number % 2 == 0 { &["machine", "clear"] } else { &["clean"] };
        let cleared = lab.run(clear).unwrap();
        assert_eq!(cleared.code, Some(0), "{step}: {cleared:?}");
        assert_nothing_remains(&lab, step);
    }
}

#[test]
fn failed_creation_leaves_nothing_when_the_domain_ends_or_libvirt_is_away() {
    let lab = lab();
    let mut creating = LoggedCommand::start(creation(&lab, &["--ready-after", "600"]));
    creating.wait_for("waiting for");
    lab.libvirtd().virsh(&["destroy", "m"]).unwrap();
    let (code, log) = creating.end();
    assert!(code == Some(1) && log.contains("the guest has ended"), "{code:?} {log}");
    assert_nothing_remains(&lab, "the domain was destroyed");

    let mut creating = LoggedCommand::start(creation(&lab, &["--ready-after", "600"]));
    creating.wait_for("waiting for");
    lab.libvirtd().kill_daemon().unwrap();
    creating.signal(Signal::INT);
    let (code, log) = creating.end();
    assert!(code == Some(1) && log.contains("machine clear"), "{code:?} {log}");
    lab.libvirtd().start_daemon().unwrap();
    let cleared = lab.run(&["machine", "clear"]).unwrap();
    assert!(cleared.code == Some(0) && cleared.stdout.contains("m: cleared"), "{cleared:?}");
    assert_nothing_remains(&lab, "libvirt was away");
}

#[test]
fn interrupted_command_leaves_its_machine_as_it_was() {
    let lab = lab();
    let made = host::run_command(creation(&lab, &["--ready-after", "1"])).unwrap();
    assert_eq!(made.code, Some(0), "{made:?}");
    let yaml = lab.cwd().yaml("kvm").unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for (step, signal) in STEPS.into_iter().zip([Signal::TERM, Signal::KILL].into_iter().cycle()) {
        let mut command = host::command(lab.cwd()).unwrap();
        command.args(["-v", "machine", "snapshot", "m", "--ready-after", "1"]);
        let mut taking = LoggedCommand::start(command);
        taking.wait_for(step);
        assert_eq!(client.machine("m").unwrap()["disabled"], true, "{step}");
        taking.signal(signal);
        let _ = taking.end();
        let cleared = lab.run(&["machine", "clear"]).unwrap();
        assert_eq!(cleared.code, Some(0), "{cleared:?}");
        assert_eq!(lab.cwd().yaml("kvm").unwrap(), yaml, "{step}");
        assert_eq!(virsh(&lab, &["snapshot-list", "--name", "m"]), ["clean", "installed"], "{step}");
        assert!(lab.cwd().root().join("machines/m/machineinfo.json").exists(), "{step}");
        assert_eq!(client.machine("m").unwrap()["disabled"], false, "{step}");
        let check = lab.run(&["--json", "check"]).unwrap();
        assert!(!check.stdout.contains("not prepared"), "{step}: {check:?}");
    }
    drop(client);
    drop(host);
    assert_no_record(&lab, "interrupted");
}

#[test]
fn snapshot_is_finished_when_a_host_starts_or_ends_during_it() {
    let lab = lab();
    let made = host::run_command(creation(&lab, &["--ready-after", "1"])).unwrap();
    assert_eq!(made.code, Some(0), "{made:?}");
    let taking = || {
        let mut command = host::command(lab.cwd()).unwrap();
        command.args(["-v", "machine", "snapshot", "m", "--ready-after", "5"]);
        let mut taking = LoggedCommand::start(command);
        taking.wait_for("waiting for");
        taking
    };
    let started = taking();
    let (mut host, mut client) = lab.serve().unwrap();
    assert_eq!(client.machine("m").unwrap()["disabled_reason"], "its snapshot is taken anew");
    let (code, log) = started.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(virsh(&lab, &["snapshot-list", "--name", "m"]), ["clean-2", "installed"]);
    assert_eq!(client.machine("m").unwrap()["disabled"], false);
    client.perform("restore_start", "m");
    client.perform("stop", "m");

    let ended = taking();
    assert!(host.terminate().unwrap().success());
    let (code, log) = ended.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(virsh(&lab, &["snapshot-list", "--name", "m"]), ["clean", "installed"]);
    let (mut host, mut client) = lab.serve().unwrap();
    client.perform("restore_start", "m");
    client.perform("stop", "m");
    assert!(host.terminate().unwrap().success());
    assert_no_record(&lab, "a host has started and ended");
}
