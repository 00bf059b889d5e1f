//! The state that a machine keeps outside of its memory and its disk: UEFI variables and a TPM. Each restore has the
//! snapshot's.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, GuestProbe, firmware};
use machinery_testkit::host;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::wait::wait_until;
use rustix::process::{Pid, Signal, getpgid, kill_process};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// The answer of a TPM that has done what was requested, and that to an index which does not exist or exists already.
/// Source: the TPM 2.0 Library, part 2, 6.6.
const SUCCESS: &str = "00000000";
const NO_INDEX: &str = "0000018b";
const INDEX_EXISTS: &str = "0000014c";

/// Makes a machine with UEFI and a TPM. Its disk is that of a seed which is in no configuration.
fn lab() -> (Lab, GuestProbe) {
    let lab = Lab::new(&[("seed", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let yaml = lab.yaml().unwrap();
    lab.write_yaml(&format!("{}machines:\n", yaml.split_once("machines:\n").unwrap().0)).unwrap();
    lab.ahead("standby: off").unwrap();
    let files = firmware::boot_files().unwrap().map(|path| path.display().to_string());
    let args = lab.cwd().root().join("m.args");
    let append = "console=ttyS0 quiet panic=-1";
    fs::write(
        &args,
        format!("-serial file:serial.log\n-kernel vmlinuz\n-initrd initramfs\n-append {append}\n"),
    )
    .unwrap();
    let (seed, args) = (lab.folder("seed"), args.display().to_string());
    let (ip, disk) = (seed.ip.clone(), seed.disk.display().to_string());
    let words = ["machine", "create", "m", "--user", "--accel", "tcg", "--cpus", "1", "--ram", "256M"];
    let more = ["--platform", "linux", "--uefi", "--tpm", "--ip", &ip, "--disk", &disk, "--args", &args];
    let files = ["--file", &files[0], "--file", &files[1]];
    // An emulated processor needs a minute to boot this firmware on a busy computer.
    let mut create = host::command(lab.cwd()).unwrap();
    let made = create.args([&words[..], &more, &files].concat()).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let probe = GuestProbe { name: "m".to_owned(), ip, serial: folder(&lab).join("serial.log") };
    (lab, probe)
}

fn folder(lab: &Lab) -> PathBuf {
    lab.cwd().root().join("machines/m")
}

/// Requests the state from the guest, after it has written the word, if there is one.
fn state(probe: &GuestProbe, word: &str) -> Value {
    let (status, body) = probe.get(&format!("/cgi-bin/firmware?{word}"), SOON).unwrap();
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

/// Returns the processes of TPMs of this lab.
fn tpms(lab: &Lab) -> Vec<PathBuf> {
    let root = lab.cwd().root().display().to_string();
    let is_tpm = |process: &PathBuf| {
        let read = |name: &str| fs::read(process.join(name)).unwrap_or_default();
        read("comm") == b"swtpm\n" && String::from_utf8_lossy(&read("environ")).contains(&root)
    };
    Path::new("/proc").read_dir().unwrap().flatten().map(|entry| entry.path()).filter(is_tpm).collect()
}

/// Restores the machine, and changes its state in the run. Returns the state of the snapshot.
fn run(client: &mut Client, lab: &Lab, probe: &GuestProbe) -> Value {
    client.perform("restore_start", "m");
    let before = state(probe, "");
    assert_eq!(before["variables"], "snapshot", "{before}");
    assert_eq!((&before["of_snapshot"], &before["of_run"]), (&SUCCESS.into(), &NO_INDEX.into()), "{before}");
    let after = state(probe, "run");
    assert_eq!((&after["extended"], &after["defined"]), (&SUCCESS.into(), &SUCCESS.into()), "{after}");
    assert_eq!((&after["variables"], &after["of_run"]), (&"runsnapshot".into(), &SUCCESS.into()), "{after}");
    assert_ne!(after["register"], before["register"]);
    assert_eq!(tpms(lab).len(), 1);
    client.perform("stop", "m");
    assert_eq!(tpms(lab), Vec::<PathBuf>::new());
    before
}

#[test]
fn variables_and_tpm_are_those_of_the_snapshot_in_each_run() {
    let (lab, probe) = lab();
    restores_the_snapshots_state(&lab, &probe);
    boots_with_the_snapshots_tpm_which_ends_with_its_qemu(&lab, &probe);
    has_a_new_tpm_in_a_new_snapshot(&lab, &probe);
    moves_with_its_variables_and_tpm(&lab, &probe);
    lab.assert_clean();
}

fn restores_the_snapshots_state(lab: &Lab, probe: &GuestProbe) {
    assert_eq!(tpms(lab), Vec::<PathBuf>::new());
    let kept = || ["efivars.fd", "tpm.state"].map(|name| fs::read(folder(lab).join(name)).unwrap());
    let (files, mut states) = (kept(), Vec::new());
    for (ahead, mode) in
        [("instant: off, standby: off", "plain"), ("standby: off", "instant"), ("standby: auto", "standby")]
    {
        lab.ahead(ahead).unwrap();
        let (mut host, mut client) = lab.serve().unwrap();
        for _ in 0..2 {
            client.perform("prepare", "m");
            let machine = client.machine("m").unwrap();
            assert_eq!(machine["ready"]["mode"], mode, "{machine}");
            assert_eq!(tpms(lab).len(), usize::from(mode == "standby"));
            states.push(run(&mut client, lab, probe));
        }
        assert_eq!(client.machine("m").unwrap()["errors"], serde_json::json!([]));
        assert!(host.terminate().unwrap().success());
        assert_eq!(tpms(lab), Vec::<PathBuf>::new());
    }
    states.dedup();
    assert_eq!(states.len(), 1, "{states:?}");
    assert_eq!(kept(), files, "a run changes files of the machine");
}

fn boots_with_the_snapshots_tpm_which_ends_with_its_qemu(lab: &Lab, probe: &GuestProbe) {
    lab.ahead("instant: off, standby: off").unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    client.perform("norestore_start", "m");
    probe.wait_for_text("guest ready", Duration::from_secs(180)).unwrap();
    let booted = state(probe, "");
    assert_eq!((&booted["defined"], &booted["of_snapshot"]), (&INDEX_EXISTS.into(), &SUCCESS.into()));
    // The TPM goes on in a run that another host adopts, and ends with QEMU also while no host watches.
    host.kill().unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    assert_eq!(client.machine("m").unwrap()["state"], "running");
    assert_eq!(state(probe, "run")["of_run"], SUCCESS);
    client.perform("stop", "m");
    assert_eq!(tpms(lab), Vec::<PathBuf>::new());
    client.perform("restore_start", "m");
    host.kill().unwrap();
    let tpm = tpms(lab)[0].file_name().unwrap().to_str().unwrap().parse().unwrap();
    // QEMU leads the group of its TPM.
    let qemu = getpgid(Pid::from_raw(tpm)).unwrap();
    kill_process(qemu, Signal::KILL).unwrap();
    wait_until("the TPM outlives its QEMU", || tpms(lab).is_empty());
    let (mut host, _) = lab.serve().unwrap();
    assert!(host.terminate().unwrap().success());
}

fn has_a_new_tpm_in_a_new_snapshot(lab: &Lab, probe: &GuestProbe) {
    let old = fs::read(folder(lab).join("tpm.state")).unwrap();
    let ran = lab.run(&["machine", "snapshot", "m"]).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_ne!(fs::read(folder(lab).join("tpm.state")).unwrap(), old);
    assert_secrets_are_private(lab);
    let (mut host, mut client) = lab.serve().unwrap();
    client.perform("restore_start", "m");
    // The old TPM has the index already.
    assert_eq!(state(probe, "")["defined"], SUCCESS);
    client.perform("stop", "m");
    assert!(host.terminate().unwrap().success());
}

fn assert_secrets_are_private(lab: &Lab) {
    for name in ["memory.zst", "tpm.state"] {
        let mode = fs::metadata(folder(lab).join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

fn moves_with_its_variables_and_tpm(lab: &Lab, probe: &GuestProbe) {
    let file = lab.cwd().root().join("m.machine").display().to_string();
    for words in [
        &["machine", "export", "m", &file][..],
        &["machine", "remove", "m", "-y"],
        &["machine", "import", &file],
    ] {
        let ran = lab.run(words).unwrap();
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }
    assert_secrets_are_private(lab);
    let (mut host, mut client) = lab.serve().unwrap();
    run(&mut client, lab, probe);
    assert!(host.terminate().unwrap().success());
}
