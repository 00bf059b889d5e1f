//! Clones: machines that start from one snapshot, each with a network and an address of its own.
//!
//! The guest is Linux with a fixed address inside. It sends results to the host, and it has an agent.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use machinery_testkit::capture;
use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, GuestProbe};
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{Lab, TestNetwork};
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const INSTANT: &str = "instant: auto, standby: off";
const STANDBY: &str = "instant: auto, standby: auto";
const GREETED_PORT: u16 = 9;
const RESULT_SERVER: (Ipv4Addr, u16) = (TestNetwork::HOST, 2042);

/// A lab whose machine `base` has clones; none if this user may not make its network.
fn lab(keys: &str, clones: &str) -> Option<Lab> {
    let lab = requirement::NETWORK.or_skip(Lab::with_network("base", SnapshotFormat::Lz4).unwrap())?;
    let serial = format!("file:{}", lab.folder("base").dir.join("%MACHINE%.log").display());
    lab.change_start_args("base", |args| {
        let at = args.iter().position(|arg| arg == "-serial").unwrap();
        args[at + 1] = serial;
    })
    .unwrap();
    configure(&lab, keys, clones);
    Some(lab)
}

fn configure(lab: &Lab, keys: &str, clones: &str) {
    lab.ahead(&format!("{keys}, machines: {{base: {{{clones}}}}}")).unwrap();
}

fn served(lab: &Lab) -> (RunningHost, Client) {
    let host = lab.host().unwrap();
    let client = host.client().unwrap();
    (host, client)
}

#[track_caller]
fn does(client: &mut Client, action: &str, machine: &str) {
    let answer = client.act(action, machine).unwrap();
    assert_eq!(answer, json!({"success": true}), "{action} of {machine}");
}

/// Does an action on all clones at the same time.
fn all_do(host: &RunningHost, action: &str, clones: &[&str]) {
    thread::scope(|scope| {
        for clone in clones {
            scope.spawn(|| does(&mut host.client().unwrap(), action, clone));
        }
    });
}

fn names(client: &mut Client) -> Vec<String> {
    let list = client.ask(json!({"action": "list"})).unwrap();
    let machines = list["machines"].as_array().unwrap().iter();
    machines.map(|machine| machine["name"].as_str().unwrap().to_owned()).collect()
}

/// Returns the folder of the only template.
#[track_caller]
fn template_of(lab: &Lab) -> PathBuf {
    let folder = lab.template("base");
    let entries = folder.parent().unwrap().read_dir().unwrap().map(|entry| entry.unwrap().path());
    let folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    let [template] = &folders[..] else { panic!("{folders:?}") };
    assert!(template.file_name().unwrap().to_string_lossy().starts_with("base~"), "{template:?}");
    template.clone()
}

fn qemu(lab: &Lab, clone: &str) -> Pid {
    lab.qemu_of_clone("base", clone).unwrap()
}

fn of_process(process: Pid, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{name}", process.as_raw_nonzero()))
}

