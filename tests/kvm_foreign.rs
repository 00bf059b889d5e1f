//! Actions of somebody else on a domain of the machinery: a run by hand, a managed save, a reset. Automatic
//! work destroys none of them, and the end of the host ends none of them. No task gets a guest that is not at
//! its snapshot.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::KvmLab;
use machinery_testkit::libvirt::SNAPSHOT;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest) = ("m", Guest::Micro);
const STANDBY: &str = "machineries: {kvm: {standby: on}}\n";
const IMAGES: &str = "machineries: {kvm: {save_images: on}}\n";

/// The place of an operator's work on a disk, and its content.
const WORK: &str = "-P 0x5a 64k 512";

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

fn lab(section: &str) -> KvmLab {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml(section).unwrap();
    lab
}

fn qemu_io(disk: &Path, command: &str) -> String {
    let mut io = Command::new("qemu-io");
    let ran = io.args(["-f", "qcow2", "-c", command]).arg(disk).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
}

/// Writes to the disk as a run that has just ended would.
fn writes_work(lab: &KvmLab) {
    let said = qemu_io(&lab.machine("m").disk, &format!("write {WORK}"));
    assert!(said.contains("wrote 512/512"), "{said}");
}

fn has_work(lab: &KvmLab) -> bool {
    let said = qemu_io(&lab.machine("m").disk, &format!("read {WORK}"));
    assert!(said.contains("read 512/512"), "{said}");
    !said.contains("Pattern verification failed")
}

/// Boots the domain as an operator would; returns its QEMU.
fn starts_by_hand(lab: &KvmLab) -> Pid {
    lab.libvirtd().virsh(&["start", "lab-m"]).unwrap();
    lab.machine("m").wait_for_next_count(SOON).unwrap();
    lab.qemu_of("m").unwrap()
}

/// Boots the domain as an operator would, writes to its disk, and powers the domain off.
fn works_by_hand(lab: &KvmLab) {
    starts_by_hand(lab);
    lab.libvirtd().virsh(&["destroy", "lab-m"]).unwrap();
    writes_work(lab);
}

impl Scene {
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

    fn ready(&mut self) -> Value {
        self.client.machine("m").unwrap()["ready"].take()
    }

    fn state(&mut self) -> Value {
        self.client.act("state", "m").unwrap()["state"].take()
    }

    /// Waits until the machine is ready in that way, for a reason that contains these words.
    fn is_ready(&mut self, how: &str, words: &str) {
        let is_so = |ready: &Value| {
            ready["mode"] == how && ready["reason"].as_str().is_some_and(|why| why.contains(words))
        };
        let mut ready = self.ready();
        while !is_so(&ready) {
            let heard = self.subscriber.wait_for_event("ready", "m");
            ready = heard.unwrap_or_else(|error| panic!("{how}: {error}; {ready}; {}", self.host.log()));
        }
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        self.lab.libvirtd().virsh(arguments).unwrap()
    }

    /// Restores the machine, and expects that it runs at the snapshot.
    #[track_caller]
    fn restores(&mut self) {
        self.does("restore_start");
        let first = self.lab.machine("m").first_count(SOON).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap(), "{}", self.host.log());
        self.lab.machine("m").wait_for_next_count(SOON).unwrap();
    }

    #[track_caller]
    fn terminates(&mut self) {
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
    }

    /// Ends the host, and expects a clean end without leftovers.
    #[track_caller]
    fn ends_well(mut self) {
        self.terminates();
        self.lab.assert_clean();
    }

    /// Expects that `check` finds no problem, and prints all of these words.
    #[track_caller]
    fn checks(&self, words: &[&str]) {
        let checked = self.lab.run(&["check"]).unwrap();
        assert_eq!(checked.code, Some(0), "{}", checked.stdout);
        for word in words {
            assert!(checked.stdout.contains(word), "no {word:?} in {}", checked.stdout);
        }
    }
}

