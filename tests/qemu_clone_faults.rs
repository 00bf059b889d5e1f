//! Faults of clones: a start whose fastest way fails, templates of two configurations, and traces of a run in another one.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use machinery_testkit::capture;
use machinery_testkit::client::Client;
use machinery_testkit::guest::GuestProbe;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{Lab, TestNetwork};
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const INSTANT: &str = "instant: auto, standby: off";
const STANDBY: &str = "instant: auto, standby: auto";
const TWO: &str = "clones: 2, clone_ips: 10.77.0.11-12";
const GREETED_PORT: u16 = 9;
/// The unit of the guest's memory.
const PAGE: usize = 4096;

/// A lab whose machine `base` has two clones, and its host; none if this user may not make its network.
fn served(keys: &str) -> Option<(Lab, RunningHost, Client)> {
    let lab = requirement::NETWORK.or_skip(Lab::with_network("base", SnapshotFormat::Lz4).unwrap())?;
    change_args(&lab, &[]);
    configure(&lab, keys, TWO);
    let host = lab.host().unwrap();
    let client = host.client().unwrap();
    Some((lab, host, client))
}

/// Gives each clone a serial log of its own, and adds these arguments.
fn change_args(lab: &Lab, more: &[&str]) {
    let serial = format!("file:{}", lab.folder("base").dir.join("%MACHINE%.log").display());
    lab.change_start_args("base", |args| {
        let at = args.iter().position(|arg| arg == "-serial").unwrap();
        args[at + 1] = serial;
        args.extend(more.iter().map(|&arg| arg.to_owned()));
    })
    .unwrap();
}

fn configure(lab: &Lab, keys: &str, clones: &str) {
    lab.ahead(&format!("{keys}, machines: {{base: {{{clones}}}}}")).unwrap();
}

#[track_caller]
fn does(client: &mut Client, action: &str, machine: &str) {
    let answer = client.act(action, machine).unwrap();
    assert_eq!(answer, json!({"success": true}), "{action} of {machine}");
}

#[track_caller]
fn reload(client: &mut Client) -> Value {
    let answer = client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(answer["success"], true, "{answer}");
    answer
}

/// Locks the clone for a task, which captures its traffic.
fn lock(lab: &Lab, client: &mut Client, clone: &str) -> PathBuf {
    let pcap = lab.cwd().root().join(format!("{clone}.pcap"));
    let lock = json!({"action": "lock", "machine": clone, "task_id": clone, "pcap_path": pcap});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    pcap
}

fn unlock(client: &mut Client, clone: &str) {
    assert_eq!(client.ask(json!({"action": "unlock", "machine": clone})).unwrap()["success"], true);
}

fn qemu(lab: &Lab, clone: &str) -> Pid {
    lab.qemu_of_clone("base", clone).unwrap()
}

fn mode(client: &mut Client, clone: &str) -> Value {
    client.machine(clone).unwrap()["ready"]["mode"].clone()
}

/// Waits until the clone is ready in that way.
fn until_ready(host: &RunningHost, clone: &str, wanted: &str) {
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    while mode(&mut client, clone) != wanted {
        client.wait_for_event("ready", clone).unwrap();
    }
}

