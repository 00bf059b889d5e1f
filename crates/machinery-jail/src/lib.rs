//! Confines a hypervisor's process.
//!
//! Code inside a hypervisor may be malware that has escaped from its guest. The plugin starts the program
//! `cuckoo-machinery-jail` in the hypervisor's place. It applies a [`Policy`] to itself and then executes the
//! hypervisor, which keeps its number and its parent:
//!
//! ```text
//! plugin ─▶ cuckoo-machinery-jail POLICY PROGRAM ARGS ─▶ cgroup ─▶ descriptors, limits ─▶ namespaces ─▶ user
//!               ─▶ no new privileges ─▶ Landlock ─▶ seccomp ─▶ execve(PROGRAM)
//! ```
//!
//! Each step only takes rights away, and none can be undone. The order follows from what the later steps forbid: a
//! process without root cannot change its user, and one behind the filter cannot make a namespace.
//!
//! The layers:
//!
//! | layer | needs | content |
//! | --- | --- | --- |
//! | A | nothing | no new privileges, an empty environment, descriptors, limits, Landlock, seccomp |
//! | B | root | a user for each machine, a network and an IPC namespace |
//! | C | a delegated cgroup | limits of memory and processes, an end of the whole run |
//!
//! | module | content |
//! | --- | --- |
//! | `policy` | [`Policy`]: the rights of a process |
//! | `apply` | [`enter`]: the steps above |
//! | `filter` | the seccomp filter |
//! | `paths` | the Landlock rules |
//! | `installed` | the place of the helper program |
//! | `support` | [`Support`]: the layers that this host can apply |

#![warn(missing_docs)]

mod apply;
mod filter;
mod installed;
mod paths;
mod policy;
mod support;

pub use apply::{JailError, enter};
pub use installed::{PROGRAM, installed};
pub use policy::{Limits, Network, Policy, User};
pub use support::{NOT_ROOT, Support};
