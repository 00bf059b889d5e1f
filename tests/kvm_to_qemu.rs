//! `import libvirt --as qemu`: domains of libvirt become machines of `qemu`, and stay as they are.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use machinery_testkit::artifacts;
use machinery_testkit::guest::{Guest, GuestProbe, Marks};
use machinery_testkit::host::{self, CommandOutput};
use machinery_testkit::lab::{KvmLab, loopback_address};
use machinery_testkit::logged::LoggedCommand;
use machinery_testkit::wait::wait_until;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::Value;
use sha2::{Digest, Sha256};

const SOON: Duration = Duration::from_secs(60);
/// The time for an emulated processor to run the firmware.
const BOOT: Duration = Duration::from_secs(180);
const LINUX: Guest = Guest::Linux { ram_mib: 256, noise_mib: 0 };
/// The firmware in one file, and its code and its variables.
const FIRMWARE: &str = "/usr/share/ovmf/OVMF.fd";
const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// The options of each import of micro guests, which have no agent.
const MICRO: [&str; 7] = ["--as", "qemu", "--platform", "windows", "--os-version", "10", "--no-agent"];

/// A lab whose domains are in the configuration of no machinery.
struct Lab {
    kvm: KvmLab,
    /// The addresses of the machines, by their names.
    machines: Vec<(String, String)>,
}

impl Lab {
    fn new(seeds: &[(&str, Guest)]) -> Lab {
        let kvm = KvmLab::new(seeds).unwrap();
        let head = format!("dsn: {}\ninterface: lo\nmachines: {{}}\n", kvm.libvirtd().dsn());
        kvm.cwd().write_yaml("kvm", &head).unwrap();
        let qemu = "# the operator's\ninterface: lo\ndisposable_copy_dir:\nbinaries:\n  qemu_img: /usr/bin/qemu-img\n  \
                    qemu_system_x86_64: /usr/bin/qemu-system-x86_64\nmachines:\n  # all of them\n";
        kvm.cwd().write_yaml("qemu", qemu).unwrap();
        kvm.cwd().list_machineries(&["qemu"]).unwrap();
        kvm.cwd().host_yaml("machineries: {qemu: {standby: off, instant_space_limit: 4 GiB}}\n").unwrap();
        Lab { kvm, machines: Vec::new() }
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        self.kvm.libvirtd().virsh(arguments).unwrap()
    }

    fn root(&self) -> &Path {
        self.kvm.cwd().root()
    }

    fn machine_folder(&self, name: &str) -> PathBuf {
        self.root().join("machines").join(name)
    }

    /// Returns the path of a file in the folder of the domains.
    fn file(&self, name: &str) -> String {
        let folder = self.root().join("domains");
        fs::create_dir_all(&folder).unwrap();
        folder.join(name).display().to_string()
    }

