//! The requirements of a machinery, each a test by its name: `cargo test restore_start` checks that one.
//!
//! The suite opens the built library as a host does, and does not trust its results. The functions below inspect this
//! machinery's machines, break a start, and kill a machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::Instance;
use machinery::{Deadline, DumpFormat};
use machinery_backend::process::{RunningProcess, leftovers};
use machinery_conformance::{Answer, BackendSpec, Fixture, artifacts};

/// The number in each snapshot.
const SNAPSHOT: u32 = 1_000_000;
/// The address of the number in the guest's memory, and of the memory in the dump.
const NUMBER: usize = 4096;
/// The timeout of calls that must succeed.
const TIMEOUT: Duration = Duration::from_secs(30);

machinery_conformance::conformance_main!(fixture);

/// Creates the fixture of each test: the library, a configuration, and the description of the backend.
fn fixture() -> Answer<Fixture> {
    let folder = Arc::new(tempfile::tempdir()?);
    let snapshot = |machine: &str| folder.path().join(machine);
    for machine in ["one", "two", "three"] {
        fs::write(snapshot(machine), SNAPSHOT.to_string())?;
    }
    let config = include_str!("conformance.yaml")
        .replace("PROGRAM", env!("CARGO_BIN_EXE_example-process-guest"))
        .replace("FOLDER", &folder.path().display().to_string());
    let (one, two, three) = (snapshot("one"), snapshot("two"), snapshot("three"));
    let (repaired, resumed, all) = (one.clone(), three.clone(), folder.path().to_owned());
    let spec = BackendSpec::new(&["one", "two", "three"])
        .counts(SNAPSHOT..=2 * SNAPSHOT, number)
        .alive(number_grows)
        .leftovers(move || Ok(guests(&all).map(|guest| format!("process {}", guest.number())).collect()))
        .breakage(
            "one",
            move || Ok(fs::remove_file(&one)?),
            move || Ok(fs::write(&repaired, SNAPSHOT.to_string())?),
        )
        .death("two", move || guests(&two).try_for_each(|guest| Ok(guest.end()?)))
        .pause("three", move || pause(&three), move || signal(&resumed, "-CONT"))
        .timeout(TIMEOUT);
    Ok(Fixture::new(artifacts::plugin("example-process")?, &config, spec)?.keep(folder))
}

/// Finds the processes whose snapshot is that file, or in that folder.
fn guests(path: &Path) -> impl Iterator<Item = RunningProcess> {
    let path: PathBuf = path.to_owned();
    let is_guest = move |process: &RunningProcess| {
        process.args().any(|arg| std::str::from_utf8(arg).is_ok_and(|arg| Path::new(arg).starts_with(&path)))
            && process.args().nth(1) == Some(b"--restore")
    };
    leftovers().filter(is_guest)
}

/// Stops the process of that snapshot. A process that is busy stops some time after the signal.
fn pause(snapshot: &Path) -> Answer<()> {
    signal(snapshot, "-STOP")?;
    let deadline = Deadline::after(TIMEOUT);
    while !guests(snapshot).all(|guest| guest.is_stopped()) {
        deadline.check("the process to stop")?;
    }
    Ok(())
}

/// Sends a signal to the process of that snapshot.
fn signal(snapshot: &Path, signal: &str) -> Answer<()> {
    let guests = guests(snapshot).map(|guest| guest.number().to_string());
    // The shell has `kill` on every system; the program of that name may be missing.
    let mut kill = Command::new("sh");
    let sent = kill.args(["-c", "kill \"$@\"", "sh", signal]).args(guests).status()?;
    if sent.success() { Ok(()) } else { Err("kill has failed".into()) }
}

/// Reads the number in the guest's memory. It starts at the snapshot's number, or at 0 after a cold start.
fn number(plugin: &Instance, machine: &str) -> Answer<u32> {
    let folder = tempfile::tempdir()?;
    let dump = folder.path().join("dump");
    plugin.dump_memory(machine, &dump, DumpFormat::Elf, Deadline::after(TIMEOUT))?;
    let core = fs::read(dump)?;
    let number = core.get(NUMBER..).and_then(|memory| memory.first_chunk()).ok_or("the dump is too short")?;
    Ok(u32::from_le_bytes(*number))
}

/// Waits until the number of a running guest has grown.
fn number_grows(plugin: &Instance, machine: &str) -> Answer<()> {
    let (before, deadline) = (number(plugin, machine)?, Deadline::after(TIMEOUT));
    loop {
        deadline.check("the number to grow")?;
        if number(plugin, machine)? > before {
            return Ok(());
        }
    }
}
