//! Masters, and the machine folders made from them.
//!
//! A *master* is a guest that was booted and saved by one QEMU version: a disk and a memory snapshot that
//! belong together. It is made once and cached. A *machine folder* is an operator's machine as VMCloak makes
//! it: `disk.qcow2`, `memory.snapshot` and `machineinfo.json`.

use std::fs::{self, File};
use std::io::BufWriter;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::recipe::{AGENT_PORT, Network, Recipe};
use super::serial::{self, SerialWatch};
use super::vm::Vm;
use super::{Guest, GuestProbe, MachineFolder, Qemu, linux, micro};
use crate::Result;
use crate::cache;
use crate::error::{Context, Error};
use crate::network::TestNetwork;
use crate::snapshot::SnapshotFormat;

/// The maximum time of a boot, on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// The count at which the micro guest's snapshot is made. A cold boot starts at 1.
const SNAPSHOT_COUNT: u32 = 16;

const DISK: &str = "disk.qcow2";
const SNAPSHOT: &str = "memory.snapshot";
const MACHINEINFO: &str = "machineinfo.json";
const SERIAL: &str = "serial.log";
const COUNT: &str = "count";

/// A guest that was booted and saved.
#[derive(Debug, Clone)]
pub struct Master {
    recipe: Recipe,
    folder: PathBuf,
}

impl Master {
    /// Returns the master of `guest` in `cache`, and makes it if it does not exist.
    pub(super) fn in_cache(cache: &Path, qemu: &Qemu, guest: Guest) -> Result<Self> {
        let cache = cache::open(cache)?;
        let recipe = Recipe::of(guest, &cache)?;
        let folder = cache::folder(&cache, &recipe.name(qemu)?, |folder| build(qemu, &recipe, folder))?;
        Ok(Self { recipe, folder })
    }

    /// Returns the micro guest's count in the snapshot. A restored machine continues with the next one. Fails
    /// for a guest that does not count.
    pub fn snapshot_count(&self) -> Result<u32> {
        let path = self.folder.join(COUNT);
        let count = fs::read_to_string(&path)
            .context(|| format!("reading the snapshot's count, {}", path.display()))?;
        count.parse().context(|| format!("reading the snapshot's count, {}", path.display()))
    }

    /// Returns the snapshot in the cache, in `format`. All test runs share it, so it must not be changed.
    pub fn snapshot(&self, format: SnapshotFormat) -> Result<PathBuf> {
        let plain = self.folder.join(SNAPSHOT);
        let name = format!("{SNAPSHOT}{}", format.suffix());
        cache::file(&self.folder, &name, |file| {
            format.write(&mut File::open(&plain)?, BufWriter::with_capacity(1 << 20, file))
        })
    }

    /// Makes the machine `name` in the folder `dir`. Its agent answers at `ip`, a loopback address; its
    /// snapshot is stored as `format`.
    pub fn machine(&self, dir: &Path, name: &str, ip: &str, format: SnapshotFormat) -> Result<MachineFolder> {
        let what = || format!("making the machine {name} in {}", dir.display());
        let ip: Ipv4Addr = ip.parse().context(|| format!("reading the machine {name}'s address {ip:?}"))?;
        fs::create_dir_all(dir).context(what)?;
        let dir = dir.canonicalize().context(what)?;
        fs::copy(self.folder.join(DISK), dir.join(DISK)).context(what)?;
        fs::copy(self.snapshot(format)?, dir.join(SNAPSHOT)).context(what)?;
        let mut start_args = self.recipe.start_args(&dir.join(SERIAL), Some(ip));
        // The arguments of a machine name files in the machine's own folder only.
        for file in self.recipe.boot_files() {
            let own = dir.join(file.file_name().unwrap_or_default());
            fs::copy(&file, &own).context(what)?;
            start_args
                .iter_mut()
                .filter(|arg| Path::new(arg.as_str()) == file)
                .for_each(|arg| *arg = own.display().to_string());
        }
        let info = machineinfo(&self.recipe, name, ip, &start_args);
        fs::write(dir.join(MACHINEINFO), format!("{info:#}\n")).context(what)?;
        let probe = GuestProbe { name: name.to_owned(), ip: ip.to_string(), serial: dir.join(SERIAL) };
        Ok(MachineFolder {
            disk: dir.join(DISK),
            snapshot: dir.join(SNAPSHOT),
            machineinfo: dir.join(MACHINEINFO),
            start_args,
            probe,
            dir,
        })
    }
}

