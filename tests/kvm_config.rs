//! The configuration of the kvm machinery, and what `check` finds on a host with libvirt.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;

use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, Ran};
use machinery_testkit::lab::KvmLab;
use machinery_testkit::scratch::ScratchCwd;

const MICRO: (&str, Guest) = ("m", Guest::Micro);

/// It refuses to serve, and says all of these words.
#[track_caller]
fn assert_refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in {}", ran.stderr);
    }
    println!("{}", ran.stderr);
}

#[test]
fn a_domain_that_is_missing_is_named_with_those_that_there_are() {
    let lab = KvmLab::new(&[MICRO, ("n", Guest::Micro)]).unwrap();
    lab.change_yaml("label: lab-m", "label: win10x64").unwrap();
    let words = ["kvm.yaml:5: machines.m.label", "no domain 'win10x64'", "lab-m, lab-n", "virsh list --all"];
    assert_refused(&lab.run(&["serve"]).unwrap(), &words);
    let checked = lab.run(&["check"]).unwrap();
    assert_eq!(checked.code, Some(2));
    assert!(checked.stdout.contains("win10x64"), "{}", checked.stdout);
    lab.assert_clean();
}

#[test]
fn labels_are_used_once() {
    let lab = KvmLab::new(&[MICRO, ("n", Guest::Micro)]).unwrap();
    lab.change_yaml("label: lab-n", "label: lab-m").unwrap();
    assert_refused(&lab.run(&["serve"]).unwrap(), &["'lab-m' is already the label of machine 'm'"]);
}

#[test]
fn a_dsn_that_leads_nowhere_is_told_with_what_to_do() {
    let machine = "machines:\n  m: {label: x, ip: 10.0.0.1, platform: linux, os_version: 1}\n";
    // What libvirt's library does not know itself it asks libvirtd for, which may run here or not.
    for (dsn, advice) in [
        ("qemu:///system?socket=/none/libvirt-sock", "Start libvirtd"),
        ("nonsense:///system", "correct the dsn in kvm.yaml"),
    ] {
        let text = format!("dsn: '{dsn}'\ninterface: lo\n{machine}");
        let cwd = ScratchCwd::new(&[("kvm", &text)]).unwrap();
        let ran = host::run(&cwd, &["serve"]).unwrap();
        assert_refused(&ran, &["cannot connect to libvirt at", dsn]);
        let checked = host::run(&cwd, &["check"]).unwrap();
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
fn check_tells_of_versions_domains_and_snapshots() {
    let lab = KvmLab::new(&[MICRO, ("bare", Guest::Micro)]).unwrap();
    let checked = lab.run(&["check"]).unwrap();
    println!("{}", checked.stdout);
    assert_eq!(checked.code, Some(0), "{}", checked.stdout);
    for words in ["kvm: libvirt ", "qemu ", "snapshot 'clean', internal, of the domain when it was running"] {
        assert!(checked.stdout.contains(words), "no {words:?} in {}", checked.stdout);
    }
    lab.libvirtd().virsh(&["snapshot-delete", "lab-bare", "clean"]).unwrap();
    let checked = lab.run(&["check"]).unwrap();
    assert_eq!(checked.code, Some(2));
    for words in ["machine 'bare'", "has no current snapshot", "snapshot-create-as"] {
        assert!(checked.stdout.contains(words), "no {words:?} in {}", checked.stdout);
    }
    // Beside a host at work it disturbs nobody.
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    let checked = lab.run(&["check"]).unwrap();
    assert!(checked.stdout.contains("its domain is running now"), "{}", checked.stdout);
    assert_eq!(client.act("state", "m").unwrap()["state"], "running");
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
}

/// Where QEMU's user may not use `/dev/kvm`, `check` says so.
#[test]
fn check_notices_a_kvm_device_that_qemu_may_not_use() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let conf = lab.cwd().root().join("libvirt/etc/libvirt/qemu.conf");
    let text = fs::read_to_string(&conf).unwrap();
    fs::write(&conf, text.replace("\"root\"", "\"+65534\"")).unwrap();
    lab.libvirtd().kill_daemon().unwrap();
    lab.libvirtd().start_daemon().unwrap();
    let checked = lab.run(&["check"]).unwrap();
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
