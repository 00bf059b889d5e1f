//! The configuration of the kvm machinery, and the findings of `check` on a host with libvirt.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, CommandOutput};
use machinery_testkit::lab::KvmLab;
use machinery_testkit::libvirt::SNAPSHOT;
use machinery_testkit::scratch::ScratchCwd;
use rustix::process::geteuid;

const MICRO: (&str, Guest) = ("m", Guest::Micro);

/// Expects that the host refuses to serve, with all of these words.
#[track_caller]
fn assert_refused(ran: &CommandOutput, words: &[&str]) {
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in {}", ran.stderr);
    }
    println!("{}", ran.stderr);
}

/// Runs `check`; returns its exit code and its output.
fn checked(lab: &KvmLab) -> (Option<i32>, String) {
    let ran = lab.run(&["-v", "check"]).unwrap();
    println!("{}", ran.stdout);
    (ran.code, ran.stdout)
}

#[track_caller]
fn assert_contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

/// Adds an argument to QEMU's command line, in the domain and in its snapshot.
fn add_argument(lab: &KvmLab, label: &str, option: &str, value: &str) {
    let added = format!(
        "<commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'><arg value='{option}'/>\
         <arg value='{value}'/></commandline></domain>"
    );
    lab.change_domain(label, |xml| xml.replace("</domain>", &added)).unwrap();
}

#[test]
fn machine_is_disabled_when_its_domain_is_missing_and_the_others_are_served() {
    let lab = KvmLab::new(&[MICRO, ("n", Guest::Micro)]).unwrap();
    lab.change_yaml("label: lab-m", "label: win10x64").unwrap();
    let words = ["no domain 'win10x64'", "lab-m, lab-n", "virsh list --all"];
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let machine = client.machine("m").unwrap();
    assert_eq!(machine["disabled"], true);
    assert_contains(machine["disabled_reason"].as_str().unwrap(), &words);
    assert_eq!(client.act("restore_start", "n").unwrap()["success"], true);
    assert_eq!(client.act("stop", "n").unwrap()["success"], true);
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(2));
    assert_contains(&output, &words);
    assert_contains(&output, &["kvm.yaml:5: machines.m.label"]);
}

#[test]
fn check_names_the_file_when_a_disk_is_gone_or_has_lost_its_snapshot() {
    let lab = KvmLab::new(&[MICRO, ("n", Guest::Micro)]).unwrap();
    assert_eq!(checked(&lab).0, Some(0));
    let disk = &lab.machine("m").disk;
    let away = disk.with_extension("away");
    fs::rename(disk, &away).unwrap();
    let path = disk.to_str().unwrap();
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(2));
    assert_contains(&output, &[path, "does not exist"]);
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let machine = client.machine("m").unwrap();
    assert_eq!(machine["disabled"], true);
    assert_contains(machine["disabled_reason"].as_str().unwrap(), &[path]);
    assert_eq!(client.machine("n").unwrap()["disabled"], false);
    fs::rename(&away, disk).unwrap();
    assert_eq!(client.act("enable_machine", "m").unwrap()["success"], true);
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
    // libvirt does not notice that the snapshot is deleted.
    let ran = Command::new("qemu-img").args(["snapshot", "-d", SNAPSHOT]).arg(disk).status().unwrap();
    assert!(ran.success());
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(2));
    assert_contains(&output, &["libvirt has the snapshot 'clean'", path, "does not"]);
}

#[test]
fn check_warns_when_a_domain_starts_by_itself_or_two_share_a_disk() {
    let lab = KvmLab::new(&[MICRO, ("n", Guest::Micro)]).unwrap();
    lab.libvirtd().virsh(&["autostart", "lab-m"]).unwrap();
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(0));
    assert_contains(&output, &["virsh autostart --disable lab-m"]);
    let xml = lab.libvirtd().virsh(&["dumpxml", "--inactive", "--security-info", "lab-n"]).unwrap();
    let paths = [&lab.machine("n").disk, &lab.machine("m").disk].map(|disk| disk.to_str().unwrap());
    lab.libvirtd().virsh_with_file(&["define"], &xml.replace(paths[0], paths[1]), &[]).unwrap();
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(2));
    assert_contains(&output, &["machine 'n'", paths[1], "which the domain of machine 'm' writes to"]);
}

/// libvirt reverts such a disk with a snapshot, but not when it restores a save image.
#[test]
fn save_image_is_not_made_when_the_command_line_names_an_image() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let second = lab.cwd().root().join("second.qcow2");
    let image = second.to_str().unwrap();
    let ran = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", image, "1M"]).status().unwrap();
    assert!(ran.success());
    lab.cwd().host_yaml("machineries: {kvm: {instant: on, standby: off}}\n").unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let mut why = || {
        assert_eq!(client.act("prepare", "m").unwrap()["success"], true);
        let ready = client.machine("m").unwrap()["ready"].take();
        (ready["mode"].as_str().unwrap().to_owned(), ready["reason"].as_str().unwrap().to_owned())
    };
    assert_eq!(why().0, "instant");
    add_argument(&lab, "lab-m", "-drive", &format!("if=none,id=second,file={image},format=qcow2"));
    let (how, why) = why();
    assert_eq!(how, "plain");
    assert_contains(&why, &["<qemu:commandline>", "-drive"]);
}

