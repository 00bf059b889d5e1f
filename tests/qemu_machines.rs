//! `machine`: machines are made of a disk, restored by a host, saved anew, carried to another CWD, and removed.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery_testkit::artifacts;
use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, GuestProbe, Marks};
use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::lab::{Lab, TestNetwork};
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::wait::wait_until;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// The time for an emulated processor to run the firmware.
const BOOT: Duration = Duration::from_secs(180);

/// Creates a lab whose machines are in no configuration. Their disks, addresses and boot files are for new machines.
fn lab(seeds: &[&str], guest: Guest) -> Lab {
    let seeds: Vec<_> = seeds.iter().map(|name| (*name, guest, SnapshotFormat::Lz4)).collect();
    let lab = Lab::new(&seeds).unwrap();
    let yaml = lab.yaml().unwrap();
    let (top, _) = yaml.split_once("machines:\n").unwrap();
    lab.write_yaml(&format!("# the operator's\n{top}machines:\n  # all of them\n")).unwrap();
    lab.ahead("standby: off").unwrap();
    lab
}

/// Returns the arguments of `machine create` for a machine with the disk and the address of a seed.
fn creation(lab: &Lab, name: &str, seed: &str) -> Vec<String> {
    let seed = lab.folder(seed);
    let args = lab.cwd().root().join(format!("{name}.args"));
    let mut text = "-serial file:serial.log\n".to_owned();
    let mut words =
        vec!["machine", "create", name, "--ip", &seed.ip, "--user", "--accel", "tcg", "--cpus", "1"];
    let disk = seed.disk.display().to_string();
    words.extend(["--disk", &disk]);
    let boot = |option: &str| {
        let at = seed.start_args.iter().position(|arg| arg == option)?;
        Some(seed.start_args[at + 1].clone())
    };
    let (kernel, initrd) = (boot("-kernel"), boot("-initrd"));
    if let Some((kernel, initrd)) = kernel.as_ref().zip(initrd.as_ref()) {
        let name = |path: &str| Path::new(path).file_name().unwrap().to_str().unwrap().to_owned();
        text += &format!(
            "-kernel {}\n-initrd {}\n-append console=ttyS0 quiet panic=-1\n",
            name(kernel),
            name(initrd)
        );
        words.extend(["--platform", "linux", "--os-version", "12", "--ram", "256M", "--tags", "apache,perl"]);
        words.extend(["--file", kernel, "--file", initrd]);
    } else {
        words.extend(["--ram", "32M", "--ready-after", "1"]);
    }
    fs::write(&args, text).unwrap();
    let args = args.display().to_string();
    words.extend(["--args", &args]);
    words.into_iter().map(str::to_owned).collect()
}

