//! Captures of double machines on a loopback interface: their begin, end, content and failures.
//!
//! The real tcpdump needs a user who may capture, by which `requirement` decides. Tests that replace tcpdump by a script
//! always run.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use machinery_testkit::capture::{self, Packet};
use machinery_testkit::client::Client;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::TestNetwork;
use machinery_testkit::requirement;
use machinery_testkit::scratch::{ScratchCwd, double};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(60);

/// The machine's address, on the loopback interface.
const IP: &str = "127.66.0.2";
/// The address of the machine's peer.
const OTHER: &str = "127.66.0.1";

fn success() -> Value {
    json!({"success": true})
}

/// Creates a CWD with a machine `m` on the interface `lo`, captured by the given tcpdump.
fn captured_by(tcpdump: &Path, more: &str) -> ScratchCwd {
    let cwd = ScratchCwd::new(&[("double", &double(&[("m", more)]))]).unwrap();
    cwd.change_yaml("double", "ip: 10.0.0.1", &format!("ip: {IP}")).unwrap();
    cwd.capture_with(tcpdump).unwrap();
    cwd
}

/// Lets a program in tcpdump's place start others.
fn unconfined(cwd: &ScratchCwd) {
    cwd.host_yaml("capture_jail: off\n").unwrap();
}

/// Creates the same CWD with the real tcpdump, and a network in which it may capture.
fn really_captured(more: &str) -> Option<(TestNetwork, ScratchCwd)> {
    let network = requirement::NETWORK.or_skip(TestNetwork::new().unwrap())?;
    Some((network, captured_by(&capture::tcpdump().unwrap(), more)))
}

fn host_on(network: &TestNetwork, cwd: &ScratchCwd) -> RunningHost {
    RunningHost::start_with(cwd, |command| network.attach(command)).unwrap()
}

fn pcap(cwd: &ScratchCwd) -> PathBuf {
    cwd.root().join("a task's dump.pcap")
}

#[track_caller]
fn lock(client: &mut Client, pcap: &Path) {
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t", "pcap_path": pcap});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
}

/// Exchanges datagrams between machine and peer, and with the result server and the agent.
fn talk(network: &TestNetwork, text: &str) {
    network
        .inside(|| {
            let [machine, other] = [IP, OTHER].map(|ip| UdpSocket::bind((ip, 0)).unwrap());
            machine.send_to(text.as_bytes(), other.local_addr().unwrap()).unwrap();
            other.send_to(text.as_bytes(), machine.local_addr().unwrap()).unwrap();
            let [server, agent] =
                [("127.0.0.1", 2042), (IP, 8000)].map(|address| UdpSocket::bind(address).unwrap());
            machine.send_to(b"results", server.local_addr().unwrap()).unwrap();
            server.send_to(b"taken", machine.local_addr().unwrap()).unwrap();
            other.send_to(b"a question", agent.local_addr().unwrap()).unwrap();
            agent.send_to(b"an answer", other.local_addr().unwrap()).unwrap();
            // Traffic of others, which the capture must not contain.
            other.send_to(b"not the machine's", server.local_addr().unwrap()).unwrap();
        })
        .unwrap();
}

/// Sends long packets until `wait` returns. A busy computer loses many of them.
fn talk_until<T>(network: &TestNetwork, wait: impl FnOnce() -> T) -> T {
    let (long, done) = ("x".repeat(50_000), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                talk(network, &long);
            }
        });
        let waited = wait();
        done.store(true, Ordering::SeqCst);
        waited
    })
}

fn payloads(packets: &[Packet]) -> Vec<String> {
    packets.iter().map(|packet| String::from_utf8_lossy(&packet.payload).into_owned()).collect()
}

/// Asserts that the file is complete and closed, and holds each datagram once in each direction.
#[track_caller]
fn assert_captured(pcap: &Path, texts: &[&str]) {
    assert_eq!(capture::writers(pcap).unwrap(), []);
    let twice: Vec<&str> = texts.iter().flat_map(|text| [*text, *text]).collect();
    assert_eq!(payloads(&capture::packets(pcap).unwrap()), twice);
    let ran = capture::tshark(pcap).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!ran.stderr.contains("cut short") && !ran.stderr.contains("truncated"), "{ran:?}");
}

