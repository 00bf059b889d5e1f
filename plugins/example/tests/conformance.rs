//! The requirements of a machinery, each a test by its name: `cargo test restore_start` checks that one.
//!
//! The suite opens the built library as a host does, and does not trust its results. The functions below inspect this
//! machinery's machines, break a start, and kill a machine.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::Instance;
use machinery::{Deadline, DumpFormat};
use machinery_conformance::{Answer, BackendSpec, Fixture, artifacts};

/// The number in the memory of each snapshot.
const SNAPSHOT: u32 = 1_000_000;
/// The timeout of calls that must succeed.
const TIMEOUT: Duration = Duration::from_secs(30);

machinery_conformance::conformance_main!(fixture);

/// Creates the fixture of each test: the library, a configuration, and the description of the backend.
fn fixture() -> Answer<Fixture> {
    let folder = Arc::new(tempfile::tempdir()?);
    let disks = folder.path().join("disks");
    let moved = folder.path().join("moved");
    let config = include_str!("conformance.yaml").replace("DISK_DIR", &disks.display().to_string());
    let [break_restore, repair] = [(&disks, &moved), (&moved, &disks)].map(|(from, to)| {
        let (from, to) = (from.clone(), to.clone());
        move || Ok(fs::rename(&from, &to)?)
    });
    let spec = BackendSpec::new(&["one", "two", "three"])
        .counts(SNAPSHOT..=2 * SNAPSHOT, number)
        .alive(number_grows)
        .leftovers(move || {
            // The folder does not exist before the first load.
            let disks = disks.read_dir().into_iter().flatten();
            disks.map(|disk| Ok(disk?.path().display().to_string())).collect()
        })
        .breakage("one", break_restore, repair)
        // Its configuration ends it after 500 ms.
        .death("mortal", || Ok(()))
        .timeout(TIMEOUT);
    Ok(Fixture::new(artifacts::plugin("example")?, &config, spec)?.keep(folder))
}

/// Reads the number in the guest's memory. It starts at the snapshot's number, or at 0 after a cold start.
fn number(plugin: &Instance, machine: &str) -> Answer<u32> {
    let folder = tempfile::tempdir()?;
    let dump = folder.path().join("dump");
    plugin.dump_memory(machine, &dump, DumpFormat::Elf, Deadline::after(TIMEOUT))?;
    // The memory is behind the headers, which end with zeros.
    let dump = fs::read(dump)?;
    let memory = dump.rsplit(|byte| *byte == 0).next().unwrap_or_default();
    Ok(std::str::from_utf8(memory)?.parse()?)
}

/// Waits until the number of a running guest has grown.
fn number_grows(plugin: &Instance, machine: &str) -> Answer<()> {
    let before = number(plugin, machine)?;
    let deadline = Deadline::after(TIMEOUT);
    while number(plugin, machine)? <= before {
        deadline.check("the number to grow")?;
    }
    Ok(())
}