fn run(lab: &Lab, words: &[String]) -> CommandOutput {
    lab.run(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
}

#[track_caller]
fn succeeds(ran: &CommandOutput) -> &CommandOutput {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran
}

fn folder_of(lab: &Lab, name: &str) -> PathBuf {
    lab.cwd().root().join("machines").join(name)
}

fn probe(lab: &Lab, name: &str, ip: &str) -> GuestProbe {
    GuestProbe { name: name.to_owned(), ip: ip.to_owned(), serial: folder_of(lab, name).join("serial.log") }
}

/// Returns the arguments of `machine create` for a machine on the bridge of the lab's network.
fn bridged(lab: &Lab) -> Vec<String> {
    let mut words = creation(lab, "m", "seed");
    let user = words.iter().position(|word| word == "--user").unwrap();
    words.splice(user..=user, ["--bridge", TestNetwork::BRIDGE].map(str::to_owned));
    // The address of the guest is an argument of its kernel.
    let (args, of_seed) = (lab.cwd().root().join("m.args"), &lab.folder("seed").start_args);
    let append = &of_seed[of_seed.iter().position(|arg| arg == "-append").unwrap() + 1];
    let text = fs::read_to_string(&args).unwrap().replace("console=ttyS0 quiet panic=-1", append);
    fs::write(&args, text.replace("file:serial.log", "file:%MACHINE%.log")).unwrap();
    words
}

/// Returns a command in the network of the lab, which may use its bridge. `name` is that of a scratch folder.
fn on_bridge(lab: &Lab, name: &str) -> std::process::Command {
    let mut command = host::command(lab.cwd()).unwrap();
    allow_bridge(lab, name, &mut command);
    command
}

fn allow_bridge(lab: &Lab, name: &str, command: &mut std::process::Command) {
    let scratch = lab.cwd().root().join(name);
    fs::create_dir(&scratch).unwrap();
    lab.network().attach(command);
    lab.network().allow_bridge(command, TestNetwork::BRIDGE, &scratch).unwrap();
}

/// Restores the Linux machine twice, and expects the snapshot's marks in RAM and on the disk each time.
#[track_caller]
fn restores_clean(client: &mut Client, probe: &GuestProbe) {
    let of_snapshot = Marks { ram: "snapshot".to_owned(), disk: "snapshot".to_owned() };
    for _ in 0..2 {
        client.perform("restore_start", &probe.name);
        assert_eq!(probe.marks(SOON).unwrap(), of_snapshot);
        assert_ne!(probe.mark("run", "run", SOON).unwrap(), of_snapshot);
        client.perform("stop", &probe.name);
    }
}

/// Expects that no record of an unfinished machine remains.
#[track_caller]
fn assert_finished(lab: &Lab) {
    let records = lab.cwd().root().join("operational/generated/machinery-host/machines");
    assert_eq!(fs::read_dir(&records).map_or(0, Iterator::count), 0);
    lab.assert_clean();
}

#[test]
fn machine_of_a_disk_is_restored_and_moves_to_another_cwd() {
    let lab = lab(&["seed", "other"], Guest::Linux { ram_mib: 256, noise_mib: 0 });
    let ran = run(&lab, &creation(&lab, "lin", "seed"));
    let stdout = &succeeds(&ran).stdout;
    assert!(stdout.contains("lin: created in") && stdout.contains("its restores are instant"), "{ran:?}");
    assert_finished(&lab);
    let yaml = lab.yaml().unwrap();
    assert!(
        yaml.starts_with("# the operator's\n") && yaml.contains("machines:\n  # all of them\n  lin:\n"),
        "{yaml}"
    );
    succeeds(&lab.run(&["check"]).unwrap());

    let (mut host, mut client) = lab.serve().unwrap();
    let listed = client.machine("lin").unwrap();
    assert!(listed["warnings"].as_array().is_none_or(Vec::is_empty), "{listed}");
    let expected = json!(["linux", "12", lab.folder("seed").ip, ["apache", "perl"], 8000]);
    assert_eq!(
        json!(["platform", "os_version", "ip", "tags", "agent_port"].map(|key| &listed[key])),
        expected
    );
    restores_clean(&mut client, &probe(&lab, "lin", &lab.folder("seed").ip));
    assert!(host.terminate().unwrap().success());

    let file = lab.cwd().root().join("lin.machine");
    let exported = lab.run(&["machine", "export", "lin", file.to_str().unwrap()]).unwrap();
    assert!(succeeds(&exported).stderr.contains("serial.log"), "{exported:?}");
    let second = self::lab(&["seed"], Guest::Linux { ram_mib: 256, noise_mib: 0 });
    let ip = second.folder("seed").ip.clone();
    let import = ["machine", "import", file.to_str().unwrap(), "--name", "moved", "--ip", &ip];
    // The disk of the archive depends on no other.
    fs::remove_dir_all(folder_of(&lab, "lin")).unwrap();
    succeeds(&second.run(&import).unwrap());
    assert_finished(&second);
    let (mut host, mut client) = second.serve().unwrap();
    restores_clean(&mut client, &probe(&second, "moved", &ip));
    assert!(host.terminate().unwrap().success());
    let again = second.run(&["machine", "snapshot", "moved"]).unwrap();
    assert!(again.code == Some(2) && again.stderr.contains("from an archive"), "{again:?}");
}

#[test]
fn running_host_gets_the_machine_its_new_snapshot_and_its_removal() {
    let lab = lab(&["seed"], Guest::Micro);
    let (mut host, mut client) = lab.serve().unwrap();
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    let probe = probe(&lab, "m", &lab.folder("seed").ip);
    client.perform("restore_start", "m");
    let first = probe.first_count(SOON).unwrap();
    assert!(first > 1, "the guest continues, and does not boot: {first}");
    // A machine that is on is neither saved nor removed.
    for words in [&["snapshot", "m"][..], &["remove", "m", "--yes"]] {
        let refused = lab.run(&[&["machine"], words].concat()).unwrap();
        assert!(
            refused.code == Some(1) && refused.stderr.contains("the running host uses the machine"),
            "{refused:?}"
        );
    }
    client.perform("stop", "m");

    let identity = |name: &str| fs::metadata(folder_of(&lab, "m").join(name)).unwrap().ino();
    let before = ["disk.qcow2", "memory.zst"].map(identity);
    fs::write(folder_of(&lab, "m").join("notes.log"), "the operator's").unwrap();
    succeeds(&lab.run(&["machine", "snapshot", "m", "--ready-after", "2"]).unwrap());
    assert_eq!(fs::read_to_string(folder_of(&lab, "m").join("notes.log")).unwrap(), "the operator's");
    let after = ["disk.qcow2", "memory.zst"].map(identity);
    assert!(before[0] != after[0] && before[1] != after[1], "{before:?} {after:?}");
    assert_eq!(client.machine("m").unwrap()["disabled"], json!(false));
    client.perform("restore_start", "m");
    assert!(probe.first_count(SOON).unwrap() > first, "it was saved later");
    client.perform("stop", "m");

    let names =
        || fs::read_dir(lab.cwd().root().join("machines")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names().count(), 2, "{:?}", names().collect::<Vec<_>>());
    let unasked = lab.run(&["machine", "remove", "m"]).unwrap();
    assert!(unasked.code == Some(2) && unasked.stderr.contains("--yes"), "{unasked:?}");
    let removed = lab.run(&["--json", "machine", "remove", "m", "--yes"]).unwrap();
    let answer: Value = serde_json::from_str(&succeeds(&removed).stdout).unwrap();
    assert_eq!(answer["removed"], json!([folder_of(&lab, "m")]));
    assert!(!folder_of(&lab, "m").exists() && client.machine("m").is_err());
    assert!(lab.yaml().unwrap().ends_with("machines:\n  # all of them\n"), "{}", lab.yaml().unwrap());
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}

#[test]
fn machine_of_a_new_cwd_needs_no_further_configuration() {
    let lab = lab(&["seed"], Guest::Micro);
    fs::remove_file(lab.cwd().root().join("conf/machineries/qemu.yaml")).unwrap();
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    succeeds(&lab.run(&["check"]).unwrap());
    let (mut host, mut client) = lab.serve().unwrap();
    client.perform("restore_start", "m");
    client.perform("stop", "m");
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}

#[test]
fn machine_of_a_disk_meets_the_requirements_of_the_interface() {
    let lab = lab(&["seed"], Guest::Micro);
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    let conf = lab.cwd().root().join("conf");
    let mut conformance = host::command(lab.cwd()).unwrap();
    conformance.arg("conformance").arg(artifacts::plugin("qemu").unwrap());
    conformance.arg("--config").arg(conf.join("machineries/qemu.yaml"));
    conformance.arg("--host-config").arg(conf.join("machinery-host.yaml"));
    // It may take longer than a command of the testkit.
    let ran = conformance.output().unwrap();
    let stdout = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success() && stdout.contains(" passed, 0 failed"), "{stdout}");
    assert_finished(&lab);
}