/// Returns the process that captures into the file, with its pidfd. Its children briefly have the same
/// command line.
fn captor(pcap: &Path) -> (Pid, OwnedFd) {
    let writers = capture::writers(pcap).unwrap();
    let pid = writers.into_iter().min_by_key(|pid| pid.as_raw_nonzero()).unwrap();
    (pid, pidfd_open(pid, PidfdFlags::empty()).unwrap())
}

#[track_caller]
fn assert_ends(process: &OwnedFd) {
    let limit = Timespec::try_from(TIMEOUT).unwrap();
    assert_eq!(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit)), Ok(1), "it goes on");
}

/// Kills captures into the file that a test left running. Declare it before the host.
struct Swept(PathBuf);

impl Drop for Swept {
    fn drop(&mut self) {
        for writer in capture::writers(&self.0).unwrap_or_default() {
            // Each capture leads its own process group. It may have ended meanwhile.
            let _ = kill_process_group(writer, Signal::KILL);
        }
    }
}

/// Asserts that a machine starts although its capture fails, and that the failure is reported.
#[track_caller]
fn assert_reported(host: &RunningHost, pcap: &Path, parts: &[&str]) {
    let (mut client, mut subscriber) = (host.client().unwrap(), host.client().unwrap());
    subscriber.subscribe().unwrap();
    lock(&mut client, pcap);
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let reported = subscriber.wait_for_event("capture_failed", "m").unwrap();
    let reason = reported["reason"].as_str().unwrap();
    for part in parts.iter().chain(&["'m'"]) {
        assert!(reason.contains(part), "{part:?} is not in: {reason}");
    }
    println!("{reason}");
    let machine = client.machine("m").unwrap();
    assert_eq!(machine["errors"], json!([reason]));
    assert_eq!((&machine["state"], &machine["disabled"]), (&json!("running"), &json!(false)));
    assert!(host.log().contains("ERROR") && host.log().contains(parts[0]), "{}", host.log());
    assert_eq!(client.act("stop", "m").unwrap(), success());
    // The failure is reported once.
    assert_eq!(client.machine("m").unwrap()["errors"], json!([reason]));
    assert_eq!(capture::writers(pcap).unwrap(), []);
}

#[test]
fn capture_holds_exactly_one_run_when_a_machine_starts_and_stops_in_any_way() {
    let Some((network, cwd)) = really_captured("") else { return };
    let host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    for start in ["restore_start", "norestore_start"] {
        for stop in ["stop", "acpi_stop", "unlock"] {
            let (pcap, text) =
                (cwd.root().join(format!("{start} to {stop}.pcap")), format!("{start} {stop}"));
            lock(&mut client, &pcap);
            talk(&network, "too early");
            assert_eq!(client.act(start, "m").unwrap(), success());
            talk(&network, &text);
            assert_eq!(client.act(stop, "m").unwrap(), success());
            talk(&network, "too late");
            assert_captured(&pcap, &[&text]);
            let rest = if stop == "unlock" { "stop" } else { "unlock" };
            assert_eq!(client.act(rest, "m").unwrap(), success());
        }
    }
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
}

#[test]
fn capture_is_complete_when_tcpdump_has_another_file_name() {
    let Some((network, cwd)) = really_captured("") else { return };
    let (real, renamed) = (capture::tcpdump().unwrap(), cwd.root().join("sniffer of ours"));
    std::os::unix::fs::symlink(&real, &renamed).unwrap();
    let path = |program: &Path| format!("path: {}", program.display());
    cwd.change_cuckoo_yaml(&path(&real), &path(&renamed)).unwrap();
    let host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    talk(&network, "renamed");
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_captured(&pcap(&cwd), &["renamed"]);
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
}

#[test]
fn captures_are_complete_when_the_host_shuts_down() {
    let Some((network, cwd)) = really_captured("") else { return };
    let mut host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    talk(&network, "the last words");
    assert!(host.terminate().unwrap().success());
    assert_captured(&pcap(&cwd), &["the last words"]);
}

#[test]
fn capture_ends_when_a_start_fails() {
    let Some((network, cwd)) = really_captured("faults: {restore_start: fail}") else { return };
    let host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], false);
    assert_captured(&pcap(&cwd), &[]);
}

