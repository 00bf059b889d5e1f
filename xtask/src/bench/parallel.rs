//! Many machines restored at the same moment, and their memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::json;

use super::figures::{Figures, Kind, Place, Unit, size};
use super::host::{Mode, Served, Session, succeeded};
use super::plan::{Plan, guest};
use super::turns::{self, timed};
use crate::run::{Context, Result, note};

/// A round takes long, and samples of memory hardly differ, so there are fewer rounds.
const ROUNDS_EACH: usize = 3;

/// The time until a restored guest is idle.
pub const IDLE_AFTER: Duration = Duration::from_secs(3);

/// Returns the kind of the time until all machines are restored.
pub fn restores(mode: Mode) -> Kind {
    let name = match mode {
        Mode::Plain => "all restored, plain",
        Mode::Instant => "all restored, instant",
        Mode::Standby => "all restored, standby",
    };
    let what = "the host: all restore_starts sent at the same moment, until the last is answered";
    Kind { by: "", name, what, unit: Unit::Ms }
}

/// Returns the kind of a machine's memory.
pub fn memory(mode: Mode) -> Kind {
    let name = match mode {
        Mode::Plain => "memory of one, plain",
        Mode::Instant => "memory of one, instant",
        Mode::Standby => "memory of one, standby",
    };
    let what = "PSS of all QEMU processes, a few seconds after that, divided by the number of machines";
    Kind { by: "", name, what, unit: Unit::MiB }
}

/// Measures each mode.
pub fn measure(plan: &Plan, figures: &mut Figures) -> Result<()> {
    let (count, ram) = (plan.machines, plan.machines_ram);
    note(&format!("{count} machines of {} are made", size(ram)));
    let names: Vec<String> = (0..count).map(|number| format!("m{number}")).collect();
    let machines: Vec<(&str, Guest, SnapshotFormat)> =
        names.iter().map(|name| (name.as_str(), guest(ram), SnapshotFormat::Plain)).collect();
    let lab = Lab::new(&machines)?;
    let memory_mib = u32::try_from(count).unwrap_or(u32::MAX).saturating_mul(ram);
    let parallel = ParallelMachines { lab: &lab, memory_mib, place: Place::AtOnce(count, ram) };
    let rounds = plan.rounds.div_ceil(ROUNDS_EACH);
    turns::take(plan.modes.clone(), |_| rounds, |mode, share| parallel.measure(mode, share, figures))
}

/// Many machines.
struct ParallelMachines<'a> {
    lab: &'a Lab,
    memory_mib: u32,
    place: Place,
}

impl ParallelMachines<'_> {
    /// Measures a mode; the first round does not count.
    fn measure(&self, mode: Mode, rounds: usize, figures: &mut Figures) -> Result<()> {
        let (lab, place) = (self.lab, self.place);
        let served = Served { cwd: lab.cwd(), machinery: "qemu", memory_mib: self.memory_mib };
        let mut session = Session::start(served, mode)?;
        for round in 0..=rounds {
            lab.names().try_for_each(|name| session.prepare(name))?;
            let took = all(&mut session, "restore_start", lab)?;
            if round > 0 {
                thread::sleep(IDLE_AFTER);
                figures.add(place, restores(mode), took);
                figures.add(place, memory(mode), memory_of_each(lab)?);
            }
            all(&mut session, "stop", lab)?;
        }
        session.end()
    }
}

/// Requests an action for every machine at once, waits for all answers, and returns the milliseconds.
fn all(session: &mut Session, action: &str, lab: &Lab) -> Result<f64> {
    let lines: String = lab
        .names()
        .map(|name| format!("{}\n", json!({"action": action, "machine": name, "id": name})))
        .collect();
    let client = session.client();
    let ((), took) = timed(|| {
        client.send_bytes(lines.as_bytes())?;
        lab.names().try_for_each(|_| succeeded(action, &client.next_message()?))
    })?;
    Ok(took)
}

/// Returns the memory of each machine, in MiB.
fn memory_of_each(lab: &Lab) -> Result<f64> {
    let machines = lab.names().count();
    Ok(memory_of_all(lab, machines)? / machines as f64)
}

/// Returns the memory of that many machines, in MiB.
pub fn memory_of_all(lab: &Lab, machines: usize) -> Result<f64> {
    let mut kib = 0.0;
    let processes = processes(&lab.qemu().system, lab.cwd().root())?;
    if processes.len() != machines {
        return Err(format!("{} QEMU processes run for {machines} machines", processes.len()).into());
    }
    for process in processes {
        kib += proportional_kib(&process)?;
    }
    Ok(kib / 1024.0)
}

/// Returns the folders in `/proc` of that program's processes with `folder` on their command line.
fn processes(program: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir("/proc").context(|| "cannot list processes in /proc".to_owned())?;
    let (program, folder) = (program.to_string_lossy(), folder.to_string_lossy());
    let is_one = |process: &PathBuf| {
        // A process without a command line has ended, or is the kernel's.
        let line = fs::read(process.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.split('\0').next() == Some(&program) && line.contains(&*folder)
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(is_one).collect())
}

/// Returns a process's memory, in which each page is divided by the number of processes that share it.
fn proportional_kib(process: &Path) -> Result<f64> {
    let path = process.join("smaps_rollup");
    let what = || format!("cannot read {}", path.display());
    let text = fs::read_to_string(&path).context(what)?;
    let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    pss.unwrap_or_default().trim().trim_end_matches(" kB").parse().context(what)
}