#[test]
fn machine_of_another_tool_is_removed_only_with_its_files() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let refused = lab.run(&["machine", "remove", "m", "--yes"]).unwrap();
    assert!(refused.code == Some(2) && refused.stderr.contains("--files"), "{refused:?}");
    for words in [&["snapshot", "m"][..], &["export", "m", "m.machine"]] {
        let refused = lab.run(&[&["machine"], words].concat()).unwrap();
        assert!(
            refused.code == Some(2) && refused.stderr.contains("has not made this machine"),
            "{refused:?}"
        );
    }
    let note = lab.folder("m").dir.join("note");
    fs::write(&note, "the operator's").unwrap();
    succeeds(&lab.run(&["machine", "remove", "m", "--yes", "--files"]).unwrap());
    assert!(note.exists() && !lab.folder("m").disk.exists() && !lab.yaml().unwrap().contains("qcow2_path"));
}

#[test]
fn wrong_input_is_refused_with_its_reason_and_nothing_is_made() {
    let lab = lab(&["seed"], Guest::Micro);
    let disk = lab.folder("seed").disk.display().to_string();
    let raw = lab.cwd().root().join("raw.img");
    fs::write(&raw, [0; 4096]).unwrap();
    let (raw, ip) = (raw.display().to_string(), lab.folder("seed").ip.clone());
    let unsafe_args = lab.cwd().root().join("unsafe.args");
    fs::write(&unsafe_args, "-drive file=/etc/shadow,format=raw\n").unwrap();
    let unsafe_args = unsafe_args.display().to_string();
    let base = ["machine", "create", "m", "--accel", "tcg", "--ready-after", "1"];
    for (more, code, expected) in [
        (&["--disk", &disk, "--ip", &ip][..], 2, "--bridge <BRIDGE>|"),
        (&["--disk", &disk, "--ip", "10.0.0.1", "--user"], 2, "not a loopback address"),
        (&["--disk", &disk, "--ip", "none", "--user"], 2, "--ip"),
        (&["--disk", "/none/such", "--ip", &ip, "--user"], 1, "/none/such"),
        (&["--disk", &raw, "--ip", &ip, "--user"], 2, "no disk in the format qcow2"),
        (&["--disk", &disk, "--ip", &ip, "--bridge", "nobr"], 1, "'nobr' does not exist"),
        (&["--disk", &disk, "--ip", &ip, "--user", "--ram", "4"], 2, "whole number of M or G"),
        (&["--disk", &disk, "--ip", &ip, "--user", "--args", "/none/args"], 1, "/none/args"),
        (&["--disk", &disk, "--ip", &ip, "--user", "--args", &unsafe_args], 2, "unsafe arguments"),
        (&["--disk", &disk, "--ip", &ip, "--user", "--file", "/none/file"], 2, "/none/file"),
        (&["--disk", &disk, "--ip", &ip, "--user", "--timeout", "1"], 2, "does not end before --timeout 1"),
    ] {
        let ran = lab.run(&[&base[..], more].concat()).unwrap();
        assert!(ran.code == Some(code) && ran.stderr.contains(expected), "{more:?}: {ran:?}");
        assert!(!folder_of(&lab, "m").exists(), "{more:?}");
        assert_finished(&lab);
    }
    // Names and folders that others have.
    for name in ["../m", "", ".m"] {
        let ran = lab.run(&["machine", "create", name, "--disk", &disk, "--ip", &ip, "--user"]).unwrap();
        assert!(ran.code == Some(2) && ran.stderr.contains("no name of a machine"), "{ran:?}");
    }
    fs::create_dir(folder_of(&lab, "m")).unwrap();
    fs::write(folder_of(&lab, "m").join("mine"), "").unwrap();
    let ran = run(&lab, &creation(&lab, "m", "seed"));
    assert!(ran.code == Some(1) && ran.stderr.contains("--folder"), "{ran:?}");
    assert!(folder_of(&lab, "m").join("mine").exists());
    assert_finished(&lab);
}

