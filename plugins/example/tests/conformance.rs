//! The requirements of a machinery, each a test by its name: `cargo test restore_start` tries that one.
//!
//! The suite opens the built library as a host does, and believes nothing: what is below tells it how to
//! look at this machinery's machines, how to spoil a start, and how to let a machine die.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::Instance;
use machinery::{Deadline, DumpFormat};
use machinery_conformance::{Answer, BackendSpec, Fixture, artifacts};

/// The number in the memory of each snapshot.
const SNAPSHOT: u32 = 1_000_000;
/// No call that ought to succeed takes so long.
const PATIENCE: Duration = Duration::from_secs(30);

machinery_conformance::conformance_tests!(fixture);

/// What each test is given: the library, a configuration, and the spec.
fn fixture() -> Answer<Fixture> {
    let folder = Arc::new(tempfile::tempdir()?);
    let disks = folder.path().join("disks");
    let spoilt = folder.path().join("spoilt");
    let config = include_str!("conformance.yaml").replace("DISK_DIR", &disks.display().to_string());
    let [spoil, mend] = [(&disks, &spoilt), (&spoilt, &disks)].map(|(from, to)| {
        let (from, to) = (from.clone(), to.clone());
        move || Ok(fs::rename(&from, &to)?)
    });
    let spec = BackendSpec::new(&["one", "two", "three"])
        .counts(SNAPSHOT..=2 * SNAPSHOT, number)
        .alive(number_grows)
        .leftovers(move || {
            // There is no folder before the first load.
            let disks = disks.read_dir().into_iter().flatten();
            disks.map(|disk| Ok(disk?.path().display().to_string())).collect()
        })
        .breakage("one", spoil, mend)
        // It is configured to die by itself.
        .death("mortal", || Ok(()))
        .timeout(PATIENCE);
    Ok(Fixture::new(artifacts::plugin("example")?, &config, spec)?.keep(folder))
}

/// The number in the guest's memory: from its snapshot on, or from 0 after a cold start.
fn number(plugin: &Instance, machine: &str) -> Answer<u32> {
    let folder = tempfile::tempdir()?;
    let dump = folder.path().join("dump");
    plugin.dump_memory(machine, &dump, DumpFormat::Elf, Deadline::after(PATIENCE))?;
    Ok(fs::read_to_string(dump)?.trim().parse()?)
}

/// A guest that lives counts.
fn number_grows(plugin: &Instance, machine: &str) -> Answer<()> {
    let before = number(plugin, machine)?;
    let deadline = Deadline::after(PATIENCE);
    while number(plugin, machine)? <= before {
        deadline.check("the number to grow")?;
    }
    Ok(())
}