    /// Makes a disk with the content of the seed's, and returns it as a disk of a domain.
    fn disk(&self, name: &str, target: &str, bus: &str) -> String {
        let (seed, path) = (&self.kvm.machine("seed").disk, self.file(name));
        let ran = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).arg(seed).arg(&path).status();
        assert!(ran.unwrap().success());
        disk(&path, target, bus)
    }

    /// Defines a domain of the micro guest.
    fn define(&mut self, name: &str, machine: &str, devices: &str) {
        let serial = self.file(&format!("{name}.serial"));
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='{machine}'>hvm</type></os><features><acpi/><apic/></features>
             <devices>{devices}
             <serial type='file'><source path='{serial}'/></serial>
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
             <input type='tablet' bus='usb'/><graphics type='vnc'><listen type='none'/></graphics><sound model='ich6'/>
             <video><model type='vga'/></video><memballoon model='none'/></devices></domain>"
        );
        self.kvm.libvirtd().virsh_with_file(&["define"], &xml, &[]).unwrap();
        self.machines.push((name.to_owned(), loopback_address().to_string()));
    }

    /// Boots the micro guest of a domain, and takes its snapshot.
    fn snapshot(&self, name: &str) {
        self.virsh(&["start", name]);
        self.of_libvirt(name).wait_for_count(8, SOON).unwrap();
        self.virsh(&["snapshot-create-as", name, "clean"]);
        self.virsh(&["destroy", name]);
    }

    /// Returns the probe of the domain's guest in libvirt.
    fn of_libvirt(&self, name: &str) -> GuestProbe {
        GuestProbe {
            name: name.to_owned(),
            ip: self.ip(name),
            serial: self.file(&format!("{name}.serial")).into(),
        }
    }

    /// Returns the probe of the machine's guest.
    fn of_qemu(&self, name: &str) -> GuestProbe {
        let serial = self.machine_folder(name).join(format!("{name}-charserial0.log"));
        GuestProbe { name: name.to_owned(), ip: self.ip(name), serial }
    }

    fn ip(&self, name: &str) -> String {
        self.machines.iter().find(|(known, _)| known == name).unwrap().1.clone()
    }

    /// Returns the arguments that import these domains.
    fn import(&self, names: &[&str], more: &[&str]) -> Vec<String> {
        let mut words = vec!["import".to_owned(), "libvirt".to_owned()];
        words.extend(names.iter().chain(more).map(|&word| word.to_owned()));
        words.extend(names.iter().flat_map(|name| ["--ip".to_owned(), format!("{name}={}", self.ip(name))]));
        words
    }

    fn run(&self, words: &[String]) -> CommandOutput {
        self.kvm.run(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
    }

    /// Returns everything of the domains that an import could change.
    fn state(&self) -> Vec<String> {
        let of_domain = |name: &String| {
            let listed: &[&[&str]] = &[
                &["dumpxml", "--inactive", "--security-info", name],
                &["snapshot-list", "--name", name],
                &["snapshot-current", "--name", name],
                &["domstate", "--reason", name],
            ];
            listed.iter().map(|words| self.virsh(words)).collect::<Vec<_>>().join("\n")
        };
        let names = self.machines.iter().map(|(name, _)| name);
        names.map(of_domain).chain(self.disks().iter().map(|disk| hash(disk))).collect()
    }

    fn disks(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.root().join("domains")).unwrap().map(|entry| entry.unwrap().path());
        let mut disks: Vec<_> = entries.filter(|path| path.extension().is_none()).collect();
        disks.sort();
        disks
    }

    /// Expects that nothing of an import exists.
    #[track_caller]
    fn assert_nothing_made(&self, what: &str) {
        let yaml = self.kvm.cwd().yaml("qemu").unwrap();
        assert!(yaml.ends_with("machines:\n  # all of them\n"), "{what}: {yaml}");
        for (name, _) in &self.machines {
            assert!(!self.machine_folder(name).exists(), "{what}: {name}");
        }
        let records = self.root().join("operational/generated/machinery-host/machines");
        assert_eq!(fs::read_dir(&records).map_or(0, Iterator::count), 0, "{what}");
        // A killed command may leave a virsh that reads, until libvirt answers.
        wait_until("a process of the command remains", || self.kvm.leftovers().unwrap().is_empty());
    }
}

fn disk(path: &str, target: &str, bus: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>
         <target dev='{target}' bus='{bus}'/></disk>"
    )
}

fn hash(path: &Path) -> String {
    let sum = Sha256::digest(fs::read(path).unwrap());
    format!("{} {sum:?}", path.display())
}