#[test]
fn host_prepares_nothing_automatically_when_somebody_else_has_written_to_the_disk() {
    for (section, prepared) in [(STANDBY, "standby"), (IMAGES, "instant")] {
        let lab = lab(section);
        works_by_hand(&lab);
        let mut scene = Scene::of(lab);
        scene.is_ready("plain", "not prepared automatically");
        assert!(has_work(&scene.lab), "{section}: the start of the host has discarded it");
        assert!(scene.host.log().contains("WARN") && scene.host.log().contains("in no snapshot"));
        scene.checks(&["warning  machine 'm'", "in no snapshot", "cuckoo-machinery prepare m"]);
        // Other automatic work of the host discards nothing either.
        scene.client.ask(json!({"action": "lock", "machine": "m", "task_id": "t"})).unwrap();
        scene.does("unlock");
        scene.does("disable_machine");
        scene.does("enable_machine");
        scene.client.ask(json!({"action": "wait_idle"})).unwrap();
        assert!(has_work(&scene.lab), "{section}: it was discarded later");
        // An explicit request discards the work.
        scene.does("prepare");
        scene.is_ready(prepared, "");
        scene.restores();
        scene.does("stop");
        assert!(!has_work(&scene.lab));
        scene.is_ready(prepared, "");
        scene.ends_well();
    }
}

/// The host receives the events of the run by hand, and of its end.
#[test]
fn host_prepares_nothing_automatically_when_a_run_by_hand_has_ended() {
    let mut scene = Scene::of(lab(STANDBY));
    scene.is_ready("standby", "");
    scene.does("disable_machine");
    scene.does("stop");
    starts_by_hand(&scene.lab);
    scene.subscriber.wait_for_state("m", "running").unwrap();
    scene.virsh(&["destroy", "lab-m"]);
    scene.subscriber.wait_for_state("m", "poweroff").unwrap();
    writes_work(&scene.lab);
    scene.does("enable_machine");
    scene.is_ready("plain", "not prepared automatically");
    assert!(has_work(&scene.lab));
    scene.restores();
    scene.does("stop");
    scene.is_ready("standby", "");
    scene.ends_well();
}

/// Changes by a run of the host are nobody's work, also for the next host.
#[test]
fn host_prepares_automatically_when_its_own_run_was_the_last_to_write() {
    let guest = Guest::Linux { ram_mib: 256, noise_mib: 16 };
    let lab = KvmLab::new(&[("m", guest)]).unwrap();
    lab.cwd().host_yaml(STANDBY).unwrap();
    let mut scene = Scene::of(lab);
    scene.is_ready("standby", "");
    for end in ["stop", "acpi_stop", "terminate", "kill"] {
        scene.does("restore_start");
        scene.lab.machine("m").mark("spoilt1", "spoilt2", SOON).unwrap();
        match end {
            "terminate" => scene.terminates(),
            "kill" => drop(scene.host.kill().unwrap()),
            action => scene.does(action),
        }
        if ["terminate", "kill"].contains(&end) {
            scene = Scene::of(scene.lab);
        }
        scene.is_ready("standby", "");
        assert!(!scene.host.log().contains("not prepared automatically"), "{end}: {}", scene.host.log());
    }
    scene.ends_well();
}

/// A new snapshot is the new state of the machine, so a return to it loses nothing.
#[test]
fn host_prepares_automatically_when_the_operator_has_taken_a_new_snapshot() {
    let lab = lab(STANDBY);
    works_by_hand(&lab);
    lab.libvirtd().virsh(&["snapshot-delete", "lab-m", SNAPSHOT]).unwrap();
    starts_by_hand(&lab);
    lab.libvirtd().virsh(&["snapshot-create-as", "lab-m", "new"]).unwrap();
    lab.libvirtd().virsh(&["destroy", "lab-m"]).unwrap();
    let mut scene = Scene::of(lab);
    scene.is_ready("standby", "");
    scene.does("restore_start");
    scene.does("stop");
    scene.is_ready("standby", "");
    scene.does("stop");
    assert!(has_work(&scene.lab), "it is in the snapshot");
    scene.ends_well();
}