fn templates(lab: &Lab) -> Vec<PathBuf> {
    let folder = lab.template("base");
    let entries = folder.parent().unwrap().read_dir().unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

fn probe(clone: &str, ip: &str) -> GuestProbe {
    GuestProbe { name: clone.to_owned(), ip: ip.to_owned(), serial: PathBuf::new() }
}

/// Asserts that the capture of the present run has the traffic of the clone, and stops the clone.
#[track_caller]
fn is_captured(lab: &Lab, client: &mut Client, clone: &str, pcap: &Path) {
    let number = clone.rsplit('-').next().unwrap().parse::<u8>().unwrap();
    let address = Ipv4Addr::new(10, 77, 0, 10 + number);
    let greeting = || UdpSocket::bind((TestNetwork::HOST, 0))?.send_to(b"greetings", (address, GREETED_PORT));
    lab.network().inside(greeting).unwrap().unwrap();
    does(client, "stop", clone);
    let packets = capture::packets(pcap).unwrap();
    assert!(packets.iter().any(|packet| packet.is_to(address)), "{clone}: {packets:?}");
    assert_eq!(client.machine(clone).unwrap()["errors"], json!([]));
}

fn ends_well(lab: &Lab, host: &mut RunningHost) {
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
    let listed = lab.network().inside(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
    assert!(!listed.contains("cm"), "the network of a run remains: {listed}");
}

#[test]
fn run_is_captured_when_the_standby_of_this_host_or_of_an_earlier_one_is_not_used() {
    let Some((lab, mut host, mut client)) = served(STANDBY) else { return };
    does(&mut client, "prepare", "base-1");
    let pcap = lock(&lab, &mut client, "base-1");
    kill_process(qemu(&lab, "base-1"), Signal::STOP).unwrap();
    does(&mut client, "restore_start", "base-1");
    is_captured(&lab, &mut client, "base-1", &pcap);
    unlock(&mut client, "base-1");
    let clones = ["base-1", "base-2"];
    clones.iter().for_each(|clone| does(&mut client, "prepare", clone));
    let standbys = clones.map(|clone| qemu(&lab, clone));
    host.kill().unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    clones.iter().for_each(|clone| until_ready(&host, clone, "standby"));
    let pcaps = clones.map(|clone| lock(&lab, &mut client, clone));
    assert_eq!(clones.map(|clone| qemu(&lab, clone)), standbys);
    does(&mut client, "norestore_start", "base-1");
    is_captured(&lab, &mut client, "base-1", &pcaps[0]);
    kill_process(standbys[1], Signal::STOP).unwrap();
    does(&mut client, "restore_start", "base-2");
    is_captured(&lab, &mut client, "base-2", &pcaps[1]);
    ends_well(&lab, &mut host);
}

#[test]
fn template_stays_when_one_clone_cannot_load_it_and_is_built_again_when_two_cannot() {
    let Some((lab, mut host, mut client)) = served(INSTANT) else { return };
    does(&mut client, "prepare", "base-1");
    let pcaps = ["base-1", "base-2"].map(|clone| lock(&lab, &mut client, clone));
    let [template] = &templates(&lab)[..] else { panic!() };
    let record = template.join("record.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"pc.ram\"", "\"other.ram\"")).unwrap();
    does(&mut client, "restore_start", "base-1");
    is_captured(&lab, &mut client, "base-1", &pcaps[0]);
    assert!(host.log().contains("the template is not used") && template.exists());
    does(&mut client, "restore_start", "base-1");
    does(&mut client, "stop", "base-1");
    assert!(template.exists() && mode(&mut client, "base-1") == "instant");
    does(&mut client, "restore_start", "base-2");
    is_captured(&lab, &mut client, "base-2", &pcaps[1]);
    assert!(!template.exists());
    unlock(&mut client, "base-2");
    does(&mut client, "prepare", "base-2");
    assert_eq!(fs::read_to_string(&record).unwrap().matches("\"pc.ram\"").count(), 1);
    does(&mut client, "restore_start", "base-2");
    does(&mut client, "stop", "base-2");
    ends_well(&lab, &mut host);
}

#[test]
fn standby_is_not_listed_when_it_was_replaced_because_its_interface_is_gone() {
    let Some((lab, mut host, mut client)) = served(STANDBY) else { return };
    does(&mut client, "prepare", "base-1");
    let pcap = lock(&lab, &mut client, "base-1");
    let interface = client.machine("base-1").unwrap()["interface"].as_str().unwrap().to_owned();
    let mut ip = Command::new("ip");
    ip.args(["link", "delete", &interface]);
    assert!(lab.network().inside(|| ip.status().unwrap()).unwrap().success());
    does(&mut client, "restore_start", "base-1");
    assert_eq!(mode(&mut client, "base-1"), "instant");
    is_captured(&lab, &mut client, "base-1", &pcap);
    ends_well(&lab, &mut host);
}

#[test]
fn clone_in_use_keeps_its_template_when_a_reload_gives_the_others_another_one() {
    let Some((lab, mut host, mut client)) = served(INSTANT) else { return };
    does(&mut client, "prepare", "base-1");
    let earlier = templates(&lab);
    lock(&lab, &mut client, "base-1");
    does(&mut client, "restore_start", "base-1");
    change_args(&lab, &["-name", "another"]);
    assert_eq!(reload(&mut client)["deferred"], json!(["base-1"]));
    does(&mut client, "prepare", "base-2");
    assert_eq!(templates(&lab).len(), 2);
    for clone in ["base-1", "base-2"] {
        if clone == "base-1" {
            does(&mut client, "stop", clone);
        }
        let before = host.log().len();
        does(&mut client, "restore_start", clone);
        assert!(!host.log()[before..].contains("a stale template was dropped"));
        does(&mut client, "stop", clone);
    }
    assert!(earlier[0].exists() && templates(&lab).len() == 2);
    client.subscribe().unwrap();
    unlock(&mut client, "base-1");
    while client.next_message().unwrap()["changed"] != json!(["base-1"]) {}
    assert!(!earlier[0].exists() && templates(&lab).len() == 1);
    ends_well(&lab, &mut host);
}

/// Returns the number of templates that the host has in memory.
fn in_memory(host: &RunningHost) -> usize {
    let descriptors = Path::new("/proc").join(host.pid().to_string()).join("fd").read_dir().unwrap();
    let paths = descriptors.map(|entry| entry.unwrap().path());
    let is_template = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("memfd:template"))
    };
    let files = paths.filter(is_template).filter_map(|path| fs::metadata(path).ok());
    files.map(|file| file.ino()).collect::<BTreeSet<_>>().len()
}

