//! Machines of two libvirts: one of them goes away, hangs or comes later, and the machines of the other notice nothing.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{FileEvent, FileWatch, KvmLab};
use rustix::process::Signal;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// A restore of the micro guest and a stop take about two seconds. A wait for the other libvirt takes fifteen.
const WITHOUT_WAIT: Duration = Duration::from_secs(10);
const FIRST: [(&str, Guest); 2] = [("a", Guest::Micro), ("a2", Guest::Micro)];
const SECOND: [(&str, Guest); 1] = [("b", Guest::Micro)];

/// A lab, a host for it, and clients. They are dropped in this order.
struct Served {
    subscriber: Client,
    client: Client,
    host: RunningHost,
    lab: KvmLab,
}

impl Served {
    /// Serves `a` and `a2` of one libvirt, and `b` of another. With a single permit for each of them.
    fn new(host_yaml: &str) -> Self {
        let lab = KvmLab::with_two_libvirts(&FIRST, &SECOND).unwrap();
        let standby_off = "machineries: {kvm: {standby: off}}";
        lab.cwd().host_yaml(&format!("max_parallel_restores: 1\n{standby_off}\n{host_yaml}")).unwrap();
        Served::of(lab)
    }

    fn of(lab: KvmLab) -> Self {
        let host = lab.host().unwrap();
        let mut subscriber = host.client().unwrap();
        subscriber.subscribe().unwrap();
        Served { subscriber, client: host.client().unwrap(), host, lab }
    }

    #[track_caller]
    fn act(&mut self, action: &str, machine: &str) {
        let answer = self.client.act(action, machine).unwrap();
        assert_eq!(answer, json!({"success": true}), "{action} of {machine}; {}", self.host.log());
    }

    /// Restores the machine, expects that its guest runs from the snapshot on, and stops it.
    #[track_caller]
    fn run(&mut self, machine: &str) {
        self.act("restore_start", machine);
        let first = self.lab.machine(machine).first_count(SOON).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap(), "{}", self.host.log());
        self.act("stop", machine);
    }

    /// Waits until the machine has a save image, so that no preparation is under way.
    fn wait_until_prepared(&mut self, machine: &str) {
        while self.client.machine(machine).unwrap()["ready"]["mode"] != "instant" {
            self.subscriber.wait_for_event("ready", machine).unwrap();
        }
    }

    /// Runs `b` three times, and expects that nothing delays it.
    #[track_caller]
    fn run_b_without_wait(&mut self, when: &str) {
        for _ in 0..3 {
            let begun = Instant::now();
            self.run("b");
            println!("a run of b {when}: {:?}", begun.elapsed());
            assert!(begun.elapsed() < WITHOUT_WAIT, "{:?}; {}", begun.elapsed(), self.host.log());
        }
        assert_eq!(self.client.machine("b").unwrap()["errors"], json!([]));
    }

    fn state(&mut self, machine: &str) -> Value {
        self.client.machine(machine).unwrap()["state"].take()
    }

    #[track_caller]
    fn finish(mut self) {
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        self.lab.assert_clean();
    }
}

#[test]
fn domains_of_one_name_are_two_machines_when_their_libvirts_differ() {
    let mut served = Served::new("");
    let checked = served.lab.run(&["-v", "check"]).unwrap();
    assert_eq!(checked.code, Some(0), "{}", checked.stdout);
    for libvirtd in [served.lab.libvirtd(), served.lab.other_libvirtd()] {
        assert!(checked.stdout.contains(&format!(" at {}", libvirtd.dsn())), "{}", checked.stdout);
    }
    for machine in ["a", "b", "a2"] {
        served.run(machine);
    }
    for machine in ["a", "b"] {
        served.act("restore_start", machine);
    }
    let is_on = |libvirtd: &machinery_testkit::libvirt::Libvirtd| {
        libvirtd.virsh(&["list", "--name"]).unwrap().contains("lab-a")
    };
    assert!(is_on(served.lab.libvirtd()) && is_on(served.lab.other_libvirtd()));
    served.act("stop", "a");
    assert!(!is_on(served.lab.libvirtd()) && is_on(served.lab.other_libvirtd()));
    assert_eq!((served.state("a"), served.state("b")), (json!("poweroff"), json!("running")));
    served.act("stop", "b");
    let same = served.lab.other_libvirtd().dsn();
    served.lab.change_yaml(&format!("    dsn: {same}\n"), "").unwrap();
    let refused = served.lab.run(&["check"]).unwrap();
    assert!(refused.stdout.contains("'lab-a' is already the label of machine 'a'"), "{}", refused.stdout);
    served.finish();
}