#[test]
fn old_key_works_and_warns_once_in_check_and_at_load() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let folder = lab.cwd().root().join("images");
    let keys =
        format!("standby: off, save_images: on, save_dir: {}, standby_memory: 1 GiB", folder.display());
    lab.cwd().host_yaml(&format!("machineries: {{kvm: {{{keys}}}}}\n")).unwrap();
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(0));
    let host = lab.host().unwrap();
    let log = host.log();
    for (old, new) in
        [("save_images", "instant"), ("save_dir", "instant_dir"), ("standby_memory", "standby_memory_limit")]
    {
        let warning = format!("machineries.kvm.{old}: this key is now called `{new}`");
        for text in [&output, &log] {
            assert_eq!(text.matches(&warning).count(), 1, "{old} in {text}");
        }
    }
    let mut client = host.client().unwrap();
    assert_eq!(client.act("prepare", "m").unwrap()["success"], true);
    assert_eq!(client.machine("m").unwrap()["ready"]["mode"], "instant");
    assert!(folder.join("m.machinery-image").exists());
}

/// The standby's QEMU has the old file open.
#[test]
fn standby_is_not_used_when_a_file_of_its_domain_was_replaced() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let file = lab.cwd().root().join("firmware-configuration");
    fs::write(&file, "old").unwrap();
    add_argument(&lab, "lab-m", "-fw_cfg", &format!("name=opt/lab,file={}", file.display()));
    lab.cwd().host_yaml("machineries: {kvm: {standby: on}}\n").unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let mut restores = |replaces: bool| {
        assert_eq!(client.act("prepare", "m").unwrap()["success"], true);
        let standby = lab.qemu_of("m").unwrap();
        if replaces {
            fs::write(&file, "another").unwrap();
        }
        assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
        let is_same = lab.qemu_of("m").unwrap() == standby;
        assert_eq!(client.act("stop", "m").unwrap()["success"], true);
        is_same
    };
    assert!(restores(false));
    assert!(!restores(true));
}

/// A libvirt that is reached over TCP counts as one on another computer. The plugin does not check its interfaces
/// and files.
#[test]
fn machine_is_served_when_libvirt_is_reached_over_tcp() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let tcp = lab.libvirtd().listens_on_tcp().unwrap();
    lab.change_yaml(&lab.libvirtd().dsn(), &tcp).unwrap();
    lab.change_yaml("interface: lo", "interface: bridge-elsewhere").unwrap();
    lab.cwd().host_yaml("machineries: {kvm: {instant: on, standby: off}}\n").unwrap();
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(0));
    assert_contains(&output, &["libvirt is on 127.0.0.1", "no save images"]);
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("prepare", "m").unwrap()["success"], true);
    let why = client.machine("m").unwrap()["ready"]["reason"].take();
    assert_contains(why.as_str().unwrap(), &["save images", "127.0.0.1"]);
    for action in ["restore_start", "stop", "norestore_start", "stop"] {
        assert_eq!(client.act(action, "m").unwrap()["success"], true, "{action}");
    }
    assert_contains(&host.log(), &["steps=\"connect "]);
}

#[test]
fn label_is_refused_when_two_machines_have_it() {
    let lab = KvmLab::new(&[MICRO, ("n", Guest::Micro)]).unwrap();
    lab.change_yaml("label: lab-n", "label: lab-m").unwrap();
    assert_refused(&lab.run(&["serve"]).unwrap(), &["'lab-m' is already the label of machine 'm'"]);
}

#[test]
fn dsn_is_refused_with_advice_when_libvirt_cannot_be_reached() {
    let machine = "machines:\n  m: {label: x, ip: 10.0.0.1, platform: linux, os_version: 1}\n";
    // libvirt's library passes an unknown driver on to a libvirtd, which may run on this computer or not.
    for (dsn, advice) in [
        ("qemu:///system?socket=/none/libvirt-sock", "Start libvirtd"),
        ("nonsense:///system", "correct the dsn in kvm.yaml"),
    ] {
        let text = format!("dsn: '{dsn}'\ninterface: lo\n{machine}");
        let cwd = ScratchCwd::new(&[("kvm", &text)]).unwrap();
        let ran = host::run(&cwd, &["serve"]).unwrap();
        assert_refused(&ran, &["cannot connect to libvirt at", dsn]);
        let checked = host::run(&cwd, &["-v", "check"]).unwrap();
        assert_eq!(checked.code, Some(2));
        println!("{}", checked.stdout);
        assert!(
            checked.stdout.to_lowercase().contains(&advice.to_lowercase()),
            "no {advice:?}: {}",
            checked.stdout
        );
    }
}

