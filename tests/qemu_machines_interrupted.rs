//! `machine create` that does not reach its end: by a signal, a kill, the end of QEMU, or a guest that is never ready.
//! Nothing of the machine remains.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::Command;

use machinery_testkit::guest::Guest;
use machinery_testkit::host;
use machinery_testkit::lab::Lab;
use machinery_testkit::logged::LoggedCommand;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Signal, kill_process};

/// The steps of a creation, as its log names them.
const STEPS: [&str; 5] =
    ["booting", "waiting for", "saving the memory", "building the template", "restoring"];

/// Creates a lab with a machine in no configuration, whose disk and address are for the new one.
fn lab() -> Lab {
    let lab = Lab::new(&[("seed", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let yaml = lab.yaml().unwrap();
    let (top, _) = yaml.split_once("machines:\n").unwrap();
    lab.write_yaml(&format!("{top}machines: {{}}\n")).unwrap();
    lab.ahead("standby: off").unwrap();
    lab
}

/// Returns the command that makes the machine `m`.
fn creation(lab: &Lab, more: &[&str]) -> Command {
    creation_of(lab, &lab.folder("seed").disk, more)
}

/// Returns the command that makes the machine `m` of that disk.
fn creation_of(lab: &Lab, disk: &Path, more: &[&str]) -> Command {
    let seed = lab.folder("seed");
    let mut command = host::command(lab.cwd()).unwrap();
    command
        .args(["-v", "machine", "create", "m", "--ip", &seed.ip, "--user", "--accel", "tcg", "--cpus", "1"]);
    command.args(["--ram", "32M", "--disk"]).arg(disk).args(more);
    command
}

fn start(lab: &Lab, more: &[&str]) -> LoggedCommand {
    LoggedCommand::start(creation(lab, more))
}

/// Expects that nothing of the machine exists.
#[track_caller]
fn assert_nothing_remains(lab: &Lab, what: &str) {
    let folder = lab.cwd().root().join("machines");
    let machines: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(machines, ["seed"], "{what}");
    let records = lab.cwd().root().join("operational/generated/machinery-host/machines");
    assert_eq!(fs::read_dir(&records).map_or(0, Iterator::count), 0, "{what}");
    assert!(lab.yaml().unwrap().ends_with("machines: {}\n"), "{what}: {}", lab.yaml().unwrap());
    lab.assert_clean();
}

#[test]
fn interrupted_creation_leaves_nothing_after_a_signal_at_any_step() {
    let lab = lab();
    for (step, signal) in STEPS.into_iter().zip([Signal::INT, Signal::TERM, Signal::HUP].into_iter().cycle())
    {
        let mut creating = start(&lab, &["--ready-after", "1"]);
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
    for (number, step) in STEPS.into_iter().enumerate() {
        let mut creating = start(&lab, &["--ready-after", "1"]);
        creating.wait_for(step);
        // The command at work is left alone.
        let clear = lab.run(&["machine", "clear"]).unwrap();
        assert!(clear.code == Some(0) && clear.stdout.is_empty(), "{clear:?}");
        creating.signal(Signal::KILL);
        assert_eq!(creating.end().0, None);
        let clear: &[&str] = if number % 2 == 0 { &["machine", "clear"] } else { &["clean"] };
        let cleared = lab.run(clear).unwrap();
        assert_eq!(cleared.code, Some(0), "{step}: {cleared:?}");
        assert!(number % 2 != 0 || cleared.stdout.contains("m: cleared"), "{step}: {cleared:?}");
        assert_nothing_remains(&lab, step);
    }
}

#[test]
fn failed_creation_leaves_nothing_when_qemu_ends_or_the_guest_is_never_ready() {
    let lab = lab();
    let mut creating = start(&lab, &["--ready-after", "600"]);
    creating.wait_for("waiting for");
    let overlay = lab.cwd().root().join("machines/m/m_disposable.qcow2").display().to_string();
    let processes = machinery_testkit::processes::list().unwrap();
    let (qemu, _) = processes.iter().find(|(_, command)| command.contains(&overlay)).unwrap();
    kill_process(*qemu, Signal::KILL).unwrap();
    let (code, log) = creating.end();
    assert!(
        code == Some(1) && log.contains("the guest has ended") && log.contains("signal 9"),
        "{code:?} {log}"
    );
    assert_nothing_remains(&lab, "QEMU was killed");

    let screen = lab.cwd().root().join("screen.png");
    let creating = start(&lab, &["--timeout", "3", "--screenshot", screen.to_str().unwrap()]);
    let (code, log) = creating.end();
    assert!(code == Some(1) && log.contains("has not answered within 3 s; screen 720x400"), "{code:?} {log}");
    assert!(fs::read(&screen).unwrap().starts_with(b"\x89PNG"));
    assert_nothing_remains(&lab, "no agent");

    lab.cwd().change_host_yaml("free_space_reserve: 0", "free_space_reserve: 1000 TiB").unwrap();
    let (code, log) = start(&lab, &["--ready-after", "1"]).end();
    assert!(code == Some(1) && log.contains("free"), "{code:?} {log}");
    assert_nothing_remains(&lab, "no space");
}

#[test]
fn machine_of_one_name_or_disk_is_made_by_one_command_at_a_time() {
    let lab = lab();
    let mut creating = start(&lab, &["--ready-after", "600"]);
    creating.wait_for("waiting for");
    let second = host::run_command(creation(&lab, &["--ready-after", "1"])).unwrap();
    assert!(second.code == Some(1) && second.stderr.contains("another command boots the disk"), "{second:?}");
    let copy = lab.cwd().root().join("copy.qcow2");
    fs::copy(&lab.folder("seed").disk, &copy).unwrap();
    let second = host::run_command(creation_of(&lab, &copy, &["--ready-after", "1"])).unwrap();
    assert!(second.code == Some(1) && second.stderr.contains("another command is at work"), "{second:?}");
    let clean = lab.run(&["clean"]).unwrap();
    assert!(clean.code == Some(1) && clean.stderr.contains("is at work on this machine"), "{clean:?}");
    creating.signal(Signal::INT);
    assert_eq!(creating.end().0, Some(1));
    assert_nothing_remains(&lab, "interrupted");
}

#[test]
fn leftovers_are_ended_when_the_folder_of_their_machine_is_gone() {
    let lab = lab();
    let mut creating = start(&lab, &["--ready-after", "600"]);
    creating.wait_for("waiting for");
    creating.signal(Signal::KILL);
    assert_eq!(creating.end().0, None);
    fs::remove_dir_all(lab.cwd().root().join("machines/m")).unwrap();
    let cleared = lab.run(&["machine", "clear"]).unwrap();
    assert!(cleared.code == Some(0) && cleared.stdout.contains("m: cleared"), "{cleared:?}");
    assert_nothing_remains(&lab, "no folder");
}

#[test]
fn interrupted_command_leaves_its_machine_as_it_was() {
    let lab = lab();
    let made = host::run_command(creation(&lab, &["--ready-after", "1"])).unwrap();
    assert_eq!(made.code, Some(0), "{made:?}");
    let folder = lab.cwd().root().join("machines");
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let content = || {
        ["disk.qcow2", "memory.zst", "machineinfo.json"]
            .map(|name| fs::read(folder.join("m").join(name)).unwrap())
    };
    let (before, yaml) = (content(), lab.yaml().unwrap());
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let snapshot = || {
        let mut command = host::command(lab.cwd()).unwrap();
        command.args(["-v", "machine", "snapshot", "m", "--ready-after", "1"]);
        LoggedCommand::start(command)
    };
    for (step, signal) in STEPS.into_iter().zip([Signal::TERM, Signal::KILL].into_iter().cycle()) {
        let mut taking = snapshot();
        taking.wait_for(step);
        assert_eq!(client.machine("m").unwrap()["disabled"], true, "{step}");
        taking.signal(signal);
        let _ = taking.end();
        let cleared = lab.run(&["machine", "clear"]).unwrap();
        assert_eq!(cleared.code, Some(0), "{cleared:?}");
        assert_eq!((names(), lab.yaml().unwrap()), (vec!["m".into(), "seed".into()], yaml.clone()), "{step}");
        assert!(content() == before, "{step}");
        assert_eq!(client.machine("m").unwrap()["disabled"], false, "{step}");
    }
    drop(client);
    drop(host);
    let mut command = host::command(lab.cwd()).unwrap();
    command.args(["-v", "machine", "export", "m"]).arg(folder.join("m.machine"));
    let mut exporting = LoggedCommand::start(command);
    exporting.wait_for("flattening");
    exporting.signal(Signal::TERM);
    // A fast export has ended already.
    let is_done = exporting.end().0 == Some(0);
    let expected = if is_done { &["m", "m.machine", "seed"][..] } else { &["m", "seed"] };
    assert_eq!(names(), expected);
    lab.assert_clean();
}

#[test]
fn snapshot_is_finished_when_a_host_starts_or_ends_during_it() {
    let lab = lab();
    let made = host::run_command(creation(&lab, &["--ready-after", "1"])).unwrap();
    assert_eq!(made.code, Some(0), "{made:?}");
    // The standby of a host has the machine's address, and so would the guest of the snapshot.
    lab.ahead("standby: on").unwrap();
    let memory = lab.cwd().root().join("machines/m/memory.zst");
    let taking = |lab: &Lab| {
        let mut command = host::command(lab.cwd()).unwrap();
        command.args(["-v", "machine", "snapshot", "m", "--ready-after", "3"]);
        let mut taking = LoggedCommand::start(command);
        taking.wait_for("waiting for");
        taking
    };
    let before = fs::read(&memory).unwrap();
    let started = taking(&lab);
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    let held = client.machine("m").unwrap();
    assert_eq!(
        (&held["disabled_reason"], &held["state"]),
        (&"its snapshot is taken anew".into(), &"poweroff".into())
    );
    let (code, log) = started.end();
    assert_eq!(code, Some(0), "{log}");
    let after = fs::read(&memory).unwrap();
    assert_ne!(before, after);
    assert_eq!(client.machine("m").unwrap()["disabled"], false);
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);

    let ended = taking(&lab);
    assert!(host.terminate().unwrap().success());
    let (code, log) = ended.end();
    assert_eq!(code, Some(0), "{log}");
    assert_ne!(fs::read(&memory).unwrap(), after);
    let mut host = lab.host().unwrap();
    assert_eq!(host.client().unwrap().machine("m").unwrap()["disabled"], false);
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}
