//! The state that a domain keeps outside of its memory and its disks: a TPM and UEFI variables. Each restore has the
//! snapshot's, and so has a cold boot.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::process::Command;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, GuestProbe, firmware};
use machinery_testkit::host;
use machinery_testkit::lab::KvmLab;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// The answers of a TPM. Source: the TPM 2.0 Library, part 2, 6.6.
const SUCCESS: &str = "00000000";
const NO_INDEX: &str = "0000018b";
const INDEX_EXISTS: &str = "0000014c";

/// Makes a machine with a TPM. Its disk is that of a seed which is in no configuration.
fn lab() -> (KvmLab, GuestProbe) {
    let lab = KvmLab::new(&[("seed", Guest::Micro)]).unwrap();
    let head = format!("dsn: {}\ninterface: lo\nmachines: {{}}\n", lab.libvirtd().dsn());
    lab.cwd().write_yaml("kvm", &head).unwrap();
    let files = firmware::boot_files().unwrap().map(|path| path.display().to_string());
    let (args, serial) = (lab.cwd().root().join("m.args"), lab.cwd().root().join("machines/m/serial.log"));
    let append = "console=ttyS0 quiet panic=-1";
    let text =
        format!("-serial file:{}\n-kernel vmlinuz\n-initrd initramfs\n-append {append}\n", serial.display());
    fs::write(&args, text).unwrap();
    let (seed, args) = (lab.machine("seed"), args.display().to_string());
    let (ip, disk) = (seed.ip.clone(), seed.disk.display().to_string());
    let words = ["machine", "create", "m", "--machinery", "kvm", "--user", "--accel", "tcg", "--cpus", "1"];
    let more =
        ["--ram", "256M", "--platform", "linux", "--tpm", "--ip", &ip, "--disk", &disk, "--args", &args];
    let files = ["--file", &files[0], "--file", &files[1]];
    let mut create = host::command(lab.cwd()).unwrap();
    let made = create.args([&words[..], &more, &files].concat()).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    (lab, GuestProbe { name: "m".to_owned(), ip, serial })
}

