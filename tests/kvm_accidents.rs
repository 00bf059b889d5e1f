//! What goes wrong with real domains: QEMUs that die, guests that go off or run out of disk, a
//! libvirtd that dies, hangs or is away, hosts that die.
//!
//! Whatever it is, nothing hangs, it is told, and the machine restores again afterwards.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{FileEvent, FileWatch, KvmLab};
use machinery_testkit::libvirt::SNAPSHOT;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest) = ("m", Guest::Micro);

fn good() -> Value {
    json!({"success": true})
}

/// A lab with the micro guest, a host for it, a subscriber and a client; dropped in this order.
struct Scene {
    subscriber: Client,
    client: Client,
    host: RunningHost,
    lab: KvmLab,
}

impl Scene {
    fn new() -> Scene {
        Scene::of(KvmLab::new(&[MICRO]).unwrap())
    }

    fn of(lab: KvmLab) -> Scene {
        let host = lab.host().unwrap();
        let mut subscriber = host.client().unwrap();
        subscriber.subscribe().unwrap();
        Scene { subscriber, client: host.client().unwrap(), host, lab }
    }

    #[track_caller]
    fn does(&mut self, action: &str) {
        assert_eq!(self.client.act(action, "m").unwrap(), good(), "{action}; {}", self.host.log());
    }

    /// Why its action fails.
    #[track_caller]
    fn fails(&mut self, action: &str) -> String {
        let answer = self.client.act(action, "m").unwrap();
        assert_eq!(answer["success"], false, "{answer}");
        answer["reason"].as_str().unwrap().to_owned()
    }

    /// Waits until the subscriber hears that the machine is in that state, and gives the reason.
    fn hears(&mut self, state: &str) -> String {
        self.subscriber.wait_for_state("m", state).unwrap()
    }

    fn state(&mut self) -> Value {
        self.client.act("state", "m").unwrap()["state"].take()
    }

    /// The machine is as good as new.
    #[track_caller]
    fn restores(&mut self) {
        self.does("enable_machine");
        self.does("restore_start");
        let first = self.lab.machine("m").first_count(SOON).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap());
        self.does("stop");
        self.lab.assert_clean();
    }

    /// In good order, with everything stopped.
    #[track_caller]
    fn ends_well(mut self) {
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        self.lab.assert_clean();
    }
}

fn kill(process: Pid) {
    kill_process(process, Signal::KILL).unwrap();
}

#[test]
fn a_qemu_that_dies_is_told_at_once() {
    let mut scene = Scene::new();
    for _ in 0..3 {
        scene.does("restore_start");
        scene.hears("running");
        let begun = Instant::now();
        kill(scene.lab.qemu_of("m").unwrap());
        let reason = scene.hears("poweroff");
        println!("killed, and heard {:?} later: {reason}", begun.elapsed());
        assert!(reason.contains("its QEMU ended"), "{reason}");
        assert_eq!(scene.state(), "poweroff");
        scene.lab.assert_clean();
    }
    scene.restores();
    scene.ends_well();
}

/// libvirt tells at once that the guest goes off, and a little later that nothing is left of it.
#[test]
fn a_guest_that_powers_itself_off_is_told_at_once() {
    let mut scene = Scene::new();
    scene.does("restore_start");
    scene.hears("running");
    let begun = Instant::now();
    scene.lab.libvirtd().virsh(&["shutdown", "lab-m"]).unwrap();
    let goes = scene.hears("stopping");
    println!("its button was pressed, and {:?} later: {goes}", begun.elapsed());
    assert!(goes.contains("the guest powers itself off"), "{goes}");
    let gone = scene.hears("poweroff");
    println!("{:?}: {gone}", begun.elapsed());
    assert!(gone.contains("the guest powered itself off"), "{gone}");
    scene.lab.assert_clean();
    scene.restores();
    scene.ends_well();
}

#[test]
fn a_guest_that_somebody_pauses_is_in_trouble_until_it_is_resumed() {
    let mut scene = Scene::new();
    scene.does("restore_start");
    scene.lab.libvirtd().virsh(&["suspend", "lab-m"]).unwrap();
    scene.hears("paused");
    assert_eq!(scene.state(), "error");
    let reason = scene.hears("error");
    assert!(reason.contains("paused by somebody else"), "{reason}");
    scene.lab.libvirtd().virsh(&["resume", "lab-m"]).unwrap();
    scene.hears("running");
    assert_eq!(scene.state(), "running");
    // One that was left paused is stopped before its next start, like any that runs.
    scene.lab.libvirtd().virsh(&["suspend", "lab-m"]).unwrap();
    scene.hears("paused");
    scene.restores();
    scene.ends_well();
}