#[test]
fn check_prints_versions_domains_and_snapshots() {
    let lab = KvmLab::new(&[MICRO, ("bare", Guest::Micro)]).unwrap();
    let checked = lab.run(&["-v", "check"]).unwrap();
    println!("{}", checked.stdout);
    assert_eq!(checked.code, Some(0), "{}", checked.stdout);
    for words in ["kvm: libvirt ", "qemu ", "snapshot 'clean', internal, of the domain when it was running"] {
        assert!(checked.stdout.contains(words), "no {words:?} in {}", checked.stdout);
    }
    lab.libvirtd().virsh(&["snapshot-delete", "lab-bare", "clean"]).unwrap();
    let checked = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(checked.code, Some(2));
    for words in ["machine 'bare'", "has no current snapshot", "snapshot-create-as"] {
        assert!(checked.stdout.contains(words), "no {words:?} in {}", checked.stdout);
    }
    // A check does not disturb a host that serves.
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    let checked = lab.run(&["-v", "check"]).unwrap();
    assert!(checked.stdout.contains("its domain is running now"), "{}", checked.stdout);
    assert_eq!(client.act("state", "m").unwrap()["state"], "running");
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
}

#[test]
fn check_warns_when_the_user_of_qemu_may_not_use_the_kvm_device() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let conf = lab.cwd().root().join("libvirt/etc/libvirt/qemu.conf");
    let text = fs::read_to_string(&conf).unwrap();
    fs::write(&conf, text.replace("\"root\"", "\"+65534\"")).unwrap();
    lab.libvirtd().kill_daemon().unwrap();
    lab.libvirtd().start_daemon().unwrap();
    let checked = lab.run(&["-v", "check"]).unwrap();
    println!("{}", checked.stdout);
    if !fs::exists("/dev/kvm").unwrap() {
        assert!(!checked.stdout.contains("libvirt runs QEMU as user"), "{}", checked.stdout);
        return;
    }
    let open = std::os::unix::fs::MetadataExt::mode(&fs::metadata("/dev/kvm").unwrap()) & 0o6 == 0o6;
    let words =
        if open { "as user nobody, may use /dev/kvm" } else { "as user nobody, which may not use /dev/kvm" };
    assert!(checked.stdout.contains(words), "no {words:?} in {}", checked.stdout);
}

/// Adds settings to libvirt's `qemu.conf`, and restarts libvirtd.
fn configure_libvirt(lab: &KvmLab, settings: &str) {
    let path = lab.cwd().root().join("libvirt/etc/libvirt/qemu.conf");
    let lines = fs::read_to_string(&path).unwrap();
    let is_set = |line: &str| {
        let key = |line: &str| line.split(" = ").next().unwrap_or_default().to_owned();
        settings.lines().any(|new| key(new) == key(line))
    };
    let kept: String = lines.lines().filter(|line| !is_set(line)).map(|line| format!("{line}\n")).collect();
    fs::write(&path, kept + settings).unwrap();
    lab.libvirtd().kill_daemon().unwrap();
    lab.libvirtd().start_daemon().unwrap();
}

#[test]
fn check_shows_how_libvirt_confines_qemu_and_warns_of_what_is_missing() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(0));
    if !geteuid().is_root() {
        // A plain user's libvirt is that of a session.
        assert_contains(
            &output,
            &["a session's libvirt runs QEMU with all rights of this user", "qemu:///system"],
        );
        return;
    }
    assert_contains(
        &output,
        &[
            "no security driver",
            "security_driver in /etc/libvirt/qemu.conf",
            "runs QEMU as root",
            "while no domain runs",
        ],
    );
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    // As root, a QEMU has all capabilities, and libvirt's seccomp filter.
    let output = checked(&lab).1;
    assert_contains(&output, &["the QEMU of lab-m has the capabilities", "clear_emulator_capabilities = 1"]);
    assert!(!output.contains("no seccomp filter"), "{output}");
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
    drop(host);

    configure_libvirt(&lab, "seccomp_sandbox = 0\n");
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    let (code, output) = checked(&lab);
    assert_eq!(code, Some(0));
    assert_contains(&output, &["no seccomp filter (seccomp_sandbox = 1)", "the right to new privileges"]);
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
    drop(host);

    configure_libvirt(&lab, "user = \"+54321\"\ngroup = \"+54322\"\n");
    let output = checked(&lab).1;
    assert_contains(&output, &["runs all QEMUs as the user 54321 and the group 54322"]);
    assert!(!output.contains("as root"), "{output}");
}