/// Returns the master of `guest` for `qemu` from `$CUCKOO_TESTKIT_CACHE`, or the user's cache folder. Makes
/// it if it does not exist.
pub fn master(qemu: &Qemu, guest: Guest) -> Result<Master> {
    Master::in_cache(&cache::default()?, qemu, guest)
}

/// Returns a master like [`master`], from another cache.
pub fn master_in(cache: &Path, qemu: &Qemu, guest: Guest) -> Result<Master> {
    Master::in_cache(cache, qemu, guest)
}

/// Boots the guest in `folder` and saves it there. The guest writes to the disk without an overlay, so that
/// the disk matches the memory.
fn build(qemu: &Qemu, recipe: &Recipe, folder: &Path) -> Result<()> {
    let (disk, serial) = (folder.join(DISK), folder.join(SERIAL));
    recipe.make_disk(qemu, &disk)?;
    let watch = SerialWatch::new(&serial)?;
    let mut vm = Vm::boot(qemu, &recipe.start_args(&serial, None), &disk)?;
    match recipe {
        Recipe::Micro | Recipe::Vmcloak => write_count(folder, pause_between_counts(&mut vm, &watch)?)?,
        Recipe::Linux { .. } | Recipe::Analysis { .. } => {
            vm.wait_for_serial(&watch, BOOT_TIMEOUT, |said| said.contains(linux::READY).then_some(()))?;
            vm.pause()?;
        }
    }
    vm.save(&folder.join(SNAPSHOT))?;
    vm.quit()?;
    fs::remove_file(&serial).context(|| format!("removing {}", serial.display()))
}

/// Pauses the micro guest when it sleeps and has printed its last count completely. The first count of a
/// restored machine is then known exactly.
fn pause_between_counts(vm: &mut Vm, watch: &SerialWatch) -> Result<u32> {
    let mut wanted = SNAPSHOT_COUNT;
    loop {
        wanted = vm.wait_for_serial(watch, BOOT_TIMEOUT, |said| {
            serial::counts(said).next_back().filter(|n| *n >= wanted)
        })?;
        vm.pause()?;
        let count = counter(&vm.memory(micro::MAGIC_ADDRESS, 12)?)?;
        let said = vm.wait_for_serial(watch, BOOT_TIMEOUT, |said| Some(said.to_owned()))?;
        if said.ends_with('\n') && serial::counts(&said).next_back() == Some(count) {
            return Ok(count);
        }
        vm.cont()?;
        wanted += 1;
    }
}

/// Returns the count in the micro guest's memory, which starts with its magic.
fn counter(memory: &[u8]) -> Result<u32> {
    let count = memory.strip_prefix(&micro::MAGIC).and_then(|rest| rest.first_chunk::<4>());
    let count =
        count.ok_or_else(|| Error::new(format!("the micro guest's counter is not in {memory:02x?}")))?;
    Ok(u32::from_le_bytes(*count))
}

fn write_count(folder: &Path, count: u32) -> Result<()> {
    let path = folder.join(COUNT);
    fs::write(&path, count.to_string()).context(|| format!("writing {}", path.display()))
}

fn machineinfo(recipe: &Recipe, name: &str, ip: Ipv4Addr, start_args: &[String]) -> serde_json::Value {
    let [_, a, b, c] = ip.octets();
    let (os_name, os_version) = match recipe {
        // The most common analysis system.
        Recipe::Micro | Recipe::Vmcloak | Recipe::Analysis { .. } => ("windows", "10"),
        Recipe::Linux { .. } => ("linux", "12"),
    };
    let bridge = match recipe {
        Recipe::Linux { network: Network::Tap, .. } => TestNetwork::TAP,
        Recipe::Analysis { .. } => TestNetwork::BRIDGE,
        // An interface of every host.
        _ => "lo",
    };
    serde_json::json!({"machine": {
        "name": name,
        "ip": ip.to_string(),
        "agent_port": AGENT_PORT,
        "os_name": os_name,
        "os_version": os_version,
        "architecture": "amd64",
        "bridge": bridge,
        "mac": format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"),
        "disk": DISK,
        "memory_snapshot": SNAPSHOT,
        "tags": [],
        "start_args": start_args,
    }})
}
