//! Reloads of the kvm machinery while machines run, with real domains of a real libvirtd and the micro guest.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use machinery::host::{Instance, Plugin};
use machinery::{Deadline, ErrorKind, HostServices, LogLevel, LogRecord, Reloaded, RestoreReadiness, State};
use machinery_testkit::artifacts;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::KvmLab;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const SOON: Duration = Duration::from_secs(60);
const STANDBY: &str = "standby: on";

fn soon() -> Deadline {
    Deadline::after(SOON)
}

/// A host that records the reported states.
struct EventRecorder(Mutex<Sender<(String, State)>>);

impl HostServices for EventRecorder {
    fn log(&self, _: LogRecord) {}
    fn state_changed(&self, machine: &str, state: State, _: &str) {
        // The receiver is dropped at the end of a test.
        let _ = self.0.lock().unwrap().send((machine.to_owned(), state));
    }
    fn progress(&self, _: &str, _: f64) {}
    fn step(&self, _: &str, _: &str, _: Duration) {}
    fn ready(&self, _: &str, _: &RestoreReadiness) {}
    fn preparation_invalidated(&self, _: &str, _: &str) {}
    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }
}

/// A loaded machinery with the machines `one`, `two` and `three`, and its lab.
struct Loaded {
    kvm: Instance,
    events: Receiver<(String, State)>,
    lab: KvmLab,
}

impl Loaded {
    fn new(section: &str) -> Self {
        let lab = KvmLab::new(&["one", "two", "three"].map(|name| (name, Guest::Micro))).unwrap();
        write_section(&lab, section);
        let plugin = Plugin::open(&artifacts::plugin("kvm").unwrap()).unwrap();
        let (sender, events) = channel();
        let setup = lab.cwd().setup("kvm").unwrap();
        let kvm = plugin.load(&setup, Arc::new(EventRecorder(Mutex::new(sender)))).unwrap();
        Loaded { kvm, events, lab }
    }

    fn reload(&self, in_use: &[&str]) -> machinery::Result<Reloaded> {
        let in_use: Vec<String> = in_use.iter().map(|name| (*name).to_owned()).collect();
        self.kvm.reload(&self.lab.cwd().setup("kvm").unwrap(), &in_use, soon())
    }

    /// Reloads, and returns the machines that are changed, and those that are changed later.
    #[track_caller]
    fn reloaded(&self, in_use: &[&str]) -> (String, String) {
        let Reloaded { changed, later } = self.reload(in_use).unwrap();
        (changed.join(" "), later.join(" "))
    }

    /// Expects that the reload is refused, with these words.
    #[track_caller]
    fn assert_refused(&self, in_use: &[&str], words: &str) {
        let error = self.reload(in_use).unwrap_err().to_string();
        assert!(error.contains(words), "no {words:?} in {error}");
    }

    fn names(&self) -> Vec<String> {
        self.kvm.machines().unwrap().into_iter().map(|info| info.name).collect()
    }

    fn remove_machine(&self, machine: &str) {
        self.lab.cwd().remove_machine("kvm", machine).unwrap();
    }

    /// Prepares the machine; returns the QEMU of its standby.
    fn make_standby(&self, machine: &str) -> Pid {
        self.kvm.prepare(machine, soon()).unwrap();
        self.lab.qemu_of(machine).unwrap()
    }

    /// Restores the machine, whose domain is that of the lab's machine `lab`; returns its QEMU.
    #[track_caller]
    fn restore_as(&self, machine: &str, lab: &str) -> Pid {
        self.kvm.restore_start(machine, soon()).unwrap();
        let first = self.lab.machine(lab).first_count(SOON).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap());
        self.lab.qemu_of(lab).unwrap()
    }

    #[track_caller]
    fn restore(&self, machine: &str) -> Pid {
        self.restore_as(machine, machine)
    }

    fn image(&self, folder: &str, machine: &str) -> PathBuf {
        self.lab.cwd().root().join(folder).join(format!("{machine}.machinery-image"))
    }

    fn finish(self) {
        self.kvm.shutdown(soon()).unwrap();
        self.lab.assert_clean();
        let files = self.lab.cwd().root().join("state").read_dir().unwrap();
        let markers =
            files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|of| of == "run"));
        assert_eq!(markers.count(), 0, "there are run markers");
    }
}

/// Writes `machinery-host.yaml` with these keys of the machinery.
fn write_section(lab: &KvmLab, section: &str) {
    lab.cwd().host_yaml(&format!("machineries: {{kvm: {{{section}}}}}\n")).unwrap();
}

fn text(changed: &str, later: &str) -> (String, String) {
    (changed.to_owned(), later.to_owned())
}

