//! The `kvm` machinery: domains of libvirt, restored from their snapshots.
//!
//! A machine is a domain that the operator has defined, with a snapshot of the moment in which Cuckoo's agent
//! waits for work. A restore reverts to that snapshot: libvirt starts QEMU, loads the memory and reverts the
//! disk. That takes as long as it takes to read the snapshot. Where there is enough memory, a machine can
//! have a *standby*: a domain that is reverted ahead of time and paused, which a restore only resumes.
//!
//! libvirt reports the changes of a domain by events, so the plugin never polls. libvirt's calls block without
//! a limit, so each runs in a thread of its own and the caller waits until its deadline.
//!
//! ```text
//!   the host's calls ─▶ machine ─▶ connection ─▶ call (a thread) ─▶ libvirtd, one of several
//!   the host ◀─ state_changed ◀─ machine ◀─ connection ◀─ events (one thread) ◀─ libvirtd
//! ```
//!
//! | module | content |
//! | --- | --- |
//! | `config` | the configuration and its checks |
//! | `shared` | everything that the machines share |
//! | `machine` | one machine: the actions on it, and its events |
//! | `reload` | the load, a new configuration while machines run, and the end |
//! | `domain`, `snapshot`, `restore` | a domain, its snapshot, and its start from the snapshot |
//! | `standby` | the standby, and the check that it is unchanged |
//! | `prepare` | save images: their sources, their folders, and disks that `qemu-img` reverts |
//! | `leftovers`, `owners` | records of the host's own runs, for the next host; the owners of their files |
//! | `foreign` | foreign work: changes by somebody else, which automatic work never destroys |
//! | `inspect` | memory dump and screenshot |
//! | `console` | the console of a running domain |
//! | `connection`, `dsn` | the connection to a libvirt, which survives a restart of libvirtd, and its address |
//! | `connections` | the connections to all libvirts of the configuration |
//! | `call` | calls with a timeout |
//! | `events`, `prepare/save`, `console`, `errno` | libvirt's event loop, saving to a file, the console, the system's errors: all `unsafe` code |
//! | `states`, `errors` | the meaning of libvirt's states, events and errors |
//! | `description`, `files` | libvirt's XML as types, and the files that it names |
//! | `check`, `compare`, `access`, `confinement`, `reaping` | the checks of `cuckoo-machinery check`, among them how libvirt confines QEMU |

mod access;
mod call;
mod check;
mod compare;
mod config;
mod confinement;
mod connection;
mod connections;
mod console;
mod description;
mod domain;
mod dsn;
mod errno;
mod errors;
mod events;
mod files;
mod foreign;
mod inspect;
mod leftovers;
mod machine;
mod owners;
mod prepare;
mod reaping;
mod reload;
mod restore;
mod shared;
mod snapshot;
mod standby;
mod states;
#[cfg(test)]
mod test_driver;

use machinery_backend::Adapter;
use shared::Kvm;

machinery::export_machinery!(Adapter<Kvm>);
