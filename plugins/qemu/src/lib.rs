//! The `qemu` machinery: QEMU processes, controlled over QMP, restored by migration from a memory snapshot.
//!
//! A machine consists of three files that VMCloak makes: a disk, a memory snapshot, and the arguments of QEMU.
//! A restore creates overlays of the disk, starts QEMU with a paused guest, loads the snapshot as an incoming
//! migration, and resumes the guest. No disk snapshots are involved, and no shell. Most restores are prepared:
//! they only map a template, or resume a standby.
//!
//! | module | content |
//! | --- | --- |
//! | `config` | the configuration and its checks |
//! | `reload` | the load, and a new configuration while machines run |
//! | `check`, `needs`, `diagnose` | the environment, the needs of machines, and machines that cannot be used |
//! | `shared`, `peers` | everything that machines have in common; machines that claim the same resources |
//! | `machine` | one machine and its actions |
//! | `prepare` | templates: snapshots in the form that makes a restore instant |
//! | `standby` | a run that is loaded and paused |
//! | `restore`, `progress`, `refusal` | loads a snapshot or a template; its progress; why QEMU refuses a snapshot |
//! | `save` | writes a snapshot |
//! | `inspect` | memory dump and screenshot |
//! | `vnc` | the console of a run |
//! | `isolation` | the network of a run that is isolated |
//! | `jail` | the rights of a machine's QEMU |
//! | `leftovers` | the leftovers of a host that was killed |
//! | `orphans` | the runs of machines that are not configured any more |
//! | `run` | one run, from its process to its end |
//! | `launch`, `console`, `passed` | a process whose monitor is connected; its output; what it inherits |
//! | `tpm` | the TPM of a run |
//! | `qmp`, `states` | the monitor, and the meaning of QEMU's states |
//! | `resources` | the resources that only one QEMU at a time can use |
//! | `machineinfo`, `images`, `options` | the arguments, the files that they open, an option's value |
//! | `allowed` | the list of safe arguments |
//! | `snapshot`, `version` | the memory snapshot; the version of QEMU |

mod allowed;
mod check;
mod config;
mod console;
mod diagnose;
mod images;
mod inspect;
mod isolation;
mod jail;
mod launch;
mod leftovers;
mod machine;
mod machineinfo;
mod memory;
mod needs;
mod options;
mod orphans;
mod passed;
mod peers;
mod prepare;
mod progress;
mod qmp;
mod refusal;
mod reload;
mod resources;
mod restore;
mod run;
mod save;
mod shared;
mod snapshot;
mod standby;
mod states;
mod tpm;
mod version;
mod vnc;

use machinery_backend::Adapter;
use shared::Qemu;

machinery::export_machinery!(Adapter<Qemu>);
