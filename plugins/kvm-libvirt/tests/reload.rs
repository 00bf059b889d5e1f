//! The kvm machinery takes over a new configuration while machines run, with real domains of a real
//! libvirtd and the micro guest.

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

/// A host that listens to what becomes of machines by itself.
struct Ears(Mutex<Sender<(String, State)>>);

impl HostServices for Ears {
    fn log(&self, _: LogRecord) {}
    fn state_changed(&self, machine: &str, state: State, _: &str) {
        // Nobody listens at the end of a test.
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

/// A loaded machinery of the machines `one`, `two` and `three`, and the lab that it is of.
struct Loaded {
    kvm: Instance,
    heard: Receiver<(String, State)>,
    lab: KvmLab,
}

impl Loaded {
    fn new(section: &str, prepare: impl FnOnce(&KvmLab)) -> Self {
        let lab = KvmLab::new(&["one", "two", "three"].map(|name| (name, Guest::Micro))).unwrap();
        prepare(&lab);
        set(&lab, section);
        let plugin = Plugin::open(&artifacts::plugin("kvm").unwrap()).unwrap();
        let (told, heard) = channel();
        let setup = lab.cwd().setup("kvm").unwrap();
        let kvm = plugin.load(&setup, Arc::new(Ears(Mutex::new(told)))).unwrap();
        Loaded { kvm, heard, lab }
    }

    fn reload(&self, in_use: &[&str]) -> machinery::Result<Reloaded> {
        let in_use: Vec<String> = in_use.iter().map(|name| (*name).to_owned()).collect();
        self.kvm.reload(&self.lab.cwd().setup("kvm").unwrap(), &in_use, soon())
    }

    /// What the reload comes to: those changed, and those that are later.
    #[track_caller]
    fn reloaded(&self, in_use: &[&str]) -> (String, String) {
        let Reloaded { changed, later } = self.reload(in_use).unwrap();
        (changed.join(" "), later.join(" "))
    }

    /// The reload is refused, in these words.
    #[track_caller]
    fn refused(&self, in_use: &[&str], words: &str) {
        let error = self.reload(in_use).unwrap_err().to_string();
        assert!(error.contains(words), "no {words:?} in {error}");
    }

    fn names(&self) -> Vec<String> {
        self.kvm.machines().unwrap().into_iter().map(|info| info.name).collect()
    }

    fn remove_machine(&self, machine: &str) {
        self.lab.cwd().remove_machine("kvm", machine).unwrap();
    }

    /// Prepares the machine; gives the QEMU that stands by.
    fn stands_by(&self, machine: &str) -> Pid {
        self.kvm.prepare(machine, soon()).unwrap();
        self.lab.qemu_of(machine).unwrap()
    }

    /// Starts the machine, from its snapshot; its domain is that of `lab`.
    #[track_caller]
    fn restores_as(&self, machine: &str, lab: &str) -> Pid {
        self.kvm.restore_start(machine, soon()).unwrap();
        let first = self.lab.machine(lab).first_count(SOON).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap());
        self.lab.qemu_of(lab).unwrap()
    }

    #[track_caller]
    fn restores(&self, machine: &str) -> Pid {
        self.restores_as(machine, machine)
    }

    fn image(&self, folder: &str, machine: &str) -> PathBuf {
        self.lab.cwd().root().join(folder).join(format!("{machine}.machinery-image"))
    }

    fn ends_well(self) {
        self.kvm.shutdown(soon()).unwrap();
        self.lab.assert_clean();
        let files = self.lab.cwd().root().join("state").read_dir().unwrap();
        let notes =
            files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|of| of == "run"));
        assert_eq!(notes.count(), 0, "there are notes of runs");
    }
}

/// Writes `machinery-host.yaml`, with just these keys of the machinery.
fn set(lab: &KvmLab, section: &str) {
    lab.cwd().host_yaml(&format!("machineries: {{kvm: {{{section}}}}}\n")).unwrap();
}

fn text(changed: &str, later: &str) -> (String, String) {
    (changed.to_owned(), later.to_owned())
}

fn is_alive(process: Pid) -> bool {
    test_kill_process(process).is_ok()
}