/// The domain's disk is on a file system on which there is hardly any space.
#[test]
fn a_guest_whose_disk_is_full_is_told_with_the_disk_and_the_reason() {
    let guest = Guest::Linux { ram_mib: 256, noise_mib: 64 };
    let lab = KvmLab::new(&[("m", guest)]).unwrap();
    let disk = lab.machine("m").disk.clone();
    let tiny = lab.cwd().root().join("tiny");
    fs::create_dir(&tiny).unwrap();
    let (disk, tiny) = (disk.to_str().unwrap(), tiny.to_str().unwrap());
    let kib = fs::metadata(disk).unwrap().len() / 1024 + 4096;
    let size = format!("size={kib}k");
    lab.libvirtd().inside(&["mount", "-t", "tmpfs", "-o", &size, "tmpfs", tiny]).unwrap();
    let copy = format!("{tiny}/disk.qcow2");
    lab.libvirtd().inside(&["cp", disk, &copy]).unwrap();
    lab.libvirtd().inside(&["mount", "--bind", &copy, disk]).unwrap();
    let mut scene = Scene::of(lab);
    scene.does("restore_start");
    scene.lab.machine("m").fill_disk(60);
    let reason = scene.hears("error");
    println!("{reason}");
    assert!(reason.contains(disk) && reason.contains("no space"), "{reason}");
    assert_eq!(scene.state(), "error");
    scene.does("stop");
    scene.does("restore_start");
    assert_eq!(scene.lab.machine("m").marks(SOON).unwrap().ram, "snapshot");
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn libvirtd_may_be_restarted_between_actions() {
    let mut scene = Scene::new();
    for _ in 0..3 {
        scene.does("restore_start");
        scene.hears("running");
        scene.lab.libvirtd().kill_daemon().unwrap();
        let reason = scene.hears("error");
        assert!(reason.contains("is lost: libvirtd has ended"), "{reason}");
        scene.lab.libvirtd().start_daemon().unwrap();
        scene.hears("running");
        // It is heard again, too.
        scene.lab.libvirtd().virsh(&["shutdown", "lab-m"]).unwrap();
        scene.hears("poweroff");
        // While no machine runs, nobody need hear of it.
        scene.lab.libvirtd().kill_daemon().unwrap();
        scene.lab.libvirtd().start_daemon().unwrap();
    }
    scene.restores();
    scene.ends_well();
}

#[test]
fn an_action_waits_for_a_libvirtd_that_is_being_restarted() {
    let mut scene = Scene::new();
    for action in ["restore_start", "stop"] {
        scene.lab.libvirtd().kill_daemon().unwrap();
        scene.client.send(&json!({"action": action, "machine": "m"})).unwrap();
        scene.lab.libvirtd().start_daemon().unwrap();
        assert_eq!(scene.client.next_message().unwrap(), good(), "{action}; {}", scene.host.log());
    }
    scene.restores();
    scene.ends_well();
}

/// At whatever moment of a restore libvirtd dies, the action fails with a reason or is done, and the
/// machine restores again.
#[test]
fn libvirtd_may_die_in_the_middle_of_a_restore() {
    let mut scene = Scene::new();
    let mut failed = 0;
    for delay in [0, 30, 60, 100, 150, 200] {
        let watch = FileWatch::new(scene.lab.machine("m").disk.parent().unwrap()).unwrap();
        scene.client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
        watch.wait(&[FileEvent::Opened("disk.qcow2")], SOON).unwrap();
        // Not a wait for something: the moments are to differ.
        thread::sleep(Duration::from_millis(delay));
        scene.lab.libvirtd().kill_daemon().unwrap();
        scene.lab.libvirtd().start_daemon().unwrap();
        let answer = scene.client.next_message().unwrap();
        println!("after {delay} ms: {answer}");
        if answer["success"] == false {
            failed += 1;
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains("restore_start of machine 'm' failed: "), "{reason}");
            assert!(reason.contains("libvirtd has gone away"), "{reason}");
        }
        scene.restores();
    }
    assert!(failed > 0, "libvirtd never died in the middle");
    scene.ends_well();
}

