//! The host's side: opens a plugin file step by step, and calls the plugin.
//!
//! ```text
//! open ─▶ is it a library? ─▶ is it a plugin? ─▶ same interface version?      no code of it runs
//!              ─▶ are its libraries installed? ─▶ same layout? ─▶ Plugin       it is loaded
//! Plugin::load(setup, services) ─▶ Instance, whose methods are called
//! ```
//!
//! The version is plain data in the file. It is compared before the library is loaded, because loading runs the
//! initialisers. Each step has its own error. An opened library is never unloaded: any thread may still run its
//! code.

mod header;
mod instance;
mod library;
mod open_error;
mod plugin;
mod reply;

pub use instance::Instance;
pub use open_error::OpenError;
pub use plugin::Plugin;

use crate::abi::{InterfaceVersion, panic_text};

/// Returns the version of the interface that this host implements, as `major.minor`.
pub fn interface_version() -> String {
    InterfaceVersion::OURS.to_string()
}

/// Returns the text of a panic that the host caught in its own code.
pub fn panic_message(panic: Box<dyn std::any::Any + Send>) -> String {
    panic_text(panic)
}
