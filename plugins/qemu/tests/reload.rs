//! The qemu machinery reloads its configuration while machines run, with real QEMUs and the micro guest.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use machinery::host::{Instance, Plugin};
use machinery::{Deadline, ErrorKind, Reloaded, State};
use machinery_testkit::artifacts;
use machinery_testkit::conformance::NullHost;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const SOON: Duration = Duration::from_secs(60);
const STANDBY: &str = "instant: auto, standby: on";

fn soon() -> Deadline {
    Deadline::after(SOON)
}

/// A loaded machinery of the machines `one`, `two` and `three`, with its lab.
struct Loaded {
    qemu: Instance,
    lab: Lab,
}

impl Loaded {
    fn new(section: &str, prepare: impl FnOnce(&Lab)) -> Self {
        let machine = |name| (name, Guest::Micro, SnapshotFormat::Lz4);
        let lab = Lab::new(&["one", "two", "three"].map(machine)).unwrap();
        lab.ahead(section).unwrap();
        prepare(&lab);
        let plugin = Plugin::open(&artifacts::plugin("qemu").unwrap()).unwrap();
        let qemu = plugin.load(&lab.cwd().setup("qemu").unwrap(), Arc::new(NullHost)).unwrap();
        Loaded { qemu, lab }
    }

    fn reload(&self, in_use: &[&str]) -> machinery::Result<Reloaded> {
        let in_use: Vec<String> = in_use.iter().map(|name| (*name).to_owned()).collect();
        self.qemu.reload(&self.lab.cwd().setup("qemu").unwrap(), &in_use, soon())
    }

    /// Reloads; returns the changed machines, and the deferred ones.
    #[track_caller]
    fn reloaded(&self, in_use: &[&str]) -> (String, String) {
        let Reloaded { changed, later } = self.reload(in_use).unwrap();
        (changed.join(" "), later.join(" "))
    }

    /// Checks that the reload is refused with these words.
    #[track_caller]
    fn refused(&self, in_use: &[&str], words: &str) {
        let error = self.reload(in_use).unwrap_err().to_string();
        assert!(error.contains(words), "no {words:?} in {error}");
    }

    fn names(&self) -> Vec<String> {
        self.qemu.machines().unwrap().into_iter().map(|info| info.name).collect()
    }

    fn remove_machine(&self, machine: &str) {
        self.lab.cwd().remove_machine("qemu", machine).unwrap();
    }

    /// Prepares the machine, and returns the QEMU of its standby.
    fn prepare_standby(&self, machine: &str) -> Pid {
        self.qemu.prepare(machine, soon()).unwrap();
        self.lab.qemu_of(machine).unwrap()
    }

    /// Restores the machine, and checks that the guest begins at the snapshot.
    #[track_caller]
    fn restores(&self, machine: &str) -> Pid {
        self.qemu.restore_start(machine, soon()).unwrap();
        let first = self.lab.folder(machine).first_count(SOON).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap());
        self.lab.qemu_of(machine).unwrap()
    }

    fn has_template(&self, machine: &str) -> bool {
        self.lab.cwd().root().join(format!("cache/templates/{machine}.template")).exists()
    }

    /// Returns the machine's processes, overlays and sockets.
    fn leftovers_of(&self, machine: &str) -> Vec<String> {
        let names = [format!("/{machine}_disposable"), format!("/qemu_{machine}.sock")];
        let is_of_it = |left: &String| names.iter().any(|name| left.contains(name));
        self.lab.leftovers().unwrap().into_iter().filter(is_of_it).collect()
    }

    fn ends_well(self) {
        self.qemu.shutdown(soon()).unwrap();
        self.lab.assert_clean();
    }
}

fn text(changed: &str, later: &str) -> (String, String) {
    (changed.to_owned(), later.to_owned())
}

fn is_alive(process: Pid) -> bool {
    test_kill_process(process).is_ok()
}