#[test]
fn host_leaves_a_run_by_hand_alone_when_it_ends() {
    for disabled in [false, true] {
        let mut scene = Scene::of(lab("machineries: {kvm: {save_images: off}}\n"));
        if disabled {
            scene.does("disable_machine");
        }
        let qemu = starts_by_hand(&scene.lab);
        scene.subscriber.wait_for_state("m", "running").unwrap();
        assert_eq!(scene.client.ask(json!({"action": "shutdown_all"})).unwrap(), good());
        assert_eq!(scene.state(), "running", "shutdown_all has ended it");
        scene.terminates();
        assert_eq!(scene.lab.qemu_of("m").unwrap(), qemu, "the end of the host has ended it");
        assert!(scene.host.log().contains("the host has not started it"), "{}", scene.host.log());
        // The next host finds the domain running, and leaves it alone as well.
        let mut scene = Scene::of(scene.lab);
        assert_eq!(scene.state(), "running");
        scene.terminates();
        assert_eq!(scene.lab.qemu_of("m").unwrap(), qemu);
        // An explicit request ends the run.
        let mut scene = Scene::of(scene.lab);
        scene.does("stop");
        scene.ends_well();
    }
}

#[test]
fn host_ends_its_own_run_when_the_machine_was_disabled_meanwhile() {
    let mut scene = Scene::of(lab(""));
    scene.restores();
    scene.does("disable_machine");
    scene.ends_well();
}

/// Domain ids begin anew after a restart of libvirtd. The operator's domain may therefore have the id of the
/// killed host's run.
#[test]
fn host_leaves_a_run_by_hand_alone_when_it_follows_a_run_of_a_killed_host() {
    let mut scene = Scene::of(lab(""));
    scene.restores();
    let id = scene.virsh(&["domid", "lab-m"]);
    scene.host.kill().unwrap();
    scene.virsh(&["destroy", "lab-m"]);
    scene.lab.libvirtd().kill_daemon().unwrap();
    scene.lab.libvirtd().start_daemon().unwrap();
    let qemu = starts_by_hand(&scene.lab);
    assert_eq!(scene.virsh(&["domid", "lab-m"]), id, "libvirtd counts on, and the test shows nothing");
    let mut scene = Scene::of(scene.lab);
    assert_eq!(scene.state(), "running");
    assert_eq!(scene.lab.qemu_of("m").unwrap(), qemu, "it was taken for a run of the killed host");
    scene.does("stop");
    scene.ends_well();
}