/// Returns the interfaces of cells in the lab's network.
fn cells(lab: &Lab) -> Vec<String> {
    let listed = lab.network().inside(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
    let names = listed.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    names.filter(|name| name.starts_with("cm")).collect()
}

/// Returns the kernel's number of an interface in the lab's network.
fn number_of(lab: &Lab, interface: &str) -> String {
    let mut ip = Command::new("ip");
    ip.args(["-o", "link", "show", "dev", interface]);
    let shown = lab.network().inside(|| ip.output().unwrap()).unwrap();
    assert!(shown.status.success(), "{shown:?}");
    String::from_utf8(shown.stdout).unwrap().split(':').next().unwrap().to_owned()
}

/// Returns the agent's answer at that address.
fn ask_agent(lab: &Lab, ip: &str) -> (u16, String) {
    let probe = GuestProbe { name: ip.to_owned(), ip: ip.to_owned(), serial: PathBuf::new() };
    lab.network().inside(|| probe.get("/", SOON)).unwrap().unwrap()
}

fn ends_well(lab: &Lab, host: &mut RunningHost) {
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
    assert_eq!(cells(lab), [""; 0], "the network of a run remains");
}

#[test]
fn clones_have_one_template_and_users_of_their_own() {
    let Some(lab) = lab(STANDBY, "clones: 3, clone_ips: 10.77.0.11-13") else { return };
    let (mut host, mut client) = served(&lab);
    let clones = ["base-1", "base-2", "base-3"];
    assert_eq!(names(&mut client), clones);
    all_do(&host, "prepare", &clones);
    assert_eq!(host.log().matches("a template was built").count(), 1);
    let listed: Vec<Value> = clones.iter().map(|clone| client.machine(clone).unwrap()).collect();
    assert!(listed.iter().all(|clone| clone["ready"]["mode"] == "standby"));
    let interfaces: BTreeSet<String> =
        listed.iter().map(|clone| clone["interface"].as_str().unwrap().to_owned()).collect();
    assert_eq!(cells(&lab).into_iter().collect::<BTreeSet<_>>(), interfaces);
    let disk: u64 = listed.iter().map(|clone| clone["ready"]["disk"].as_u64().unwrap_or(0)).sum();
    let ram = fs::metadata(template_of(&lab).join("ram")).unwrap();
    assert!((1..ram.blocks() * 512 + (2 << 20)).contains(&disk), "the template counts once: {disk}");
    let processes = clones.map(|clone| qemu(&lab, clone));
    let users: BTreeSet<u32> =
        processes.iter().map(|process| fs::metadata(of_process(*process, "")).unwrap().uid()).collect();
    assert_eq!(users.len(), 3);
    for process in processes {
        has_sealed_ram(process);
    }
    all_do(&host, "restore_start", &clones);
    for ip in ["10.77.0.11", "10.77.0.12", "10.77.0.13"] {
        assert_eq!(ask_agent(&lab, ip).0, 200);
    }
    assert_eq!(clones.map(|clone| qemu(&lab, clone)), processes, "a standby was not used");
    all_do(&host, "stop", &clones);
    ends_well(&lab, &mut host);
}

/// An older QEMU opens its RAM for writing.
#[track_caller]
fn has_sealed_ram(process: Pid) {
    let maps = fs::read_to_string(of_process(process, "maps")).unwrap();
    if !maps.contains("memfd:template") {
        assert!(maps.contains("/base~"), "{maps}");
        return;
    }
    let mut ram = File::options().read(true).write(true).open(of_process(process, "fd/4")).unwrap();
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    assert_eq!(fcntl_get_seals(&ram).unwrap(), seals);
    assert!(ram.write_all(b"evil").is_err());
}

#[test]
fn clones_send_results_from_their_own_addresses_at_the_same_time() {
    let Some(lab) = lab(INSTANT, "clones: 2, clone_ips: 10.77.0.11-12") else { return };
    let server = lab.network().inside(|| TcpListener::bind(RESULT_SERVER)).unwrap().unwrap();
    let (mut host, mut client) = served(&lab);
    let clones = [("base-1", "10.77.0.11"), ("base-2", "10.77.0.12")];
    for (clone, _) in clones {
        let pcap = lab.cwd().root().join(format!("{clone}.pcap"));
        let lock = json!({"action": "lock", "machine": clone, "task_id": clone, "pcap_path": pcap});
        assert_eq!(client.ask(lock).unwrap()["success"], true);
    }
    all_do(&host, "restore_start", &clones.map(|(clone, _)| clone));
    let mut senders = BTreeSet::new();
    while senders.len() < 2 {
        senders.insert(server.accept().unwrap().1.ip());
    }
    assert_eq!(senders, clones.map(|(_, ip)| ip.parse::<IpAddr>().unwrap()).into());
    for (clone, ip) in clones {
        assert_eq!(ask_agent(&lab, ip).0, 200);
        let address: Ipv4Addr = ip.parse().unwrap();
        // The capture leaves out the agent and the result server.
        let greeting =
            || UdpSocket::bind((TestNetwork::HOST, 0))?.send_to(b"greetings", (address, GREETED_PORT));
        lab.network().inside(greeting).unwrap().unwrap();
        let pcap = lab.cwd().root().join(format!("{clone}.pcap"));
        does(&mut client, "stop", clone);
        let packets = capture::packets(&pcap).unwrap();
        assert!(packets.iter().any(|packet| packet.is_to(address)), "{clone}: {packets:?}");
        let strange = packets.iter().find(|packet| !packet.is_from(address) && !packet.is_to(address));
        assert!(strange.is_none(), "{strange:?}");
    }
    ends_well(&lab, &mut host);
}

#[test]
fn clones_are_added_and_removed_while_one_runs() {
    let Some(lab) = lab(STANDBY, "clones: 2, clone_ips: 10.77.0.11-19") else { return };
    let (mut host, mut client) = served(&lab);
    does(&mut client, "restore_start", "base-1");
    let running = qemu(&lab, "base-1");
    let reload = |client: &mut Client, clones: &str| {
        configure(&lab, STANDBY, clones);
        client.ask(json!({"action": "reload"})).unwrap()
    };
    let answer = reload(&mut client, "clones: 4, clone_ips: 10.77.0.11-19");
    assert_eq!(answer["success"], true, "{answer}");
    assert_eq!(names(&mut client), ["base-1", "base-2", "base-3", "base-4"]);
    does(&mut client, "restore_start", "base-4");
    does(&mut client, "stop", "base-4");
    // The address of a clone in use changes once the clone is free.
    let answer = reload(&mut client, "clones: 1, clone_ips: 10.77.0.31-39");
    assert_eq!((&answer["success"], &answer["deferred"]), (&json!(true), &json!(["base-1"])), "{answer}");
    assert_eq!(names(&mut client), ["base-1"]);
    assert_eq!(qemu(&lab, "base-1"), running);
    assert_eq!(ask_agent(&lab, "10.77.0.11").0, 200);
    client.subscribe().unwrap();
    does(&mut client, "stop", "base-1");
    while client.next_message().unwrap()["changed"] != json!(["base-1"]) {}
    does(&mut client, "restore_start", "base-1");
    assert_eq!(ask_agent(&lab, "10.77.0.31").0, 200);
    let answer = reload(&mut client, "clones: 2, clone_ips: 10.77.0.31-31");
    assert_eq!(answer["success"], false);
    assert!(
        answer["reason"].as_str().unwrap().contains("it has 1 addresses, and there are 2 clones"),
        "{answer}"
    );
    does(&mut client, "stop", "base-1");
    ends_well(&lab, &mut host);
}

#[test]
fn next_host_adopts_a_clone_and_clears_the_network_of_one_that_has_ended() {
    let Some(lab) = lab(INSTANT, "clones: 2, clone_ips: 10.77.0.11-12") else { return };
    let (mut host, mut client) = served(&lab);
    for clone in ["base-1", "base-2"] {
        let lock = json!({"action": "lock", "machine": clone, "task_id": clone});
        assert_eq!(client.ask(lock).unwrap()["success"], true);
        does(&mut client, "restore_start", clone);
    }
    let (kept, killed) = (qemu(&lab, "base-1"), qemu(&lab, "base-2"));
    host.kill().unwrap();
    kill_process(killed, Signal::KILL).unwrap();
    let (mut host, mut client) = served(&lab);
    assert_eq!(client.machine("base-1").unwrap()["state"], "running");
    assert_eq!(qemu(&lab, "base-1"), kept);
    assert_eq!(ask_agent(&lab, "10.77.0.11").0, 200);
    assert_eq!(cells(&lab), [client.machine("base-1").unwrap()["interface"].as_str().unwrap()]);
    does(&mut client, "stop", "base-1");
    assert_eq!(cells(&lab), [""; 0]);
    ends_well(&lab, &mut host);
}

#[test]
fn next_host_adopts_the_standby_of_a_clone_with_its_network() {
    let Some(lab) = lab(STANDBY, "clones: 2, clone_ips: 10.77.0.11-12") else { return };
    let (mut host, mut client) = served(&lab);
    does(&mut client, "prepare", "base-1");
    let standby = qemu(&lab, "base-1");
    host.kill().unwrap();
    let (mut host, mut client) = served(&lab);
    client.subscribe().unwrap();
    while client.machine("base-1").unwrap()["ready"]["mode"] != "standby" {
        client.wait_for_event("ready", "base-1").unwrap();
    }
    does(&mut client, "restore_start", "base-1");
    assert_eq!(qemu(&lab, "base-1"), standby, "{}", host.log());
    assert_eq!(ask_agent(&lab, "10.77.0.11").0, 200);
    does(&mut client, "stop", "base-1");
    // A cold start ends the standby, and continues in its network.
    does(&mut client, "prepare", "base-1");
    let interface = client.machine("base-1").unwrap()["interface"].as_str().unwrap().to_owned();
    let cell = number_of(&lab, &interface);
    does(&mut client, "norestore_start", "base-1");
    assert_eq!(number_of(&lab, &interface), cell);
    does(&mut client, "stop", "base-1");
    ends_well(&lab, &mut host);
}

#[test]
fn clone_is_unusable_when_its_arguments_have_no_tap() {
    let lab = Lab::new(&[("base", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    configure(&lab, INSTANT, "clones: 2, clone_ips: 10.77.0.11-12, guest_ip: 10.66.0.2");
    let (mut host, mut client) = served(&lab);
    let why = client.machine("base-2").unwrap()["disabled_reason"].to_string();
    assert!(why.contains("its network is isolated, and its start_args have no tap"), "{why}");
    assert!(why.contains("Put %MACHINE% into the name"), "{why}");
    // The lab's result server has a loopback address, which no guest reaches.
    let unreachable = "isolated machines cannot send their results";
    assert!(host.log().contains(unreachable), "{}", host.log());
    ends_well_without_network(&lab, &mut host);
    let checked = lab.run(&["check"]).unwrap();
    assert_eq!(checked.stdout.matches("its start_args have no tap").count(), 1, "{}", checked.stdout);
    assert_eq!(checked.stdout.matches(unreachable).count(), 1, "{}", checked.stdout);
}

fn ends_well_without_network(lab: &Lab, host: &mut RunningHost) {
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}
