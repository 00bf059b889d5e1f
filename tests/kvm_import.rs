//! The import of a lab of libvirt: one command adds its domains, which are then checked and restored.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::{Duration, Instant};

use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::lab::{KvmLab, TestNetwork};
use machinery_testkit::libvirt::SNAPSHOT;
use machinery_testkit::requirement;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// The domains of the big lab.
const DOMAINS: usize = 20;

/// The top of a `kvm.yaml` by hand.
fn head(lab: &KvmLab) -> String {
    format!(
        "# The analysis machines of the lab.\ndsn: {}\ninterface: lo # of all machines\n\nmachines:\n  # from libvirt:\n",
        lab.libvirtd().dsn()
    )
}

/// Makes a lab whose machines are in no configuration yet.
fn unimported(names: &[String]) -> KvmLab {
    let machines: Vec<(&str, Guest)> = names.iter().map(|name| (name.as_str(), Guest::Micro)).collect();
    let lab = KvmLab::new(&machines).unwrap();
    lab.cwd().write_yaml("kvm", &head(&lab)).unwrap();
    lab
}

fn names(count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("m{number:02}")).collect()
}

fn mac(number: usize) -> String {
    format!("52:54:00:77:00:{number:02x}")
}

/// Defines a network that reserves an address for each card. It is never started: a bridge would need privileges, and the
/// loopback interface exists everywhere.
fn define_network(lab: &KvmLab, cards: usize) {
    let host = |number| format!("<host mac='{}' ip='10.77.0.{}'/>", mac(number), 100 + number);
    let hosts: String = (1..=cards).map(host).collect();
    let network = format!(
        "<network><name>lab</name><bridge name='lo'/><ip address='10.77.0.1' netmask='255.255.255.0'>
         <dhcp><range start='10.77.0.100' end='10.77.0.200'/>{hosts}</dhcp></ip></network>"
    );
    lab.libvirtd().virsh_with_file(&["net-define"], &network, &[]).unwrap();
}

/// Adds the system to the domain's metadata, as virt-install writes it, and a card if there is a number for its MAC
/// address.
fn describe(lab: &KvmLab, label: &str, card: Option<usize>) {
    let system = "<metadata><l:libosinfo xmlns:l='http://libosinfo.org/xmlns/libvirt/domain/1.0'>\
                  <l:os id='http://microsoft.com/win/10'/></l:libosinfo></metadata>";
    let card = card.map(|number| {
        format!(
            "<interface type='network'><mac address='{}'/><source network='lab'/></interface></devices>",
            mac(number)
        )
    });
    let with = |xml: &str| {
        let xml = xml.replace("</uuid>", &format!("</uuid>{system}"));
        card.as_ref().map_or(xml.clone(), |card| xml.replace("</devices>", card))
    };
    lab.change_domain(label, with).unwrap();
}

#[track_caller]
fn assert_fails(ran: &CommandOutput, words: &[&str]) {
    println!("{}", ran.stderr);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in {}", ran.stderr);
    }
}

/// Runs an import that succeeds, and returns its outcome.
#[track_caller]
fn imported(lab: &KvmLab, arguments: &[&str]) -> Value {
    let begun = Instant::now();
    let arguments: Vec<&str> = ["--json", "import"].iter().chain(arguments).copied().collect();
    let ran = lab.run(&arguments).unwrap();
    println!("{:?}: {}{}", begun.elapsed(), ran.stdout, ran.stderr);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    serde_json::from_str(&ran.stdout).unwrap()
}

fn count(list: &Value) -> usize {
    list.as_array().unwrap().len()
}