#[test]
fn capture_lasts_until_stop_when_the_machine_powers_itself_off() {
    let Some((network, cwd)) = really_captured("poweroff_after_ms: 1") else { return };
    let host = host_on(&network, &cwd);
    let (mut client, mut subscriber) = (host.client().unwrap(), host.client().unwrap());
    subscriber.subscribe().unwrap();
    lock(&mut client, &pcap(&cwd));
    let _ = client.act("restore_start", "m").unwrap();
    subscriber.wait_for_state("m", "poweroff").unwrap();
    talk(&network, "what was still under way");
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_captured(&pcap(&cwd), &["what was still under way"]);
}

#[test]
fn tcpdump_does_not_run_when_no_capture_is_requested_or_enabled() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let asked = cwd.root().join("asked");
    let tcpdump = cwd.script("tcpdump", &format!("echo asked > '{}'", asked.display())).unwrap();
    cwd.capture_with(&tcpdump).unwrap();
    let pcap = pcap(&cwd);
    let run = |lock: Option<Value>| {
        let host = RunningHost::start(&cwd).unwrap();
        let mut client = host.client().unwrap();
        if let Some(lock) = &lock {
            assert_eq!(client.ask(lock.clone()).unwrap()["success"], true);
        }
        for start in ["restore_start", "norestore_start"] {
            assert_eq!(client.act(start, "m").unwrap(), success());
            assert_eq!(client.act("stop", "m").unwrap(), success());
        }
        if lock.is_some() {
            assert_eq!(client.act("unlock", "m").unwrap(), success());
        }
        assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
    };
    run(None);
    run(Some(json!({"action": "lock", "machine": "m", "task_id": "t"})));
    cwd.change_cuckoo_yaml("enabled: true", "enabled: false").unwrap();
    run(Some(json!({"action": "lock", "machine": "m", "task_id": "t", "pcap_path": &pcap})));
    cwd.change_cuckoo_yaml("  enabled: false\n", "").unwrap();
    run(Some(json!({"action": "lock", "machine": "m", "task_id": "t", "pcap_path": &pcap})));
    assert!(!asked.exists() && !pcap.exists());
}

#[test]
fn capture_failure_advises_to_install_tcpdump_when_it_is_missing() {
    let cwd = captured_by(Path::new("/nowhere/tcpdump"), "");
    let host = RunningHost::start(&cwd).unwrap();
    assert_reported(&host, &pcap(&cwd), &["/nowhere/tcpdump", "Install tcpdump", "tcpdump.path"]);
}

#[test]
fn capture_failure_is_reported_when_tcpdump_is_not_executable() {
    let cwd = captured_by(Path::new("/etc/passwd"), "");
    let host = RunningHost::start(&cwd).unwrap();
    assert_reported(&host, &pcap(&cwd), &["/etc/passwd", "tcpdump.path"]);
}

#[test]
fn capture_failure_is_reported_when_the_interface_is_missing() {
    let Some((network, cwd)) = really_captured("") else { return };
    cwd.change_yaml("double", "interface: lo", &format!("interface: {}", TestNetwork::TAP)).unwrap();
    let host = host_on(&network, &cwd);
    network.remove_tap().unwrap();
    assert_reported(&host, &pcap(&cwd), &["there is no interface tap0", "`interface`"]);
}

#[test]
fn capture_failure_is_reported_when_the_interface_disappears() {
    let Some((network, cwd)) = really_captured("") else { return };
    cwd.change_yaml("double", "interface: lo", &format!("interface: {}", TestNetwork::TAP)).unwrap();
    let host = host_on(&network, &cwd);
    let (mut client, mut subscriber) = (host.client().unwrap(), host.client().unwrap());
    subscriber.subscribe().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    network.remove_tap().unwrap();
    let reported = subscriber.wait_for_event("capture_failed", "m").unwrap();
    assert!(reported["reason"].as_str().unwrap().contains("the interface tap0 went away"), "{reported}");
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["state"], &machine["errors"]), (&json!("running"), &json!([reported["reason"]])));
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_captured(&pcap(&cwd), &[]);
}