#[track_caller]
fn succeeds(ran: &CommandOutput) {
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

#[track_caller]
fn fails(ran: &CommandOutput, words: &[&str]) {
    assert_ne!(ran.code, Some(0), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in {}", ran.stderr);
    }
}

fn qemu_io(path: &str, command: &str) -> String {
    let ran = Command::new("qemu-io").args(["-f", "qcow2", "-c", command, path]).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    String::from_utf8(ran.stdout).unwrap()
}

/// Makes a lab with the domain `m` of the micro guest, at its snapshot.
fn small() -> Lab {
    let mut lab = Lab::new(&[("seed", Guest::Micro)]);
    let disk = lab.disk("m", "hda", "ide");
    lab.define("m", "pc", &disk);
    lab.snapshot("m");
    lab
}

/// Returns the firmware of a domain. libvirt keeps the variables in internal snapshots from 10.10 on, if they are in a
/// qcow2 file.
fn firmware(lab: &Lab) -> String {
    let version = lab.kvm.libvirtd().inside(&["libvirtd", "--version"]).unwrap();
    let numbers = version.split_whitespace().last().unwrap().split('.').map(|number| number.parse().unwrap());
    if numbers.take(2).collect::<Vec<u32>>() < vec![10, 10] {
        return format!("<loader type='rom'>{FIRMWARE}</loader>");
    }
    let path = lab.file("variables");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2", VARIABLES, &path]);
    assert!(convert.status().unwrap().success());
    format!("<loader readonly='yes' type='pflash'>{CODE}</loader><nvram format='qcow2'>{path}</nvram>")
}

/// Defines a domain that boots the Linux guest of the lab by UEFI, and takes its snapshot.
fn define_uefi(lab: &mut Lab) {
    let seed = lab.kvm.machine("linux").clone();
    let (path, serial) = (lab.file("uefi"), lab.file("uefi.serial"));
    let made = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).arg(&seed.disk).arg(&path).status();
    assert!(made.unwrap().success());
    let ip = loopback_address().to_string();
    let described = lab.virsh(&["dumpxml", "--inactive", &seed.label]);
    let (before, after) = described.split_once("<uuid>").unwrap();
    let (_, after) = after.split_once("</uuid>").unwrap();
    let (before, address) = (before.replace(&seed.label, "uefi"), format!("hostfwd=tcp:{}:", seed.ip));
    // The devices get addresses that fit to the other type of machine.
    let after =
        after.split('\n').filter(|line| !line.contains("<address ") && !line.contains("<controller "));
    let after = after.filter(|line| !line.contains("</controller>")).collect::<Vec<_>>().join("\n");
    let after = after.replace(&seed.disk.display().to_string(), &path);
    let after = after.replace(&seed.serial.display().to_string(), &serial);
    let after = after.replace(&address, &format!("hostfwd=tcp:{ip}:"));
    let after = after.replace("</type>", &format!("</type>{}", firmware(lab)));
    let (head, tail) = after.split_once("machine='").unwrap();
    let (_, tail) = tail.split_once('\'').unwrap();
    let xml = format!("{before}{head}machine='q35'{tail}");
    lab.kvm.libvirtd().virsh_with_file(&["define"], &xml, &[]).unwrap();
    lab.machines.push(("uefi".to_owned(), ip));
    lab.virsh(&["start", "uefi"]);
    let probe = lab.of_libvirt("uefi");
    probe.mark("snapshot", "snapshot", BOOT).unwrap();
    lab.virsh(&["snapshot-create-as", "uefi", "clean"]);
    lab.virsh(&["destroy", "uefi"]);
}

