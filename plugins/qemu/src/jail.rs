//! What a machine's QEMU may do: the policy of its jail, from its arguments.
//!
//! Everything that QEMU opens by a path is named in its arguments or made by this plugin. Everything else QEMU gets as a
//! descriptor: the monitor's socket, the RAM, snapshots, and taps.
//!
//! | module | content |
//! | --- | --- |
//! | `policy` | the files, devices and ports that the arguments name |
//! | `taps` | the taps that the plugin opens in QEMU's place |

mod policy;
mod taps;

pub use policy::policy_of;
pub use taps::{Passed, pass_taps};

/// QEMU's own filter of system calls, beside the jail's. libvirt uses the same. Source: `-sandbox` in QEMU's
/// qemu-options.hx.
pub const SANDBOX: [&str; 2] =
    ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];
