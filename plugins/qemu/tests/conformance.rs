//! The qemu machinery keeps every promise of a machinery, with real QEMUs and the micro guest, whose
//! counter tells exactly where a run began.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::host::{Instance, Plugin};
use machinery::{Deadline, HostServices, LogLevel, LogRecord, Setup, State};
use machinery_testkit::artifacts;
use machinery_testkit::conformance::{self, Answer, Subject};
use machinery_testkit::guest::{self, Guest, MachineFolder, Qemu};
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Pid, Signal, kill_process};

const SOON: Duration = Duration::from_secs(60);

/// What a machine's folder holds, run or not.
const ITS_OWN: [&str; 4] = ["disk.qcow2", "memory.snapshot", "machineinfo.json", "serial.log"];

/// Four machines, one for each format that a snapshot may have, in a folder of their own.
struct Lab {
    root: tempfile::TempDir,
    machines: HashMap<String, MachineFolder>,
    names: Vec<String>,
    restored: u32,
}

impl Lab {
    fn new() -> Arc<Lab> {
        let root = tempfile::Builder::new().prefix("qemu-conformance.").tempdir().unwrap();
        for folder in ["sockets", "state", "cache"] {
            fs::create_dir(root.path().join(folder)).unwrap();
        }
        let qemu = Qemu::find().unwrap();
        let master = guest::master(&qemu, Guest::Micro).unwrap();
        let folders = SnapshotFormat::ALL.map(|format| {
            let name = format!("micro_{format:?}").to_lowercase();
            let number = format as u8 + 1;
            master.machine(&root.path().join(&name), &name, &format!("127.0.5.{number}"), format).unwrap()
        });
        fs::write(root.path().join("qemu.yaml"), yaml(&qemu, &folders)).unwrap();
        Arc::new(Lab {
            names: folders.iter().map(|folder| folder.name.clone()).collect(),
            machines: folders.into_iter().map(|folder| (folder.name.clone(), folder)).collect(),
            restored: master.snapshot_count().unwrap() + 1,
            root,
        })
    }

    fn setup(&self) -> Setup {
        setup(self.root.path())
    }

    fn subject(self: &Arc<Lab>) -> Subject {
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        let [counting, living, littered, killing] = [(); 4].map(|()| Arc::clone(self));
        let mortal = names[0].to_owned();
        Subject::new(&names, self.restored..=self.restored, move |_, machine| {
            Ok(counting.machines[machine].first_count(SOON)?)
        })
        .alive(move |_, machine| living.counts_on(machine))
        .leftovers(move || littered.leftovers())
        .death(names[0], move || killing.kill(&mortal))
        .patience(SOON)
    }

    /// The machine's snapshot, spoilt in every way there is.
    fn broken_snapshots(&self, machine: &str) -> Vec<(String, &'static str, Vec<u8>)> {
        let path = &self.machines[machine].snapshot;
        let (whole, format) = (fs::read(path).unwrap(), SnapshotFormat::of(path).unwrap());
        let stored = |mut content: &[u8]| {
            let mut file = Vec::new();
            format.write(&mut content, &mut file).unwrap();
            file
        };
        let mut broken = vec![
            ("an empty file", Vec::new()),
            ("the first half", whole[..whole.len() / 2].to_vec()),
            ("garbage behind the beginning", [&whole[..8], &[0x5a; 100_000]].concat()),
            ("something else", stored(&[0x5a; 100_000])),
        ];
        // A plain one ends in a text that QEMU does not need, so whether that is whole cannot be told.
        if format != SnapshotFormat::Plain {
            broken.push(("the end cut off", whole[..whole.len() - 100].to_vec()));
            broken.push(("nothing, but well packed", stored(&[])));
        }
        broken.into_iter().map(|(how, content)| (machine.to_owned(), how, content)).collect()
    }

    fn counts_on(&self, machine: &str) -> Answer<()> {
        let machine = &self.machines[machine];
        machine.first_count(SOON)?;
        machine.wait_for_count(machine.last_count()? + 1, SOON)?;
        Ok(())
    }

    /// Processes, sockets and disks that are there because of a run.
    fn leftovers(&self) -> Answer<Vec<String>> {
        let root = self.root.path().to_string_lossy().into_owned();
        let processes = processes_with(&root)?.into_iter().map(|pid| format!("process {pid:?}"));
        let mut files = files_in(&self.root.path().join("sockets"))?;
        for machine in self.machines.values() {
            let is_its_own = |path: &PathBuf| ITS_OWN.iter().any(|name| path.ends_with(name));
            files.extend(files_in(&machine.dir)?.into_iter().filter(|path| !is_its_own(path)));
        }
        Ok(processes.chain(files.iter().map(|path| path.display().to_string())).collect())
    }

