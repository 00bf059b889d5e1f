//! The machine that VMCloak makes, in all steps: import, check, prepare, restore, stop.
//!
//! The machine has a sound card. On a host without one, QEMU prints 50 lines about that on its stderr at each
//! start. The machine's serial port goes to a relative path.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::{self, Guest};
use machinery_testkit::host;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::trace::{self, SystemCall, Trace};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// Creates a lab whose machine is in no configuration yet, as VMCloak leaves it.
fn unpacked() -> Lab {
    let lab = Lab::new(&[("m", Guest::Vmcloak, SnapshotFormat::Lz4)]).unwrap();
    change_args(&lab, |args| {
        let at = args.iter().position(|arg| arg == "-serial").unwrap();
        args[at + 1] = "file:./serial.log".to_owned();
    });
    let yaml = lab.yaml().unwrap();
    let (top, _) = yaml.split_once("machines:\n").unwrap();
    lab.write_yaml(top).unwrap();
    lab
}

/// Changes the arguments, and keeps VMCloak's other keys.
fn change_args(lab: &Lab, change: impl FnOnce(&mut Vec<String>)) {
    let file = &lab.folder("m").machineinfo;
    let mut info: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let mut args: Vec<String> = serde_json::from_value(info["machine"]["start_args"].take()).unwrap();
    change(&mut args);
    info["machine"]["start_args"] = json!(args);
    fs::write(file, info.to_string()).unwrap();
}

/// Restores the machine, and checks that the guest begins at the snapshot and that the serial port's file is in the
/// machine's own folder.
#[track_caller]
fn restores(lab: &Lab, client: &mut Client) {
    client.perform("restore_start", "m");
    let count = guest::master(lab.qemu(), Guest::Vmcloak).unwrap().snapshot_count().unwrap();
    assert_eq!(lab.folder("m").first_count(SOON).unwrap(), count + 1);
}

#[test]
fn vmcloak_machine_is_restored_when_it_was_imported_unchanged() {
    let lab = unpacked();
    let folder = lab.folder("m").dir.display().to_string();
    let imported = lab.run(&["import", "vmcloak", &folder]).unwrap();
    assert_eq!(imported.code, Some(0), "{imported:?}");
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    for (ahead, mode) in
        [("instant: off, standby: off", "plain"), ("standby: off", "instant"), ("standby: auto", "standby")]
    {
        lab.ahead(ahead).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        for _ in 0..2 {
            client.perform("prepare", "m");
            let ready = client.machine("m").unwrap()["ready"].clone();
            assert_eq!(ready["mode"], mode, "{ready}");
            restores(&lab, &mut client);
            client.perform("stop", "m");
        }
        let list = lab.run(&["list"]).unwrap();
        let (listed, log) = (format!("{}{}", list.stdout, list.stderr), host.log());
        for noise in ["ALSA", "alsa", "qemu-system-gui", "audio"] {
            assert!(!listed.contains(noise) && !log.contains(noise), "{noise}: {listed}\n{log}");
        }
        assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
        assert!(host.terminate().unwrap().success());
        lab.assert_clean();
    }
}

/// A computer that crashes has the old configuration or the new one.
#[test]
fn configuration_is_on_disk_when_an_import_has_ended() {
    let lab = unpacked();
    let trace = Trace::new(&["fsync", "rename", "renameat", "renameat2"]).unwrap();
    let mut import = host::command(lab.cwd()).unwrap();
    import.args(["import", "vmcloak"]).arg(&lab.folder("m").dir);
    trace.attach(&mut import);
    let ran = host::run_command(import).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let calls = trace.finish().unwrap();
    let is_rename = |call: &SystemCall| call.name.starts_with("rename") && call.args.contains("/qemu.yaml\"");
    let renamed = calls.iter().position(is_rename).unwrap();
    let is_synced = |call: &SystemCall| call.name == "fsync" && call.args.contains("/.import-");
    assert!(calls[..renamed].iter().any(is_synced), "{calls:?}");
    trace::position(&calls, renamed, "fsync", "/machineries").unwrap();
}

#[test]
fn reason_begins_with_qemus_messages_when_a_sound_card_prints_others() {
    let lab = unpacked();
    let folder = lab.folder("m").dir.display().to_string();
    assert_eq!(lab.run(&["import", "vmcloak", &folder]).unwrap().code, Some(0));
    change_args(&lab, |args| args.extend(["-m", "128"].map(str::to_owned)));
    lab.ahead("instant: off, standby: off").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let answer = client.act("restore_start", "m").unwrap();
    let reason = answer["reason"].as_str().unwrap();
    println!("{reason}");
    assert!(reason.contains("Size mismatch: pc.ram") && reason.len() < 1000, "{reason}");
    assert!(!reason.contains("ALSA") && !reason.contains("qemu-system-gui"), "{reason}");
    let list = lab.run(&["list"]).unwrap();
    let line = list.stdout.lines().find(|line| line.contains("disabled")).unwrap();
    assert!(line.contains("64 MiB of RAM, and start_args give 128 MiB"), "{line}");
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}