#[test]
fn machine_is_refused_when_another_one_has_its_name_address_or_disk() {
    let lab = lab(&["seed", "other"], Guest::Micro);
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    let before = lab.yaml().unwrap();
    for (name, seed, expected) in
        [("m", "other", "a machine of this name exists"), ("n", "seed", "the machine 'm' has this ip, too")]
    {
        let ran = run(&lab, &creation(&lab, name, seed));
        assert!(ran.code == Some(2) && ran.stderr.contains(expected), "{ran:?}");
    }
    let mut words = creation(&lab, "n", "other");
    let at = words.iter().position(|word| word == "--disk").unwrap();
    words[at + 1] = folder_of(&lab, "m").join("disk.qcow2").display().to_string();
    let ran = run(&lab, &words);
    assert!(ran.code == Some(2) && ran.stderr.contains("is the disk of the machine 'm'"), "{ran:?}");
    // Neither an overlay of a machine's disk, nor an address at which another program answers.
    let overlay = lab.cwd().root().join("overlay.qcow2").display().to_string();
    let backing = words[at + 1].clone();
    let mut make = std::process::Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &backing, &overlay]);
    assert!(make.status().unwrap().success());
    words[at + 1] = overlay;
    let ran = run(&lab, &words);
    assert!(ran.code == Some(2) && ran.stderr.contains("is the disk of the machine 'm'"), "{ran:?}");
    let mut words = creation(&lab, "n", "other");
    let ready = words.iter().position(|word| word == "--ready-after").unwrap();
    words.drain(ready..ready + 2);
    let _other = std::net::TcpListener::bind((lab.folder("other").ip.as_str(), 8000)).unwrap();
    let ran = run(&lab, &words);
    assert!(ran.code == Some(1) && ran.stderr.contains("answers at"), "{ran:?}");
    assert_eq!(lab.yaml().unwrap(), before);
    assert_finished(&lab);
}