#[test]
fn capture_ends_with_a_valid_file_when_it_reaches_its_limit() {
    let Some((network, cwd)) = really_captured("") else { return };
    cwd.host_yaml("capture_size_limit: 1 MiB\n").unwrap();
    let host = host_on(&network, &cwd);
    let (mut client, mut subscriber) = (host.client().unwrap(), host.client().unwrap());
    subscriber.subscribe().unwrap();
    let pcap = pcap(&cwd);
    lock(&mut client, &pcap);
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let reported = talk_until(&network, || subscriber.wait_for_event("capture_failed", "m")).unwrap();
    let reason = reported["reason"].as_str().unwrap();
    assert!(reason.contains("has reached the limit of 1 MiB"), "{reason}");
    assert!(reason.contains("capture_size_limit"), "{reason}");
    assert_eq!(capture::writers(&pcap).unwrap(), []);
    talk(&network, "too late");
    let packets = capture::packets(&pcap).unwrap();
    // So many of the longest packets fit into the limit.
    assert!(packets.len() >= 20 && !payloads(&packets).contains(&"too late".to_owned()));
    let ran = capture::tshark(&pcap).unwrap();
    assert!(!ran.stderr.contains("cut short") && !ran.stderr.contains("truncated"), "{ran:?}");
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["state"], &machine["errors"]), (&json!("running"), &json!([reason])));
    assert_eq!(client.act("stop", "m").unwrap(), success());
}

#[test]
fn capture_failure_is_reported_when_the_file_cannot_be_written() {
    for (path, why) in
        [("no folder/dump.pcap", "folder"), ("a file/dump.pcap", "folder"), ("conf", "no file")]
    {
        let Some((network, cwd)) = really_captured("") else { return };
        cwd.write("a file", "").unwrap();
        let host = host_on(&network, &cwd);
        let pcap = cwd.root().join(path);
        let cannot = format!("cannot write to {}", pcap.display());
        assert_reported(&host, &pcap, &[&cannot, why]);
    }
}

#[test]
fn capture_failure_is_reported_when_the_path_is_a_symbolic_link() {
    let Some((network, cwd)) = really_captured("") else { return };
    cwd.write("secret", "kept").unwrap();
    std::os::unix::fs::symlink("secret", pcap(&cwd)).unwrap();
    let host = host_on(&network, &cwd);
    assert_reported(&host, &pcap(&cwd), &["cannot write to", "symbolic link"]);
    assert_eq!(std::fs::read(cwd.root().join("secret")).unwrap(), b"kept");
}

#[test]
fn tcpdump_has_another_user_and_no_rights_when_the_host_is_root() {
    if !requirement::is_root() {
        return;
    }
    let Some((network, cwd)) = really_captured("") else { return };
    let host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let process = captor(&pcap(&cwd)).0.as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let value = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    for key in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        assert_eq!(value(key), ["0000000000000000"], "{status}");
    }
    assert!(value("Uid:").iter().chain(&value("Gid:")).all(|number| number != "0"), "{status}");
    assert_eq!(
        (value("NoNewPrivs:"), value("Seccomp:")),
        (vec!["1".to_owned()], vec!["2".to_owned()]),
        "{status}"
    );
    // It has only pipes and its socket, and not the file.
    for descriptor in std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten() {
        let opened = std::fs::read_link(descriptor.path()).unwrap().display().to_string();
        assert!(!opened.starts_with(cwd.root().to_str().unwrap()), "{opened}");
    }
    talk(&network, "without rights");
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_captured(&pcap(&cwd), &["without rights"]);
}

#[test]
fn tcpdump_reads_and_writes_no_file_unless_its_jail_is_off() {
    if !requirement::is_root() {
        return;
    }
    for (more, is_confined) in [("", true), ("capture_jail: off\n", false)] {
        let cwd = captured_by(Path::new("/replaced"), "");
        cwd.host_yaml(more).unwrap();
        cwd.write("secret", "of the host\n").unwrap();
        let (secret, made) = (cwd.root().join("secret"), cwd.root().join("made"));
        let read = format!("read -r line < '{}' && echo \"tcpdump: $line\" >&2", secret.display());
        let attempts = format!("{read}; : > '{}'", made.display());
        let script = cwd.script("tcpdump", &attempts).unwrap();
        cwd.change_cuckoo_yaml("/replaced", &script.display().to_string()).unwrap();
        let host = RunningHost::start(&cwd).unwrap();
        let mut client = host.client().unwrap();
        lock(&mut client, &pcap(&cwd));
        assert_eq!(client.act("restore_start", "m").unwrap(), success());
        let errors = client.machine("m").unwrap()["errors"].to_string();
        assert_eq!((errors.contains("of the host"), made.exists()), (!is_confined, !is_confined), "{errors}");
    }
}