#[test]
fn machines_are_added_changed_and_removed_while_another_one_runs() {
    let loaded = Loaded::new(STANDBY, |lab| lab.cwd().remove_machine("qemu", "three").unwrap());
    let (lab, qemu) = (&loaded.lab, &loaded.qemu);
    let running = loaded.restores("one");
    let standby = loaded.prepare_standby("two");
    // A machine is added.
    let yaml = lab.yaml().unwrap();
    let three = lab.folder("three");
    let keys = [
        ("qcow2_path", &three.disk),
        ("snapshot_path", &three.snapshot),
        ("machineinfo_path", &three.machineinfo),
    ];
    let keys: String = keys.iter().map(|(key, path)| format!("    {key}: {}\n", path.display())).collect();
    let new = format!("  three:\n{keys}    ip: {}\n    platform: linux\n    os_version: 1\n", three.ip);
    lab.write_yaml(&(yaml.clone() + &new)).unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one", "two", "three"]);
    assert_eq!(lab.qemu_of("two").unwrap(), standby, "the standby of an unchanged machine was discarded");
    loaded.restores("three");
    qemu.stop("three", soon()).unwrap();
    // Another machine changes, in a key that only the host uses.
    lab.change_yaml("  two:\n", "  two:\n    tags: [office]\n").unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("two", ""));
    assert!(!is_alive(standby), "the standby of the old configuration still exists");
    assert_eq!(loaded.leftovers_of("two"), [""; 0]);
    assert_eq!(qemu.machines().unwrap()[1].tags, ["office"]);
    loaded.restores("two");
    qemu.stop("two", soon()).unwrap();
    // Two machines are removed: one has a standby, the other one only a template.
    loaded.prepare_standby("two");
    loaded.prepare_standby("three");
    assert_eq!(qemu.stop("three", soon()).unwrap_err().kind(), ErrorKind::StateReached);
    assert!(["two", "three"].iter().all(|name| loaded.has_template(name)));
    loaded.remove_machine("two");
    loaded.remove_machine("three");
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    assert_eq!(loaded.names(), ["one"]);
    for name in ["two", "three"] {
        assert_eq!(loaded.leftovers_of(name), [""; 0]);
        assert!(!loaded.has_template(name), "its template still exists");
        assert_eq!(qemu.restore_start(name, soon()).unwrap_err().kind(), ErrorKind::NoSuchMachine);
    }
    // The running machine is unaffected.
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    assert_eq!(qemu.state("one", soon()).unwrap(), State::Running);
    lab.folder("one").wait_for_next_count(SOON).unwrap();
    loaded.ends_well();
}

#[test]
fn machine_in_use_is_changed_when_it_is_free() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let (lab, qemu) = (&loaded.lab, &loaded.qemu);
    loaded.prepare_standby("one");
    let running = loaded.restores("one");
    // The content of machineinfo.json counts too.
    lab.change_start_args("one", |args| args.extend(["-name".to_owned(), "changed".to_owned()])).unwrap();
    loaded.remove_machine("two");
    assert_eq!(loaded.reloaded(&["one", "two"]), text("", "one two"));
    assert_eq!(loaded.names(), ["one", "three", "two"]);
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    lab.folder("one").wait_for_next_count(SOON).unwrap();
    // The host is wrong if it reports a running machine as free.
    loaded.refused(&["two"], "the machine is on");
    assert_eq!(lab.qemu_of("one").unwrap(), running);
    qemu.stop("one", soon()).unwrap();
    assert_eq!(loaded.reloaded(&["two"]), text("one", "two"));
    assert_eq!(loaded.reloaded(&[]), text("", ""));
    assert_eq!(loaded.names(), ["one", "three"]);
    loaded.prepare_standby("one");
    let restored = loaded.restores("one");
    let command = std::fs::read(format!("/proc/{}/cmdline", restored.as_raw_nonzero())).unwrap();
    assert!(String::from_utf8_lossy(&command).contains("changed"), "it runs with the old arguments");
    loaded.ends_well();
}

#[test]
fn reload_changes_nothing_when_it_is_refused() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let lab = &loaded.lab;
    let running = loaded.restores("one");
    let standby = loaded.prepare_standby("two");
    let yaml = lab.yaml().unwrap();
    let stays_so = || {
        assert_eq!(loaded.names(), ["one", "three", "two"]);
        assert_eq!(lab.qemu_of("one").unwrap(), running);
        assert_eq!(lab.qemu_of("two").unwrap(), standby);
        lab.write_yaml(&yaml).unwrap();
    };
    let (disk, image) = (lab.folder("two").disk.display().to_string(), lab.qemu().img.display().to_string());
    for (old, new, words) in [
        ("  two:", "  two:\n    tgas: []", "machines.two: unknown key `tgas`"),
        (disk.as_str(), "none.qcow2", "machines.two.qcow2_path: none.qcow2 is not an absolute path"),
        (image.as_str(), "/bin/true", "binaries.qemu_img: qemu_img stays "),
    ] {
        lab.change_yaml(old, new).unwrap();
        // This change alone would be applied.
        loaded.remove_machine("three");
        loaded.refused(&["one"], words);
        stays_so();
    }
    let folder = lab.cwd().root().join("elsewhere");
    lab.ahead(&format!("{STANDBY}, instant_dir: {}", folder.display())).unwrap();
    loaded.refused(&["one"], "machineries.qemu.instant_dir: instant_dir stays ");
    assert!(!folder.exists());
    stays_so();
    lab.ahead(STANDBY).unwrap();
    // A machine in use may not be renamed.
    lab.change_yaml("  one:", "  renamed:").unwrap();
    let disk = lab.folder("one").disk.display();
    loaded.refused(
        &["one"],
        &format!("machines.renamed.qcow2_path: '{disk}' is in use as the qcow2_path of machine 'one'"),
    );
    stays_so();
    assert_eq!(loaded.reloaded(&["one"]), text("", ""));
    stays_so();
    loaded.restores("two");
    loaded.ends_well();
}

