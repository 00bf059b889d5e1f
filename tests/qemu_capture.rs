//! The capture of a task: all of its machine's traffic, from the first packet to the last, except the traffic
//! with the agent and the result server.
//!
//! The guest has sent packets since before its snapshot was taken, so it sends as soon as it is restored. QEMU's
//! own dump of the network card is the reference for the capture.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

use machinery_testkit::capture::{self, End, Packet, TCP, UDP};
use machinery_testkit::client::Client;
use machinery_testkit::guest::{AGENT_PORT, linux};
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{Lab, TestNetwork};
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::Signal;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const ICMP: u8 = 1;
const ARP: u8 = 0;

const RESULT_SERVER: End = (TestNetwork::HOST, 2042);
const AGENT: End = (TestNetwork::GUEST, AGENT_PORT);
const COUNTED: End = (TestNetwork::HOST, linux::COUNTED_PORT);

/// The test's destination in the guest: the result server's port at another address.
const GREETED: End = (TestNetwork::GUEST, 2042);
/// The guest's destination on the host: the agent's port at another address.
const NO_AGENT: End = (TestNetwork::HOST, AGENT_PORT);

/// A kind of packet that has to occur before a run is long enough.
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

/// Reports whether a packet belongs into a task's capture.
fn belongs(packet: &Packet) -> bool {
    let of_machine = packet.is_from(TestNetwork::GUEST) || packet.is_to(TestNetwork::GUEST);
    of_machine && !packet.is_with(AGENT) && !packet.is_with(RESULT_SERVER)
}

/// Returns the numbers that the guest has sent.
fn counts(packets: &[Packet]) -> Vec<u32> {
    let counted = packets.iter().filter(|packet| goes_to(packet, COUNTED));
    counted.filter_map(|packet| linux::count_in(&packet.payload)).collect()
}

#[track_caller]
fn assert_does(client: &mut Client, request: Value) {
    let answer = client.ask(request.clone()).unwrap();
    assert_eq!(answer["success"], true, "{request}: {answer}");
}

/// Creates a lab with a machine that sends packets; none if this user may not create its network.
fn lab() -> Option<Lab> {
    requirement::NETWORK.or_skip(Lab::with_network("talker", SnapshotFormat::Lz4).unwrap())
}

/// Starts the machine, whose traffic is captured into `pcap`.
fn start(client: &mut Client, pcap: &Path) {
    assert_does(client, json!({"action": "lock", "machine": "talker", "task_id": "t", "pcap_path": pcap}));
    assert_does(client, json!({"action": "restore_start", "machine": "talker"}));
}

/// Exchanges packets with the machine until each kind has occurred.
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

/// Checks that the file is complete, and that no process writes to it.
fn assert_whole(pcap: &Path, packets: &[Packet]) {
    assert_eq!(capture::writers(pcap).unwrap(), []);
    let ran = capture::tshark(pcap).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!ran.stderr.contains("cut short") && !ran.stderr.contains("truncated"), "{}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), packets.len());
}

#[test]
fn capture_holds_the_traffic_of_its_machine_from_the_first_packet() {
    let Some(lab) = lab() else { return };
    captures_everything(&lab, |_| {});
}

#[test]
fn capture_holds_the_traffic_from_the_first_packet_when_a_standby_is_resumed() {
    let Some(lab) = lab() else { return };
    lab.ahead("instant: auto, standby: on").unwrap();
    captures_everything(&lab, |client| {
        assert_does(client, json!({"action": "enable_machine", "machine": "talker"}));
        assert_does(client, json!({"action": "prepare", "machine": "talker"}));
        assert_eq!(client.machine("talker").unwrap()["ready"]["mode"], "standby");
    });
}

