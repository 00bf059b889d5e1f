//! The toolkit of a machinery plugin: the parts that every backend needs, apart from its hypervisor.
//!
//! The crate is not part of the interface, and a plugin need not use it. It has two layers, which can be used apart:
//!
//! - An [`Adapter`] around [`Shared`] and [`Backend`] implements [`Machinery`](machinery::Machinery) for a backend that
//!   thinks in single machines: it finds the machine of a name, names it in errors, applies a new configuration, and ends
//!   all machines.
//! - Parts for the machines themselves: processes, files, preparations, outputs.
//!
//! | module | content |
//! | --- | --- |
//! | `adapter` | [`Adapter`]: a `Machinery` of single machines |
//! | `shared`, `backend` | [`Shared`], [`Backend`]: what an author writes about all machines, and about one |
//! | `machine_set` | [`MachineSet`]: the machines, and a new configuration while they run |
//! | `work` | [`Work`]: the operation under way on one machine, and the cancellation of a preparation |
//! | [`process`] | processes, their console, their end, and the leftovers of a killed host |
//! | `process_machine` | [`ProcessMachine`]: a machine that is one process, with its run, its standby and its end |
//! | `run_folder` | [`RunFolder`]: the folder of one run, which is removed with the run |
//! | `overlay`, `qemu_img` | [`OverlayTemplates`], [`QemuImg`]: disposable disks |
//! | [`files`] | files that are replaced atomically, locks, free space |
//! | [`hash`] | a hash that is the same in every build |
//! | [`jail`] | the confinement of a hypervisor's process |
//! | [`cell`] | the isolated network of one run |
//! | `output` | [`Output`]: the file of a dump or a screenshot, which appears only when it is complete |
//! | `intake` | [`Intake`]: a pipe through which a hypervisor writes such a file |
//! | `memory_file` | [`MemoryFile`]: a file in memory that a hypervisor writes, such as a screenshot |
//! | `picture`, [`rfb`] | PNG from PPM or pixels, and the screen of a VNC server |
//! | [`elf`] | a memory dump as an ELF core file |
//! | `budget`, `keeper` | [`Budget`]: memory for standbys, and the thread that gives automatic ones back |
//! | `readiness`, `steps` | [`ReadinessReport`], [`Steps`]: reports to the host |
//! | `space` | [`DiskSpace`]: the free space that runs leave |
//! | `rate` | [`RateLimit`], [`LogLimit`]: a limit for what a guest can cause as often as it likes |
//! | [`refuse`] | errors of actions that a machine's state does not allow |
//! | [`sync`], [`concurrent`] | locks and waits; the same action on many machines |

#![warn(missing_docs)]

mod adapter;
mod backend;
mod budget;
pub mod cell;
pub mod concurrent;
pub mod elf;
pub mod files;
pub mod hash;
mod intake;
pub mod jail;
mod keeper;
mod machine_set;
mod memory_file;
mod output;
mod overlay;
mod picture;
pub mod process;
mod process_machine;
mod qemu_img;
mod rate;
mod readiness;
pub mod refuse;
pub mod rfb;
mod run_folder;
mod shared;
mod space;
mod steps;
pub mod sync;
mod work;

pub use adapter::Adapter;
pub use backend::{Backend, PrepareOrigin};
pub use budget::{Budget, Memory, Share, Standby};
pub use intake::{Copying, Intake};
pub use machine_set::{MachineKeys, MachineSet, ReloadPlan, Reloadable, expect_unchanged};
pub use memory_file::MemoryFile;
pub use output::Output;
pub use overlay::{
    ImageFile, OverlayTemplates, Overlays, expect_overlay_folder, overlay_path, remove_overlays,
};
pub use picture::{is_ppm, ppm_to_png, rgb_to_png};
pub use process_machine::{Guest, GuestProcess, ProcessMachine};
pub use qemu_img::{ImageFiles, QemuImg};
pub use rate::{LogLimit, RateLimit};
pub use readiness::ReadinessReport;
pub use run_folder::{RUN_VARIABLE, RunFolder};
pub use shared::Shared;
pub use space::{DiskSpace, DiskWriter};
pub use steps::Steps;
pub use work::{Cancellation, Operation, UnderWay, Work, WorkState};
