//! Analysis machines to test with, made on the spot.
//!
//! ```no_run
//! use machinery_testkit::guest::{self, Guest, Qemu};
//! use machinery_testkit::snapshot::SnapshotFormat;
//! # fn main() -> machinery_testkit::Result<()> {
//! let qemu = Qemu::find()?;
//! let master = guest::master(&qemu, Guest::Micro)?;
//! let machine = master.machine("/tmp/win10_1".as_ref(), "win10_1", "127.0.5.1", SnapshotFormat::Lz4)?;
//! // … restore it, and see that it went on from where the snapshot was made:
//! let first = machine.first_count(std::time::Duration::from_secs(10))?;
//! assert_eq!(first, master.snapshot_count()? + 1);
//! # Ok(()) }
//! ```
//!
//! A *guest* is what runs ([`micro`], [`linux`]); a [`Master`] is a guest that was booted once and
//! saved; a [`MachineFolder`] is one machine made from a master, as an operator would have it. All
//! of it runs emulated (TCG), without KVM and without rights.

mod cpio;
pub mod linux;
mod machine;
mod master;
pub mod micro;
mod probe;
pub(crate) mod recipe;
pub(crate) mod serial;
mod vm;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use machine::MachineFolder;
pub use master::Master;
pub use probe::{GuestProbe, Marks};
pub use recipe::AGENT_PORT;
pub use vm::{DISK_PLACEHOLDER, Vm};

use crate::error::Error;
use crate::{Result, cache, command};

/// The programs of one QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// `qemu-system-x86_64`.
    pub system: PathBuf,
    /// `qemu-img`.
    pub img: PathBuf,
}

impl Qemu {
    /// The QEMU to test with: that in `$CUCKOO_TEST_QEMU_DIR` (its `bin`, else its `usr/bin`), else
    /// the one in `$PATH`.
    pub fn find() -> Result<Self> {
        match env::var_os("CUCKOO_TEST_QEMU_DIR").filter(|folder| !folder.is_empty()) {
            Some(dir) => Self::in_folders(&["bin", "usr/bin"].map(|bin| Path::new(&dir).join(bin))),
            None => Self::in_folders(
                &env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>(),
            ),
        }
    }

    fn in_folders(folders: &[PathBuf]) -> Result<Self> {
        let program = |name: &str| {
            let paths = folders.iter().map(|folder| folder.join(name));
            paths.into_iter().find(|path| path.is_file()).ok_or_else(|| {
                let places = env::join_paths(folders).unwrap_or_default();
                Error::new(format!(
                    "there is no {name} in {places:?}: install qemu-system-x86 and qemu-utils, or set CUCKOO_TEST_QEMU_DIR"
                ))
            })
        };
        Ok(Self { system: program("qemu-system-x86_64")?, img: program("qemu-img")? })
    }

    /// The first line of what `--version` says.
    pub fn version(&self) -> Result<String> {
        let said = command::output(Command::new(&self.system).arg("--version"))?;
        Ok(said.lines().next().unwrap_or_default().to_owned())
    }

    /// Makes `overlay`, a disk that holds what a run writes instead of `disk`.
    pub fn overlay(&self, disk: &Path, overlay: &Path) -> Result<()> {
        let mut create = Command::new(&self.img);
        create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([disk, overlay]);
        command::output(&mut create).map(drop)
    }
}

/// What runs in a test machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guest {
    /// A boot sector that counts: see [`micro`].
    Micro,
    /// The same guest on the machine that VMCloak makes, with its sound card and other devices. For QEMU
    /// only.
    Vmcloak,
    /// Linux with an agent: see [`linux`].
    Linux {
        /// RAM, in MiB; 256 is enough for a guest without noise.
        ram_mib: u32,
        /// How much of it is filled with what does not compress, in MiB.
        noise_mib: u32,
    },
    /// The same on a [`TestNetwork`](crate::lab::Wire), where it talks without end: see [`linux`]. For QEMU only.
    TrafficSource,
}

/// The master of `guest` for `qemu`, from `$CUCKOO_TESTKIT_CACHE` (else the user's cache folder),
/// made now if it is not there.
pub fn master(qemu: &Qemu, guest: Guest) -> Result<Master> {
    Master::in_cache(&cache::default()?, qemu, guest)
}

/// Like [`master`], in a cache of one's own.
pub fn master_in(cache: &Path, qemu: &Qemu, guest: Guest) -> Result<Master> {
    Master::in_cache(cache, qemu, guest)
}
