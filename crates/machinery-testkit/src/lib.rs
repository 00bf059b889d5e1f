//! Tools for the tests of the whole workspace.
//!
//! - [`guest`]: analysis machines, made on demand: a boot sector that is up in a quarter of a second, and a
//!   small Linux with an agent, a disk and a network. The repository contains no image, and nothing is
//!   installed.
//! - [`snapshot`]: the formats of a memory snapshot.
//! - [`libvirt`]: a private libvirtd, with such machines as its domains.
//! - [`lab`]: a CWD with such machines.
//! - [`capture`]: capture files, packet by packet.
//! - [`scratch`], [`host`], [`client`]: a CWD, the machinery host that serves it, and a client. They end with
//!   their test.
//! - [`logged`]: a command under way, whose log names its steps.
//! - [`conformance`]: the requirements of a machinery plugin, as checks; a crate of its own, which needs no
//!   guests.
//! - [`processes`], [`random`]: the processes of this computer, and reproducible random numbers.
//! - [`browser`]: a real browser, for the host's web page.
//! - [`package`]: the files of a Debian package.
//! - [`prometheus`]: the checks of metrics and rules.
//! - [`requirement`]: what a test needs of this computer and its user.
//! - [`terminal`]: a program in a terminal, its screen and its keys.
//! - [`viewer`]: a viewer of a machine's console.
//! - [`trace`]: the system calls of a program.
//! - [`wait`]: waits for what no event reports.
//! - [`artifacts`], [`separate_build`]: the results of this build, and builds outside of the workspace.

pub mod artifacts;
pub mod browser;
mod cache;
pub mod capture;
pub mod client;
mod command;
mod error;
mod file_content;
pub mod guest;
pub mod host;
pub mod lab;
pub mod libvirt;
pub mod logged;
mod network;
pub mod package;
mod process;
pub mod processes;
pub mod prometheus;
pub mod random;
pub mod requirement;
mod resources;
pub mod scratch;
pub mod separate_build;
pub mod snapshot;
pub mod terminal;
pub mod trace;
pub mod version;
pub mod viewer;
pub mod wait;

pub use error::{Error, Result};
pub use machinery_conformance as conformance;