#[test]
fn capture_is_written_into_a_passed_file_or_pipe() {
    let Some((network, cwd)) = really_captured("") else { return };
    let host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t", "fd": true});
    std::fs::write(pcap(&cwd), [b'x'; 100_000]).unwrap();
    let file = std::fs::File::options().write(true).open(pcap(&cwd)).unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    for descriptor in [OwnedFd::from(file), writer.into()] {
        assert_eq!(client.ask_with(lock.clone(), &descriptor).unwrap()["success"], true);
        drop(descriptor);
        // A second start overwrites a file.
        for text in ["first", "passed"] {
            assert_eq!(client.act("restore_start", "m").unwrap(), success());
            talk(&network, text);
            assert_eq!(client.act("stop", "m").unwrap(), success());
        }
        assert_eq!(client.act("unlock", "m").unwrap(), success());
    }
    assert_captured(&pcap(&cwd), &["passed"]);
    let mut piped = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut piped).unwrap();
    // Both captures, one behind the other.
    let second = std::fs::read(pcap(&cwd)).unwrap().len();
    assert!(piped.len() >= 2 * second - 20, "{} and {second} bytes", piped.len());
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
}

#[test]
fn capture_failure_is_reported_when_tcpdump_lacks_a_capability() {
    let Some((network, cwd)) = really_captured("") else { return };
    let real = capture::tcpdump().unwrap().display().to_string();
    let without = format!("exec setpriv --bounding-set=-net_raw --inh-caps=-net_raw -- {real} \"$@\"");
    let tcpdump = cwd.script("tcpdump", &without).unwrap().display().to_string();
    cwd.change_cuckoo_yaml(&real, &tcpdump).unwrap();
    let host = host_on(&network, &cwd);
    assert_reported(&host, &pcap(&cwd), &["may not capture on lo", "setcap", "Run the host as root"]);
}

#[test]
fn capture_failure_is_reported_when_the_address_is_invalid() {
    let Some((network, cwd)) = really_captured("") else { return };
    cwd.change_yaml("double", &format!("ip: {IP}"), "ip: 300.1.2.3").unwrap();
    let host = host_on(&network, &cwd);
    assert_reported(&host, &pcap(&cwd), &["does not understand the filter", "`ip`"]);
}

#[test]
fn machine_runs_on_when_tcpdump_dies() {
    let Some((network, cwd)) = really_captured("") else { return };
    let host = host_on(&network, &cwd);
    let (mut client, mut subscriber) = (host.client().unwrap(), host.client().unwrap());
    subscriber.subscribe().unwrap();
    let pcap = pcap(&cwd);
    lock(&mut client, &pcap);
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    talk(&network, "before");
    capture::wait_for(&pcap, TIMEOUT, |packets| packets.len() == 2).unwrap();
    kill_process(captor(&pcap).0, Signal::KILL).unwrap();
    let reported = subscriber.wait_for_event("capture_failed", "m").unwrap();
    assert!(reported["reason"].as_str().unwrap().contains("ended by itself"), "{reported}");
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["state"], &machine["errors"]), (&json!("running"), &json!([reported["reason"]])));
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_eq!(client.machine("m").unwrap()["errors"], json!([reported["reason"]]));
    // Packets captured earlier are saved.
    assert_captured(&pcap, &["before"]);
    // The next run is captured again.
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    talk(&network, "after");
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_captured(&pcap, &["after"]);
}

#[test]
fn capture_is_complete_when_the_next_task_locks_at_once() {
    let Some((network, cwd)) = really_captured("") else { return };
    let host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    talk(&network, "of the first task");
    let next = json!({"action": "lock", "machine": "m", "task_id": "next", "id": 2});
    // One write, so that the host reads the second request before it answers the first.
    let both = format!("{}\n{next}\n", json!({"action": "unlock", "machine": "m", "id": 1}));
    client.send_bytes(both.as_bytes()).unwrap();
    let mut answers = [client.next_message().unwrap(), client.next_message().unwrap()];
    answers.sort_by_key(|answer| answer["id"].to_string());
    assert_eq!(answers[0], json!({"success": true, "id": 1}));
    assert_captured(&pcap(&cwd), &["of the first task"]);
    assert_eq!(client.machine("m").unwrap()["locked_by"], "next");
}

#[test]
fn tcpdump_is_ended_when_it_closes_its_stderr() {
    let script = "exec 2> /dev/null; exec sleep 1000";
    let cwd = captured_by(Path::new("/replaced"), "");
    let script = cwd.script("tcpdump", script).unwrap();
    cwd.change_cuckoo_yaml("/replaced", &script.display().to_string()).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    assert_reported(&host, &pcap(&cwd), &["closed its stderr"]);
    assert_eq!(host.resources().unwrap().children, "");
}

