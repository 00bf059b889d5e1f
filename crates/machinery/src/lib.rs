//! The interface between a malware sandbox's machinery host and its virtualisation backends.
//!
//! A *machinery* drives virtual machines: it brings them to a saved running state, stops them,
//! looks at them. The host loads each machinery as a plugin, a shared library
//! `libmachinery_<name>.so`, and calls it across an ABI that outlives compilers.
//!
//! # Writing a plugin
//!
//! Implement [`Machinery`] in plain Rust and export it; everything about the ABI is generated:
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
//! with `crate-type = ["cdylib"]` and a library name of `machinery_<name>`. `cuckoo-machinery new-plugin`
//! writes such a crate, commented, tested and working, to begin with; `docs/plugins.md` is the guide.
//!
//! # Where things are
//!
//! | module | what it holds |
//! | --- | --- |
//! | `plugin` | the [`Machinery`] trait and what a plugin is given: [`Setup`], [`Deadline`] |
//! | `ready` | how ready a machine is for its next restore, and what that may cost: [`RestoreReadiness`], [`Budget`] |
//! | `reload` | a new configuration while machines run: [`MachineSet`], [`Reloaded`] |
//! | `diagnosis` | machines that cannot be used, and why: [`Diagnosis`] |
//! | `socket` | sockets under paths of any length |
//! | `command` | starts other programs with the limits that the host was started with |
//! | `services` | the way back, from the plugin to the host: [`Host`] |
//! | [`config`] | reading YAML with file, line and key in every error; the keys all machineries share |
//! | `error`, `report`, `state` | the words both sides use |
//! | `abi` | the stable ABI around it, generated and hidden |
//! | [`host`] | the host's side: opening a plugin file and calling it |

#![warn(missing_docs)]

#[doc(hidden)]
pub mod abi;
mod command;
pub mod config;
mod deadline;
mod diagnosis;
mod error;
pub mod host;
mod plugin;
mod ready;
mod reload;
mod report;
mod services;
mod socket;
mod state;
mod text;

pub use command::command;
pub use deadline::Deadline;
pub use diagnosis::Diagnosis;
pub use error::{Error, ErrorKind, Place, Result};
pub use plugin::{Capabilities, Conflict, DumpFormat, MachineInfo, Machinery, Setup};
pub use ready::{Budget, Readiness, RestoreReadiness, Share, Standby, format_bytes, parse_bytes};
pub use reload::{MachineSet, ReloadPlan, Reloadable, Reloaded, expect_unchanged};
pub use report::{Finding, Level, Report};
pub use services::{GUEST_POWERED_OFF, Host, HostServices, LogLevel, LogRecord};
pub use socket::{SocketPath, machine_socket};
pub use state::State;