/// Expects that the plugin meets its requirements with two of the machines.
#[track_caller]
fn assert_conforms(lab: &Lab) {
    for name in ["sata", "lab-linux", "uefi"] {
        lab.kvm.cwd().remove_machine("qemu", name).unwrap();
    }
    let plugin = artifacts::folder().unwrap().join("libmachinery_qemu.so").display().to_string();
    let file = |name: &str| lab.root().join("conf").join(name).display().to_string();
    let (config, host_config) = (file("machineries/qemu.yaml"), file("machinery-host.yaml"));
    let ran =
        lab.kvm.run(&["conformance", &plugin, "--config", &config, "--host-config", &host_config]).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

#[test]
fn domains_of_five_shapes_become_machines_by_one_command() {
    let mut lab = Lab::new(&[("seed", Guest::Micro), ("linux", LINUX)]);
    let ide = lab.disk("ide", "hda", "ide");
    lab.define("ide", "pc", &ide);
    let redirection = lab.file("sata.redirection");
    let sata = lab.disk("sata", "sda", "sata")
        + &format!("<redirdev bus='usb' type='unix'><source mode='bind' path='{redirection}'/></redirdev>");
    lab.define("sata", "q35", &sata);
    let (second, cd) = (lab.file("second"), lab.file("cd.iso"));
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &second, "16M"]).status();
    assert!(made.unwrap().success());
    fs::write(&cd, vec![7; 1 << 20]).unwrap();
    let cd = format!(
        "<disk type='file' device='cdrom'><source file='{cd}'/><target dev='sda' bus='sata'/><readonly/></disk>"
    );
    let two = lab.disk("two", "vda", "virtio") + &disk(&second, "vdb", "virtio") + &cd;
    lab.define("two", "q35", &two);
    qemu_io(&second, "write -P 0x5a 0 64k");
    for name in ["ide", "sata", "two"] {
        lab.snapshot(name);
    }
    // The disk's present state is another one than the snapshot's.
    qemu_io(&second, "write -P 0xa5 0 64k");
    let linux = lab.kvm.machine("linux").clone();
    lab.machines.push((linux.label.clone(), linux.ip.clone()));
    define_uefi(&mut lab);
    let before = lab.state();

    let names = ["ide", "sata", "two", "lab-linux", "uefi"];
    let mut words = lab.import(&names, &MICRO[..6]);
    words.push("--no-agent".to_owned());
    succeeds(&lab.run(&words));
    assert_eq!(lab.state(), before);
    let disk = lab.machine_folder("two").join("disk-2.qcow2");
    qemu_io(disk.to_str().unwrap(), "read -P 0x5a 0 64k");
    succeeds(&lab.kvm.run(&["check"]).unwrap());

    let (mut host, mut client) = lab.kvm.serve().unwrap();
    let mut counts = Vec::new();
    for name in ["ide", "sata", "two", "ide", "sata", "two"] {
        client.perform("restore_start", name);
        counts.push((name, lab.of_qemu(name).first_count(SOON).unwrap()));
        client.perform("stop", name);
    }
    let of_snapshot = Marks { ram: "snapshot".to_owned(), disk: "snapshot".to_owned() };
    for name in ["lab-linux", "uefi", "lab-linux", "uefi"] {
        client.perform("restore_start", name);
        let probe = lab.of_qemu(name);
        assert_eq!(probe.marks(SOON).unwrap(), of_snapshot, "{name}");
        probe.mark("run", "run", SOON).unwrap();
        client.perform("stop", name);
    }
    for name in names {
        assert_eq!(client.machine(name).unwrap()["ready"]["mode"], "instant", "{name}");
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    assert_conforms(&lab);
    assert_eq!(lab.state(), before);

    // The domains work in libvirt as before.
    for (name, count) in counts {
        let probe = lab.of_libvirt(name);
        fs::remove_file(&probe.serial).unwrap();
        lab.virsh(&["snapshot-revert", name, "clean"]);
        assert_eq!(probe.first_count(SOON).unwrap(), count, "{name}");
        lab.virsh(&["destroy", name]);
        lab.virsh(&["start", name]);
        lab.virsh(&["destroy", name]);
    }
}

#[test]
fn faults_of_all_domains_are_named_and_nothing_is_written() {
    let mut lab = small();
    for (name, device) in [("on", ""), ("folder", "<filesystem type='mount'/>"), ("bare", "")] {
        let disk = lab.disk(name, "hda", "ide");
        lab.define(name, "pc", &disk);
        if name == "bare" {
            continue;
        }
        lab.snapshot(name);
        if !device.is_empty() {
            let shared =
                "<filesystem type='mount'><source dir='/tmp'/><target dir='t'/></filesystem></devices>";
            let with = |xml: &str| xml.replace("</devices>", shared);
            lab.kvm.change_domain(name, with).unwrap();
        }
    }
    lab.virsh(&["start", "on"]);
    let ran = lab.run(&lab.import(&["m", "on", "folder", "bare"], &MICRO));
    fails(
        &ran,
        &[
            "machine 'on': its domain is on",
            "machine 'folder': the snapshot 'clean' cannot come over: the domain has a folder of this computer",
            "machine 'bare': its domain has no snapshot",
        ],
    );
    assert!(!ran.stderr.contains("machine 'm'"), "{}", ran.stderr);
    lab.virsh(&["destroy", "on"]);
    lab.assert_nothing_made("faults");
    // The plugin's rules, a missing value, a name of two machines, and a folder that exists.
    let words = |more: &[&str]| lab.import(&["m", "on"], &[&MICRO, more].concat());
    fails(&lab.run(&words(&["--name", "x"])), &["--name without DOMAIN="]);
    fails(&lab.run(&words(&["--name", "on=m"])), &["same name or address"]);
    fails(&lab.kvm.run(&["import", "libvirt", "m", "--disks", "copy"]).unwrap(), &["--as"]);
    fails(&lab.kvm.run(&["import", "libvirt", "m", "--as", "qemu"]).unwrap(), &["--ip 'm=ADDRESS'"]);
    let remote = ["--dsn", "qemu+ssh://none.invalid/system"];
    fails(&lab.run(&words(&remote)), &["whose disks are files of another computer"]);
    let dry = lab.run(&words(&["--dry-run"]));
    succeeds(&dry);
    assert!(dry.stdout.contains("would add  m") && dry.stdout.contains("machines/on/disk.qcow2"), "{dry:?}");
    lab.assert_nothing_made("no import");
}

