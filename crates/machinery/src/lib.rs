//! The interface between a malware sandbox's machinery host and its virtualisation backends.
//!
//! A *machinery* controls virtual machines: it restores them to a snapshot, stops them, and inspects them. The
//! host loads each machinery as a plugin, a shared library `libmachinery_<name>.so`. It calls the plugin across an
//! ABI that does not depend on the compiler.
//!
//! # Writing a plugin
//!
//! Implement [`Machinery`] in plain Rust and export it. The macro generates everything that the ABI needs:
//!
//! ```
//! use machinery::{Capabilities, Deadline, Error, Host, MachineInfo, Machinery, Result, Setup, State};
//!
//! struct Nothing;
//!
//! impl Machinery for Nothing {
//!     const NAME: &'static str = "nothing";
//!
//!     fn load(_: &Setup, _: Host) -> Result<Self> {
//!         Ok(Nothing)
//!     }
//!     fn version(&self, _: Deadline) -> Result<String> {
//!         Ok("none".to_owned())
//!     }
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities::default()
//!     }
//!     fn machines(&self) -> Vec<MachineInfo> {
//!         Vec::new()
//!     }
//!     fn state(&self, machine: &str, _: Deadline) -> Result<State> {
//!         Err(Error::no_such_machine(machine))
//!     }
//!     fn restore_start(&self, machine: &str, _: Deadline) -> Result<()> {
//!         Err(Error::no_such_machine(machine))
//!     }
//!     fn stop(&self, machine: &str, _: Deadline) -> Result<()> {
//!         Err(Error::no_such_machine(machine))
//!     }
//!     fn shutdown(&self, _: Deadline) -> Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! machinery::export_machinery!(Nothing);
//! # fn main() {}
//! ```
//!
//! The crate needs `crate-type = ["cdylib"]` and the library name `machinery_<name>`. `cuckoo-machinery new-plugin`
//! writes such a crate, with comments and tests, as a working start. `docs/plugins.md` is the guide.
//!
//! # Where things are
//!
//! | module | content |
//! | --- | --- |
//! | `plugin`, `machine_info` | the [`Machinery`] trait, its [`Setup`] and its [`MachineInfo`] |
//! | `deadline` | the deadline of a call: [`Deadline`] |
//! | `ready` | a machine's readiness for its next restore: [`RestoreReadiness`] |
//! | `reserve` | the disk space that stays free: [`FreeSpaceReserve`] |
//! | `reload` | the answer to a new configuration while machines run: [`Reloaded`] |
//! | `diagnosis` | machines that cannot be used, and the reasons: [`Diagnosis`] |
//! | `socket` | sockets with paths of any length: [`SocketPath`] |
//! | `command` | starts other programs with the limits of open files that the host was started with |
//! | `services` | calls from the plugin to the host: [`Host`] |
//! | [`config`] | reads YAML, with file, line and key in every error; the keys that all machineries share |
//! | `error`, `report`, `state` | errors, findings of a check, and machine states: [`Error`], [`Report`], [`State`] |
//! | [`trust`] | files that decide which code runs, and the users who can change them |
//! | `text` | limits on the texts that cross the interface |
//! | `abi` | the stable ABI, generated and hidden |
//! | [`host`] | the host's side: opens a plugin file and calls the plugin |

#![warn(missing_docs)]

#[doc(hidden)]
pub mod abi;
mod command;
pub mod config;
mod deadline;
mod diagnosis;
mod error;
pub mod host;
mod machine_info;
mod plugin;
mod ready;
mod reload;
mod report;
mod reserve;
mod services;
mod setup;
mod socket;
mod state;
mod text;
pub mod trust;

pub use command::command;
pub use deadline::Deadline;
pub use diagnosis::Diagnosis;
pub use error::{Error, ErrorKind, Place, Result};
pub use machine_info::MachineInfo;
pub use plugin::{Capabilities, Conflict, DumpFormat, Machinery};
pub use ready::{Readiness, RestoreReadiness, format_bytes, parse_bytes};
pub use reload::Reloaded;
pub use report::{Finding, Level, Report};
pub use reserve::FreeSpaceReserve;
pub use services::{GUEST_POWERED_OFF, Host, HostServices, LogLevel, LogRecord};
pub use setup::Setup;
pub use socket::{SocketPath, machine_socket};
pub use state::State;
