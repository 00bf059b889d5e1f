//! Machines that somebody else made: arguments that run code, and images that name other files. `import`, `check` and
//! the host refuse them before any program opens or runs something of them.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

const STANDBY: &str = "instant: auto, standby: on";

fn lab(machines: &[(&str, Guest)]) -> Lab {
    let machines: Vec<_> =
        machines.iter().map(|(name, guest)| (*name, *guest, SnapshotFormat::Lz4)).collect();
    Lab::new(&machines).unwrap()
}

/// Adds arguments, and keeps VMCloak's other keys.
fn add_args(lab: &Lab, machine: &str, args: &[String]) {
    let file = &lab.folder(machine).machineinfo;
    let mut info: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    info["machine"]["start_args"].as_array_mut().unwrap().extend(args.iter().cloned().map(Value::from));
    fs::write(file, info.to_string()).unwrap();
}

/// Adds a bridge whose helper is a script in the machine's folder. Returns the file that the script makes.
fn add_script(lab: &Lab, machine: &str) -> PathBuf {
    let marker = lab.cwd().root().join("script-ran");
    let script = lab.cwd().script("helper", &format!(": > {}\nexit 1", marker.display())).unwrap();
    let netdev = format!("bridge,id=evil,br=br0,helper={}", script.display());
    add_args(lab, machine, &["-netdev".to_owned(), netdev]);
    marker
}

#[test]
fn foreign_folder_runs_nothing_when_it_is_imported_checked_and_served() {
    let lab = lab(&[("m", Guest::Vmcloak), ("n", Guest::Micro)]);
    let marker = add_script(&lab, "m");
    let written = lab.cwd().root().join("written");
    let more = ["-plugin", "/none/x.so", "-D", &written.display().to_string(), "-d", "guest_errors"];
    add_args(&lab, "m", &more.map(str::to_owned));
    let (yaml, folder) = (lab.yaml().unwrap(), lab.folder("m").dir.display().to_string());
    let empty = yaml.split("machines:").next().unwrap().to_owned() + "machines:\n";
    let refused =
        ["helper=", "runs a program", "-plugin /none/x.so", "-D ", "unsafe_start_args: true", "machines.m."];

    lab.write_yaml(&empty).unwrap();
    let import = lab.run(&["import", "vmcloak", &folder]).unwrap();
    assert_eq!((import.code, lab.yaml().unwrap()), (Some(2), empty), "{import:?}");
    lab.write_yaml(&yaml).unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    lab.ahead(STANDBY).unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    for action in ["prepare", "restore_start", "norestore_start"] {
        assert_eq!(client.act(action, "m").unwrap()["success"], false, "{action}");
    }
    let reason = client.machine("m").unwrap()["disabled_reason"].to_string();
    for word in refused {
        for said in [&import.stderr, &check.stdout, &reason] {
            assert!(said.contains(word), "{word} is not in {said}");
        }
    }
    client.perform("restore_start", "n");
    client.perform("stop", "n");
    assert!(host.terminate().unwrap().success());
    assert!(!marker.exists() && !written.exists());
    lab.assert_clean();
}

