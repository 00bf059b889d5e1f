//! What the tests of the whole workspace stand on.
//!
//! - [`guest`]: analysis machines to test with, made on the spot: a boot sector that is up in a
//!   quarter of a second, and a small Linux with an agent, a disk and a network. No image is kept
//!   in the repository and nothing is installed.
//! - [`snapshot`]: the formats in which a memory snapshot may be stored.
//! - [`libvirt`]: a libvirtd of one's own, and such machines as its domains.
//! - [`lab`]: all of it together, for experiments.
//! - [`capture`]: what was captured of a network, packet by packet.
//! - [`scratch`], [`host`], [`client`]: a CWD, the machinery host that serves it, and a client that
//!   talks to it. Nothing of them outlives its test.
//! - [`conformance`]: the requirements of a machinery plugin, as checks that any of them is put to; a
//!   crate of its own, for those who need no guests.
//! - [`artifacts`]: where the build has put what they run; [`separate_build`]: what is built on its own.

pub mod artifacts;
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
mod network;
mod process;
mod processes;
pub mod random;
mod resources;
pub mod scratch;
pub mod separate_build;
pub mod snapshot;

pub use error::{Error, Result};
pub use machinery_conformance as conformance;
pub use machinery_conformance::conformance_tests;
