//! Each run begins clean, whatever the previous run has written. Every image that a machine's arguments open
//! for writing gets an overlay for each run. A machine with an image that cannot have an overlay is refused.
//!
//! QEMU itself writes to the images, by the monitor command `qemu-io`, as a guest's driver would.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::guest::{DISK_PLACEHOLDER, Guest};
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::Pid;
use serde_json::{Value, json};

const STANDBY: &str = "instant: auto, standby: on";

/// The pattern and its place: not the first sector, which QEMU protects in an image of unknown format.
const WRITE: &str = "write -P 90 64k 4k";
const IS_WRITTEN: &str = "read -P 90 64k 4k";
const IS_CLEAN: &str = "read -P 0 64k 4k";

fn lab(names: &[&str]) -> Lab {
    let machines: Vec<_> = names.iter().map(|name| (*name, Guest::Micro, SnapshotFormat::Lz4)).collect();
    Lab::new(&machines).unwrap()
}

/// Creates an image of one MiB in the lab's folder, filled with zeros.
fn image(lab: &Lab, name: &str, format: &str) -> PathBuf {
    let path = lab.cwd().root().join(name);
    let mut create = Command::new(&lab.qemu().img);
    create.args(["create", "-q", "-f", format]).arg(&path).arg("1M");
    assert!(create.status().unwrap().success());
    path
}

fn hash(path: &Path) -> u32 {
    crc32fast::hash(&fs::read(path).unwrap())
}

/// Adds these arguments and a monitor to the machine.
fn add_args(lab: &Lab, machine: &str, args: &[String]) {
    lab.change_start_args(machine, |own| {
        own.extend_from_slice(args);
        let chardev = format!("socket,id=hmp,path={},server=on,wait=off", monitor(lab, machine).display());
        own.extend(["-chardev", &chardev, "-mon", "chardev=hmp,mode=readline"].map(str::to_owned));
    })
    .unwrap();
    lab.accept_unsafe_args(machine).unwrap();
}

fn args<const N: usize>(args: [&str; N]) -> Vec<String> {
    args.map(str::to_owned).to_vec()
}

fn monitor(lab: &Lab, machine: &str) -> PathBuf {
    lab.cwd().root().join(format!("{machine}.hmp"))
}

/// Lets the machine's QEMU write to the drive of that name.
fn write_to(lab: &Lab, machine: &str, drive: &str) {
    let mut stream = BufReader::new(UnixStream::connect(monitor(lab, machine)).unwrap());
    let answer = |stream: &mut BufReader<UnixStream>| {
        let mut said = Vec::new();
        while !said.ends_with(b"(qemu) ") {
            assert!(stream.read_until(b' ', &mut said).unwrap() > 0, "the monitor has closed");
        }
        String::from_utf8_lossy(&said).into_owned()
    };
    answer(&mut stream);
    for command in [WRITE, "flush"] {
        writeln!(stream.get_mut(), "qemu-io {drive} \"{command}\"").unwrap();
        let said = answer(&mut stream);
        assert!(!said.contains("rror"), "{said}");
    }
}

/// Reports whether the image holds this pattern, also while a QEMU has the image open.
fn holds(lab: &Lab, image: &Path, what: &str) -> bool {
    let mut read = Command::new(lab.qemu().img.with_file_name("qemu-io"));
    let read = read.args(["-U", "-r", "-c", what]).arg(image).output().unwrap();
    assert!(read.status.success() || !read.stdout.is_empty(), "{read:?}");
    read.status.success() && !String::from_utf8_lossy(&read.stdout).contains("failed")
}

/// Returns the files below the lab's folder that this process may write to, except its overlays, its outputs
/// and the RAM of its template. QEMU before 8.2 opens that RAM for writing to map it privately.
fn writable_files(lab: &Lab, process: Pid) -> Vec<PathBuf> {
    let proc = PathBuf::from(format!("/proc/{}", process.as_raw_nonzero()));
    let mut found = Vec::new();
    for descriptor in fs::read_dir(proc.join("fd")).unwrap().flatten() {
        let Ok(path) = fs::read_link(descriptor.path()) else { continue };
        let Ok(info) = fs::read_to_string(proc.join("fdinfo").join(descriptor.file_name())) else { continue };
        // The flags are octal; the last digit is the access mode.
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_ours =
            name.contains("_disposable") || name == "serial.log" || path.ends_with("m.template/ram");
        if path.starts_with(lab.cwd().root()) && !flags.ends_with('0') && !is_ours {
            found.push(path);
        }
    }
    found
}

