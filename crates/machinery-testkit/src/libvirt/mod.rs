//! A libvirtd of one's own, and test machines as its domains.
//!
//! A [`Libvirtd`] runs beside the system's, if there is one, and neither knows of the other: it has its
//! own configuration, sockets, state, and a view of the file system and of processes in which there is
//! no other. A [`Master`] is a guest with a snapshot, made once with one QEMU and libvirt; from it
//! domains are defined that are restored at once.
//!
//! Domains are of the type `qemu`, emulated like all test guests, so that they run everywhere.

mod daemon;
mod domain;
mod master;
mod namespaces;
mod settings;

pub use daemon::Libvirtd;
pub use master::{Master, SNAPSHOT, master};
