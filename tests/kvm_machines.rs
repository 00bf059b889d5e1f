//! `machine` for the machinery `kvm`: domains are made of a disk, restored by a host, saved anew, and removed.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, GuestProbe, Marks};
use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::lab::{KvmLab, TestNetwork};
use machinery_testkit::{artifacts, requirement};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const LINUX: Guest = Guest::Linux { ram_mib: 256, noise_mib: 0 };

/// Creates a lab whose machine `seed` is in no configuration. Its disk and its address are for new machines.
fn lab(guest: Guest) -> KvmLab {
    let lab = KvmLab::new(&[("seed", guest)]).unwrap();
    lab.cwd().write_yaml("kvm", &head(&lab)).unwrap();
    lab
}

fn head(lab: &KvmLab) -> String {
    format!("# the operator's\ndsn: {}\ninterface: lo\nmachines:\n  # all of them\n", lab.libvirtd().dsn())
}

/// Returns the arguments of `machine create` for the machine `m`, as a copy of the seed's guest.
fn creation(lab: &KvmLab, guest: Guest, network: &[&str], more: &[&str]) -> Vec<String> {
    let seed = lab.machine("seed");
    let args = lab.cwd().root().join("m.args");
    let mut text = format!("-serial file:{}\n", folder(lab).join("serial.log").display());
    let disk = seed.disk.display().to_string();
    let mut words = vec!["machine", "create", "m", "--machinery", "kvm", "--accel", "tcg", "--cpus", "1"];
    words.extend(["--ip", &seed.ip, "--disk", &disk]);
    words.extend(network);
    let described = lab.libvirtd().virsh(&["dumpxml", &seed.label]).unwrap();
    let element = |name: &str| {
        let (_, after) = described.split_once(&format!("<{name}>"))?;
        after.split_once('<').map(|(value, _)| value.to_owned())
    };
    let boot = element("kernel").zip(element("initrd"));
    if let Some((kernel, initrd)) = boot.as_ref().filter(|_| guest == LINUX) {
        let name = |path: &str| PathBuf::from(path).file_name().unwrap().to_str().unwrap().to_owned();
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
    words.extend(more);
    words.into_iter().map(str::to_owned).collect()
}

fn run(lab: &KvmLab, words: &[String]) -> CommandOutput {
    lab.run(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
}

#[track_caller]
fn succeeds(ran: &CommandOutput) -> &CommandOutput {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran
}

#[track_caller]
fn fails(ran: &CommandOutput, words: &[&str]) {
    assert_ne!(ran.code, Some(0), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in {}", ran.stderr);
    }
}

fn folder(lab: &KvmLab) -> PathBuf {
    lab.cwd().root().join("machines/m")
}

fn probe(lab: &KvmLab) -> GuestProbe {
    let ip = lab.machine("seed").ip.clone();
    GuestProbe { name: "m".to_owned(), ip, serial: folder(lab).join("serial.log") }
}

/// Returns the names of all domains, or of a domain's snapshots.
fn names(lab: &KvmLab, list: &[&str]) -> Vec<String> {
    let listed = lab.libvirtd().virsh(list).unwrap();
    listed.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn domains(lab: &KvmLab) -> Vec<String> {
    names(lab, &["list", "--all", "--name"])
}

fn snapshots(lab: &KvmLab) -> Vec<String> {
    names(lab, &["snapshot-list", "--name", "m"])
}

/// Expects that `check` has no problem, and no warning about changes of somebody else.
#[track_caller]
fn assert_sound(lab: &KvmLab) {
    let check = lab.run(&["--json", "check"]).unwrap();
    let check = &succeeds(&check).stdout;
    assert!(check.contains("machine 'm': snapshot 'clean") && !check.contains("not prepared"), "{check}");
}

/// Expects that no record of an unfinished machine remains.
#[track_caller]
fn assert_finished(lab: &KvmLab) {
    let records = lab.cwd().root().join("operational/generated/machinery-host/machines");
    assert_eq!(fs::read_dir(&records).map_or(0, Iterator::count), 0);
    lab.assert_clean();
}

/// Restores the Linux machine twice, and expects the snapshot's marks in RAM and on the disk each time.
#[track_caller]
fn restores_clean(client: &mut Client, probe: &GuestProbe) {
    let of_snapshot = Marks { ram: "snapshot".to_owned(), disk: "snapshot".to_owned() };
    for _ in 0..2 {
        client.perform("restore_start", "m");
        assert_eq!(probe.marks(SOON).unwrap(), of_snapshot);
        assert_ne!(probe.mark("run", "run", SOON).unwrap(), of_snapshot);
        client.perform("stop", "m");
    }
}

#[test]
fn machine_of_a_disk_is_a_domain_that_is_restored_saved_anew_and_removed() {
    let lab = lab(LINUX);
    let ran = run(&lab, &creation(&lab, LINUX, &["--user"], &[]));
    let stdout = &succeeds(&ran).stdout;
    assert!(stdout.contains("m: created in") && stdout.contains("restored once"), "{ran:?}");
    assert_finished(&lab);
    let yaml = lab.cwd().yaml("kvm").unwrap();
    let ip = &lab.machine("seed").ip;
    let entry = format!(
        "{}  m:\n    label: m\n    snapshot: clean\n    ip: \"{ip}\"\n    platform: linux\n    os_version: \"12\"\n    \
         architecture: amd64\n    interface: lo\n    agent_port: 8000\n    tags: [apache, perl]\n",
        head(&lab)
    );
    assert_eq!(yaml, entry);
    assert_eq!((domains(&lab).len(), snapshots(&lab)), (2, vec!["clean".to_owned(), "installed".to_owned()]));
    assert_sound(&lab);
    let probe = probe(&lab);
    let (mut host, mut client) = lab.serve().unwrap();
    restores_clean(&mut client, &probe);
    assert!(host.terminate().unwrap().success());

    let commented = yaml.replace("snapshot: clean", "snapshot: clean # of May");
    lab.cwd().write_yaml("kvm", &commented).unwrap();
    succeeds(&lab.run(&["machine", "snapshot", "m"]).unwrap());
    assert_finished(&lab);
    assert_eq!(lab.cwd().yaml("kvm").unwrap(), commented.replace("clean #", "clean-2 #"));
    assert_eq!(snapshots(&lab), ["clean-2", "installed"]);
    assert_sound(&lab);
    let (mut host, mut client) = lab.serve().unwrap();
    restores_clean(&mut client, &probe);
    assert!(host.terminate().unwrap().success());

    fails(
        &lab.run(&["machine", "export", "m", "m.machine"]).unwrap(),
        &["not support", "Copy the installed disk"],
    );
    fails(&lab.run(&["machine", "remove", "m"]).unwrap(), &["--yes"]);
    let removed = lab.run(&["--json", "machine", "remove", "m", "--yes"]).unwrap();
    let answer: Value = serde_json::from_str(&succeeds(&removed).stdout).unwrap();
    assert_eq!((&answer["removed"], &answer["notes"]), (&json!([folder(&lab)]), &json!([])));
    assert_eq!((domains(&lab), folder(&lab).exists()), (vec!["lab-seed".to_owned()], false));
    assert_eq!(lab.cwd().yaml("kvm").unwrap(), head(&lab));
    assert_finished(&lab);
}

#[test]
fn running_host_gets_the_machine_its_new_snapshot_and_its_removal() {
    let lab = lab(Guest::Micro);
    lab.cwd().host_yaml("machineries: {kvm: {instant: on, standby: off}}\n").unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    let made = run(&lab, &creation(&lab, Guest::Micro, &["--user"], &[]));
    assert!(succeeds(&made).stdout.contains("its restores are instant"), "{made:?}");
    let probe = probe(&lab);
    client.perform("prepare", "m");
    client.perform("restore_start", "m");
    let first = probe.first_count(SOON).unwrap();
    assert!(first > 1, "the guest continues, and does not boot: {first}");
    // A machine that is on is neither saved nor removed.
    for words in [&["snapshot", "m"][..], &["remove", "m", "--yes"]] {
        fails(&lab.run(&[&["machine"], words].concat()).unwrap(), &["the running host uses the machine"]);
    }
    client.perform("stop", "m");
    // The generation id of a run is no change of the domain: its save image is made once.
    let image = lab.cwd().root().join("operational/generated/machinery-host/kvm/cache/m.machinery-image");
    let made = fs::metadata(&image).unwrap().ino();
    for action in ["restore_start", "stop", "prepare"] {
        client.perform(action, "m");
    }
    assert_eq!(fs::metadata(&image).unwrap().ino(), made);

    fs::write(folder(&lab).join("notes.log"), "the operator's").unwrap();
    succeeds(&lab.run(&["machine", "snapshot", "m", "--ready-after", "2"]).unwrap());
    assert_eq!(fs::read_to_string(folder(&lab).join("notes.log")).unwrap(), "the operator's");
    assert_eq!(snapshots(&lab), ["clean-2", "installed"]);
    assert_eq!(client.machine("m").unwrap()["disabled"], json!(false));
    client.perform("restore_start", "m");
    assert!(probe.first_count(SOON).unwrap() > first, "it was saved later");
    client.perform("stop", "m");

    // The domain of a standby is on. The host ends it.
    lab.cwd().change_host_yaml("standby: off", "standby: on").unwrap();
    let has_standby = |client: &mut Client| {
        client.perform("prepare", "m");
        assert_eq!(client.machine("m").unwrap()["ready"]["mode"], json!("standby"));
    };
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], json!(true));
    has_standby(&mut client);
    succeeds(&lab.run(&["machine", "snapshot", "m", "--ready-after", "1"]).unwrap());
    assert_eq!(snapshots(&lab), ["clean", "installed"]);
    has_standby(&mut client);
    succeeds(&lab.run(&["machine", "remove", "m", "--yes"]).unwrap());
    assert!(!folder(&lab).exists() && client.machine("m").is_err());
    assert_eq!((domains(&lab), lab.cwd().yaml("kvm").unwrap()), (vec!["lab-seed".to_owned()], head(&lab)));
    assert!(host.terminate().unwrap().success());
    assert_finished(&lab);
}

#[test]
fn machine_that_was_made_meets_the_requirements_of_its_devices() {
    let lab = lab(Guest::Micro);
    lab.cwd().host_yaml("machineries: {kvm: {console: true}}\n").unwrap();
    let yaml = lab.cwd().root().join("conf/machineries/kvm.yaml");
    fs::remove_file(&yaml).unwrap();
    let dsn = lab.libvirtd().dsn();
    succeeds(&run(&lab, &creation(&lab, Guest::Micro, &["--user"], &["--dsn", &dsn])));
    let mut command = host::command(lab.cwd()).unwrap();
    command.arg("conformance").arg(artifacts::plugin("kvm").unwrap()).arg("--config").arg(yaml);
    command.arg("--host-config").arg(lab.cwd().root().join("conf/machinery-host.yaml"));
    let requirements = ["restore_start", "norestore_start", "acpi_stop", "prepare", "screenshot", "console"];
    for name in requirements {
        command.args(["--only", name]);
    }
    let ran = host::run_command(command).unwrap();
    assert!(succeeds(&ran).stdout.contains("6 passed, 0 failed, 0 skipped"), "{ran:?}");
}

#[test]
fn machine_on_a_bridge_is_made_and_restored_with_its_card() {
    let Some(network) = requirement::NETWORK.or_skip(TestNetwork::new().unwrap()) else { return };
    network.add_bridge(TestNetwork::BRIDGE).unwrap();
    // libvirtd and its QEMU are in the network as well.
    network.inside(|| machine_on_a_bridge(&network)).unwrap();
}

fn machine_on_a_bridge(network: &TestNetwork) {
    let lab = lab(Guest::Micro);
    let of_libvirt = format!(
        "<network><name>lab</name><forward mode='bridge'/><bridge name='{}'/></network>",
        TestNetwork::BRIDGE
    );
    lab.libvirtd().virsh_with_file(&["net-define"], &of_libvirt, &[]).unwrap();
    let create = |words: &[&str]| {
        let mut command = host::command(lab.cwd()).unwrap();
        command.args(creation(&lab, Guest::Micro, words, &[]));
        network.attach(&mut command);
        host::run_command(command).unwrap()
    };
    fails(&create(&["--libvirt-network", "none"]), &["net-dumpxml"]);
    fails(&create(&["--libvirt-network", "lab"]), &["network 'lab' is off", "virsh net-start"]);
    lab.libvirtd().virsh(&["net-start", "lab"]).unwrap();
    for words in [["--libvirt-network", "lab"], ["--bridge", TestNetwork::BRIDGE]] {
        succeeds(&create(&words));
        let yaml = lab.cwd().yaml("kvm").unwrap();
        assert!(yaml.contains(&format!("    interface: {}\n", TestNetwork::BRIDGE)), "{yaml}");
        assert!(yaml.contains("    mac_address: \"52:54:00:"), "{yaml}");
        let mut host = RunningHost::start_with(lab.cwd(), |command| network.attach(command)).unwrap();
        let mut client = host.client().unwrap();
        client.perform("restore_start", "m");
        assert!(network.members(TestNetwork::BRIDGE).unwrap().contains("vnet"));
        client.perform("stop", "m");
        assert!(host.terminate().unwrap().success());
        let mut remove = host::command(lab.cwd()).unwrap();
        remove.args(["machine", "remove", "m", "--yes"]);
        network.attach(&mut remove);
        succeeds(&host::run_command(remove).unwrap());
    }
    assert_finished(&lab);
}

#[test]
fn wrong_values_are_refused_and_leave_nothing() {
    let lab = lab(Guest::Micro);
    let create = |network: &[&str], more: &[&str]| run(&lab, &creation(&lab, Guest::Micro, network, more));
    fails(&create(&["--user"], &["--uefi"]), &["UEFI", "import libvirt"]);
    fails(&create(&["--user"], &["--dsn", "qemu:///other"]), &["qemu:///other"]);
    fails(&create(&["--bridge", "none-such"], &[]), &["none-such"]);
    let clones = ["--clones", "2", "--clone-ips", "127.0.0.5-6"];
    for (network, option) in [(&["--isolated"][..], "--isolated"), (&clones, "--clones")] {
        fails(&create(network, &[]), &[option, "libvirt makes the network", "--libvirt-network"]);
    }
    let words = creation(&lab, Guest::Micro, &["--libvirt-network", "lab"], &[]);
    let of_qemu: Vec<String> =
        words.into_iter().filter(|word| word != "--machinery" && word != "kvm").collect();
    fails(&run(&lab, &of_qemu), &["--libvirt-network is about libvirt", "--machinery kvm"]);
    let other = "<domain type='qemu'><name>m</name><memory>1024</memory><os><type>hvm</type></os></domain>";
    lab.libvirtd().virsh_with_file(&["define"], other, &[]).unwrap();
    fails(&create(&["--user"], &[]), &["domain 'm' already exists"]);
    assert_eq!(domains(&lab).len(), 2, "a domain of somebody else stays");
    lab.libvirtd().virsh(&["undefine", "m"]).unwrap();
    assert_eq!((lab.cwd().yaml("kvm").unwrap(), folder(&lab).exists()), (head(&lab), false));
    assert_finished(&lab);

    // A machine of another tool, and the disk of a machine.
    succeeds(
        &lab.run(&["import", "libvirt", "--platform=linux", "--os-version=1", "--ip", "127.9.9.9"]).unwrap(),
    );
    for words in [&["remove", "lab-seed", "--yes"][..], &["snapshot", "lab-seed"]] {
        let ran = lab.run(&[&["machine"], words].concat()).unwrap();
        fails(&ran, &["has not made this machine", "by hand"]);
    }
    let refused = create(&["--user"], &["-v"]);
    let early = refused.stderr.contains("defining the domain") && !refused.stderr.contains("booting");
    assert!(early, "{refused:?}");
    fails(&refused, &["which the domain of machine 'lab-seed' writes to"]);
    lab.cwd().write_yaml("kvm", &head(&lab)).unwrap();
    succeeds(&create(&["--user"], &[]));
    let disk = folder(&lab).join("disk.qcow2").display().to_string();
    let words = creation(&lab, Guest::Micro, &["--user"], &[]).into_iter();
    let words: Vec<String> = words
        .map(|word| match word.as_str() {
            "m" => "second".to_owned(),
            word if word.ends_with("disk.qcow2") => disk.clone(),
            _ if word == lab.machine("seed").ip => "127.9.9.8".to_owned(),
            _ => word,
        })
        .collect();
    fails(&run(&lab, &words), &["is the disk of the machine 'm'", "Make a copy"]);
    // A domain that somebody has started is not removed.
    lab.libvirtd().virsh(&["start", "m"]).unwrap();
    fails(&lab.run(&["machine", "remove", "m", "--yes"]).unwrap(), &["its domain 'm' is on"]);
    lab.libvirtd().virsh(&["destroy", "m"]).unwrap();
    assert_finished(&lab);
}

#[test]
fn changed_installed_disk_is_reported_and_a_touched_one_causes_a_warning() {
    let lab = lab(Guest::Micro);
    succeeds(&run(&lab, &creation(&lab, Guest::Micro, &["--user"], &[])));
    let checked = || lab.run(&["check"]).unwrap();
    assert!(!checked().stdout.contains("installed disk"), "{:?}", checked());
    let base = fs::File::options().append(true).open(&lab.machine("seed").disk).unwrap();
    base.set_modified(SystemTime::now() - SOON).unwrap();
    assert!(succeeds(&checked()).stdout.contains("has its old size"), "{:?}", checked());
    let taken = lab.run(&["machine", "snapshot", "m", "--ready-after", "1"]).unwrap();
    assert!(succeeds(&taken).stdout.contains("has its old size"), "{taken:?}");
    assert!(!checked().stdout.contains("installed disk"), "{:?}", checked());
    base.set_len(base.metadata().unwrap().len() + 512).unwrap();
    let reported = checked();
    assert!(
        reported.code == Some(2) && reported.stdout.contains("the installed disk has changed"),
        "{reported:?}"
    );
    fails(&lab.run(&["machine", "snapshot", "m"]).unwrap(), &["the installed disk has changed"]);
    assert_eq!(snapshots(&lab), ["clean-2", "installed"]);
    assert_finished(&lab);
}