#[test]
fn run_opens_no_file_for_writing_when_images_are_named_in_each_spelling() {
    let lab = lab(&["m"]);
    let raw = |n: usize| image(&lab, &format!("raw,{n}"), "raw").display().to_string();
    let comma = |path: String| path.replace(',', ",,");
    let qcow2 = image(&lab, "second.qcow2", "qcow2");
    let json = json!({"driver": "file", "filename": raw(1), "node-name": "s1", "auto-read-only": true});
    let nested = json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": raw(2)}});
    let more = [
        args(["-drive", &format!("file={},format=qcow2,if=none,id=d0", qcow2.display())]),
        args(["-drive", &format!("file={},if=none,id=d1,format=raw", comma(raw(0)))]),
        args(["-blockdev", &json.to_string()]),
        args(["-blockdev", r#"{"driver":"raw","node-name":"f1","file":"s1"}"#]),
        args(["-blockdev", &nested.to_string()]),
        args(["-blockdev", &format!("driver=file,node-name=f2,filename={}", comma(raw(3)))]),
        args(["-blockdev", &format!("raw,node-name=f3,file.driver=file,file.filename={}", comma(raw(4)))]),
        args(["-drive", &format!("file.filename={},if=none,id=d2,format=raw", comma(raw(5)))]),
        args(["-hdb", &raw(6)]),
        args(["-drive", &format!("file={},if=ide,index=2", comma(raw(7)))]),
        args(["-drive", &format!("file={},if=none,id=d3", lab.folder("m").disk.display())]),
    ];
    add_args(&lab, "m", &more.concat());
    let before = hash(&qcow2);
    let (mut host, mut client) = lab.serve().unwrap();
    client.perform("norestore_start", "m");
    // A guest that counts can use its disk, so the arguments are valid.
    lab.folder("m").first_count(std::time::Duration::from_secs(60)).unwrap();
    let qemu = lab.qemu_of("m").unwrap();
    assert_eq!(writable_files(&lab, qemu), Vec::<PathBuf>::new());
    for n in 1..=11 {
        assert!(lab.overlay("m", n).exists(), "{n}");
    }
    for drive in ["d0", "d1", "d2", "d3", "ide0-hd1"] {
        write_to(&lab, "m", drive);
    }
    client.perform("stop", "m");
    lab.assert_clean();
    assert_eq!(hash(&qcow2), before);
    assert!(fs::read(raw_path(&lab, 0)).unwrap().iter().all(|byte| *byte == 0));
    assert!(host.terminate().unwrap().success());
}

fn raw_path(lab: &Lab, n: usize) -> PathBuf {
    lab.cwd().root().join(format!("raw,{n}"))
}

#[test]
fn next_run_is_clean_when_one_has_written_to_every_image() {
    for ahead in ["instant: off, standby: off", "instant: auto, standby: off", STANDBY] {
        let lab = lab(&["m"]);
        let (second, third) = (image(&lab, "second.qcow2", "qcow2"), image(&lab, "third.raw", "raw"));
        let drives = [
            args(["-drive", &format!("file={},format=qcow2,if=none,id=second", second.display())]),
            args(["-drive", &format!("file={},format=raw,if=none,id=third", third.display())]),
        ];
        add_args(&lab, "m", &drives.concat());
        lab.ahead(ahead).unwrap();
        let before = (hash(&second), hash(&third));
        let (mut host, mut client) = lab.serve().unwrap();
        for _ in 0..2 {
            client.perform("prepare", "m");
            if ahead == STANDBY {
                assert_eq!(writable_files(&lab, lab.qemu_of("m").unwrap()), Vec::<PathBuf>::new());
            }
            client.perform("restore_start", "m");
            assert_eq!(writable_files(&lab, lab.qemu_of("m").unwrap()), Vec::<PathBuf>::new(), "{ahead}");
            for (drive, n) in [("second", 2), ("third", 3)] {
                let overlay = lab.overlay("m", n);
                assert!(holds(&lab, &overlay, IS_CLEAN), "{drive} is not clean ({ahead})");
                write_to(&lab, "m", drive);
                assert!(holds(&lab, &overlay, IS_WRITTEN), "{drive} was not written to");
            }
            client.perform("stop", "m");
        }
        assert_eq!((hash(&second), hash(&third)), before, "{ahead}");
        assert!(host.terminate().unwrap().success());
        lab.assert_clean();
    }
}

#[test]
fn machines_run_at_the_same_time_when_they_share_a_file_of_uefi_variables() {
    let lab = lab(&["m", "n"]);
    let code = lab.cwd().root().join("code.fd");
    fs::copy("/usr/share/seabios/bios-256k.bin", &code).unwrap();
    let vars = lab.cwd().root().join("vars.fd");
    fs::write(&vars, vec![0; 256 << 10]).unwrap();
    let flash = [
        args(["-drive", &format!("if=pflash,unit=0,format=raw,readonly=on,file={}", code.display())]),
        args(["-drive", &format!("if=pflash,unit=1,format=raw,file={}", vars.display())]),
    ];
    let before = hash(&vars);
    ["m", "n"].into_iter().for_each(|machine| add_args(&lab, machine, &flash.concat()));
    let (mut host, mut client) = lab.serve().unwrap();
    for _ in 0..2 {
        for machine in ["m", "n"] {
            client.perform("norestore_start", machine);
            assert_eq!(lab.folder(machine).first_count(std::time::Duration::from_secs(60)).unwrap(), 1);
            assert!(
                holds(&lab, &lab.overlay(machine, 2), IS_CLEAN),
                "{machine} sees variables of the last run"
            );
            write_to(&lab, machine, "pflash1");
            assert_eq!(writable_files(&lab, lab.qemu_of(machine).unwrap()), Vec::<PathBuf>::new());
        }
        ["m", "n"].into_iter().for_each(|machine| client.perform("stop", machine));
        lab.assert_clean();
        assert_eq!(hash(&vars), before);
    }
    assert!(host.terminate().unwrap().success());
}

#[test]
fn disk_is_not_written_to_when_the_placeholder_is_in_another_argument() {
    let lab = lab(&["m"]);
    let disk = &lab.folder("m").disk;
    let linked = lab.cwd().root().join("linked.qcow2");
    std::os::unix::fs::symlink(disk, &linked).unwrap();
    let before = hash(disk);
    for path in [disk, &linked] {
        add_args(&lab, "m", &args(["-name", &format!("guest={DISK_PLACEHOLDER}")]));
        let machineinfo = &lab.folder("m").machineinfo;
        let text = fs::read_to_string(machineinfo).unwrap();
        let named = text.replace(&format!("file={DISK_PLACEHOLDER}"), &format!("file={}", path.display()));
        assert_ne!(named, text);
        fs::write(machineinfo, named).unwrap();
        let (mut host, mut client) = lab.serve().unwrap();
        client.perform("restore_start", "m");
        let first = lab.folder("m").first_count(std::time::Duration::from_secs(60)).unwrap();
        assert_eq!(first, lab.restored_count().unwrap());
        write_to(&lab, "m", "ide0-hd0");
        assert!(holds(&lab, &lab.overlay("m", 2), IS_WRITTEN));
        client.perform("stop", "m");
        assert!(host.terminate().unwrap().success());
        assert_eq!(hash(disk), before);
        lab.assert_clean();
    }
    let check = lab.run(&["-v", "check"]).unwrap();
    assert!(check.stdout.contains("so its qcow2_path is not its disk"), "{check:?}");
}

#[test]
fn kept_overlays_are_there_until_the_next_start_when_the_operator_keeps_them() {
    let lab = lab(&["m"]);
    let second = image(&lab, "second.raw", "raw");
    add_args(
        &lab,
        "m",
        &args(["-drive", &format!("file={},format=raw,if=none,id=second", second.display())]),
    );
    lab.host_yaml("", ", keep_disposable_disks: true").unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    for _ in 0..2 {
        client.perform("restore_start", "m");
        let overlay = lab.overlay("m", 2);
        assert!(holds(&lab, &overlay, IS_CLEAN));
        write_to(&lab, "m", "second");
        client.perform("stop", "m");
        assert!(holds(&lab, &overlay, IS_WRITTEN) && lab.disposable("m").exists());
    }
    assert!(host.terminate().unwrap().success());
    // The next host removes the overlays, once they are not to be kept.
    lab.host_yaml("", "").unwrap();
    assert!(lab.host().unwrap().terminate().unwrap().success());
    lab.assert_clean();
}

#[test]
fn machine_is_refused_when_its_runs_cannot_be_clean() {
    for (option, value, what) in [
        ("-drive", "file=/dev/loop-control,format=raw,if=none,id=x", "the device /dev/loop-control"),
        ("-drive", "file=fat:rw:/tmp,format=raw,if=none,id=x", "a folder"),
        ("-fsdev", "local,id=f,path=/tmp,security_model=none", "a folder"),
        ("-tpmdev", "emulator,id=t,chardev=c", "TPM"),
        ("-drive", "file=nbd://127.0.0.1:1/x,if=none,id=x", "protocol nbd"),
    ] {
        let lab = lab(&["m", "n"]);
        lab.change_start_args("m", |own| own.extend([option, value].map(str::to_owned))).unwrap();
        let check = lab.run(&["-v", "check"]).unwrap();
        assert_eq!(check.code, Some(2), "{check:?}");
        let argument = format!("{option} {value}");
        for word in [what, &argument, "allow_shared_writes", "machine 'm'"] {
            assert!(check.stdout.contains(word), "{word} is not in {}", check.stdout);
        }
        let (mut host, mut client) = lab.serve().unwrap();
        for action in ["restore_start", "norestore_start"] {
            let answer = client.act(action, "m").unwrap();
            assert_eq!(answer["success"], false, "{value}");
        }
        let reason = client.machine("m").unwrap()["disabled_reason"].as_str().unwrap().to_owned();
        assert!(reason.contains(what) && reason.contains("allow_shared_writes"), "{reason}");
        client.perform("restore_start", "n");
        client.perform("stop", "n");
        assert!(host.terminate().unwrap().success());
        lab.assert_clean();
    }
}

#[test]
fn machine_runs_with_shared_writes_when_its_operator_allows_them() {
    let lab = lab(&["m"]);
    let shared = args(["-fsdev", "local,id=f,path=/tmp,security_model=none"]);
    lab.change_start_args("m", |own| own.extend(shared)).unwrap();
    lab.host_yaml("", ", machines: {m: {allow_shared_writes: true, unsafe_start_args: true}}").unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    assert!(check.stdout.contains("allow_shared_writes"), "{}", check.stdout);
    let (mut host, mut client) = lab.serve().unwrap();
    let warnings = client.machine("m").unwrap()["warnings"].to_string();
    assert!(warnings.contains("allow_shared_writes") && warnings.contains("-fsdev"), "{warnings}");
    client.perform("restore_start", "m");
    client.perform("stop", "m");
    assert!(host.terminate().unwrap().success());
}

#[test]
fn standby_is_made_anew_when_a_file_that_the_arguments_name_was_replaced() {
    let lab = lab(&["m"]);
    let root = lab.cwd().root().to_owned();
    let (iso, base) = (image(&lab, "x.iso", "raw"), image(&lab, "base.raw", "raw"));
    let second = root.join("second.qcow2");
    let mut create = Command::new(&lab.qemu().img);
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"]).arg(&second);
    assert!(create.current_dir(&root).status().unwrap().success());
    let files = [
        args(["-drive", &format!("file={},media=cdrom,if=none,id=cd", iso.display())]),
        args(["-drive", &format!("file={},format=qcow2,if=none,id=second", second.display())]),
    ];
    add_args(&lab, "m", &files.concat());
    lab.ahead(STANDBY).unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    for file in [&iso, &base] {
        client.perform("prepare", "m");
        let standing_by = lab.qemu_of("m").unwrap();
        let new = file.with_extension("new");
        fs::write(&new, vec![7; 1 << 20]).unwrap();
        fs::rename(&new, file).unwrap();
        let log = host.log().len();
        client.perform("restore_start", "m");
        assert_ne!(
            lab.qemu_of("m").unwrap(),
            standing_by,
            "{} is used although its file was replaced",
            file.display()
        );
        let change = format!("{} was changed", file.display());
        assert!(host.log()[log..].contains(&change), "not logged: {change}");
        client.perform("stop", "m");
    }
    client.perform("prepare", "m");
    let log = host.log().len();
    fs::remove_file(&base).unwrap();
    let answer = client.act("restore_start", "m").unwrap();
    let reason = answer["reason"].as_str().unwrap();
    assert!(
        reason.contains("base.raw") && reason.contains("second.qcow2"),
        "{answer}\n{}",
        &host.log()[log..]
    );
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

#[test]
fn import_is_refused_when_the_machines_runs_cannot_be_clean() {
    let lab = lab(&["m"]);
    let m = lab.folder("m");
    let empty = lab.yaml().unwrap().split("machines:").next().unwrap().to_owned() + "machines:\n";
    lab.write_yaml(&empty).unwrap();
    let mut info: Value = serde_json::from_str(&fs::read_to_string(&m.machineinfo).unwrap()).unwrap();
    let shared = ["-fsdev", "local,id=f,path=/tmp,security_model=none"].map(Value::from);
    info["machine"]["start_args"].as_array_mut().unwrap().extend(shared);
    fs::write(&m.machineinfo, info.to_string()).unwrap();
    let folder = m.dir.display().to_string();
    let import = lab.run(&["import", "vmcloak", &folder]).unwrap();
    assert_eq!(import.code, Some(2), "{import:?}");
    for word in ["-fsdev local", "allow_shared_writes", "machines.m."] {
        assert!(import.stderr.contains(word), "{word} is not in {}", import.stderr);
    }
    assert_eq!(lab.yaml().unwrap(), empty);
    lab.host_yaml("", ", machines: {m: {allow_shared_writes: true, unsafe_start_args: true}}").unwrap();
    let import = lab.run(&["import", "vmcloak", &folder]).unwrap();
    assert_eq!(import.code, Some(0), "{import:?}");
    assert!(lab.yaml().unwrap().contains("  m:"));
}
