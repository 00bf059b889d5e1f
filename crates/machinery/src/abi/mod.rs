//! The stable ABI, private to `export_machinery!` and the host.
//!
//! *Methods* are slots of a vtable that `abi_stable` checks field by field when a plugin is opened;
//! new ones are added behind the last. *Records* (a setup, the machines, an error) cross as JSON
//! text; a new field is a new key. So neither breaks plugins that are already built. The rule of what may
//! change when is `docs/interface.md`, and `tests/interfaces` has what it is tried on.
//!
//! ```text
//!            host process                        libmachinery_x.so
//!   host::Instance ── MachineryAbi (vtable) ──▶ plugin::Exported<X> ──▶ X: Machinery
//!   HostServices  ◀── ServicesAbi  (vtable) ──  services::HostOfPlugin ◀── machinery::Host
//! ```
//!
//! Every arrow between the two columns ends in a panic guard (`guard`): a panic becomes an
//! [`Error`](crate::Error) and never unwinds across the border, where it would abort the process. And
//! each text is looked at on sanitize (`sanitize`) before it is believed.
//!
//! # What this cannot stand
//!
//! A plugin is code in the host's process. What aborts a process aborts the host: a panic while
//! another one unwinds, a panic in a plugin that was built with `panic = "abort"`, one in the `Drop` of
//! a panic's payload that a thread of the plugin ended with, an exception of C++ that leaves a plugin,
//! an overflow of the stack, memory that runs out, a wild pointer. And a call that does not come back
//! keeps its thread for as long as the process lives; one that does not come back from `dlopen` keeps the
//! dynamic linker locked as well, and with it every thread of the host that starts.

mod guard;
mod json;
mod logging;
pub mod plugin;
mod sanitize;
mod services;
mod version;
mod vtable;

pub use abi_stable::library::LibHeader;
pub use version::InterfaceVersion;
pub use vtable::ModuleRef;

pub(crate) use guard::panic_text;
pub(crate) use json::{Manifest, ReloadRequest, Reply, from_json, to_json};
pub(crate) use sanitize::text;
pub(crate) use services::abi_services;
pub(crate) use vtable::MachineryObject;