#[test]
fn machine_is_refused_when_a_clone_has_its_name_or_address() {
    let lab =
        Lab::new(&[("w", Guest::Micro, SnapshotFormat::Lz4), ("seed", Guest::Micro, SnapshotFormat::Lz4)])
            .unwrap();
    let (before, ip) = (lab.yaml().unwrap(), lab.folder("seed").ip.clone());
    lab.ahead("standby: off, machines: {w: {clones: [{name: c, ip: 127.77.7.7}]}}").unwrap();
    let mut words = creation(&lab, "n", "seed");
    let at = words.iter().position(|word| *word == ip).unwrap();
    for (name, ip, expected) in
        [("c", "127.77.7.8", "'c' is already the name"), ("n", "127.77.7.7", "the ip of")]
    {
        words[2] = name.to_owned();
        words[at] = ip.to_owned();
        let ran = run(&lab, &words);
        assert!(ran.code == Some(2) && ran.stderr.contains(expected), "{ran:?}");
    }
    // A section without an entry would be refused by each host.
    let ran = lab.run(&["machine", "remove", "w", "--yes", "--files"]).unwrap();
    assert!(ran.code == Some(2) && ran.stderr.contains("machinery-host.yaml"), "{ran:?}");
    assert_eq!(lab.yaml().unwrap(), before);
    assert_finished(&lab);
}

#[test]
fn machine_stays_when_its_command_is_interrupted_after_its_entry_was_added() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let folder = &lab.folder("m").dir;
    let record = lab.cwd().root().join("operational/generated/machinery-host/machines/m");
    fs::create_dir_all(&record).unwrap();
    fs::write(folder.join(".unfinished"), "").unwrap();
    let text = json!({"name": "m", "folder": folder, "setup": null, "disabled": []}).to_string();
    fs::write(record.join("record.json"), text).unwrap();
    let ran = lab.run(&["machine", "clear", "--interrupted", "m"]).unwrap();
    assert!(ran.code == Some(1) && ran.stderr.contains("is in the configuration, and stays"), "{ran:?}");
    assert!(lab.folder("m").disk.exists() && !folder.join(".unfinished").exists());
    let ran = lab.run(&["machine", "clear", "--interrupted", "m"]).unwrap();
    assert!(ran.code == Some(1) && ran.stderr.contains("unfinished machines are removed"), "{ran:?}");
    assert_finished(&lab);
}

