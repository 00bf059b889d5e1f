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
    let [runs, moved] = ["runs", "moved"].map(|name| folder.path().join(name));
    fs::create_dir(&runs)?;
    let config = include_str!("conformance.yaml").replace("RUN_DIR", &runs.display().to_string());
    let (broken, repaired) = ((runs.clone(), moved.clone()), (runs.clone(), moved));
    // A file at the path of the folder makes every start fail.
    let break_restore = move || Ok(fs::rename(&broken.0, &broken.1).and_then(|()| fs::write(&broken.0, ""))?);
    let repair =
        move || Ok(fs::remove_file(&repaired.0).and_then(|()| fs::rename(&repaired.1, &repaired.0))?);
    let spec = BackendSpec::new(&["one", "two", "three"])
        .counts(SNAPSHOT..=2 * SNAPSHOT, number)
        .alive(number_grows)
        .leftovers(move || {
            let runs = runs.read_dir().into_iter().flatten();
            runs.map(|run| Ok(run?.path().display().to_string())).collect()
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
    // The memory is the end of the core file.
    let core = fs::read(dump)?;
    let number = core.last_chunk().ok_or("the dump is empty")?;
    Ok(u32::from_le_bytes(*number))
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
