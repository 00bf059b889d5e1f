use std::path::Path;

use clap::Parser;

use super::*;

/// A file as CAPE's own example: comments, one machine in use, and one that is not.
const KVM_CONF: &str = "\
[kvm]
# The machines in use.
machines = win10, win7-office

interface = virbr0
dsn = qemu+tcp://127.0.0.1:1/system

[win10]
label = win10x64
platform = windows
ip = 192.168.122.101
; the version of Windows is a tag
tags = x64,win10
snapshot = clean
arch = x64
reserved = yes
resultserver_ip = 192.168.122.1
resultserver_port = 2042

[win7-office]
label: win7
platform: Windows
IP: 192.168.122.102
tags =
  win7,
  office
interface = virbr7
snapshot =
arch = x86
reserved = no

[spare]
label = spare
";

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    cape: Cape,
}

fn conf(folder: &Path, texts: &[&str], options: &[&str]) -> Result<Found> {
    let mut arguments = vec!["cape".to_owned()];
    for (number, text) in texts.iter().enumerate() {
        let path = folder.join(format!("{number}.conf"));
        fs::write(&path, text).unwrap();
        arguments.push(path.display().to_string());
    }
    arguments.extend(options.iter().map(|option| (*option).to_owned()));
    find(&Command::try_parse_from(arguments).unwrap().cape)
}

fn found(texts: &[&str], options: &[&str]) -> Found {
    conf(tempfile::tempdir().unwrap().path(), texts, options).unwrap()
}

fn fails(text: &str) -> String {
    conf(tempfile::tempdir().unwrap().path(), &[text], &[]).unwrap_err().to_string()
}

#[test]
fn machines_have_the_keys_that_have_an_equivalent() {
    let found = found(&[KVM_CONF], &[]);
    let [win10, win7] = &found.machines[..] else { panic!("{found:?}") };
    let expected = serde_yaml::from_str::<serde_yaml::Value>(
        "{label: win10x64, snapshot: clean, ip: 192.168.122.101, platform: windows, os_version: '10', architecture: amd64, \
         interface: virbr0, tags: [x64, win10]}",
    );
    assert_eq!((win10.name.as_str(), win10.entry()), ("win10x64", expected.unwrap()));
    let expected = serde_yaml::from_str::<serde_yaml::Value>(
        "{label: win7, ip: 192.168.122.102, platform: windows, os_version: '7', architecture: x86, interface: virbr7, \
         tags: [win7, office]}",
    );
    assert_eq!((win7.name.as_str(), win7.entry()), ("win7", expected.unwrap()));
    assert_eq!(found.dsn.as_deref(), Some("qemu+tcp://127.0.0.1:1/system"));
    assert_eq!(found.interface.as_deref(), Some("virbr0"));
    assert_eq!(found.left_out, [("spare".to_owned(), "it is not among the machines of [kvm]".to_owned())]);
}

#[test]
fn keys_without_an_equivalent_are_named_in_one_note() {
    let found = found(&[KVM_CONF], &[]);
    let [note] = &found.notes[..] else { panic!("{found:?}") };
    assert!(note.contains("left out: reserved, resultserver_ip, resultserver_port."), "{note}");
}

#[test]
fn later_file_and_option_override_a_key() {
    let later = "[DEFAULT]\nplatform = linux\n[kvm]\nmachines = win10\n[win10]\nip = 10.0.0.9\ntags = a%%b\n";
    let earlier = KVM_CONF.replacen("platform = windows\n", "", 1);
    let found = found(&[&earlier, later], &["--os-version=win10x64=22.04"]);
    let entry = found.machines[0].entry();
    assert_eq!((entry["ip"].as_str(), entry["tags"][0].as_str()), (Some("10.0.0.9"), Some("a%b")));
    assert_eq!((entry["platform"].as_str(), entry["os_version"].as_str()), (Some("linux"), Some("22.04")));
    assert_eq!((found.machines.len(), entry["label"].as_str()), (1, Some("win10x64")));
}

#[test]
fn version_is_unknown_when_the_tags_name_several_or_none() {
    for (tags, version) in [
        ("x64,win10", Some("10")),
        ("WinXP,winrar", Some("xp")),
        ("win7,win10", None),
        ("winrar", None),
        ("", None),
    ] {
        assert_eq!(windows_of(&words(tags)).as_deref(), version, "{tags}");
    }
}

#[test]
fn file_is_refused_with_its_place_when_it_has_no_usable_machines() {
    for (text, expected) in [
        ("[virtualbox]\nmachines = a\n[a]\nlabel = a\n", "'virtualbox' are no domains of libvirt"),
        ("[cuckoo]\nmachinery = kvm\n", "no section [kvm] or [kvmremote]"),
        ("\n[kvm]\nmachines =\n", "0.conf:2: kvm.machines: no machine is listed"),
        ("[kvm]\nmachines = a\n", "0.conf:1: kvm.machines: there is no section [a]"),
        ("[kvm]\nmachines = a\n[a]\nip = 10.0.0.1\n", "0.conf:3: a.label: there is no label"),
        ("[kvm\n", "0.conf: this is not a configuration of CAPE: line 1"),
    ] {
        let error = fails(text);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