fn is_alive(process: Pid) -> bool {
    test_kill_process(process).is_ok()
}

#[test]
fn machines_are_added_changed_and_removed_while_another_one_runs() {
    let loaded = Loaded::new(STANDBY);
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    let yaml = lab.cwd().yaml("kvm").unwrap();
    let running = loaded.restore("one");
    let standby = loaded.make_standby("two");
    loaded.remove_machine("three");
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one", "two"]);
    // The machine is added again.
    lab.cwd().write_yaml("kvm", &yaml).unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one", "two", "three"]);
    assert_eq!(lab.qemu_of("two").unwrap(), standby, "the standby of an unchanged machine was discarded");
    loaded.restore("three");
    kvm.stop("three", soon()).unwrap();
    // Another machine gets another snapshot.
    lab.change_yaml("  two:\n", "  two:\n    snapshot: clean\n").unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("two", ""));
    assert!(
        !is_alive(standby) && lab.qemu_of("two").is_err(),
        "the standby of a changed or removed machine is still on"
    );
    assert_eq!(kvm.machines().unwrap()[1].snapshot.as_deref(), Some("clean"));
    loaded.restore("two");
    kvm.stop("two", soon()).unwrap();
    // Two machines are removed. The domain of one does not exist any more.
    loaded.make_standby("two");
    loaded.make_standby("three");
    let label = &lab.machine("three").label;
    lab.libvirtd().virsh(&["destroy", label]).unwrap();
    lab.libvirtd().virsh(&["undefine", label, "--snapshots-metadata"]).unwrap();
    loaded.remove_machine("two");
    loaded.remove_machine("three");
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one"]);
    for name in ["two", "three"] {
        assert!(lab.qemu_of(name).is_err(), "the standby of a changed or removed machine is still on");
        assert_eq!(kvm.restore_start(name, soon()).unwrap_err().kind(), ErrorKind::NoSuchMachine);
    }
    // The running machine is not affected.
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    assert_eq!(kvm.state("one", soon()).unwrap(), State::Running);
    lab.machine("one").wait_for_next_count(SOON).unwrap();
    loaded.finish();
}

#[test]
fn machine_in_use_is_changed_by_a_later_reload() {
    let loaded = Loaded::new(STANDBY);
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    loaded.make_standby("one");
    let running = loaded.restore("one");
    lab.change_yaml("  one:\n", "  one:\n    tags: [office]\n").unwrap();
    loaded.remove_machine("two");
    assert_eq!(loaded.reloaded(&["one", "two"]), text("", "one two"));
    assert_eq!(loaded.names(), ["one", "three", "two"]);
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    lab.machine("one").wait_for_next_count(SOON).unwrap();
    // A reload that would change a running machine is refused.
    loaded.assert_refused(&["two"], "the machine is on");
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    kvm.stop("one", soon()).unwrap();
    assert_eq!(loaded.reloaded(&["two"]), text("one", "two"));
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    assert_eq!(loaded.names(), ["one", "three"]);
    assert_eq!(kvm.machines().unwrap()[0].tags, ["office"]);
    loaded.restore("one");
    loaded.finish();
}

#[test]
fn machines_are_unchanged_when_the_configuration_is_refused() {
    let loaded = Loaded::new(STANDBY);
    let lab = &loaded.lab;
    let running = loaded.restore("one");
    let standby = loaded.make_standby("two");
    let yaml = lab.cwd().yaml("kvm").unwrap();
    let (dsn, away) = (lab.libvirtd().dsn(), "qemu:///system?socket=/none/socket");
    for (old, new, words) in [
        ("  two:", "  two:\n    tgas: []", "machines.two: unknown key `tgas`"),
        (dsn.as_str(), away, "cannot connect to libvirt at qemu:///system?socket=/none/socket"),
        // A machine in use cannot be renamed.
        ("  one:", "  renamed:", "machines.renamed.label: 'lab-one' is in use as the label of machine 'one'"),
    ] {
        lab.change_yaml(old, new).unwrap();
        // A valid change beside the wrong one.
        loaded.remove_machine("three");
        loaded.assert_refused(&["one"], words);
        assert_eq!(loaded.names(), ["one", "two", "three"]);
        assert_eq!(lab.qemu_of("one").unwrap(), running);
        assert_eq!(lab.qemu_of("two").unwrap(), standby);
        lab.cwd().write_yaml("kvm", &yaml).unwrap();
    }
    loaded.restore("two");
    loaded.finish();
}