#[test]
fn capture_succeeds_when_tcpdump_warns() {
    let Some((network, cwd)) = really_captured("") else { return };
    let real = capture::tcpdump().unwrap().display().to_string();
    let script = format!("echo 'tcpdump: WARNING: no promiscuous mode' >&2; exec {real} \"$@\"");
    let script = cwd.script("tcpdump", &script).unwrap();
    cwd.change_cuckoo_yaml(&real, &script.display().to_string()).unwrap();
    let host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    talk(&network, "all the same");
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_captured(&pcap(&cwd), &["all the same"]);
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
}

#[test]
fn machine_starts_when_tcpdump_never_listens() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    // The child has to end with its parent.
    let tcpdump = cwd.script("tcpdump", "sh -c 'while true; do sleep 60; done' \"$@\"; true").unwrap();
    cwd.capture_with(&tcpdump).unwrap();
    unconfined(&cwd);
    let _swept = Swept(pcap(&cwd));
    let host = RunningHost::start(&cwd).unwrap();
    assert_reported(&host, &pcap(&cwd), &["does not listen"]);
}

#[test]
fn tcpdump_is_killed_when_it_ignores_signals() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let unread = "trap '' TERM USR1; echo 'tcpdump: listening on lo' >&2; while true; do sleep 60; done";
    let tcpdump = cwd.script("tcpdump", unread).unwrap();
    cwd.capture_with(&tcpdump).unwrap();
    unconfined(&cwd);
    let _swept = Swept(pcap(&cwd));
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap(&cwd));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let (_, process) = captor(&pcap(&cwd));
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_ends(&process);
    let errors = client.machine("m").unwrap()["errors"].clone();
    assert_eq!(errors.as_array().unwrap().len(), 1, "{errors}");
    assert!(errors[0].as_str().unwrap().contains("did not end within"), "{errors}");
    assert_eq!(capture::writers(&pcap(&cwd)).unwrap(), []);
}

#[test]
fn next_host_ends_captures_when_a_host_was_killed() {
    for keeps_capturing in [true, false] {
        let Some((network, cwd)) = really_captured("") else { return };
        let pcap = pcap(&cwd);
        let mut host = host_on(&network, &cwd);
        let mut client = host.client().unwrap();
        lock(&mut client, &pcap);
        assert_eq!(client.act("restore_start", "m").unwrap(), success());
        talk(&network, "before");
        capture::wait_for(&pcap, TIMEOUT, |packets| packets.len() == 2).unwrap();
        let (_, process) = captor(&pcap);
        host.kill().unwrap();
        if !keeps_capturing {
            cwd.change_cuckoo_yaml("enabled: true", "enabled: false").unwrap();
        }
        let host = host_on(&network, &cwd);
        assert_ends(&process);
        assert_captured(&pcap, &["before"]);
        let mut client = host.client().unwrap();
        let machine = client.machine("m").unwrap();
        assert_eq!((&machine["locked"], &machine["locked_by"]), (&json!(true), &json!("t")));
        assert_eq!(client.act("restore_start", "m").unwrap(), success());
        talk(&network, "after");
        assert_eq!(client.act("stop", "m").unwrap(), success());
        assert_captured(&pcap, &[if keeps_capturing { "after" } else { "before" }]);
    }
}

#[test]
fn another_program_with_the_same_file_survives_a_killed_host() {
    let Some((network, cwd)) = really_captured("") else { return };
    let pcap = pcap(&cwd);
    let mut host = host_on(&network, &cwd);
    let mut client = host.client().unwrap();
    lock(&mut client, &pcap);
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let (_, process) = captor(&pcap);
    let reader = std::process::Command::new("tail").args(["-f", "-n", "0"]).arg(&pcap).spawn();
    let mut reader = Ended(reader.unwrap());
    host.kill().unwrap();
    let _host = host_on(&network, &cwd);
    assert_ends(&process);
    assert_eq!(reader.0.try_wait().unwrap(), None, "it reads on");
    assert_eq!(capture::writers(&pcap).unwrap(), [Pid::from_child(&reader.0)]);
}

/// A child process that is killed when dropped.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // The child may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
