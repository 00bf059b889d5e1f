//! What a machine sends and receives during a task is in the task's file: from its first packet to its
//! last, and nothing of what is exchanged with the agent and the result server.
//!
//! The guest talks since before its snapshot was made, so it sends the moment it is restored. QEMU
//! writes down all that passes its card; that is what the capture is measured by.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

use machinery_testkit::capture::{self, End, Packet, TCP, UDP};
use machinery_testkit::client::Client;
use machinery_testkit::guest::{AGENT_PORT, linux};
use machinery_testkit::lab::{Lab, TestNetwork};
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const ICMP: u8 = 1;
const ARP: u8 = 0;

const RESULT_SERVER: End = (TestNetwork::HOST, 2042);
const AGENT: End = (TestNetwork::GUEST, AGENT_PORT);
const COUNTED: End = (TestNetwork::HOST, linux::COUNTED_PORT);

/// Where the test sends to in the guest: the result server's port, but at another address.
const GREETED: End = (TestNetwork::GUEST, 2042);
/// Where the guest sends to on the host: the agent's port, but at another address.
const NO_AGENT: End = (TestNetwork::HOST, AGENT_PORT);

/// What must have happened until a run has been long enough.
type Kind = (&'static str, fn(&Packet) -> bool);

const KINDS: [Kind; 11] = [
    ("counted", |p| p.protocol == UDP && goes_to(p, COUNTED)),
    ("asked for a name", |p| p.protocol == UDP && goes_to(p, (TestNetwork::HOST, 53))),
    ("refused", |p| p.protocol == ICMP && p.is_from(TestNetwork::HOST)),
    ("greeted", |p| p.protocol == UDP && goes_to(p, GREETED)),
    ("another's agent", |p| p.protocol == TCP && goes_to(p, NO_AGENT)),
    ("looked for", |p| p.protocol == ARP && p.is_to(TestNetwork::GUEST)),
    ("asked the agent", |p| goes_to(p, AGENT)),
    ("the agent's answer", |p| p.is_with(AGENT) && p.is_from(TestNetwork::GUEST)),
    ("results", |p| p.protocol == TCP && goes_to(p, RESULT_SERVER)),
    ("taken results", |p| p.is_with(RESULT_SERVER) && p.is_from(TestNetwork::HOST)),
    ("results by datagram", |p| p.protocol == UDP && goes_to(p, RESULT_SERVER)),
];

fn goes_to(packet: &Packet, end: End) -> bool {
    packet.ends.is_some_and(|(_, to)| to == end)
}

/// Whether a packet belongs into a task's file.
fn belongs(packet: &Packet) -> bool {
    let of_machine = packet.is_from(TestNetwork::GUEST) || packet.is_to(TestNetwork::GUEST);
    of_machine && !packet.is_with(AGENT) && !packet.is_with(RESULT_SERVER)
}

/// The numbers that the guest has sent.
fn counts(packets: &[Packet]) -> Vec<u32> {
    let counted = packets.iter().filter(|packet| goes_to(packet, COUNTED));
    counted.filter_map(|packet| linux::count_in(&packet.payload)).collect()
}

#[track_caller]
fn assert_does(client: &mut Client, request: Value) {
    let answer = client.ask(request.clone()).unwrap();
    assert_eq!(answer["success"], true, "{request}: {answer}");
}

/// A lab with a talking machine, unless this user may not make its network.
fn lab() -> Option<Lab> {
    let lab = Lab::with_network("talker", SnapshotFormat::Lz4).unwrap();
    if lab.is_none() {
        println!("left out: this user may not make a network");
    }
    lab
}

/// Starts the machine, with its traffic to be captured into `pcap`.
fn start(client: &mut Client, pcap: &Path) {
    assert_does(client, json!({"action": "lock", "machine": "talker", "task_id": "t", "pcap_path": pcap}));
    assert_does(client, json!({"action": "restore_start", "machine": "talker"}));
}

/// Talks with the machine until there was everything.
fn talk(lab: &Lab) {
    let (machine, dumped) = (lab.folder("talker"), lab.dumped("talker"));
    let greeting = || UdpSocket::bind((TestNetwork::HOST, 0))?.send_to(b"greetings", GREETED);
    lab.network().inside(greeting).unwrap().unwrap();
    assert_eq!(lab.network().inside(|| machine.get("/", SOON)).unwrap().unwrap().0, 200);
    let complete = |packets: &[Packet]| {
        counts(packets).len() >= 200 && KINDS.iter().all(|(_, is)| packets.iter().any(is))
    };
    if let Err(error) = capture::wait_for(&dumped, SOON, complete) {
        let packets = capture::packets(&dumped).unwrap();
        let missing = KINDS.iter().filter(|(_, is)| !packets.iter().any(is)).map(|(name, _)| name);
        panic!("{error}; missing: {:?}", missing.collect::<Vec<_>>());
    }
}

/// Nobody writes to the file any more, and it is whole.
fn assert_whole(pcap: &Path, packets: &[Packet]) {
    assert_eq!(capture::writers(pcap).unwrap(), []);
    let ran = capture::tshark(pcap).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!ran.stderr.contains("cut short") && !ran.stderr.contains("truncated"), "{}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), packets.len());
}

#[test]
fn a_tasks_file_holds_what_its_machine_sent_and_received_from_the_first_packet_on() {
    let Some(lab) = lab() else { return };
    captures_everything(&lab, |_| {});
}

/// It has its place on the wire long before the task begins.
#[test]
fn the_same_holds_for_a_machine_that_stood_by() {
    let Some(lab) = lab() else { return };
    lab.ahead("instant: auto, standby: on").unwrap();
    captures_everything(&lab, |client| {
        assert_does(client, json!({"action": "enable_machine", "machine": "talker"}));
        assert_does(client, json!({"action": "prepare", "machine": "talker"}));
        assert_eq!(client.machine("talker").unwrap()["ready"]["mode"], "standby");
    });
}

fn captures_everything(lab: &Lab, prepare: impl Fn(&mut Client)) {
    // Nobody listens to what it is told, but it is told.
    let _result_server = lab.network().inside(|| TcpListener::bind(RESULT_SERVER)).unwrap().unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for round in 1..=3 {
        let pcap = lab.cwd().root().join(format!("dump of round {round}.pcap"));
        prepare(&mut client);
        start(&mut client, &pcap);
        talk(lab);
        // So that no next one stands by yet, which would begin QEMU's account anew.
        assert_does(&mut client, json!({"action": "disable_machine", "machine": "talker", "reason": "read"}));
        assert_does(&mut client, json!({"action": "stop", "machine": "talker"}));
        assert_does(&mut client, json!({"action": "unlock", "machine": "talker"}));
        let [truth, captured] = [&lab.dumped("talker"), &pcap].map(|file| capture::packets(file).unwrap());
        println!("round {round}: {} packets, {} captured", truth.len(), captured.len());

        // It counted before its snapshot was made, and goes on from there.
        let first = counts(&truth)[0];
        assert!(first > 1, "the guest begins anew");
        assert_eq!(counts(&captured)[0], first, "the first datagram is missing");

        let expected: Vec<&Packet> = truth.iter().filter(|packet| belongs(packet)).collect();
        let (sent, received): (Vec<&Packet>, Vec<&Packet>) =
            captured.iter().partition(|packet| packet.is_from(TestNetwork::GUEST));
        let (should_be_sent, should_be_received): (Vec<&Packet>, Vec<&Packet>) =
            expected.into_iter().partition(|packet| packet.is_from(TestNetwork::GUEST));
        assert_eq!(counts(&captured), counts(&truth));
        assert_same(&sent, &should_be_sent);
        // What came to a card that was off by then has not passed it.
        assert!(received.iter().all(|packet| belongs(packet)), "{received:?}");
        assert_same(&received[..should_be_received.len().min(received.len())], &should_be_received);

        assert_whole(&pcap, &captured);
        lab.assert_clean();
        assert_does(&mut client, json!({"action": "enable_machine", "machine": "talker"}));
    }
    assert_eq!(client.machine("talker").unwrap()["errors"], json!([]));
}

#[test]
fn a_tcpdump_that_takes_its_time_is_waited_for() {
    let Some(lab) = lab() else { return };
    // Longer than the machine takes to its first packet.
    let real = capture::tcpdump().unwrap().display().to_string();
    let slow = lab.cwd().script("tcpdump", &format!("sleep 3; exec {real} \"$@\"")).unwrap();
    lab.cwd().change_cuckoo_yaml(&real, &slow.display().to_string()).unwrap();
    let pcap = lab.cwd().root().join("dump.pcap");
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    start(&mut client, &pcap);
    let some = |packets: &[Packet]| counts(packets).len() >= 10;
    capture::wait_for(&lab.dumped("talker"), SOON, some).unwrap();
    assert_does(&mut client, json!({"action": "stop", "machine": "talker"}));
    let [truth, captured] =
        [&lab.dumped("talker"), &pcap].map(|file| counts(&capture::packets(file).unwrap()));
    assert_eq!(captured, truth);
}

#[test]
fn what_a_killed_host_captured_can_be_read_and_its_task_keeps_the_machine() {
    let Some(lab) = lab() else { return };
    let _result_server = lab.network().inside(|| TcpListener::bind(RESULT_SERVER)).unwrap().unwrap();
    let pcap = lab.cwd().root().join("dump.pcap");
    let mut host = lab.host().unwrap();
    start(&mut host.client().unwrap(), &pcap);
    // What is not in the file yet when it is ended may be lost; that is the last second, at most.
    let some = |packets: &[Packet]| counts(packets).len() >= 50;
    capture::wait_for(&pcap, SOON, some).unwrap();
    host.kill().unwrap();
    // The machine is ended as well, so QEMU's account is complete.
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    lab.assert_clean();
    let packets = capture::packets(&pcap).unwrap();
    assert_whole(&pcap, &packets);
    assert!(some(&packets) && packets.iter().all(belongs));
    let truth = counts(&capture::packets(&lab.dumped("talker")).unwrap());
    assert!(truth.starts_with(&counts(&packets)), "{:?} is not how {truth:?} begins", counts(&packets));
    let machine = client.machine("talker").unwrap();
    assert_eq!((&machine["locked"], &machine["locked_by"]), (&json!(true), &json!("t")));
    // The task may go on with it, from the start.
    assert_does(&mut client, json!({"action": "restore_start", "machine": "talker"}));
    talk(&lab);
    assert_does(&mut client, json!({"action": "stop", "machine": "talker"}));
    let [truth, captured] =
        [&lab.dumped("talker"), &pcap].map(|file| counts(&capture::packets(file).unwrap()));
    assert_eq!(captured, truth);
}

/// The same packets in the same order.
#[track_caller]
fn assert_same(captured: &[&Packet], expected: &[&Packet]) {
    let differ = captured.iter().zip(expected).position(|(captured, expected)| captured != expected);
    if let Some(at) = differ {
        panic!("packet {at} is {:?}, not {:?}", captured[at], expected[at]);
    }
    assert_eq!(captured.len(), expected.len(), "as far as they go, they are the same");
}