/// The host's own run ends while libvirtd is away, and somebody else's run begins; the host is not restarted.
#[test]
fn host_leaves_a_run_by_hand_alone_when_its_own_ended_while_libvirtd_was_away() {
    let mut scene = Scene::of(lab(""));
    scene.restores();
    scene.subscriber.wait_for_state("m", "running").unwrap();
    scene.lab.libvirtd().kill_daemon().unwrap();
    scene.subscriber.wait_for_state("m", "error").unwrap();
    kill_process(scene.lab.qemu_of("m").unwrap(), Signal::KILL).unwrap();
    // The host is suspended until the operator's run has begun.
    scene.host.signal(Signal::STOP).unwrap();
    scene.lab.libvirtd().start_daemon().unwrap();
    let qemu = starts_by_hand(&scene.lab);
    scene.host.signal(Signal::CONT).unwrap();
    scene.subscriber.wait_for_state("m", "poweroff").unwrap();
    scene.subscriber.wait_for_state("m", "running").unwrap();
    scene.terminates();
    assert_eq!(scene.lab.qemu_of("m").unwrap(), qemu);
    let mut scene = Scene::of(scene.lab);
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn managed_save_is_removed_when_the_machine_is_started_and_spared_until_then() {
    let lab = lab(STANDBY);
    starts_by_hand(&lab);
    lab.libvirtd().virsh(&["managedsave", "lab-m"]).unwrap();
    let mut scene = Scene::of(lab);
    scene.is_ready("plain", "managed save");
    scene.checks(&["warning  machine 'm'", "managed save"]);
    assert!(scene.virsh(&["dominfo", "lab-m"]).contains("Managed save:   yes"));
    for action in ["norestore_start", "restore_start"] {
        scene.does(action);
        let first = scene.lab.machine("m").first_count(SOON).unwrap();
        let wanted = if action == "restore_start" { scene.lab.restored_count().unwrap() } else { 1 };
        assert_eq!(first, wanted, "{action} has resumed the managed save");
        assert!(scene.host.log().contains("managed save of its domain is removed"), "{}", scene.host.log());
        assert!(scene.virsh(&["dominfo", "lab-m"]).contains("Managed save:   no"));
        scene.does("stop");
        scene.is_ready("standby", "");
        scene.does("stop");
        starts_by_hand(&scene.lab);
        scene.virsh(&["managedsave", "lab-m"]);
    }
    // An explicit request for a preparation is executed, too.
    scene.does("prepare");
    scene.is_ready("standby", "");
    assert!(scene.virsh(&["dominfo", "lab-m"]).contains("Managed save:   no"));
    scene.restores();
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn shut_off_snapshot_is_restored_when_the_domain_has_a_managed_save() {
    let lab = lab("");
    lab.libvirtd().virsh(&["snapshot-create-as", "lab-m", "off"]).unwrap();
    starts_by_hand(&lab);
    lab.libvirtd().virsh(&["managedsave", "lab-m"]).unwrap();
    let mut scene = Scene::of(lab);
    scene.does("restore_start");
    assert_eq!(scene.lab.machine("m").first_count(SOON).unwrap(), 1);
    scene.does("stop");
    scene.ends_well();
}

/// libvirt-guests saves and resumes domains in this way if the host's unit has no order relative to it.
#[test]
fn run_of_ours_is_ended_when_somebody_has_saved_and_resumed_it() {
    for killed in [false, true] {
        let mut scene = Scene::of(lab(""));
        scene.restores();
        if killed {
            scene.host.kill().unwrap();
            scene.virsh(&["managedsave", "lab-m"]);
        } else {
            scene.virsh(&["managedsave", "lab-m"]);
            scene.subscriber.wait_for_state("m", "poweroff").unwrap();
            scene.terminates();
        }
        scene.virsh(&["start", "lab-m"]);
        scene.lab.qemu_of("m").unwrap();
        let mut scene = Scene::of(scene.lab);
        assert_eq!(scene.state(), "poweroff", "killed: {killed}");
        scene.lab.assert_clean();
        scene.restores();
        scene.does("stop");
        scene.ends_well();
    }
}

/// Units stop in the reverse order of their start.
#[test]
fn unit_ends_the_host_before_libvirt_guests_saves_its_runs() {
    let unit = include_str!("../integrations/systemd/cuckoo-machinery.service");
    let after = unit.lines().filter_map(|line| line.strip_prefix("After="));
    assert!(after.flat_map(|line| line.split(' ')).any(|other| other == "libvirt-guests.service"), "{unit}");
}

#[test]
fn standby_is_replaced_when_somebody_resets_it() {
    let mut scene = Scene::of(lab(STANDBY));
    scene.is_ready("standby", "");
    let stood_by = scene.lab.qemu_of("m").unwrap();
    scene.virsh(&["reset", "lab-m"]);
    scene.is_ready("plain", "reset");
    scene.is_ready("standby", "");
    assert_ne!(scene.lab.qemu_of("m").unwrap(), stood_by);
    scene.restores();
    scene.does("stop");
    // A task that comes at this moment does not get that guest either.
    for _ in 0..5 {
        scene.is_ready("standby", "");
        scene.virsh(&["reset", "lab-m"]);
        scene.restores();
        scene.does("stop");
    }
    scene.ends_well();
}

#[test]
fn guest_may_reboot_when_it_runs() {
    let mut scene = Scene::of(lab(STANDBY));
    scene.is_ready("standby", "");
    scene.restores();
    let qemu = scene.lab.qemu_of("m").unwrap();
    scene.virsh(&["reset", "lab-m"]);
    scene.lab.machine("m").wait_for_count(1, SOON).unwrap();
    scene.lab.machine("m").wait_for_next_count(SOON).unwrap();
    assert_eq!((scene.state(), scene.lab.qemu_of("m").unwrap()), (json!("running"), qemu));
    scene.does("stop");
    scene.ends_well();
}

#[test]
fn standby_is_renewed_when_the_guest_powered_itself_off() {
    let mut scene = Scene::of(lab(STANDBY));
    for round in 0..25 {
        scene.is_ready("standby", "");
        let stood_by = scene.lab.qemu_of("m").unwrap();
        scene.restores();
        assert_eq!(scene.lab.qemu_of("m").unwrap(), stood_by, "round {round} was not from standby");
        scene.virsh(&["shutdown", "lab-m"]);
        scene.subscriber.wait_for_state("m", "poweroff").unwrap();
    }
    scene.is_ready("standby", "");
    let log = scene.host.log();
    assert!(!log.contains("not prepared") && !log.contains("not used"), "{log}");
    scene.ends_well();
}