#[test]
fn unsafe_arguments_run_when_the_operator_accepts_them() {
    let lab = lab(&[("m", Guest::Vmcloak)]);
    let marker = add_script(&lab, "m");
    lab.accept_unsafe_args("m").unwrap();
    // A jail starts no helper of the arguments, whether the operator accepts them or not.
    let (mut jailed, mut client) = lab.serve().unwrap();
    assert_eq!(client.act("norestore_start", "m").unwrap()["success"], false);
    assert!(jailed.terminate().unwrap().success() && !marker.exists());
    lab.set_jail("off").unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    let machine = client.machine("m").unwrap();
    assert!(machine["warnings"].to_string().contains("unsafe_start_args"), "{machine}");
    assert!(!marker.exists());
    // The helper fails, and so does the start.
    assert_eq!(client.act("norestore_start", "m").unwrap()["success"], false);
    assert!(marker.exists());
    let check = lab.run(&["-v", "check"]).unwrap();
    assert!(check.stdout.contains("its unsafe arguments are accepted"), "{check:?}");
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

#[test]
fn machine_is_refused_when_its_arguments_name_a_file_elsewhere() {
    let lab = lab(&[("m", Guest::Micro)]);
    let secret = lab.cwd().root().join("secret");
    fs::write(&secret, vec![7; 4096]).unwrap();
    std::os::unix::fs::symlink(&secret, lab.folder("m").dir.join("x.iso")).unwrap();
    let secret = secret.display().to_string();
    for args in [["-cdrom", "x.iso"], ["-hdb", &secret], ["-kernel", &secret], ["-bios", &secret]] {
        lab.change_start_args("m", |own| own.extend(args.map(str::to_owned))).unwrap();
        let check = lab.run(&["-v", "check"]).unwrap();
        assert_eq!(check.code, Some(2), "{check:?}");
        assert!(check.stdout.contains("outside of the machine's folder"), "{args:?}: {check:?}");
    }
    lab.accept_unsafe_args("m").unwrap();
    lab.change_start_args("m", |own| own.extend(["-hdb", &secret].map(str::to_owned))).unwrap();
    assert_eq!(lab.run(&["-v", "check"]).unwrap().code, Some(0));
}

/// Replaces the disk by an image that names another file, as `qemu-img` makes it.
fn replace_disk(lab: &Lab, options: &[&str]) {
    let disk = &lab.folder("m").disk;
    fs::remove_file(disk).unwrap();
    let mut create = Command::new(&lab.qemu().img);
    create.args(["create", "-q", "-f", "qcow2"]).args(options).arg(disk).arg("1M");
    assert!(create.status().unwrap().success(), "{options:?}");
}

/// Checks that `check` and a host refuse the disk, and that a host which has loaded the machine before does so too.
#[track_caller]
fn assert_disk_is_refused(lab: &Lab, options: &[&str], words: &[&str]) {
    let disk = lab.folder("m").disk.clone();
    let sound = fs::read(&disk).unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    replace_disk(lab, options);
    for action in ["restore_start", "norestore_start"] {
        let answer = client.act(action, "m").unwrap().to_string();
        assert!(words.iter().all(|word| answer.contains(word)), "{options:?}: {answer}");
        client.act("enable_machine", "m").unwrap();
    }
    assert!(host.terminate().unwrap().success());
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    let (mut host, mut client) = lab.serve().unwrap();
    let reason = client.machine("m").unwrap()["disabled_reason"].to_string();
    for word in words.iter().copied().chain([disk.to_str().unwrap()]) {
        assert!(check.stdout.contains(word) && reason.contains(word), "{word}: {reason}\n{}", check.stdout);
    }
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
    fs::write(&disk, sound).unwrap();
}

#[test]
fn image_is_refused_when_it_names_a_secret() {
    let lab = lab(&[("m", Guest::Micro)]);
    let secret = lab.cwd().root().join("secret");
    fs::write(&secret, vec![7; 4096]).unwrap();
    let name = secret.to_str().unwrap();
    let json = json!({"driver": "raw", "file": {"driver": "file", "filename": name}});
    let json = format!("json:{json}");
    assert_disk_is_refused(&lab, &["-u", "-F", "raw", "-b", &json], &["is JSON", "rebase"]);
    assert_disk_is_refused(&lab, &["-F", "raw", "-b", name], &[name, "raw file outside", "convert"]);
    let data = lab.folder("m").dir.join("data.raw");
    let option = format!("data_file={}", data.display());
    assert_disk_is_refused(&lab, &["-o", &option], &["data_file", "data.raw"]);
    let owned = lab.folder("m").dir.join("base.qcow2");
    let mut create = Command::new(&lab.qemu().img);
    assert!(create.args(["create", "-q", "-f", "qcow2"]).arg(&owned).arg("1M").status().unwrap().success());
    if requirement::is_root() {
        std::os::unix::fs::chown(&owned, Some(65_534), None).unwrap();
        let words = ["base.qcow2", "belongs to the user 65534", "chown"];
        assert_disk_is_refused(&lab, &["-u", "-F", "qcow2", "-b", "base.qcow2"], &words);
    }
}

#[test]
fn image_is_refused_and_nothing_connects_when_it_names_a_server() {
    let lab = lab(&[("m", Guest::Micro)]);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("nbd://{}/x", server.local_addr().unwrap());
    server.set_nonblocking(true).unwrap();
    assert_disk_is_refused(&lab, &["-u", "-F", "raw", "-b", &url], &["a protocol", "nbd://"]);
    assert_eq!(server.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    // The image is dangerous: `qemu-img` connects.
    server.set_nonblocking(false).unwrap();
    let disk = lab.cwd().root().join("dangerous.qcow2");
    describe(&lab, &disk, &url, &server);
}

fn describe(lab: &Lab, disk: &Path, url: &str, server: &TcpListener) {
    let qemu_img = || Command::new(&lab.qemu().img);
    let made = qemu_img()
        .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", url])
        .arg(disk)
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    let mut describes = qemu_img().args(["info", "--backing-chain"]).arg(disk).spawn().unwrap();
    // The connection ends at once, and so does `qemu-img`.
    drop(server.accept().unwrap());
    assert!(!describes.wait().unwrap().success());
}