#[test]
fn isolated_machine_is_made_and_saved_anew_in_its_cell() {
    let made = Lab::with_network("seed", SnapshotFormat::Lz4).unwrap();
    let Some(lab) = requirement::NETWORK.or_skip(made) else { return };
    let yaml = lab.yaml().unwrap();
    lab.write_yaml(&format!("{}machines:\n", yaml.split_once("machines:\n").unwrap().0)).unwrap();
    lab.ahead("standby: off, network: isolated").unwrap();
    let words = bridged(&lab);
    lab.network().add_bridge(TestNetwork::BRIDGE).unwrap();
    // Only by its cell can the host ask the agent of the guest.
    let inside = |words: &[&str]| {
        let mut command = host::command(lab.cwd()).unwrap();
        lab.network().attach(command.args(words));
        host::run_command(command).unwrap()
    };
    succeeds(&inside(&words.iter().map(String::as_str).collect::<Vec<_>>()));
    lab.ahead("standby: off, machines: {m: {clones: [{name: c, ip: 10.77.0.11}]}}").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.perform("restore_start", "c");
    let refused = inside(&["machine", "snapshot", "m"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("'c'"), "{refused:?}");
    client.perform("stop", "c");
    succeeds(&inside(&["machine", "snapshot", "m"]));
    let clone = client.machine("c").unwrap();
    assert!(clone["disabled"] == false && clone["change_pending"] == false, "{clone}");
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}

#[test]
fn export_runs_the_program_that_reads_the_disk_in_the_jail() {
    let lab = lab(&["seed"], Guest::Micro);
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    let (img, escaped) = (lab.qemu().img.display().to_string(), lab.cwd().root().join("escaped"));
    let hostile = format!("echo > {}\nexec {img} \"$@\"", escaped.display());
    let hostile = lab.cwd().script("hostile-img", &hostile).unwrap();
    lab.change_yaml(&img, &hostile.display().to_string()).unwrap();
    let file = lab.cwd().root().join("m.machine");
    succeeds(&lab.run(&["machine", "export", "m", file.to_str().unwrap()]).unwrap());
    assert!(file.exists() && !escaped.exists());
    // The header of the disk does not choose what the archive has, either.
    let disk = folder_of(&lab, "m").join("disk.qcow2");
    let mut rebase = std::process::Command::new(img);
    rebase.args(["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow"]).arg(disk);
    assert!(rebase.status().unwrap().success());
    let refused =
        lab.run(&["machine", "export", "m", file.with_extension("second").to_str().unwrap()]).unwrap();
    assert!(refused.code == Some(2) && refused.stderr.contains("/etc/shadow"), "{refused:?}");
    assert_finished(&lab);
}

#[test]
fn export_is_refused_when_the_machine_has_a_network_that_no_import_accepts() {
    let lab = lab(&["seed"], Guest::Micro);
    let words = creation(&lab, "m", "seed");
    let args = lab.cwd().root().join("m.args");
    let more = "-netdev user,id=net1,restrict=on\n-device e1000,netdev=net1,addr=9\n";
    fs::write(&args, fs::read_to_string(&args).unwrap() + more).unwrap();
    succeeds(&run(&lab, &words));
    let refused = lab.run(&["machine", "export", "m", "m.machine"]).unwrap();
    assert!(
        refused.code == Some(2) && refused.stderr.contains("no host would import the machine"),
        "{refused:?}"
    );
    assert_finished(&lab);
}

#[test]
fn changed_installed_disk_is_reported_and_a_touched_one_causes_a_warning() {
    let lab = lab(&["seed"], Guest::Micro);
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    let disk = &lab.folder("seed").disk;
    let open = || fs::File::options().append(true).open(disk).unwrap();
    let check = || lab.run(&["check"]).unwrap();
    let snapshot = || lab.run(&["machine", "snapshot", "m", "--ready-after", "1"]).unwrap();
    assert!(!succeeds(&check()).stdout.contains("installed disk"));
    open().set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
    let touched = check();
    assert!(succeeds(&touched).stdout.contains("written or replaced"), "{touched:?}");
    let taken = snapshot();
    assert!(format!("{:?}", succeeds(&taken)).contains("written or replaced"), "{taken:?}");
    // The new snapshot is of the disk as it is now.
    assert!(!succeeds(&check()).stdout.contains("installed disk"));
    open().write_all(&[0; 512]).unwrap();
    let (checked, taken) = (check(), snapshot());
    assert!(
        checked.code == Some(2) && checked.stdout.contains("the installed disk has changed"),
        "{checked:?}"
    );
    assert!(taken.code == Some(1) && taken.stderr.contains("the installed disk has changed"), "{taken:?}");
    fs::remove_file(disk).unwrap();
    let (checked, taken) = (check(), snapshot());
    let name = disk.display().to_string();
    assert!(checked.code == Some(2) && checked.stdout.contains(&name), "{checked:?}");
    assert!(taken.code == Some(1) && taken.stderr.contains(&name), "{taken:?}");
    assert_finished(&lab);
}

#[test]
fn machine_is_disabled_or_in_quarantine_after_its_new_snapshot_as_it_was_before() {
    let lab = lab(&["seed"], Guest::Micro);
    lab.heal().unwrap();
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    let state = lab.cwd().root().join("operational/generated/machinery-host/machines.json");
    fs::write(&state, r#"{"format": 1, "machines": {"m": {"quarantine": {"reason": "killed"}}}}"#).unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    client.subscribe().unwrap();
    // Longer than the pause before a try. It is not tried while the snapshot is taken.
    succeeds(&lab.run(&["machine", "snapshot", "m", "--ready-after", "6"]).unwrap());
    let listed = client.machine("m").unwrap();
    assert_eq!((&listed["disabled_reason"], &listed["quarantine"]["tries"]), (&json!("killed"), &json!(0)));
    assert_eq!(client.wait_for_event("healed", "m").unwrap()["tries"], 1);
    let disable = json!({"action": "disable_machine", "machine": "m", "reason": "by hand"});
    assert_eq!(client.ask(disable).unwrap()["success"], true);
    succeeds(&lab.run(&["machine", "snapshot", "m", "--ready-after", "1"]).unwrap());
    let listed = client.machine("m").unwrap();
    assert_eq!((&listed["disabled_reason"], &listed["quarantine"]), (&json!("by hand"), &Value::Null));
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}

#[test]
fn machine_is_made_by_uefi_with_its_own_variables() {
    let lab = lab(&["seed"], Guest::Linux { ram_mib: 256, noise_mib: 0 });
    let mut words = creation(&lab, "m", "seed");
    words.push("--uefi".to_owned());
    let args = lab.cwd().root().join("m.args");
    // The kernel logs its firmware.
    fs::write(&args, fs::read_to_string(&args).unwrap().replace(" quiet", "")).unwrap();
    let probe = probe(&lab, "m", &lab.folder("seed").ip);
    std::thread::scope(|scope| {
        let making = scope.spawn(|| run(&lab, &words));
        wait_until("the machine has no folder", || making.is_finished() || folder_of(&lab, "m").exists());
        let booted = probe.wait_for_text("efi: EFI v", BOOT);
        succeeds(&making.join().unwrap());
        booted.unwrap();
    });
    let template = ["/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_VARS.fd"].map(fs::read);
    let own = fs::read(folder_of(&lab, "m").join("efivars.fd")).unwrap();
    assert!(template.iter().flatten().any(|template| template.len() == own.len()));
    succeeds(&lab.run(&["check"]).unwrap());
    let (mut host, mut client) = lab.serve().unwrap();
    restores_clean(&mut client, &probe);
    assert_eq!(fs::read(folder_of(&lab, "m").join("efivars.fd")).unwrap(), own, "runs have an overlay");
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}

#[test]
fn machine_is_made_on_a_bridge_and_restored_there() {
    let made = Lab::with_network("seed", SnapshotFormat::Lz4).unwrap();
    let Some(lab) = requirement::NETWORK.or_skip(made) else { return };
    let yaml = lab.yaml().unwrap();
    lab.write_yaml(&format!("{}machines:\n", yaml.split_once("machines:\n").unwrap().0)).unwrap();
    lab.change_yaml(TestNetwork::TAP, TestNetwork::BRIDGE).unwrap();
    lab.ahead("standby: off").unwrap();
    lab.network().add_machines(0).unwrap();
    let words = bridged(&lab);
    let mut create = on_bridge(&lab, "create");
    create.args(&words);
    succeeds(&host::run_command(create).unwrap());
    let mut host =
        RunningHost::start_with(lab.cwd(), |command| allow_bridge(&lab, "serve", command)).unwrap();
    let mut client = host.client().unwrap();
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["interface"], &machine["state"]), (&json!(TestNetwork::BRIDGE), &json!("poweroff")));
    client.perform("restore_start", "m");
    assert_eq!(lab.network().members(TestNetwork::BRIDGE).unwrap().lines().count(), 1);
    let probe = probe(&lab, "m", &TestNetwork::GUEST.to_string());
    let (status, _) = lab.network().inside(|| probe.get("/", SOON)).unwrap().unwrap();
    assert_eq!(status, 200);
    client.perform("stop", "m");
    assert_eq!(lab.network().members(TestNetwork::BRIDGE).unwrap(), "");
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}