fn captures_everything(lab: &Lab, prepare: impl Fn(&mut Client)) {
    // The server accepts connections and reads nothing.
    let _result_server = lab.network().inside(|| TcpListener::bind(RESULT_SERVER)).unwrap().unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for round in 1..=3 {
        let pcap = lab.cwd().root().join(format!("dump of round {round}.pcap"));
        prepare(&mut client);
        start(&mut client, &pcap);
        talk(lab);
        // A new standby would begin a new dump of QEMU.
        assert_does(&mut client, json!({"action": "disable_machine", "machine": "talker", "reason": "read"}));
        assert_does(&mut client, json!({"action": "stop", "machine": "talker"}));
        assert_does(&mut client, json!({"action": "unlock", "machine": "talker"}));
        let [truth, captured] = [&lab.dumped("talker"), &pcap].map(|file| capture::packets(file).unwrap());
        println!("round {round}: {} packets, {} captured", truth.len(), captured.len());

        // The guest continues with the count of its snapshot.
        let first = counts(&truth)[0];
        assert!(first > 1, "the guest has booted");
        assert_eq!(counts(&captured)[0], first, "the first datagram is missing");

        let expected: Vec<&Packet> = truth.iter().filter(|packet| belongs(packet)).collect();
        let (sent, received): (Vec<&Packet>, Vec<&Packet>) =
            captured.iter().partition(|packet| packet.is_from(TestNetwork::GUEST));
        let (should_be_sent, should_be_received): (Vec<&Packet>, Vec<&Packet>) =
            expected.into_iter().partition(|packet| packet.is_from(TestNetwork::GUEST));
        assert_eq!(counts(&captured), counts(&truth));
        assert_same(&sent, &should_be_sent);
        // Packets to a card that was off by then are not in QEMU's dump.
        assert!(received.iter().all(|packet| belongs(packet)), "{received:?}");
        assert_same(&received[..should_be_received.len().min(received.len())], &should_be_received);

        assert_whole(&pcap, &captured);
        lab.assert_clean();
        assert_does(&mut client, json!({"action": "enable_machine", "machine": "talker"}));
    }
    assert_eq!(client.machine("talker").unwrap()["errors"], json!([]));
}

#[test]
fn start_waits_for_tcpdump_when_it_is_slow() {
    let Some(lab) = lab() else { return };
    // The delay is longer than the machine's time to its first packet.
    let real = capture::tcpdump().unwrap().display().to_string();
    let slow = lab.cwd().script("tcpdump", &format!("sleep 3; exec {real} \"$@\"")).unwrap();
    lab.cwd().change_cuckoo_yaml(&real, &slow.display().to_string()).unwrap();
    lab.host_yaml("capture_jail: off\n", "").unwrap();
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
fn capture_continues_and_reports_its_gap_when_the_host_was_killed() {
    continues_with_next_host(|host, lab| {
        host.kill().unwrap();
        *host = lab.host().unwrap();
    });
}

#[test]
fn capture_continues_and_reports_its_gap_when_the_host_is_replaced() {
    continues_with_next_host(|host, _| {
        host.signal(Signal::USR2).unwrap();
        host.wait_for_replacement().unwrap();
    });
}

fn continues_with_next_host(change_host: impl Fn(&mut RunningHost, &Lab)) {
    let Some(lab) = lab() else { return };
    let _result_server = lab.network().inside(|| TcpListener::bind(RESULT_SERVER)).unwrap().unwrap();
    let pcap = lab.cwd().root().join("dump.pcap");
    let mut host = lab.host().unwrap();
    start(&mut host.client().unwrap(), &pcap);
    // The packets of the last second may be lost when tcpdump is ended.
    let some = |packets: &[Packet]| counts(packets).len() >= 50;
    capture::wait_for(&pcap, SOON, some).unwrap();
    let before = counts(&capture::packets(&pcap).unwrap());
    change_host(&mut host, &lab);
    let mut client = host.client().unwrap();
    let machine = client.machine("talker").unwrap();
    assert_eq!((&machine["state"], &machine["locked_by"]), (&json!("running"), &json!("t")));
    assert!(machine["errors"].to_string().contains("no packets of the time between two hosts"), "{machine}");
    talk(&lab);
    assert_does(&mut client, json!({"action": "stop", "machine": "talker"}));
    lab.assert_clean();
    let packets = capture::packets(&pcap).unwrap();
    assert_whole(&pcap, &packets);
    assert!(packets.iter().all(belongs));
    let (truth, captured) = (counts(&capture::packets(&lab.dumped("talker")).unwrap()), counts(&packets));
    assert!(captured.starts_with(&before) && captured.len() > before.len(), "{captured:?}");
    let gaps = captured.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert!(
        gaps <= 1 && captured[0] == truth[0] && captured.last() == truth.last(),
        "{captured:?}\n{truth:?}"
    );
    // The next run of the task is captured from the beginning.
    assert_does(&mut client, json!({"action": "restore_start", "machine": "talker"}));
    talk(&lab);
    assert_does(&mut client, json!({"action": "stop", "machine": "talker"}));
    let [truth, captured] =
        [&lab.dumped("talker"), &pcap].map(|file| counts(&capture::packets(file).unwrap()));
    assert_eq!(captured, truth);
}

/// Checks that these are the same packets in the same order.
#[track_caller]
fn assert_same(captured: &[&Packet], expected: &[&Packet]) {
    let differ = captured.iter().zip(expected).position(|(captured, expected)| captured != expected);
    if let Some(at) = differ {
        panic!("packet {at} is {:?}, not {:?}", captured[at], expected[at]);
    }
    assert_eq!(captured.len(), expected.len(), "one of them has more packets");
}