#[test]
fn machines_come_change_and_go_while_another_one_runs() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    let yaml = lab.cwd().yaml("kvm").unwrap();
    let running = loaded.restores("one");
    let stood_by = loaded.stands_by("two");
    loaded.remove_machine("three");
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one", "two"]);
    // It comes again.
    lab.cwd().write_yaml("kvm", &yaml).unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one", "two", "three"]);
    assert_eq!(lab.qemu_of("two").unwrap(), stood_by, "what has not changed was let go");
    loaded.restores("three");
    kvm.stop("three", soon()).unwrap();
    // Another one changes, in what it is restored to.
    lab.change_yaml("  two:\n", "  two:\n    snapshot: clean\n").unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("two", ""));
    assert!(!is_alive(stood_by) && lab.qemu_of("two").is_err(), "what stood by is still there");
    assert_eq!(kvm.machines().unwrap()[1].snapshot.as_deref(), Some("clean"));
    loaded.restores("two");
    kvm.stop("two", soon()).unwrap();
    // Two of them go; of one there is no domain any more.
    loaded.stands_by("two");
    loaded.stands_by("three");
    let label = &lab.machine("three").label;
    lab.libvirtd().virsh(&["destroy", label]).unwrap();
    lab.libvirtd().virsh(&["undefine", label, "--snapshots-metadata"]).unwrap();
    loaded.remove_machine("two");
    loaded.remove_machine("three");
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one"]);
    for name in ["two", "three"] {
        assert!(lab.qemu_of(name).is_err(), "what stood by is still there");
        assert_eq!(kvm.restore_start(name, soon()).unwrap_err().kind(), ErrorKind::NoSuchMachine);
    }
    // Nothing of that was noticed by the one that runs.
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    assert_eq!(kvm.state("one", soon()).unwrap(), State::Running);
    lab.machine("one").wait_for_next_count(SOON).unwrap();
    loaded.ends_well();
}

#[test]
fn a_machine_in_use_is_changed_once_it_is_free() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    loaded.stands_by("one");
    let running = loaded.restores("one");
    lab.change_yaml("  one:\n", "  one:\n    tags: [office]\n").unwrap();
    loaded.remove_machine("two");
    assert_eq!(loaded.reloaded(&["one", "two"]), text("", "one two"));
    assert_eq!(loaded.names(), ["one", "three", "two"]);
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    lab.machine("one").wait_for_next_count(SOON).unwrap();
    // A host that takes a running machine for one that is off is wrong.
    loaded.refused(&["two"], "the machine is on");
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    kvm.stop("one", soon()).unwrap();
    assert_eq!(loaded.reloaded(&["two"]), text("one", "two"));
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    assert_eq!(loaded.names(), ["one", "three"]);
    assert_eq!(kvm.machines().unwrap()[0].tags, ["office"]);
    loaded.restores("one");
    loaded.ends_well();
}

#[test]
fn what_cannot_be_taken_over_changes_nothing() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let lab = &loaded.lab;
    let running = loaded.restores("one");
    let stood_by = loaded.stands_by("two");
    let yaml = lab.cwd().yaml("kvm").unwrap();
    let dsn = lab.libvirtd().dsn().to_owned();
    for (old, new, words) in [
        ("  two:", "  two:\n    tgas: []", "machines.two: unknown key `tgas`"),
        (dsn.as_str(), "qemu:///system", "kvm.yaml:1: dsn: dsn is "),
        // A machine in use may not come by another name.
        ("  one:", "  renamed:", "machines.renamed.label: 'lab-one' is in use as the label of machine 'one'"),
    ] {
        lab.change_yaml(old, new).unwrap();
        // Something that would be taken over without that.
        loaded.remove_machine("three");
        loaded.refused(&["one"], words);
        assert_eq!(loaded.names(), ["one", "two", "three"]);
        assert_eq!(lab.qemu_of("one").unwrap(), running);
        assert_eq!(lab.qemu_of("two").unwrap(), stood_by);
        lab.cwd().write_yaml("kvm", &yaml).unwrap();
    }
    loaded.restores("two");
    loaded.ends_well();
}