#[test]
fn a_guest_that_ends_while_libvirtd_is_away_is_told_when_it_is_back() {
    let mut scene = Scene::new();
    scene.does("restore_start");
    scene.hears("running");
    scene.lab.libvirtd().kill_daemon().unwrap();
    scene.hears("error");
    kill(scene.lab.qemu_of("m").unwrap());
    scene.lab.libvirtd().start_daemon().unwrap();
    let reason = scene.hears("poweroff");
    println!("{reason}");
    scene.restores();
    scene.ends_well();
}

#[test]
fn a_libvirtd_that_stays_away_is_told_with_what_to_do() {
    let mut scene = Scene::new();
    scene.lab.libvirtd().kill_daemon().unwrap();
    let reason = scene.fails("restore_start");
    println!("{reason}");
    for words in ["the connection to libvirt at qemu:///system", "is lost", "Start libvirtd"] {
        assert!(reason.contains(words), "no {words:?} in {reason}");
    }
    scene.lab.libvirtd().start_daemon().unwrap();
    scene.restores();
    // Without one a host does not even start.
    scene.lab.libvirtd().kill_daemon().unwrap();
    assert_eq!(scene.host.terminate().unwrap().code(), Some(0), "{}", scene.host.log());
    let ran = scene.lab.run(&["serve"]).unwrap();
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(
        ran.stderr.contains("cannot connect to libvirt") && ran.stderr.contains("Start libvirtd"),
        "{}",
        ran.stderr
    );
    scene.lab.assert_clean();
}

#[test]
fn a_libvirtd_that_hangs_costs_the_action_its_time_and_no_more() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml("timeouts: {screenshot: 1}\n").unwrap();
    let mut scene = Scene::of(lab);
    scene.does("restore_start");
    scene.lab.libvirtd().signal_daemon(Signal::STOP).unwrap();
    let path = scene.lab.cwd().root().join("shot.png");
    let begun = Instant::now();
    let request = json!({"action": "screenshot", "machine": "m", "path": path});
    let answer = scene.client.ask(request).unwrap();
    let (took, reason) = (begun.elapsed(), answer["reason"].as_str().unwrap());
    println!("{took:?}: {reason}");
    assert!(reason.contains("waited 1.0 s for libvirt"), "{reason}");
    scene.lab.libvirtd().signal_daemon(Signal::CONT).unwrap();
    scene.does("stop");
    assert!(!path.exists());
    scene.restores();
    scene.ends_well();
}

/// A run that a killed host has left is ended; what an operator has started is not, until the machine
/// is wanted.
#[test]
fn a_host_that_dies_leaves_a_run_that_the_next_one_ends() {
    let mut scene = Scene::new();
    scene.does("restore_start");
    let qemu = scene.lab.qemu_of("m").unwrap();
    scene.host.kill().unwrap();
    assert_eq!(scene.lab.qemu_of("m").unwrap(), qemu, "it outlives the host");
    let mut scene = Scene::of(scene.lab);
    scene.lab.assert_clean();
    assert_eq!(scene.state(), "poweroff");
    assert!(
        scene.host.log().contains("a run that an earlier host has left is stopped"),
        "{}",
        scene.host.log()
    );
    scene.restores();
    assert_eq!(scene.host.terminate().unwrap().code(), Some(0));

    let lab = scene.lab;
    lab.libvirtd().virsh(&["snapshot-revert", "lab-m", SNAPSHOT]).unwrap();
    let theirs = lab.qemu_of("m").unwrap();
    let mut scene = Scene::of(lab);
    assert_eq!(scene.lab.qemu_of("m").unwrap(), theirs, "somebody else's run is left alone");
    assert_eq!(scene.state(), "running");
    scene.restores();
    scene.ends_well();
}

/// libvirtd carries on with a restore that nobody waits for any more.
#[test]
fn a_host_that_dies_in_the_middle_of_a_restore_leaves_nothing_that_the_next_one_does_not_end() {
    let mut scene = Scene::of(KvmLab::new(&[("m", Guest::Linux { ram_mib: 256, noise_mib: 64 })]).unwrap());
    for _ in 0..3 {
        let watch = FileWatch::new(scene.lab.machine("m").disk.parent().unwrap()).unwrap();
        scene.client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
        // The guest's serial port is made by its QEMU.
        watch.wait(&[FileEvent::Opened("serial.log")], SOON).unwrap();
        scene.host.kill().unwrap();
        scene = Scene::of(scene.lab);
        assert_eq!(scene.state(), "poweroff");
        scene.lab.assert_clean();
    }
    scene.does("restore_start");
    assert_eq!(scene.lab.machine("m").marks(SOON).unwrap().ram, "snapshot");
    scene.does("stop");
    scene.ends_well();
}