#[test]
fn import_leaves_nothing_after_a_signal_or_a_kill_at_any_step() {
    let lab = small();
    let before = lab.state();
    let steps = [
        "reading the domains",
        "copying the disks",
        "copying the memory",
        "building the template",
        "restoring",
    ];
    for step in steps {
        for signal in [Signal::TERM, Signal::KILL] {
            let mut command = host::command(lab.kvm.cwd()).unwrap();
            command.arg("-v").args(lab.import(&["m"], &MICRO));
            let mut importing = LoggedCommand::start(command);
            importing.wait_for(step);
            importing.signal(signal);
            let (code, log) = importing.end();
            assert_eq!(code, (signal == Signal::TERM).then_some(1), "{step}: {log}");
            if signal == Signal::KILL {
                succeeds(&lab.kvm.run(&["machine", "clear"]).unwrap());
            }
            lab.assert_nothing_made(step);
            assert_eq!(lab.state(), before, "{step}");
        }
    }
}

/// Expects that `kvm.yaml` stays if its entry cannot be removed, or the machine is not added.
fn assert_exchange_is_refused_or_undone(lab: &Lab, import: &[&str], entry: &str) {
    let cwd = lab.kvm.cwd();
    let host = fs::read_to_string(lab.root().join("conf/machinery-host.yaml")).unwrap();
    cwd.host_yaml("machineries: {kvm: {machines: {m: {standby: off}}}}\n").unwrap();
    let section = lab.kvm.run(import).unwrap();
    fails(&section, &["machineries.kvm.machines.m", "Remove the section"]);
    assert!(!section.stderr.contains("copying the disks"), "{section:?}");
    cwd.host_yaml(&host).unwrap();
    let flow = entry.replace("machines:\n  # one\n  m:\n", "machines: {m: {").replace("\n    ", ", ");
    let flow = flow.replace("{, ", "{").replace("java]\n", "java]}}\n");
    cwd.write_yaml("kvm", &flow).unwrap();
    fails(&lab.kvm.run(import).unwrap(), &["indented block"]);
    lab.assert_nothing_made("an entry that cannot be removed");
    cwd.write_yaml("kvm", entry).unwrap();
    // While the command waits for the lock of the configuration, somebody else adds a machine of the same name.
    let mut command = host::command(cwd).unwrap();
    command.arg("-v").args(import);
    let mut importing = LoggedCommand::start(command);
    importing.wait_for("copying the memory");
    let lock = fs::File::open(lab.root().join("operational/generated/machinery-host")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    importing.wait_for("adding the machine to the configuration");
    let qemu = cwd.yaml("qemu").unwrap();
    let other = "  m: {qcow2_path: /x, snapshot_path: /x, machineinfo_path: /x, ip: 127.9.9.9, platform: linux, \
                 os_version: 1, architecture: amd64}\n";
    cwd.write_yaml("qemu", &format!("{qemu}{other}")).unwrap();
    drop(lock);
    let (code, log) = importing.end();
    assert!(code == Some(2) && log.contains("has this machine already"), "{code:?}: {log}");
    cwd.write_yaml("qemu", &qemu).unwrap();
    assert_eq!(cwd.yaml("kvm").unwrap(), entry);
    lab.assert_nothing_made("an exchange that is undone");
}

#[test]
fn domain_of_a_machine_of_kvm_is_replaced_when_the_operator_says_so() {
    let lab = small();
    let cwd = lab.kvm.cwd();
    cwd.list_machineries(&["qemu", "kvm"]).unwrap();
    // The domain of a standby is on, and so is one of which the host makes a save image.
    let settings = "{qemu: {standby: off, instant_space_limit: 4 GiB}, kvm: {instant: off, standby: off}}";
    cwd.host_yaml(&format!("machineries: {settings}\n")).unwrap();
    let entry = format!(
        "dsn: {}\ninterface: lo\nmachines:\n  # one\n  m:\n    label: m\n    ip: {}\n    platform: windows\n    \
         os_version: 10\n    tags: [office, java]\n",
        lab.kvm.libvirtd().dsn(),
        lab.ip("m")
    );
    cwd.write_yaml("kvm", &entry).unwrap();
    // The values are those of kvm.yaml.
    let import = ["import", "libvirt", "--as", "qemu", "--no-agent", "m"];
    let with = |more: &[&str]| lab.kvm.run(&[&import, more].concat()).unwrap();
    fails(&with(&[]), &["kvm.yaml has its domain as the machine 'm'", "--replace"]);
    lab.assert_nothing_made("an entry of kvm");
    assert_exchange_is_refused_or_undone(&lab, &[&import[..], &["--replace"]].concat(), &entry);
    let mut host = lab.kvm.host().unwrap();
    let mut client = host.client().unwrap();
    let replaced = with(&["--replace"]);
    succeeds(&replaced);
    // At no moment a host has both machines, which it refuses.
    assert!(!replaced.stdout.contains("has not reloaded"), "{replaced:?}");
    let yaml = cwd.yaml("kvm").unwrap();
    assert!(yaml.contains("# one") && !yaml.contains("label"), "{yaml}");
    assert!(cwd.yaml("qemu").unwrap().contains("office"));
    // The running host has the machine of qemu now.
    assert_eq!(client.machine("m").unwrap()["machinery_name"], "qemu");
    client.perform("restore_start", "m");
    lab.of_qemu("m").first_count(SOON).unwrap();
    client.perform("stop", "m");
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());

    // A second import changes nothing.
    let again = lab.run(&lab.import(&["m"], &[&["--json"], &MICRO[..]].concat()));
    succeeds(&again);
    let outcome: Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!((&outcome["added"], &outcome["skipped"][0]["name"]), (&Value::Array(Vec::new()), &"m".into()));
    let refused = lab.kvm.run(&["machine", "snapshot", "m"]).unwrap();
    fails(&refused, &["the copy of a domain's snapshot"]);
    // A later snapshot of the same name is another one.
    lab.virsh(&["snapshot-delete", "m", "clean"]);
    lab.snapshot("m");
    fails(&lab.run(&lab.import(&["m"], &MICRO)), &["a machine of this name exists"]);
    let other = lab.run(&lab.import(&["m"], &[&MICRO, &["--snapshot", "clean", "--name", "n"][..]].concat()));
    fails(&other, &["the machine 'm' has this ip, too"]);
}