/// Requests the state from the guest, after it has written the word, if there is one.
fn state(probe: &GuestProbe, word: &str) -> Value {
    let (status, body) = probe.get(&format!("/cgi-bin/firmware?{word}"), SOON).unwrap();
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

/// Restores the machine, and changes its TPM in the run, and its variables if it has some. Returns the state of the
/// snapshot.
fn run(client: &mut Client, probe: &GuestProbe) -> Value {
    client.perform("restore_start", "m");
    let before = state(probe, "");
    assert!(before["variables"] == "snapshot" || before["variables"] == "", "{before}");
    assert_eq!((&before["of_snapshot"], &before["of_run"]), (&SUCCESS.into(), &NO_INDEX.into()), "{before}");
    let after = state(probe, "run");
    assert_eq!((&after["extended"], &after["of_run"]), (&SUCCESS.into(), &SUCCESS.into()), "{after}");
    assert_ne!(after["register"], before["register"]);
    client.perform("stop", "m");
    before
}

#[test]
fn tpm_is_that_of_the_snapshot_in_each_run() {
    let (lab, probe) = lab();
    has_the_snapshots_state_in_each_run(&lab, &probe);
    assert_eq!(lab.run(&["machine", "remove", "m", "-y"]).unwrap().code, Some(0));
    lab.assert_clean();
}

fn has_the_snapshots_state_in_each_run(lab: &KvmLab, probe: &GuestProbe) {
    let variables = || fs::read(lab.cwd().root().join("machines/m/variables.qcow2")).ok();
    let mut states = Vec::new();
    for (kvm, mode) in
        [("instant: off, standby: off", "plain"), ("standby: off", "instant"), ("standby: on", "standby")]
    {
        lab.cwd().host_yaml(&format!("machineries: {{kvm: {{{kvm}}}}}\n")).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        for _ in 0..2 {
            client.perform("prepare", "m");
            let machine = client.machine("m").unwrap();
            assert_eq!(machine["ready"]["mode"], mode, "{machine}");
            let before = variables();
            states.push(run(&mut client, probe));
            if mode == "instant" {
                boots_with_the_snapshots_state(&mut client, probe);
            }
            assert!(mode == "plain" || variables() == before, "a run writes to the domain's variables");
        }
        assert!(host.terminate().unwrap().success());
    }
    states.dedup();
    assert_eq!(states.len(), 1, "{states:?}");
}

/// Boots the machine, whose last run has changed its state.
fn boots_with_the_snapshots_state(client: &mut Client, probe: &GuestProbe) {
    client.perform("norestore_start", "m");
    probe.wait_for_text("guest ready", Duration::from_secs(180)).unwrap();
    let booted = state(probe, "");
    assert_eq!((&booted["defined"], &booted["of_run"]), (&INDEX_EXISTS.into(), &NO_INDEX.into()), "{booted}");
    assert!(booted["variables"] == "snapshot" || booted["variables"] == "", "{booted}");
    client.perform("stop", "m");
}

/// Reports whether libvirt takes internal snapshots of a domain with UEFI.
fn saves_uefi(lab: &KvmLab) -> bool {
    let version = lab.libvirtd().virsh(&["version", "--daemon"]).unwrap();
    let daemon = version.lines().find_map(|line| line.strip_prefix("Running against daemon: ")).unwrap();
    let mut numbers = daemon.trim().split('.').map(|number| number.parse::<u32>().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (10, 10)
}

/// Defines and boots the domain `m`, with a TPM and with variables in a qcow2 file.
fn boot_by_uefi(lab: &KvmLab) -> GuestProbe {
    let folder = lab.cwd().root().join("machines/m");
    fs::create_dir(&folder).unwrap();
    let (seed, path) = (lab.machine("seed"), |name: &str| folder.join(name).display().to_string());
    let (disk, variables) = (path("disk.qcow2"), path("variables.qcow2"));
    for words in [
        ["create", "-q", "-f", "qcow2", &disk, "1M"],
        ["convert", "-q", "-O", "qcow2", "/usr/share/OVMF/OVMF_VARS_4M.fd", &variables],
    ] {
        assert!(Command::new("qemu-img").args(words).status().unwrap().success());
    }
    let [kernel, initrd] = firmware::boot_files().unwrap().map(|path| path.display().to_string());
    let args = [
        "-netdev".to_owned(),
        format!("user,id=net0,restrict=on,hostfwd=tcp:{}:8000-:8000", seed.ip),
        "-device".to_owned(),
        "virtio-net-pci,netdev=net0,bus=pcie.0,addr=0x10".to_owned(),
    ];
    let args: String = args.iter().map(|arg| format!("<q:arg value='{arg}'/>")).collect();
    let domain = format!(
        "<domain type='qemu' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><name>m</name>
        <memory unit='MiB'>256</memory><os><type arch='x86_64' machine='q35'>hvm</type>
        <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
        <nvram format='qcow2'>{}</nvram><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
        <cmdline>console=ttyS0 quiet panic=-1</cmdline></os><features><acpi/></features><devices>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>
        <target dev='vda' bus='virtio'/></disk><controller type='usb' model='none'/>
        <serial type='file'><source path='{}'/></serial><memballoon model='none'/>
        <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>
        <q:commandline>{args}</q:commandline></domain>",
        variables,
        disk,
        path("serial.log"),
    );
    lab.libvirtd().virsh_with_file(&["define"], &domain, &[]).unwrap();
    lab.libvirtd().virsh(&["start", "m"]).unwrap();
    GuestProbe { name: "m".to_owned(), ip: seed.ip.clone(), serial: folder.join("serial.log") }
}

#[test]
fn variables_and_tpm_are_those_of_the_snapshot_where_libvirt_takes_one() {
    let lab = KvmLab::new(&[("seed", Guest::Micro)]).unwrap();
    let probe = boot_by_uefi(&lab);
    if !saves_uefi(&lab) {
        let refused = lab.libvirtd().virsh(&["snapshot-create-as", "m", "clean"]).unwrap_err().to_string();
        assert!(refused.contains("pflash"), "{refused}");
        lab.libvirtd().virsh(&["destroy", "m"]).unwrap();
        return;
    }
    probe.wait_for_text("guest ready", Duration::from_secs(300)).unwrap();
    lab.libvirtd().virsh(&["snapshot-create-as", "m", "clean"]).unwrap();
    lab.libvirtd().virsh(&["destroy", "m"]).unwrap();
    let (dsn, ip) = (lab.libvirtd().dsn(), &probe.ip);
    let entry = format!("label: m, snapshot: clean, ip: {ip}, platform: linux, os_version: '12'");
    lab.cwd()
        .write_yaml("kvm", &format!("dsn: {dsn}\ninterface: lo\nmachines:\n  m: {{{entry}}}\n"))
        .unwrap();
    has_the_snapshots_state_in_each_run(&lab, &probe);
    lab.assert_clean();
}
