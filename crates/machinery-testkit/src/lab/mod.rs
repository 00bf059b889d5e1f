//! Labs: a CWD with a machinery and machines to do experiments on.
//!
//! - [`Lab`]: QEMU processes, as the qemu machinery drives them.
//! - [`KvmLab`]: domains of a private libvirtd.
//!
//!
//! A lab [on a wire](Lab::with_network) has a network of its own. [`FileWatch`] and [`TinyDisk`] are for
//! accidents.
//!
//! What a run leaves is looked for by the lab's folder, which is on the command line of every process
//! that a run starts. A lab that is dropped ends what is left, and is an error then.

mod kvm;
mod kvm_fixture;
mod leftovers;
mod network;
mod qemu;
mod tiny_disk;
mod watch;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::Ipv4Addr;

pub use kvm::{KvmLab, KvmMachine};
pub use kvm_fixture::KvmFixture;
pub(crate) use leftovers::processes;
pub use network::TestNetwork;
pub use qemu::Lab;
pub use tiny_disk::TinyDisk;
pub use watch::{FileEvent, FileWatch};

/// A loopback address that most likely nobody else uses. Those that tests write down are in 127.0.
pub(crate) fn address() -> Ipv4Addr {
    let [a, b, c, ..] = RandomState::new().build_hasher().finish().to_be_bytes();
    Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254))
}