#[test]
fn archive_is_refused_when_it_is_damaged_and_nothing_is_made() {
    let lab = lab(&["seed", "other"], Guest::Micro);
    succeeds(&run(&lab, &creation(&lab, "m", "seed")));
    let file = lab.cwd().root().join("m.machine");
    let path = file.to_str().unwrap();
    succeeds(&lab.run(&["machine", "export", "m", path]).unwrap());
    let twice = lab.run(&["machine", "export", "m", path]).unwrap();
    assert!(twice.code == Some(1) && twice.stderr.contains("exists"), "{twice:?}");
    let (before, ip) = (lab.yaml().unwrap(), lab.folder("other").ip.clone());
    let import = ["machine", "import", path, "--name", "n", "--no-agent", "--ip", &ip];
    // On the same CWD, two guests would have the same network card.
    let same = lab.run(&import).unwrap();
    assert!(same.code == Some(2) && same.stderr.contains("has this mac_address, too"), "{same:?}");
    let whole = fs::read(&file).unwrap();
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    for content in [&whole[..whole.len() / 2], &whole[..whole.len() - 1], &changed, b"", b"text"] {
        fs::write(&file, content).unwrap();
        let ran = lab.run(&import).unwrap();
        assert!(ran.code == Some(2) && ran.stderr.contains("is no exported machine"), "{ran:?}");
    }
    assert!(!folder_of(&lab, "n").exists());
    assert_eq!(lab.yaml().unwrap(), before);
    fs::write(&file, &whole).unwrap();
    succeeds(&lab.run(&["machine", "remove", "m", "--yes"]).unwrap());
    let (none, all) = ("free_space_reserve: 0", "free_space_reserve: 1000 TiB");
    lab.cwd().change_host_yaml(none, all).unwrap();
    let full = lab.run(&import).unwrap();
    assert!(full.code == Some(1) && full.stderr.contains("have to stay free"), "{full:?}");
    assert!(!folder_of(&lab, "n").exists());
    lab.cwd().change_host_yaml(all, none).unwrap();
    succeeds(&lab.run(&import).unwrap());
    let (mut host, mut client) = lab.serve().unwrap();
    client.perform("restore_start", "n");
    assert!(probe(&lab, "n", &ip).first_count(SOON).unwrap() > 1);
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}
