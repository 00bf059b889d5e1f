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
mod qemu;
mod tiny_disk;
mod watch;

pub use kvm::{KvmLab, KvmMachine};
pub use kvm_fixture::KvmFixture;
pub use qemu::Lab;
pub use tiny_disk::TinyDisk;
pub use watch::{FileEvent, FileWatch};

pub use crate::network::TestNetwork;
