//! Analysis machines for tests, made on demand.
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
//! A *guest* is the software in a machine ([`micro`], [`linux`], [`analysis`]). A [`Master`] is a guest that was booted
//! once and saved. A [`MachineFolder`] is one machine made from a master, as an operator would have it. All
//! of them are emulated (TCG), and need neither KVM nor privileges.

mod agent;
pub mod analysis;
pub mod cape;
mod cpio;
pub mod debian;
pub mod firmware;
mod kind;
pub mod linux;
mod machine;
mod master;
pub mod micro;
mod monitor;
mod probe;
mod qemu;
pub(crate) mod recipe;
pub(crate) mod serial;
mod vm;

pub use kind::Guest;
pub use machine::MachineFolder;
pub use master::{Master, master, master_in};
pub use probe::{GuestProbe, Marks};
pub use qemu::Qemu;
pub use recipe::AGENT_PORT;
pub use vm::{DISK_PLACEHOLDER, Vm};