    /// Ends a machine's QEMU as a crash would.
    fn kill(&self, machine: &str) -> Answer<()> {
        let disk = self.machines[machine].dir.join(format!("{machine}_disposable.qcow2"));
        let processes = processes_with(&disk.to_string_lossy())?;
        match processes.as_slice() {
            [qemu] => Ok(kill_process(*qemu, Signal::KILL)?),
            other => Err(format!("{} processes use {}, not one", other.len(), disk.display()).into()),
        }
    }
}

fn setup(root: &Path) -> Setup {
    let config = ConfigFile::read(&root.join("qemu.yaml")).unwrap();
    let [sockets_dir, state_dir, cache_dir] = ["sockets", "state", "cache"].map(|name| root.join(name));
    Setup { config, host_config: None, sockets_dir, state_dir, cache_dir }
}

fn loaded(root: &Path) -> Instance {
    let plugin = Plugin::open(&artifacts::plugin("qemu").unwrap()).unwrap();
    plugin.load(&setup(root), Arc::new(Deaf)).unwrap()
}

/// A host that does not listen.
struct Deaf;

impl HostServices for Deaf {
    fn log(&self, _: LogRecord) {}
    fn state_changed(&self, _: &str, _: State, _: &str) {}
    fn progress(&self, _: &str, _: f64) {}
    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }
}

fn yaml(qemu: &Qemu, folders: &[MachineFolder]) -> String {
    let mut text = format!(
        "interface: lo\ndisposable_copy_dir:\nbinaries:\n  qemu_img: {}\n  qemu_system_x86_64: {}\nmachines:\n",
        qemu.img.display(),
        qemu.system.display()
    );
    for folder in folders {
        text += &format!(
            "  {}:\n    qcow2_path: {}\n    snapshot_path: {}\n    machineinfo_path: {}\n    ip: {}\n    \
             platform: windows\n    os_version: 10\n",
            folder.name,
            folder.disk.display(),
            folder.snapshot.display(),
            folder.machineinfo.display(),
            folder.ip
        );
    }
    text
}

fn files_in(folder: &Path) -> Answer<Vec<PathBuf>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
}

/// The processes with this on their command line.
fn processes_with(text: &str) -> Answer<Vec<Pid>> {
    let mut found = Vec::new();
    for process in files_in(Path::new("/proc"))? {
        let pid = process.file_name().and_then(|name| name.to_str()?.parse().ok()).and_then(Pid::from_raw);
        // One that has ended meanwhile has no command line, and is none of ours.
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(text) {
            found.extend(pid);
        }
    }
    Ok(found)
}

#[test]
fn qemu_keeps_every_promise() {
    let lab = Lab::new();
    let name = lab.names[1].clone();
    let snapshot = lab.machines[&name].snapshot.clone();
    let whole = fs::read(&snapshot).unwrap();
    let (half, path) = (whole.len() / 2, snapshot.clone());
    let truncate = move || Ok(fs::File::options().write(true).open(&path)?.set_len(half as u64)?);
    let mend = move || Ok(fs::write(&snapshot, &whole)?);
    let subject = lab.subject().breakage(&name, truncate, mend);
    let plugin = artifacts::plugin("qemu").unwrap();
    let report = conformance::run(&plugin, &lab.setup(), &subject);
    println!("{report}");
    assert!(report.all_kept(), "{report}");
}

/// However a snapshot is broken, and in whatever format.
#[test]
fn a_broken_snapshot_leaves_nothing_behind() {
    let lab = Lab::new();
    let plugin = artifacts::plugin("qemu").unwrap();
    let mut kept = true;
    for (name, how, content) in lab.names.iter().flat_map(|name| lab.broken_snapshots(name)) {
        let [spoilt, mended] = [(); 2].map(|()| lab.machines[&name].snapshot.clone());
        let whole = fs::read(&spoilt).unwrap();
        let subject = lab.subject().patience(Duration::from_secs(20)).breakage(
            &name,
            move || Ok(fs::write(&spoilt, &content)?),
            move || Ok(fs::write(&mended, &whole)?),
        );
        let report = conformance::run_some(&plugin, &lab.setup(), &subject, &["failed_start"]);
        print!("{name}, {how}: {report}");
        kept &= report.all_kept() && report.not_tried().is_empty();
    }
    assert!(kept, "the lines above say which is not noticed");
}

/// What the leftovers are looked for with finds them when they are there.
#[test]
fn a_running_machine_is_something_that_could_be_left() {
    let lab = Lab::new();
    let qemu = loaded(lab.root.path());
    assert_eq!(lab.leftovers().unwrap(), Vec::<String>::new());
    qemu.restore_start(&lab.names[0], Deadline::after(SOON)).unwrap();
    let found = lab.leftovers().unwrap();
    for what in ["process", "_disposable.qcow2"] {
        assert!(found.iter().any(|left| left.contains(what)), "no {what} in {found:?}");
    }
    qemu.stop(&lab.names[0], Deadline::after(SOON)).unwrap();
}
