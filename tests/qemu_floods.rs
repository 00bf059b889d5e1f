//! A QEMU whose code is an attacker's, or whose guest makes it print without end: it costs its own machine, little of
//! the host's memory, and few lines of the log. Runs that fill the disk are ended.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::Instant;

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::wait::wait_until;
use serde_json::{Value, json};

/// The memory by which the host may grow, in KiB.
const GROWTH: usize = 50 * 1024;

/// A program in QEMU's place that answers each command of the monitor with success, and reports that the guest runs. It
/// then floods, and waits for its end.
const FLOODER: &str = r#"use Socket;
my ($arg) = grep { /cuckoo-monitor/ && /^socket/ } @ARGV;
my $m;
if ($arg =~ /path=([^,]+)/) { my $path = $1; socket($m, PF_UNIX, SOCK_STREAM, 0); connect($m, pack_sockaddr_un($path)) or die }
elsif ($arg =~ /fd=(\d+)/) { open(my $l, "+<&=", $1) or die; accept($m, $l) or die }
select($m); $| = 1;
print qq({"QMP": {"version": {}, "capabilities": []}}\n);
while (<$m>) {
    my $runs = /"cont"/;
    print qq({"return": {"status": "running", "running": true}, "id": $1}\n) while /"id": ?(\d+)/g;
    next unless $runs;
    print qq({"event": "RESUME", "data": {}}\n);
    FLOOD;
    open(my $done, ">", "flooded") or die;
    close($done);
}
"#;

/// A lab in which the QEMU of machine `m` floods; that of machine `n` is real.
struct Flood {
    host: RunningHost,
    done: PathBuf,
    lab: Lab,
}

fn flood(code: &str) -> Flood {
    let machines = [("m", Guest::Micro, SnapshotFormat::Lz4), ("n", Guest::Micro, SnapshotFormat::Lz4)];
    let lab = Lab::new(&machines).unwrap();
    let flooder = FLOODER.replace("FLOOD", code).replace('\'', "'\\''");
    let real = lab.qemu().system.display().to_string();
    let folder = lab.folder("m").dir.clone();
    let script = format!(
        "case \"$*\" in *{}/*) exec perl -e '{flooder}' -- \"$@\";; esac\nexec {real} \"$@\"",
        folder.display()
    );
    lab.fake_qemu("7.2.0", &script).unwrap();
    let host = lab.host().unwrap();
    Flood { host, done: folder.join("flooded"), lab }
}

impl Flood {
    /// Starts the machine, and returns the reason of its end.
    fn end(&self) -> String {
        let mut subscriber = self.host.client().unwrap();
        subscriber.subscribe().unwrap();
        let _ = self.host.client().unwrap().act("norestore_start", "m").unwrap();
        subscriber.wait_for_state("m", "poweroff").unwrap()
    }

    /// Starts the machine, and waits until it has flooded.
    fn whole(&self) {
        let started = self.host.client().unwrap().act("norestore_start", "m").unwrap();
        assert_eq!(started, json!({"success": true}));
        wait_until("the flood does not end", || self.done.exists());
    }

    /// Starts and ends the other machine, so that the memory of a first run does not count.
    fn assert_other_works(&self) {
        let mut client = self.host.client().unwrap();
        for action in ["restore_start", "screenshot", "stop"] {
            let path = self.lab.cwd().root().join("picture.png");
            let request = json!({"action": action, "machine": "n", "path": path});
            assert_eq!(client.ask(request).unwrap(), json!({"success": true}), "{action}");
        }
    }

    fn resident_kib(&self) -> usize {
        self.host.resources().unwrap().resident_kib
    }

    /// Asserts that the host has hardly grown, that the other machine works, and that this one is enabled.
    #[track_caller]
    fn assert_survived(mut self, before: usize) {
        let after = self.resident_kib();
        assert!(after <= before + GROWTH, "{before} KiB, then {after} KiB");
        self.assert_other_works();
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        self.lab.assert_clean();
    }
}

#[test]
fn qemu_is_killed_with_the_reason_when_its_monitor_line_does_not_end() {
    let flood = flood(r#"my $x = "x" x 65536; print $x while 1"#);
    flood.assert_other_works();
    let before = flood.resident_kib();
    let reason = flood.end();
    assert_eq!(reason, "QEMU was killed: its monitor sent more than 4 MiB without an end of line");
    let mut client = flood.host.client().unwrap();
    let errors = client.machine("m").unwrap()["errors"].clone();
    assert!(errors[0].as_str().unwrap().contains("more than 4 MiB"), "{errors}");
    flood.assert_survived(before);
}

#[test]
fn start_fails_with_the_reason_when_the_monitor_floods_instead_of_an_answer() {
    let flood = flood("1");
    let flooder = flood.lab.cwd().root().join("fake-qemu");
    let text = std::fs::read_to_string(&flooder).unwrap();
    std::fs::write(&flooder, text.replace("while (<$m>) {", "my $x = \"x\" x 65536; while (1) { print $x;"))
        .unwrap();
    flood.assert_other_works();
    let before = flood.resident_kib();
    let mut client = flood.host.client().unwrap();
    let answer = client.act("norestore_start", "m").unwrap();
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.contains("its monitor sent more than 4 MiB without an end of line"), "{reason}");
    assert_eq!(client.machine("m").unwrap()["disabled"], true);
    flood.assert_survived(before);
}

