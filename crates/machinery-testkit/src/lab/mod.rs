//! Labs: a CWD with a machinery and machines for tests.
//!
//! - [`Lab`]: QEMU processes of the qemu machinery.
//! - [`KvmLab`]: domains of a private libvirtd.
//! - [`AnalysisLab`]: QEMU processes under Cuckoo3, for whole analyses.
//!
//! A lab [with a network](Lab::with_network) has a [`TestNetwork`] of its own. [`FileWatch`] and [`TinyDisk`]
//! help to cause failures at a given moment.
//!
//! Each process of a run has the lab's folder on its command line, by which the lab finds leftovers. A lab
//! that is dropped kills leftover processes, and panics if there are leftovers.

mod analysis;
mod kvm;
mod kvm_fixture;
mod leftovers;
mod qemu;
mod settings;
mod tiny_disk;
mod watch;

pub use analysis::{Analysis, AnalysisLab, Cuckoo, Manager, Report, SAMPLE_NAME, Step, Timeline};
pub use kvm::{KvmLab, KvmMachine};
pub use kvm_fixture::KvmFixture;
pub use qemu::Lab;
pub use tiny_disk::TinyDisk;
pub use watch::{FileEvent, FileWatch};

pub use crate::network::{TestNetwork, loopback_address};
