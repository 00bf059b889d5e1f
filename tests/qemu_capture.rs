//! What a machine sends and receives during a task is in the task's file: from its first packet to its
//! last, and nothing of what is exchanged with the agent and the result server.
//!
//! The guest talks since before its snapshot was made, so it sends the moment it is restored. QEMU
//! writes down all that passes its card; that is what the capture is measured by.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

use machinery_testkit::capture::{self, End, Packet, TCP, UDP};
use machinery_testkit::client::Client;
use machinery_testkit::guest::{AGENT_PORT, linux};
use machinery_testkit::lab::{Lab, Wire};
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const ICMP: u8 = 1;
const ARP: u8 = 0;

const RESULT_SERVER: End = (Wire::HOST, 2042);
const AGENT: End = (Wire::GUEST, AGENT_PORT);
const COUNTED: End = (Wire::HOST, linux::COUNTED_PORT);

/// Where the test sends to in the guest: the result server's port, but at another address.
const GREETED: End = (Wire::GUEST, 2042);
/// Where the guest sends to on the host: the agent's port, but at another address.
const NO_AGENT: End = (Wire::HOST, AGENT_PORT);

/// What must have happened until a run has been long enough.
type Kind = (&'static str, fn(&Packet) -> bool);

const KINDS: [Kind; 11] = [
    ("counted", |p| p.protocol == UDP && goes_to(p, COUNTED)),
    ("asked for a name", |p| p.protocol == UDP && goes_to(p, (Wire::HOST, 53))),
    ("refused", |p| p.protocol == ICMP && p.is_from(Wire::HOST)),
    ("greeted", |p| p.protocol == UDP && goes_to(p, GREETED)),
    ("another's agent", |p| p.protocol == TCP && goes_to(p, NO_AGENT)),
    ("looked for", |p| p.protocol == ARP && p.is_to(Wire::GUEST)),
    ("asked the agent", |p| goes_to(p, AGENT)),
    ("the agent's answer", |p| p.is_with(AGENT) && p.is_from(Wire::GUEST)),
    ("results", |p| p.protocol == TCP && goes_to(p, RESULT_SERVER)),
    ("taken results", |p| p.is_with(RESULT_SERVER) && p.is_from(Wire::HOST)),
    ("results by datagram", |p| p.protocol == UDP && goes_to(p, RESULT_SERVER)),
];

fn goes_to(packet: &Packet, end: End) -> bool {
    packet.ends.is_some_and(|(_, to)| to == end)
}

/// Whether a packet belongs into a task's file.
fn belongs(packet: &Packet) -> bool {
    let of_machine = packet.is_from(Wire::GUEST) || packet.is_to(Wire::GUEST);
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

/// A run of the machine, captured into `pcap`, until there was everything. All that QEMU saw of it.
fn run(lab: &Lab, client: &mut Client, pcap: &Path) -> Vec<Packet> {
    let machine = lab.folder("talker");
    assert_does(client, json!({"action": "lock", "machine": "talker", "task_id": "t", "pcap_path": pcap}));
    assert_does(client, json!({"action": "restore_start", "machine": "talker"}));
    let greeting = || UdpSocket::bind((Wire::HOST, 0))?.send_to(b"greetings", GREETED);
    lab.wire().inside(greeting).unwrap().unwrap();
    assert_eq!(lab.wire().inside(|| machine.get("/", SOON)).unwrap().unwrap().0, 200);
    let complete = |packets: &[Packet]| {
        counts(packets).len() >= 200 && KINDS.iter().all(|(_, is)| packets.iter().any(is))
    };
    if let Err(error) = capture::wait_for(&lab.dumped("talker"), SOON, complete) {
        let packets = capture::packets(&lab.dumped("talker")).unwrap();
        let missing = KINDS.iter().filter(|(_, is)| !packets.iter().any(is)).map(|(name, _)| name);
        panic!("{error}; missing: {:?}", missing.collect::<Vec<_>>());
    }
    assert_does(client, json!({"action": "stop", "machine": "talker"}));
    assert_does(client, json!({"action": "unlock", "machine": "talker"}));
    capture::packets(&lab.dumped("talker")).unwrap()
}

#[test]
fn a_tasks_file_holds_what_its_machine_sent_and_received_from_the_first_packet_on() {
    let Some(lab) = Lab::on_wire("talker", SnapshotFormat::Lz4).unwrap() else {
        println!("left out: this user may not make a network");
        return;
    };
    // Nobody listens to what it is told, but it is told.
    let _result_server = lab.wire().inside(|| TcpListener::bind(RESULT_SERVER)).unwrap().unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for round in 1..=3 {
        let pcap = lab.cwd().root().join(format!("dump of round {round}.pcap"));
        let truth = run(&lab, &mut client, &pcap);
        let captured = capture::packets(&pcap).unwrap();
        println!("round {round}: {} packets, {} captured", truth.len(), captured.len());

        // It counted before its snapshot was made, and goes on from there.
        let first = counts(&truth)[0];
        assert!(first > 1, "the guest begins anew");
        assert_eq!(counts(&captured)[0], first, "the first datagram is missing");

        let expected: Vec<&Packet> = truth.iter().filter(|packet| belongs(packet)).collect();
        let (sent, received): (Vec<&Packet>, Vec<&Packet>) =
            captured.iter().partition(|packet| packet.is_from(Wire::GUEST));
        let (should_be_sent, should_be_received): (Vec<&Packet>, Vec<&Packet>) =
            expected.into_iter().partition(|packet| packet.is_from(Wire::GUEST));
        assert_eq!(counts(&captured), counts(&truth));
        assert_same(&sent, &should_be_sent);
        // What came to a card that was off by then has not passed it.
        assert!(received.iter().all(|packet| belongs(packet)), "{received:?}");
        assert_same(&received[..should_be_received.len().min(received.len())], &should_be_received);

        let ran = capture::tshark(&pcap).unwrap();
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(!ran.stderr.contains("cut short") && !ran.stderr.contains("truncated"), "{}", ran.stderr);
        assert_eq!(ran.stdout.lines().count(), captured.len());
        assert_eq!(capture::writers(&pcap).unwrap(), []);
        lab.assert_clean();
    }
    assert_eq!(client.machine("talker").unwrap()["errors"], json!([]));
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