#[test]
fn template_is_in_memory_as_long_as_clones_use_it() {
    let Some((lab, mut host, mut client)) = served(INSTANT) else { return };
    does(&mut client, "prepare", "base-1");
    does(&mut client, "restore_start", "base-1");
    let maps = fs::read_to_string(format!("/proc/{}/maps", qemu(&lab, "base-1").as_raw_nonzero())).unwrap();
    // A newer QEMU maps the file.
    let count = usize::from(maps.contains("memfd:template"));
    assert_eq!(in_memory(&host), count);
    configure(&lab, "instant: off, standby: off", TWO);
    reload(&mut client);
    assert_eq!(in_memory(&host), count, "a clone in use restores by it");
    client.subscribe().unwrap();
    does(&mut client, "stop", "base-1");
    while client.next_message().unwrap()["changed"] != json!(["base-1"]) {}
    assert_eq!(in_memory(&host), 0);
    configure(&lab, INSTANT, TWO);
    reload(&mut client);
    does(&mut client, "prepare", "base-2");
    assert_eq!(in_memory(&host), count);
    configure(&lab, INSTANT, "network: isolated, instant: off");
    reload(&mut client);
    assert_eq!(in_memory(&host), 0);
    ends_well(&lab, &mut host);
}

/// Writes the mark into each page of the guest's RAM that the guest does not use, through its QEMU's map of the RAM; returns
/// the number of pages.
fn soil(process: Pid, mark: &[u8]) -> usize {
    let folder = Path::new("/proc").join(process.as_raw_nonzero().to_string());
    let maps = fs::read_to_string(folder.join("maps")).unwrap();
    let is_ram = |line: &&str| line.contains("memfd:template") || line.contains(".template/ram");
    let ram = maps.lines().find(is_ram).unwrap_or_else(|| panic!("{maps}"));
    let (begin, end) = ram.split(' ').next().unwrap().split_once('-').unwrap();
    let [begin, end] = [begin, end].map(|address| u64::from_str_radix(address, 16).unwrap());
    let memory = File::options().read(true).write(true).open(folder.join("mem")).unwrap();
    let is_unused = |page: &u64| {
        let mut content = [0; PAGE];
        memory.read_exact_at(&mut content, *page).unwrap();
        content == [0; PAGE]
    };
    let pages: Vec<u64> = (begin..end).step_by(PAGE).filter(is_unused).collect();
    pages.iter().for_each(|page| memory.write_all_at(mark, *page).unwrap());
    pages.len()
}

/// Dumps the memory of a clone, and returns the number of marks in it.
fn marks_in(lab: &Lab, client: &mut Client, clone: &str, mark: &str) -> usize {
    let path = lab.cwd().root().join(format!("{clone}.dump"));
    let dump = json!({"action": "dump_memory", "machine": clone, "path": path});
    assert_eq!(client.ask(dump).unwrap()["success"], true);
    assert!(fs::metadata(&path).unwrap().len() > 16 << 20);
    let found = Command::new("grep").args(["--text", "--only-matching", mark]).arg(&path).output().unwrap();
    fs::remove_file(path).unwrap();
    found.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count()
}

#[test]
fn memory_of_a_clone_is_never_in_another_one_or_in_a_later_restore() {
    let Some((lab, mut host, mut client)) = served(STANDBY) else { return };
    let (mark, text) = ("written through QEMU", "writtenbytheguest");
    let clones = [("base-1", "10.77.0.11"), ("base-2", "10.77.0.12")];
    clones.iter().for_each(|(clone, _)| does(&mut client, "prepare", clone));
    does(&mut client, "restore_start", "base-1");
    let marked = lab.network().inside(|| probe("base-1", "10.77.0.11").mark(text, text, SOON)).unwrap();
    assert_eq!(marked.unwrap().ram, text);
    does(&mut client, "restore_start", "base-2");
    // The guest may not survive it, and its QEMU does.
    let soiled = soil(qemu(&lab, "base-1"), mark.as_bytes());
    assert!(soiled > 1000, "{soiled}");
    assert!(marks_in(&lab, &mut client, "base-1", mark) > soiled / 2, "the marks cannot be found");
    assert!(marks_in(&lab, &mut client, "base-1", text) > 0);
    let is_clean = |client: &mut Client, clone: &str| {
        for mark in [mark, text] {
            assert_eq!(marks_in(&lab, client, clone, mark), 0, "{clone} has the memory of another run");
        }
    };
    is_clean(&mut client, "base-2");
    for (clone, _) in clones {
        does(&mut client, "stop", clone);
        does(&mut client, "restore_start", clone);
        is_clean(&mut client, clone);
    }
    clones.iter().for_each(|(clone, _)| does(&mut client, "stop", clone));
    // As long as this host keeps the template, and from its file after that.
    assert!(host.terminate().unwrap().success());
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    does(&mut client, "restore_start", "base-2");
    is_clean(&mut client, "base-2");
    does(&mut client, "stop", "base-2");
    ends_well(&lab, &mut host);
}
