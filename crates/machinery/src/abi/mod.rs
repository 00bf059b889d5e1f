//! The stable ABI, private to `export_machinery!` and the host.
//!
//! *Methods* are slots of a vtable. `abi_stable` compares it field by field when a plugin is opened. A new method is
//! added at the end. *Records* (a setup, the machines, an error) cross the border as JSON. A new field is a new key.
//! Neither breaks plugins that are already built. `docs/interface.md` lists the permitted changes, and
//! `tests/interfaces` contains the plugins that test them.
//!
//! ```text
//!            host process                        libmachinery_x.so
//!   host::Instance ── MachineryAbi (vtable) ──▶ plugin::Exported<X> ──▶ X: Machinery
//!   HostServices  ◀── ServicesAbi  (vtable) ──  services::HostOfPlugin ◀── machinery::Host
//! ```
//!
//! Every arrow between the two columns ends in a panic guard (`guard`). A panic becomes an [`Error`](crate::Error). It
//! never unwinds across the border, where it would abort the process. The receiving side also checks each text
//! (`sanitize`) before it uses it.
//!
//! # Limits
//!
//! A plugin is code in the host's process. Everything that aborts a process aborts the host:
//!
//! - a panic during another panic's unwinding, or in a plugin that was built with `panic = "abort"`;
//! - a panic in the `Drop` of the panic payload that a thread of the plugin ended with;
//! - a C++ exception that leaves a plugin, a stack overflow, an out-of-memory error, an invalid pointer.
//!
//! A call that never returns keeps its thread for the lifetime of the process. A call that never returns from
//! `dlopen` also holds the lock of the dynamic linker, and thus blocks every thread that the host starts.

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
