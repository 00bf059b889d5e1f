//! Restores that are prepared. Domains that stand by: restored without being loaded, always at the
//! snapshot, never when anything has happened to them; to the outside they are off, and they are gone
//! when they ought to be. And save images, which are as good as the snapshot or not used.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
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
const LINUX: Guest = Guest::Linux { ram_mib: 256, noise_mib: 64 };
const ON: &str = "machineries: {kvm: {standby: on}}\n";

fn good() -> Value {
    json!({"success": true})
}

/// A lab with the machine `m`, a host for it, a subscriber and a client; dropped in this order.
struct Scene {
    subscriber: Client,
    client: Client,
    host: RunningHost,
    lab: KvmLab,
}

impl Scene {
    /// With the micro guest, which stands by.
    fn new() -> Scene {
        let mut scene = Scene::with(&[MICRO], ON);
        scene.stands_by();
        scene
    }

    fn with(machines: &[(&str, Guest)], section: &str) -> Scene {
        let lab = KvmLab::new(machines).unwrap();
        lab.cwd().host_yaml(section).unwrap();
        Scene::of(lab)
    }

    fn of(lab: KvmLab) -> Scene {
        let host = lab.host().unwrap();
        let mut subscriber = host.client().unwrap();
        subscriber.subscribe().unwrap();
        Scene { subscriber, client: host.client().unwrap(), host, lab }
    }

    /// What the subscriber has not heard by now, it does not hear any more.
    fn listens_anew(&mut self) {
        self.subscriber = self.host.client().unwrap();
        self.subscriber.subscribe().unwrap();
    }

    #[track_caller]
    fn does(&mut self, action: &str) {
        assert_eq!(self.client.act(action, "m").unwrap(), good(), "{action}; {}", self.host.log());
    }

    /// Why its action fails.
    #[track_caller]
    fn fails(&mut self, request: Value) -> String {
        let answer = self.client.ask(request).unwrap();
        assert_eq!(answer["success"], false, "{answer}");
        answer["reason"].as_str().unwrap().to_owned()
    }

    fn ready(&mut self) -> Value {
        self.client.machine("m").unwrap()["ready"].take()
    }

    fn state(&mut self) -> Value {
        self.client.act("state", "m").unwrap()["state"].take()
    }

    /// Waits until it stands by, which the subscriber need not have heard: a host is soon ready.
    fn stands_by(&mut self) -> Value {
        if self.ready()["mode"] == "standby" {
            return self.ready();
        }
        self.hears("standby")
    }

    /// Waits until the subscriber hears that the machine is ready in that way.
    fn hears(&mut self, how: &str) -> Value {
        loop {
            let heard = self.subscriber.wait_for_event("ready", "m");
            let ready = heard.unwrap_or_else(|error| panic!("{how}: {error}; {}", self.host.log()));
            if ready["mode"] == how {
                return ready;
            }
        }
    }

    fn qemu(&self) -> Pid {
        self.lab.qemu_of("m").unwrap()
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        self.lab.libvirtd().virsh(arguments).unwrap()
    }

    /// The machine is restored, at the snapshot, and runs.
    #[track_caller]
    fn restores(&mut self) {
        self.does("restore_start");
        let first = self.lab.machine("m").first_count(SOON).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap());
        self.lab.machine("m").wait_for_next_count(SOON).unwrap();
    }

    /// In good order, with nothing left.
    #[track_caller]
    fn ends_well(mut self) {
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        self.lab.assert_clean();
    }
}

/// What the subscriber has heard of states since it was last asked, up to an answer that it asks for
/// itself.
fn states_heard(client: &mut Client) -> Vec<Value> {
    client.send(&json!({"action": "state", "machine": "m", "id": "mark"})).unwrap();
    let mut states = Vec::new();
    loop {
        let message = client.next_message().unwrap();
        if message["id"] == "mark" {
            return states;
        }
        if message["event"] == "state" {
            states.push(message);
        }
    }
}

#[test]
fn what_stands_by_is_what_is_restored_and_always_at_the_snapshot() {
    let mut scene = Scene::new();
    for round in 0..10 {
        let stood_by = scene.qemu();
        let begun = Instant::now();
        scene.restores();
        println!("round {round}: {:?} until it was heard to count on", begun.elapsed());
        assert_eq!(scene.qemu(), stood_by, "it was not what stood by that was restored");
        assert_eq!(scene.ready()["mode"], "plain");
        scene.does("stop");
        scene.hears("standby");
    }
    let log = scene.host.log();
    assert!(!log.contains("not used") && !log.contains("ERROR"), "{log}");
    scene.ends_well();
}