#[test]
fn new_machine_is_unusable_while_another_process_uses_its_disk() {
    let loaded = Loaded::new(STANDBY, |lab| lab.change_yaml("  three:", "  other:").unwrap());
    let lab = &loaded.lab;
    let mut qemu = Command::new(&lab.qemu().system);
    let overlay = lab.disposable("three");
    fs::write(&overlay, "").unwrap();
    let name = format!("guest={}", overlay.display());
    qemu.args(["-S", "-display", "none", "-nodefaults", "-name", &name]).stderr(Stdio::null());
    let mut other = qemu.spawn().unwrap();
    lab.change_yaml("  other:", "  three:").unwrap();
    lab.change_yaml("  two:", "  two:\n    tags: [office]").unwrap();
    let reloaded = loaded.reload(&[]);
    let diagnosed = loaded.qemu.diagnose(&loaded.names(), soon());
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(reloaded.unwrap().changed, ["two"]);
    let [three] = &diagnosed.unwrap()[..] else { panic!("one machine is diagnosed") };
    let why = three.unusable.as_ref().unwrap().to_string();
    assert!(three.machine == "three" && why.contains("uses the overlay"), "{why}");
    assert_eq!(loaded.qemu.diagnose(&loaded.names(), soon()).unwrap(), []);
    loaded.restores("three");
    loaded.restores("two");
    loaded.ends_well();
}

#[test]
fn reload_works_when_runs_end_meanwhile() {
    let loaded = Loaded::new(STANDBY, |_| {});
    let (lab, qemu) = (&loaded.lab, &loaded.qemu);
    loaded.restores("one");
    let killed = loaded.restores("two");
    loaded.prepare_standby("three");
    for machine in ["one", "two", "three"] {
        lab.change_yaml(&format!("  {machine}:\n"), &format!("  {machine}:\n    tags: [office]\n")).unwrap();
    }
    let reloaded = thread::scope(|scope| {
        scope.spawn(|| qemu.stop("one", soon()).unwrap());
        scope.spawn(|| kill_process(killed, Signal::KILL).unwrap());
        loaded.reloaded(&["one", "two"])
    });
    assert_eq!(reloaded, text("three", "one two"));
    assert_eq!(loaded.reloaded(&[]), text("one two", ""));
    lab.assert_clean();
    for machine in ["one", "two", "three"] {
        loaded.restores(machine);
    }
    loaded.ends_well();
}

#[test]
fn reload_changes_the_preparations() {
    let loaded = Loaded::new("instant: off, standby: off", |_| {});
    let (lab, qemu) = (&loaded.lab, &loaded.qemu);
    loaded.restores("one");
    lab.ahead(STANDBY).unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("three two", "one"));
    let standby = loaded.prepare_standby("two");
    assert!(loaded.has_template("two"));
    // The limit leaves no memory for another standby.
    lab.ahead(&format!("{STANDBY}, standby_memory_limit: 1 MiB")).unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("", "one"));
    qemu.prepare("three", soon()).unwrap();
    assert_eq!(loaded.leftovers_of("three"), [""; 0]);
    assert_eq!(lab.qemu_of("two").unwrap(), standby);
    lab.ahead("instant: off, standby: off, keep_disposable_disks: true").unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("three two", "one"));
    assert!(!is_alive(standby) && !loaded.has_template("two") && !loaded.has_template("three"));
    loaded.restores("two");
    qemu.stop("two", soon()).unwrap();
    assert!(lab.disposable("two").exists(), "its disk was not kept");
    lab.ahead("instant: off, standby: off").unwrap();
    assert_eq!(loaded.reloaded(&["one"]), text("three two", ""));
    assert!(!lab.disposable("two").exists(), "an overlay that is no longer kept still exists");
    loaded.ends_well();
}