/// Expects that `check` finds each machine and its snapshot, and no problem.
#[track_caller]
fn assert_sound(lab: &KvmLab, machines: usize) {
    let check = lab.run(&["--json", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    let report: Value = serde_json::from_str(&check.stdout).unwrap();
    let texts =
        report["findings"].as_array().unwrap().iter().map(|finding| finding["text"].as_str().unwrap());
    let texts: Vec<&str> = texts.inspect(|text| println!("{text}")).collect();
    let snapshots = texts.iter().filter(|text| text.contains(": snapshot 'clean', internal, ")).count();
    assert_eq!(snapshots, machines);
    // A warning of an entry that differs from its domain.
    assert!(!texts.iter().any(|text| text.contains("kvm.yaml")), "{texts:?}");
}

/// Restores the machine, and expects that its guest runs from the snapshot on.
#[track_caller]
fn assert_restored(lab: &KvmLab, name: &str) {
    let label = lab.machine(name).label.as_str();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for action in ["restore_start", "stop"] {
        assert_eq!(client.act(action, label).unwrap(), json!({"success": true}), "{}", host.log());
        if action == "restore_start" {
            let first = lab.machine(name).first_count(SOON).unwrap();
            assert_eq!(first, lab.restored_count().unwrap());
        }
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
}

#[test]
fn lab_of_20_domains_is_imported_by_one_command() {
    let names = names(DOMAINS);
    let lab = unimported(&names);
    define_network(&lab, DOMAINS - 1);
    for (number, name) in names.iter().enumerate() {
        // The first one has no card, so that it can start.
        describe(&lab, &lab.machine(name).label, Some(number).filter(|number| *number > 0));
    }
    let before = lab.cwd().yaml("kvm").unwrap();
    let text = || lab.cwd().yaml("kvm").unwrap();

    let refused = lab.run(&["import", "libvirt"]).unwrap();
    let asked = "machine 'lab-m01' failed: libvirt does not have its ip. Add --ip 'lab-m01=ADDRESS'";
    assert_fails(&refused, &[asked]);
    assert_eq!(text(), before);

    let ip = format!("--ip=lab-m01={}", lab.machine("m01").ip);
    let planned = imported(&lab, &["libvirt", "--dry-run", &ip]);
    let entries = planned["dry_run"].as_str().unwrap().strip_prefix("machines:\n").unwrap();
    assert_eq!((count(&planned["added"]), text()), (DOMAINS, before.clone()));

    let added = imported(&lab, &["libvirt", &ip]);
    assert_eq!((count(&added["added"]), &added["skipped"]), (DOMAINS, &json!([])), "{added}");
    let after = text();
    assert_eq!(after, format!("{before}{entries}"));
    let entry = "  lab-m20:\n    label: lab-m20\n    snapshot: clean\n    ip: \"10.77.0.119\"\n    platform: windows\n    \
                 os_version: \"10\"\n    architecture: amd64\n    interface: lo\n    mac_address: \"52:54:00:77:00:13\"\n";
    assert!(after.contains(entry), "{after}");
    for arguments in [&["libvirt", ip.as_str()][..], &["libvirt"]] {
        let again = imported(&lab, arguments);
        assert_eq!((count(&again["added"]), count(&again["skipped"])), (0, DOMAINS), "{again}");
        assert_eq!(text(), after);
    }
    assert_sound(&lab, DOMAINS);
    assert_restored(&lab, "m01");
}

#[test]
fn machines_of_cape_are_imported_when_libvirt_has_their_domains() {
    let lab = unimported(&names(2));
    let before = lab.cwd().yaml("kvm").unwrap();
    let conf = format!(
        "[kvm]\n# The machines in use.\nmachines = cape1,cape2\ninterface = lo\ndsn = {}\n\n\
         [cape1]\nlabel = lab-m01\nplatform = windows\nip = {}\narch = x64\ntags = x64,win10\nreserved = yes\n\n\
         [cape2]\nlabel = lab-gone\nplatform = linux\nip = 127.77.0.2\narch = x86\nsnapshot = clean\n",
        lab.libvirtd().dsn(),
        lab.machine("m01").ip
    );
    let file = lab.cwd().root().join("kvm.conf");
    let path = file.display().to_string();
    fs::write(&file, &conf).unwrap();
    let import = ["cape", path.as_str(), "--os-version=lab-m02=22.04"];
    let run = |arguments: &[&str]| lab.run(&[&["import"], arguments].concat()).unwrap();

    let lacking = run(&["cape", &path]);
    assert_fails(
        &lacking,
        &["machine 'lab-gone' failed", "does not have its os_version", "--os-version 'lab-gone=VERSION'"],
    );
    let refused = run(&["cape", &path, "--os-version=lab-gone=22.04"]);
    assert_fails(&refused, &["machines.lab-gone.label", "no domain 'lab-gone'", "lab-m01, lab-m02"]);
    assert_eq!(lab.cwd().yaml("kvm").unwrap(), before);

    fs::write(&file, conf.replace("lab-gone", "lab-m02")).unwrap();
    let added = imported(&lab, &import);
    assert_eq!(added["added"], json!(["lab-m01", "lab-m02"]));
    assert!(added["notes"][0].as_str().unwrap().contains("left out: reserved."), "{added}");
    let after = lab.cwd().yaml("kvm").unwrap();
    assert!(after.starts_with(&before) && after.contains("    tags: [x64, win10]\n"), "{after}");
    assert_eq!(count(&imported(&lab, &import)["skipped"]), 2);
    assert_eq!(lab.cwd().yaml("kvm").unwrap(), after);
    assert_sound(&lab, 2);
    assert_restored(&lab, "m01");
}

/// libvirtd has the leases in a file, also while the network is off.
#[test]
fn address_of_a_lease_is_imported_with_a_note() {
    if !requirement::is_root() {
        return;
    }
    let lab = unimported(&names(1));
    define_network(&lab, 0);
    describe(&lab, "lab-m01", Some(1));
    let folder = lab.cwd().root().join("libvirt/var/lib/libvirt/dnsmasq");
    let lease = json!([{"ip-address": "10.77.0.150", "mac-address": mac(1), "hostname": "win", "expiry-time": 4_000_000_000_u32}]);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("lo.status"), lease.to_string()).unwrap();
    lab.cwd().list_machineries(&["qemu"]).unwrap();
    let notes = imported(&lab, &["libvirt", "--dry-run"])["notes"].to_string();
    assert!(notes.contains("cuckoo.yaml does not list the machinery kvm"), "{notes}");
    lab.cwd().list_machineries(&["kvm"]).unwrap();
    let added = imported(&lab, &["libvirt"]);
    assert_eq!((&added["added"], count(&added["notes"])), (&json!(["lab-m01"]), 1));
    let note = added["notes"][0].as_str().unwrap();
    assert!(
        note.starts_with("machine 'lab-m01': its ip 10.77.0.150 is a lease, which may change."),
        "{note}"
    );
    assert!(lab.cwd().yaml("kvm").unwrap().contains("    ip: \"10.77.0.150\"\n"));
    assert_sound(&lab, 1);
}

/// The card is on a bridge, and part of the snapshot.
#[test]
fn domain_on_a_bridge_is_restored_with_its_card_when_it_was_imported() {
    let Some(network) = requirement::NETWORK.or_skip(TestNetwork::new().unwrap()) else { return };
    network.add_bridge(TestNetwork::BRIDGE).unwrap();
    // libvirtd and its QEMU are in the network as well.
    network.inside(|| import_on_a_bridge(&network)).unwrap();
}

fn import_on_a_bridge(network: &TestNetwork) {
    let lab = unimported(&names(1));
    let (libvirtd, machine) = (lab.libvirtd(), lab.machine("m01"));
    let label = machine.label.as_str();
    let card = format!(
        "<interface type='bridge'><mac address='{}'/><source bridge='{}'/></interface></devices>",
        mac(1),
        TestNetwork::BRIDGE
    );
    let domain = libvirtd.virsh(&["dumpxml", "--inactive", "--security-info", label]).unwrap();
    libvirtd.virsh(&["snapshot-delete", label, SNAPSHOT]).unwrap();
    libvirtd.virsh_with_file(&["define"], &domain.replace("</devices>", &card), &[]).unwrap();
    libvirtd.virsh(&["start", label]).unwrap();
    machine.wait_for_count(20, SOON).unwrap();
    libvirtd.virsh(&["snapshot-create-as", label, SNAPSHOT]).unwrap();
    libvirtd.virsh(&["destroy", label]).unwrap();

    let mut import = host::command(lab.cwd()).unwrap();
    import.args(["import", "libvirt", "--platform=linux", "--os-version=1", "--ip"]).arg(&machine.ip);
    network.attach(&mut import);
    let ran = host::run_command(import).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let text = lab.cwd().yaml("kvm").unwrap();
    for line in [format!("interface: {}", TestNetwork::BRIDGE), format!("mac_address: \"{}\"", mac(1))] {
        assert!(text.contains(&format!("\n    {line}\n")), "{line}: {text}");
    }
    let host = RunningHost::start_with(lab.cwd(), |command| network.attach(command)).unwrap();
    let mut client = host.client().unwrap();
    let mut firsts = Vec::new();
    for _ in 0..2 {
        assert_eq!(client.act("restore_start", label).unwrap(), json!({"success": true}), "{}", host.log());
        firsts.push(machine.first_count(SOON).unwrap());
        assert!(network.members(TestNetwork::BRIDGE).unwrap().contains("vnet"));
        assert_eq!(client.act("stop", label).unwrap(), json!({"success": true}), "{}", host.log());
    }
    assert!(firsts[0] == firsts[1] && firsts[0] > 20, "{firsts:?}");
}

#[test]
fn import_fails_with_advice_when_libvirtd_is_away() {
    let lab = unimported(&names(1));
    lab.libvirtd().kill_daemon().unwrap();
    let ran = lab.run(&["import", "libvirt"]).unwrap();
    assert_eq!((ran.code, lab.cwd().yaml("kvm").unwrap()), (Some(1), head(&lab)), "{ran:?}");
    println!("{}", ran.stderr);
    assert!(ran.stderr.contains("virsh cannot connect to libvirt at qemu:///"), "{}", ran.stderr);
    assert!(ran.stderr.contains("Start libvirtd"), "{}", ran.stderr);
}