#[test]
fn to_the_outside_it_is_off() {
    let mut scene = Scene::with(&[MICRO], ON);
    let ready = scene.stands_by();
    assert!(ready["memory"].as_u64().unwrap() > 32 << 20, "{ready}");
    assert_eq!(ready["reason"], "");
    assert_eq!(scene.state(), "poweroff");
    assert_eq!(scene.client.machine("m").unwrap()["state"], "poweroff");
    assert_eq!(states_heard(&mut scene.subscriber), [] as [Value; 0]);
    let path = scene.lab.cwd().root().join("look");
    let checked = scene.lab.run(&["check"]).unwrap();
    assert!(checked.stdout.contains("machine 'm': it stands by"), "{}", checked.stdout);
    for action in ["dump_memory", "screenshot"] {
        let reason = scene.fails(json!({"action": action, "machine": "m", "path": path}));
        assert!(reason.contains("powered off"), "{reason}");
    }
    scene.does("acpi_stop");
    assert_eq!(scene.stands_by()["mode"], "standby");
    scene.restores();
    // That one is not about what comes from a restore.
    states_heard(&mut scene.subscriber);
    scene.does("stop");
    scene.hears("standby");
    scene.ends_well();
}

#[test]
fn a_stop_lets_go_of_it() {
    let mut scene = Scene::new();
    states_heard(&mut scene.subscriber);
    scene.does("stop");
    scene.lab.assert_clean();
    let ready = scene.ready();
    assert!(ready["mode"] == "plain" && ready["memory"] == 0, "{ready}");
    assert_eq!(states_heard(&mut scene.subscriber), [] as [Value; 0]);
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn a_cold_start_is_one() {
    let mut scene = Scene::new();
    for _ in 0..2 {
        let stood_by = scene.qemu();
        scene.does("norestore_start");
        assert_eq!(scene.lab.machine("m").first_count(SOON).unwrap(), 1);
        assert_ne!(scene.qemu(), stood_by);
        scene.does("stop");
        scene.hears("standby");
    }
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn one_that_is_killed_is_replaced() {
    let mut scene = Scene::new();
    let stood_by = scene.qemu();
    states_heard(&mut scene.subscriber);
    kill_process(stood_by, Signal::KILL).unwrap();
    let plain = scene.hears("plain");
    println!("{plain}");
    scene.hears("standby");
    assert_ne!(scene.qemu(), stood_by);
    assert_eq!(states_heard(&mut scene.subscriber), [] as [Value; 0]);
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

/// A guest that somebody lets run has left its snapshot.
#[test]
fn one_that_somebody_resumes_is_never_given_to_a_task() {
    let mut scene = Scene::new();
    let stood_by = scene.qemu();
    states_heard(&mut scene.subscriber);
    scene.virsh(&["resume", "lab-m"]);
    scene.hears("plain");
    scene.hears("standby");
    assert_ne!(scene.qemu(), stood_by);
    assert_eq!(states_heard(&mut scene.subscriber), [] as [Value; 0]);
    // Nor is it at the very moment, whoever is first.
    for together in [false, true] {
        if together {
            scene.client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
            // It fails where the restore was first.
            let _ = scene.lab.libvirtd().virsh(&["resume", "lab-m"]);
            assert_eq!(scene.client.next_message().unwrap(), good(), "{}", scene.host.log());
        } else {
            scene.virsh(&["resume", "lab-m"]);
            scene.does("restore_start");
        }
        let first = scene.lab.machine("m").first_count(SOON).unwrap();
        assert_eq!(first, scene.lab.restored_count().unwrap());
        scene.does("stop");
        scene.hears("standby");
    }
    scene.ends_well();
}

#[test]
fn one_that_was_out_of_sight_is_replaced() {
    let mut scene = Scene::new();
    for _ in 0..2 {
        let stood_by = scene.qemu();
        scene.lab.libvirtd().kill_daemon().unwrap();
        scene.hears("plain");
        assert_eq!(scene.state(), "poweroff");
        scene.lab.libvirtd().start_daemon().unwrap();
        scene.hears("standby");
        assert_ne!(scene.qemu(), stood_by);
        scene.restores();
        scene.does("stop");
        scene.hears("standby");
    }
    // A restore that comes meanwhile waits, and does not take it either.
    let stood_by = scene.qemu();
    scene.lab.libvirtd().kill_daemon().unwrap();
    scene.client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    scene.lab.libvirtd().start_daemon().unwrap();
    assert_eq!(scene.client.next_message().unwrap(), good(), "{}", scene.host.log());
    assert_ne!(scene.qemu(), stood_by);
    assert_eq!(scene.lab.machine("m").first_count(SOON).unwrap(), scene.lab.restored_count().unwrap());
    scene.does("stop");
    scene.ends_well();
}

/// Nothing tells that a snapshot is another one now, so a restore looks.
#[test]
fn the_snapshot_of_now_is_restored() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml(ON).unwrap();
    let mut scene = Scene::of(lab);
    scene.stands_by();
    scene.does("stop");
    // One of the same name, of another moment; and what stands by of the old one meanwhile.
    scene.virsh(&["snapshot-revert", "lab-m", SNAPSHOT]);
    let later = scene.lab.restored_count().unwrap() + 20;
    scene.lab.machine("m").wait_for_count(later, SOON).unwrap();
    scene.virsh(&["snapshot-create-as", "lab-m", "other"]);
    scene.virsh(&["destroy", "lab-m"]);
    scene.virsh(&["snapshot-current", "lab-m", "--snapshotname", SNAPSHOT]);
    scene.does("restore_start");
    // The end of the run by hand has been reason enough to prepare it.
    scene.listens_anew();
    scene.does("stop");
    scene.hears("standby");
    let old = scene.qemu();
    scene.virsh(&["snapshot-delete", "lab-m", SNAPSHOT]);
    let other = scene.virsh(&["snapshot-dumpxml", "--security-info", "lab-m", "other"]);
    scene.virsh(&["snapshot-delete", "lab-m", "other", "--metadata"]);
    scene
        .lab
        .libvirtd()
        .virsh_with_file(&["snapshot-create", "lab-m"], &other, &["--redefine", "--current"])
        .unwrap();
    scene.does("restore_start");
    assert_ne!(scene.qemu(), old);
    assert!(scene.lab.machine("m").first_count(SOON).unwrap() > later - 1, "it was the old one");
    assert!(scene.host.log().contains("what stands by is not used"), "{}", scene.host.log());
    scene.listens_anew();
    scene.does("stop");
    scene.hears("standby");
    scene.does("restore_start");
    assert!(scene.lab.machine("m").first_count(SOON).unwrap() > later - 1, "it was the old one");
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn a_host_that_dies_leaves_what_the_next_one_ends() {
    let mut scene = Scene::new();
    let left = scene.qemu();
    scene.host.kill().unwrap();
    assert_eq!(scene.lab.qemu_of("m").unwrap(), left, "it outlives the host");
    // The next one has it off.
    scene.lab.cwd().host_yaml("machineries: {kvm: {standby: off}}\n").unwrap();
    let mut scene = Scene::of(scene.lab);
    scene.lab.assert_clean();
    assert_eq!(scene.state(), "poweroff");
    scene.does("prepare");
    let ready = scene.ready();
    assert!(ready["reason"].as_str().unwrap().starts_with("standby is off"), "{ready}");
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn all_are_gone_when_the_host_ends() {
    let machines = ["m", "n", "o", "p", "q", "r"].map(|name| (name, Guest::Micro));
    let mut scene = Scene::with(&machines, ON);
    for (name, _) in machines {
        assert_eq!(scene.client.act("prepare", name).unwrap(), good());
        assert_eq!(scene.client.machine(name).unwrap()["ready"]["mode"], "standby", "{name}");
    }
    // One runs, the others stand by.
    scene.does("restore_start");
    scene.ends_well();
}

#[test]
fn without_memory_for_it_there_is_none_and_it_is_told_why() {
    let section =
        "machineries: {kvm: {standby: on, standby_memory: 40 MiB, machines: {n: {standby: off}}}}\n";
    let machines = [MICRO, ("n", Guest::Micro), ("big", LINUX)];
    let mut scene = Scene::with(&machines, section);
    for (name, words) in [("n", "standby is off"), ("big", "256 MiB of memory")] {
        assert_eq!(scene.client.act("prepare", name).unwrap(), good());
        let ready = scene.client.machine(name).unwrap()["ready"].take();
        assert_eq!(ready["mode"], "plain");
        assert!(ready["reason"].as_str().unwrap().contains(words), "{ready}");
    }
    scene.stands_by();
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn auto_is_off_and_says_what_to_do() {
    let mut scene = Scene::with(&[MICRO], "");
    scene.does("prepare");
    let ready = scene.ready();
    assert!(ready["mode"] == "plain" && ready["reason"].as_str().unwrap().contains("standby: on"), "{ready}");
    scene.lab.assert_clean();
    scene.ends_well();
}

/// It ends at once, and so does what it was loading.
#[test]
fn a_preparation_gives_way() {
    let mut scene = Scene::with(&[("m", LINUX)], ON);
    scene.stands_by();
    scene.does("stop");
    for action in ["stop", "norestore_start"] {
        let watch = FileWatch::new(scene.lab.machine("m").disk.parent().unwrap()).unwrap();
        scene.client.send(&json!({"action": "prepare", "machine": "m", "id": 1})).unwrap();
        // The guest's serial port is made by its QEMU.
        watch.wait(&[FileEvent::Opened("serial.log")], SOON).unwrap();
        scene.client.send(&json!({"action": action, "machine": "m", "id": 2})).unwrap();
        let mut answers = [scene.client.next_message().unwrap(), scene.client.next_message().unwrap()];
        answers.sort_by_key(|answer| answer["id"].as_u64());
        println!("{answers:?}");
        assert_eq!(answers[0]["success"], false);
        assert_eq!(answers[1]["success"], true, "{}", scene.host.log());
        assert_eq!(scene.client.machine("m").unwrap()["disabled"], false);
        if action == "stop" {
            scene.lab.assert_clean();
        } else {
            scene.does("stop");
            scene.hears("standby");
            scene.does("stop");
        }
    }
    let watch = FileWatch::new(scene.lab.machine("m").disk.parent().unwrap()).unwrap();
    scene.client.send(&json!({"action": "prepare", "machine": "m"})).unwrap();
    watch.wait(&[FileEvent::Opened("serial.log")], SOON).unwrap();
    scene.ends_well();
}

const IMAGES: &str = "machineries: {kvm: {save_images: on}}\n";

impl Scene {
    /// With the micro guest, which has a save image.
    fn with_image() -> Scene {
        let mut scene = Scene::with(&[MICRO], IMAGES);
        scene.has_image();
        scene
    }

    /// Waits until there is an image for its next restore.
    fn has_image(&mut self) -> Value {
        self.does("prepare");
        let ready = self.ready();
        assert_eq!(ready["mode"], "instant", "{ready}; {}", self.host.log());
        ready
    }

    /// How often it was restored from an image, and how often by a revert.
    fn restored(&self) -> (usize, usize) {
        let log = self.host.log();
        let of = |step: &str| {
            let done = log.lines().filter(|line| line.contains("action=\"restore_start\""));
            done.filter(|line| line.contains(step)).count()
        };
        (of("load "), of("revert "))
    }

    fn qemu_io(&self, command: &str) -> String {
        let mut io = Command::new("qemu-io");
        let ran = io.args(["-f", "qcow2", "-c", command]).arg(&self.lab.machine("m").disk).output().unwrap();
        String::from_utf8_lossy(&ran.stdout).into_owned()
    }

    fn image(&self) -> PathBuf {
        let mut found = Vec::new();
        files_below(self.lab.cwd().root(), &mut found);
        found.retain(|path| path.ends_with("m.machinery-image"));
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            files_below(&entry.path(), found);
        } else {
            found.push(entry.path());
        }
    }
}

#[test]
fn an_image_is_restored_at_the_snapshot_with_the_disk_of_the_snapshot() {
    let mut scene = Scene::with_image();
    let ready = scene.ready();
    assert!(ready["disk"].as_u64() > Some(0) && ready["memory"] == 0, "{ready}");
    scene.lab.assert_clean();
    for _ in 0..5 {
        // As if the run before had written it.
        scene.qemu_io("write -P 0x5a 64k 512");
        scene.restores();
        scene.does("stop");
        let said = scene.qemu_io("read -P 0x5a 64k 512");
        assert!(said.contains("Pattern verification failed"), "the run had another's disk: {said}");
    }
    assert_eq!(scene.restored(), (5, 0), "{}", scene.host.log());
    // A cold start is one, and does not spoil it.
    scene.does("norestore_start");
    assert_eq!(scene.lab.machine("m").first_count(SOON).unwrap(), 1);
    scene.does("stop");
    scene.restores();
    scene.does("stop");
    assert_eq!(scene.restored(), (6, 0), "{}", scene.host.log());
    // Nor does an operator who looks what is there.
    scene.virsh(&["snapshot-revert", "lab-m", SNAPSHOT, "--running"]);
    scene.lab.machine("m").wait_for_next_count(SOON).unwrap();
    scene.virsh(&["destroy", "lab-m"]);
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn what_a_linux_guest_writes_is_gone_with_an_image() {
    let mut scene = Scene::with(&[("m", LINUX)], IMAGES);
    scene.has_image();
    for _ in 0..3 {
        scene.does("restore_start");
        let marks = scene.lab.machine("m").marks(SOON).unwrap();
        assert_eq!((marks.ram.as_str(), marks.disk.as_str()), ("snapshot", "snapshot"));
        scene.lab.machine("m").mark("spoilt1", "spoilt2", SOON).unwrap();
        scene.does("stop");
    }
    assert_eq!(scene.restored(), (3, 0), "{}", scene.host.log());
    scene.ends_well();
}

/// It outlives the host, and is made anew when it is of something that is no more.
#[test]
fn an_image_is_of_the_snapshot_and_the_domain_of_now() {
    let mut scene = Scene::with_image();
    let made = fs::metadata(scene.image()).unwrap().modified().unwrap();
    assert_eq!(scene.host.terminate().unwrap().code(), Some(0));
    let mut scene = Scene::of(scene.lab);
    scene.has_image();
    assert_eq!(fs::metadata(scene.image()).unwrap().modified().unwrap(), made);
    // Another snapshot, of the same name.
    scene.does("restore_start");
    let later = scene.lab.restored_count().unwrap() + 20;
    scene.lab.machine("m").wait_for_count(later, SOON).unwrap();
    scene.virsh(&["snapshot-delete", "lab-m", SNAPSHOT]);
    scene.virsh(&["snapshot-create-as", "lab-m", SNAPSHOT]);
    scene.does("stop");
    for _ in 0..2 {
        scene.does("restore_start");
        assert!(scene.lab.machine("m").first_count(SOON).unwrap() >= later, "it was the old one");
        scene.does("stop");
        scene.has_image();
    }
    assert_ne!(fs::metadata(scene.image()).unwrap().modified().unwrap(), made);
    // Another description of the domain.
    let before = scene.restored();
    let xml = scene.virsh(&["dumpxml", "--inactive", "--security-info", "lab-m"]);
    let changed = xml.replace("</name>", "</name><description>another</description>");
    scene.lab.libvirtd().virsh_with_file(&["define"], &changed, &[]).unwrap();
    scene.does("restore_start");
    assert_eq!(scene.restored(), (before.0, before.1 + 1), "{}", scene.host.log());
    scene.does("stop");
    scene.has_image();
    scene.ends_well();
}

#[test]
fn an_image_that_does_not_work_costs_no_restore() {
    let mut scene = Scene::with_image();
    fs::write(scene.image(), "nothing of the kind").unwrap();
    scene.restores();
    scene.does("stop");
    scene.does("prepare");
    let ready = scene.ready();
    assert!(
        ready["mode"] == "plain" && ready["reason"].as_str().unwrap().contains("image has failed"),
        "{ready}"
    );
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn a_host_that_dies_while_it_makes_an_image_leaves_what_the_next_one_ends() {
    let lab = KvmLab::new(&[("m", LINUX)]).unwrap();
    lab.cwd().host_yaml(IMAGES).unwrap();
    let watch = FileWatch::new(lab.machine("m").disk.parent().unwrap()).unwrap();
    let mut scene = Scene::of(lab);
    watch.wait(&[FileEvent::Opened("serial.log")], SOON).unwrap();
    scene.host.kill().unwrap();
    let mut scene = Scene::of(scene.lab);
    assert_eq!(scene.state(), "poweroff");
    scene.has_image();
    scene.lab.assert_clean();
    // One that is being made gives way, too.
    fs::remove_file(scene.image()).unwrap();
    let watch = FileWatch::new(scene.lab.machine("m").disk.parent().unwrap()).unwrap();
    scene.client.send(&json!({"action": "prepare", "machine": "m", "id": 1})).unwrap();
    watch.wait(&[FileEvent::Opened("serial.log")], SOON).unwrap();
    scene.does("stop");
    scene.lab.assert_clean();
    assert_eq!(scene.client.machine("m").unwrap()["disabled"], false);
    scene.ends_well();
}