#[test]
fn libvirtd_that_is_killed_costs_its_own_machines_and_they_heal_when_it_is_back() {
    let mut served = Served::new("");
    served.act("restore_start", "a");
    served.run_b_without_wait("before");
    served.lab.libvirtd().kill_daemon().unwrap();
    let reason = served.subscriber.wait_for_state("a", "error").unwrap();
    assert!(reason.contains("libvirtd has ended"), "{reason}");
    // It waits for its libvirt, with a permit.
    let mut waiting = served.host.client().unwrap();
    waiting.send(&json!({"action": "restore_start", "machine": "a2"})).unwrap();
    served.run_b_without_wait("while the other libvirt is away");
    assert_eq!(waiting.next_message().unwrap()["success"], false);
    served.subscriber.wait_for_event("quarantined", "a2").unwrap();
    served.lab.libvirtd().start_daemon().unwrap();
    served.subscriber.wait_for_state("a", "running").unwrap();
    served.subscriber.wait_for_event("healed", "a2").unwrap();
    served.act("stop", "a");
    for machine in ["a", "a2", "b"] {
        served.run(machine);
    }
    served.finish();
}

/// libvirtd hangs in the middle of a restore, which keeps its permit until its timeout.
#[test]
fn libvirtd_that_hangs_costs_its_own_machines_and_they_heal_when_it_goes_on() {
    let mut served = Served::new("timeouts: {state: 5, restore_start: 12, stop: 6}");
    served.run("a2");
    served.wait_until_prepared("a2");
    let watch = FileWatch::new(served.lab.machine("a2").disk.parent().unwrap()).unwrap();
    let mut waiting = served.host.client().unwrap();
    waiting.send(&json!({"action": "restore_start", "machine": "a2"})).unwrap();
    watch.wait(&[FileEvent::Opened("disk.qcow2")], SOON).unwrap();
    served.lab.libvirtd().signal_daemon(Signal::STOP).unwrap();
    served.run_b_without_wait("while the other libvirt hangs");
    assert_eq!(waiting.next_message().unwrap()["success"], false);
    served.subscriber.wait_for_event("quarantined", "a2").unwrap();
    served.run_b_without_wait("while the other libvirt hangs");
    served.lab.libvirtd().signal_daemon(Signal::CONT).unwrap();
    served.subscriber.wait_for_event("healed", "a2").unwrap();
    for machine in ["a", "a2", "b"] {
        served.run(machine);
    }
    served.finish();
}

#[test]
fn host_starts_when_one_of_its_libvirts_is_away_and_has_its_machines_later() {
    let lab = KvmLab::with_two_libvirts(&FIRST, &SECOND).unwrap();
    lab.other_libvirtd().kill_daemon().unwrap();
    let mut served = Served::of(lab);
    assert_eq!((served.state("a"), served.state("b")), (json!("poweroff"), json!("error")));
    served.run("a");
    served.lab.other_libvirtd().start_daemon().unwrap();
    served.subscriber.wait_for_state("b", "poweroff").unwrap();
    served.run("b");
    served.finish();
}

#[test]
fn host_does_not_start_when_all_of_its_libvirts_are_away() {
    let lab = KvmLab::with_two_libvirts(&FIRST, &SECOND).unwrap();
    for libvirtd in [lab.libvirtd(), lab.other_libvirtd()] {
        libvirtd.kill_daemon().unwrap();
    }
    let refused = lab.run(&["serve"]).unwrap();
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    for libvirtd in [lab.libvirtd(), lab.other_libvirtd()] {
        assert!(refused.stderr.contains(&libvirtd.dsn()), "{}", refused.stderr);
    }
}

#[test]
fn reload_moves_a_machine_to_another_libvirt() {
    let mut served = Served::new("");
    served.run("a");
    let (first, other) = (served.lab.libvirtd().dsn(), served.lab.other_libvirtd().dsn());
    // The machinery and `b` swap their dsn, so `a` and `a2` have domains of the second libvirt.
    served.lab.change_yaml(&format!("dsn: {first}\n"), &format!("dsn: {other}\n")).unwrap();
    served.lab.change_yaml(&format!("    dsn: {other}\n"), &format!("    dsn: {first}\n")).unwrap();
    let answer = served.client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(answer["success"], true, "{answer}");
    served.act("restore_start", "a");
    let moved = served.lab.machine("b").first_count(SOON).unwrap();
    assert_eq!(moved, served.lab.restored_count().unwrap(), "the domain of `b` is that of `a` now");
    served.act("stop", "a");
    let reason = served.client.machine("a2").unwrap()["disabled_reason"].take();
    assert!(reason.as_str().unwrap().contains("no domain 'lab-a2'"), "{reason}");
    served.finish();
}