#[test]
fn qemu_is_killed_when_it_floods_states() {
    let stops = r#"{"event": "BLOCK_IO_ERROR", "data": {"action": "stop", "reason": "no"}}"#;
    let resumes = r#"{"event": "RESUME", "data": {}}"#;
    let flood = flood(&format!("print qq({stops}\\n{resumes}\\n) x 100 while 1"));
    flood.assert_other_works();
    let before = flood.resident_kib();
    let reason = flood.end();
    assert!(reason.starts_with("QEMU was killed: it reports its state too often"), "{reason}");
    let lines = flood.host.log().lines().filter(|line| line.contains("the disk failed")).count();
    assert!(lines < 100, "{lines} lines");
    flood.assert_survived(before);
}

#[test]
fn host_does_not_grow_when_qemu_floods_events_that_nobody_reads() {
    let data = "x".repeat(1000);
    let flood = flood(&format!("print qq({{\"event\": \"X\", \"data\": \"{data}\"}}\\n) x 64 for 1..2048"));
    flood.assert_other_works();
    let before = flood.resident_kib();
    flood.whole();
    assert_eq!(flood.host.client().unwrap().act("stop", "m").unwrap(), json!({"success": true}));
    flood.assert_survived(before);
}

#[test]
fn host_does_not_grow_when_qemu_prints_without_an_end_of_line() {
    let flood = flood(r#"my $x = "x" x 65536; syswrite(STDERR, $x) for 1..2048"#);
    flood.assert_other_works();
    let before = flood.resident_kib();
    flood.whole();
    assert_eq!(flood.host.client().unwrap().act("stop", "m").unwrap(), json!({"success": true}));
    flood.assert_survived(before);
}

#[test]
fn log_has_few_lines_when_a_guest_makes_qemu_print_many() {
    let warning = "qemu-system-x86_64: warning: Virtqueue size exceeded";
    let flood = flood(&format!("my $x = \"{warning}\\n\" x 1000; syswrite(STDERR, $x) for 1..200"));
    flood.assert_other_works();
    let (before, begun) = (flood.resident_kib(), Instant::now());
    flood.whole();
    let mut client: Client = flood.host.client().unwrap();
    assert_eq!(client.act("stop", "m").unwrap(), json!({"success": true}));
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap();
    let log = flood.host.log();
    let of_guest = |line: &&str| line.contains(warning) || line.contains("lines suppressed");
    let lines = log.lines().filter(of_guest).count();
    assert!((20..=20 + 2 * (seconds + 2)).contains(&lines), "{lines} lines in {seconds} s");
    // Each line is there or counted.
    let suppressed = |line: &str| line.split("… ").nth(1)?.split(' ').next()?.parse::<usize>().ok();
    let counted: usize =
        log.lines().filter(|line| line.contains("lines suppressed")).filter_map(suppressed).sum();
    let logged = log.lines().filter(|line| line.contains(warning)).count();
    assert_eq!(counted + logged, 200_000);
    flood.assert_survived(before);
}

const SHORT: &str = "free_space_reserve: 1000000 TiB";

#[test]
fn start_is_refused_and_the_machine_stays_when_the_disk_space_is_short() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    lab.host_yaml(SHORT, "").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for action in ["restore_start", "norestore_start", "prepare"] {
        let answer = client.act(action, "m").unwrap();
        let reason = answer["reason"].as_str().unwrap();
        assert!(reason.contains("have to stay free (free_space_reserve)"), "{reason}");
        assert!(reason.contains(lab.folder("m").dir.to_str().unwrap()), "{reason}");
        let machine = client.machine("m").unwrap();
        assert_eq!((&machine["disabled"], &machine["state"]), (&json!(false), &json!("poweroff")));
    }
    lab.host_yaml("free_space_reserve: 0", "").unwrap();
    let reloaded = client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(reloaded["settings"], json!(["free_space_reserve"]), "{reloaded}");
    for action in ["restore_start", "stop"] {
        assert_eq!(client.act(action, "m").unwrap(), json!({"success": true}));
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
}

#[test]
fn one_run_is_ended_with_the_reason_when_the_disk_space_becomes_short() {
    let machines = [("m", Guest::Micro, SnapshotFormat::Lz4), ("n", Guest::Micro, SnapshotFormat::Lz4)];
    let lab = Lab::new(&machines).unwrap();
    let mut host = lab.host().unwrap();
    let (mut client, mut subscriber) = (host.client().unwrap(), host.client().unwrap());
    for name in lab.names() {
        assert_eq!(client.act("restore_start", name).unwrap(), json!({"success": true}));
    }
    // The overlay of `m` is the largest. QEMU does not write to the end of it.
    let overlay = std::fs::File::options().append(true).open(lab.disposable("m")).unwrap();
    std::io::Write::write_all(&mut &overlay, &vec![1; 8 << 20]).unwrap();
    subscriber.subscribe().unwrap();
    lab.host_yaml(SHORT, "").unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    let reason = subscriber.wait_for_state("m", "poweroff").unwrap();
    assert!(reason.starts_with("QEMU was killed: only ") && reason.contains("have to stay free"), "{reason}");
    assert!(reason.contains("this run has written most of all"), "{reason}");
    let machine: Value = client.machine("m").unwrap();
    assert!(machine["errors"][0].as_str().unwrap().contains("have to stay free"), "{machine}");
    let warned = |line: &str| line.contains("WARN") && line.contains("this run has written most of all");
    assert!(host.log().lines().any(warned), "{}", host.log());
    // A file system that is not filled further costs no more.
    assert_eq!(client.act("state", "n").unwrap()["state"], "running");
    assert_eq!(client.act("stop", "n").unwrap(), json!({"success": true}));
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
}