#[test]
fn overlay_is_made_on_a_disk_that_is_at_its_snapshot() {
    let lab = small();
    let overlay = [&MICRO[..], &["--disks", "overlay"]].concat();
    // The guest has not written to its disk after the snapshot.
    let path = lab.file("m");
    qemu_io(&path, "write -P 0xa5 0 512");
    fails(&lab.run(&lab.import(&["m"], &overlay)), &["has changes after the snapshot", "snapshot-revert"]);
    lab.virsh(&["snapshot-revert", "m", "clean", "--paused"]);
    lab.virsh(&["destroy", "m"]);
    let before = lab.state();
    let ran = lab.run(&lab.import(&["m"], &overlay));
    succeeds(&ran);
    assert!(ran.stdout.contains("do not start or revert the domain 'm'"), "{ran:?}");
    let (mut host, mut client) = lab.kvm.serve().unwrap();
    client.perform("restore_start", "m");
    lab.of_qemu("m").first_count(SOON).unwrap();
    client.perform("stop", "m");
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    assert_eq!(lab.state(), before);
    // A disk that somebody has written to is found.
    qemu_io(&path, "write -P 0xa5 0 512");
    let checked = lab.kvm.run(&["check"]).unwrap();
    assert!(checked.stdout.contains("domains/m"), "{checked:?}");
}
