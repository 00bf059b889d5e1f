//! A private libvirtd, and test machines as its domains.
//!
//! A [`Libvirtd`] runs beside the system's. It has its own configuration, sockets and state, and its own view
//! of files and processes. A [`Master`] is a guest with a snapshot, made once for one QEMU and libvirt.
//! Domains are defined from it.
//!
//! Domains are emulated (type `qemu`) like all test guests, so that they run everywhere.

mod daemon;
mod domain;
mod master;
mod namespaces;
mod settings;
mod supervisor;

pub use daemon::Libvirtd;
pub use master::{Master, SNAPSHOT, master};