#[test]
fn what_happens_to_a_domain_is_told_of_the_machine_that_has_it_now() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    loaded.stands_by("two");
    lab.change_yaml("  two:", "  renamed:").unwrap();
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    let qemu = loaded.restores_as("renamed", "two");
    kill_process(qemu, Signal::KILL).unwrap();
    let (machine, state) = loaded.heard.recv_timeout(SOON).unwrap();
    assert_eq!((machine.as_str(), state), ("renamed", State::Poweroff));
    // Of one that is gone, and of its domain, nobody hears.
    loaded.remove_machine("renamed");
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    lab.libvirtd().virsh(&["start", &lab.machine("two").label]).unwrap();
    lab.libvirtd().virsh(&["destroy", &lab.machine("two").label]).unwrap();
    loaded.restores("one");
    kill_process(lab.qemu_of("one").unwrap(), Signal::KILL).unwrap();
    let (machine, state) = loaded.heard.recv_timeout(SOON).unwrap();
    assert_eq!((machine.as_str(), state), ("one", State::Poweroff));
    assert_eq!(kvm.state("one", soon()).unwrap(), State::Poweroff);
    loaded.ends_well();
}

/// What somebody else has started is not the machine's.
#[test]
fn a_domain_of_somebody_else_goes_on_when_its_machine_goes() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let lab = &loaded.lab;
    lab.libvirtd().virsh(&["start", &lab.machine("two").label]).unwrap();
    let running = lab.qemu_of("two").unwrap();
    loaded.remove_machine("two");
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    assert_eq!(lab.qemu_of("two").unwrap(), running);
    lab.libvirtd().virsh(&["destroy", &lab.machine("two").label]).unwrap();
    loaded.ends_well();
}

#[test]
fn runs_may_end_while_the_configuration_is_taken_over() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    loaded.restores("one");
    let killed = loaded.restores("two");
    loaded.stands_by("three");
    for machine in ["one", "two", "three"] {
        lab.change_yaml(&format!("  {machine}:\n"), &format!("  {machine}:\n    tags: [office]\n")).unwrap();
    }
    let reloaded = thread::scope(|scope| {
        scope.spawn(|| kvm.stop("one", soon()).unwrap());
        scope.spawn(|| kill_process(killed, Signal::KILL).unwrap());
        loaded.reloaded(&["one", "two"])
    });
    assert_eq!(reloaded, text("three", "one two"));
    // The host asks again when it has heard of both ends.
    let mut ended = [loaded.heard.recv_timeout(SOON).unwrap(), loaded.heard.recv_timeout(SOON).unwrap()];
    ended.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(ended, [("one".to_owned(), State::Poweroff), ("two".to_owned(), State::Poweroff)]);
    assert_eq!(loaded.reloaded(&[]), text("one two", ""));
    lab.assert_clean();
    for machine in ["one", "two", "three"] {
        loaded.restores(machine);
    }
    loaded.ends_well();
}

#[test]
fn what_is_done_ahead_can_be_changed() {
    let loaded = Loaded::new("save_images: on", |_| {});
    let (lab, kvm) = (&loaded.lab, &loaded.kvm);
    kvm.prepare("two", soon()).unwrap();
    kvm.prepare("three", soon()).unwrap();
    let here = |machine: &str| loaded.image("cache", machine).exists();
    assert!(here("two") && here("three"));
    loaded.restores("one");
    // One that is right stays.
    lab.change_yaml("  two:\n", "  two:\n    tags: [office]\n").unwrap();
    loaded.remove_machine("three");
    assert_eq!(loaded.reloaded(&["one"]), text("two", ""));
    assert!(here("two") && !here("three"));
    loaded.restores("two");
    kvm.stop("two", soon()).unwrap();
    // They are to be elsewhere.
    let folder = lab.cwd().root().join("elsewhere");
    set(lab, &format!("save_images: on, save_dir: {}", folder.display()));
    assert_eq!(loaded.reloaded(&["one"]), text("two", "one"));
    assert!(!here("two"), "it stays where nobody looks for it");
    kvm.prepare("two", soon()).unwrap();
    assert!(loaded.image("elsewhere", "two").exists());
    // One stands by instead, if there is memory for it.
    set(lab, "save_images: off, standby: on, standby_memory: 1 MiB");
    assert_eq!(loaded.reloaded(&["one"]), text("two", "one"));
    kvm.prepare("two", soon()).unwrap();
    assert!(lab.qemu_of("two").is_err());
    set(lab, "save_images: off, standby: on");
    assert_eq!(loaded.reloaded(&["one"]), text("", "one"));
    let stood_by = loaded.stands_by("two");
    set(lab, "save_images: off");
    assert_eq!(loaded.reloaded(&["one"]), text("two", "one"));
    assert!(!is_alive(stood_by), "it stands by all the same");
    loaded.ends_well();
}