#[test]
fn event_of_a_domain_is_reported_for_its_present_machine() {
    let loaded = Loaded::new(STANDBY);
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    loaded.make_standby("two");
    lab.change_yaml("  two:", "  renamed:").unwrap();
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    let qemu = loaded.restore_as("renamed", "two");
    kill_process(qemu, Signal::KILL).unwrap();
    let (machine, state) = loaded.events.recv_timeout(SOON).unwrap();
    assert_eq!((machine.as_str(), state), ("renamed", State::Poweroff));
    // Events of a removed machine's domain are not reported.
    loaded.remove_machine("renamed");
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    lab.libvirtd().virsh(&["start", &lab.machine("two").label]).unwrap();
    lab.libvirtd().virsh(&["destroy", &lab.machine("two").label]).unwrap();
    loaded.restore("one");
    kill_process(lab.qemu_of("one").unwrap(), Signal::KILL).unwrap();
    let (machine, state) = loaded.events.recv_timeout(SOON).unwrap();
    assert_eq!((machine.as_str(), state), ("one", State::Poweroff));
    assert_eq!(kvm.state("one", soon()).unwrap(), State::Poweroff);
    loaded.finish();
}

/// A run that somebody else has started is not the host's.
#[test]
fn run_by_hand_goes_on_when_its_machine_is_removed() {
    let loaded = Loaded::new(STANDBY);
    let lab = &loaded.lab;
    lab.libvirtd().virsh(&["start", &lab.machine("two").label]).unwrap();
    let running = lab.qemu_of("two").unwrap();
    loaded.remove_machine("two");
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    assert_eq!(lab.qemu_of("two").unwrap(), running);
    lab.libvirtd().virsh(&["destroy", &lab.machine("two").label]).unwrap();
    loaded.finish();
}

#[test]
fn reload_succeeds_when_runs_end_meanwhile() {
    let loaded = Loaded::new(STANDBY);
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    loaded.restore("one");
    let killed = loaded.restore("two");
    loaded.make_standby("three");
    for machine in ["one", "two", "three"] {
        lab.change_yaml(&format!("  {machine}:\n"), &format!("  {machine}:\n    tags: [office]\n")).unwrap();
    }
    let reloaded = thread::scope(|scope| {
        scope.spawn(|| kvm.stop("one", soon()).unwrap());
        scope.spawn(|| kill_process(killed, Signal::KILL).unwrap());
        loaded.reloaded(&["one", "two"])
    });
    assert_eq!(reloaded, text("three", "one two"));
    // A host reloads again after both ends.
    let mut ended = [loaded.events.recv_timeout(SOON).unwrap(), loaded.events.recv_timeout(SOON).unwrap()];
    ended.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(ended, [("one".to_owned(), State::Poweroff), ("two".to_owned(), State::Poweroff)]);
    assert_eq!(loaded.reloaded(&[]), text("one two", ""));
    lab.assert_clean();
    for machine in ["one", "two", "three"] {
        loaded.restore(machine);
    }
    loaded.finish();
}

#[test]
fn reload_changes_images_and_standbys() {
    let loaded = Loaded::new("instant: on, standby: off");
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    kvm.prepare("two", soon()).unwrap();
    kvm.prepare("three", soon()).unwrap();
    let here = |machine: &str| loaded.image("cache", machine).exists();
    assert!(here("two") && here("three"));
    loaded.restore("one");
    // A valid image is kept.
    lab.change_yaml("  two:\n", "  two:\n    tags: [office]\n").unwrap();
    loaded.remove_machine("three");
    assert_eq!(loaded.reloaded(&["one"]), text("two", ""));
    assert!(here("two") && !here("three"));
    loaded.restore("two");
    kvm.stop("two", soon()).unwrap();
    // The images get another folder.
    let folder = lab.cwd().root().join("elsewhere");
    write_section(lab, &format!("instant: on, standby: off, instant_dir: {}", folder.display()));
    assert_eq!(loaded.reloaded(&["one"]), text("two", "one"));
    assert!(!here("two"), "the image in the old folder was not removed");
    kvm.prepare("two", soon()).unwrap();
    assert!(loaded.image("elsewhere", "two").exists());
    // A standby replaces the image, if there is enough memory.
    write_section(lab, "instant: off, standby: on, standby_memory_limit: 1 MiB");
    assert_eq!(loaded.reloaded(&["one"]), text("two", "one"));
    kvm.prepare("two", soon()).unwrap();
    assert!(lab.qemu_of("two").is_err());
    write_section(lab, "instant: off, standby: on");
    assert_eq!(loaded.reloaded(&["one"]), text("", "one"));
    let standby = loaded.make_standby("two");
    write_section(lab, "instant: off");
    assert_eq!(loaded.reloaded(&["one"]), text("two", "one"));
    assert!(!is_alive(standby), "the standby was not discarded");
    loaded.finish();
}
