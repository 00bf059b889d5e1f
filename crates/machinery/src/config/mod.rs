//! Reads configuration files; every error names file, line, key and value.
//!
//! `serde_yaml` knows the line of each of its own errors. Later checks (a duplicate value, a missing file) do not know
//! the line any more. [`ConfigFile::error`] therefore finds the key in the text again.

mod faults;
mod file;
mod interface;
mod machines;
mod parse;
mod renamed;
mod values;

pub use file::ConfigFile;
pub use interface::{expect_interface, find_interface};
pub use machines::is_machine_name;
pub use machines::{Configured, MachineConfig, Machines};
pub use renamed::renamed_keys;
pub use values::{checked, empty_as_none, flag, lowercase, null_as_default, port, text, words};
