//! The commands that need no running host.

pub mod check;
pub mod conformance;
pub mod import;
pub mod new_plugin;
