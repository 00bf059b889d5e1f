//! Reading configuration so that every error names file, line, key and value.
//!
//! `serde_yaml` knows the line of everything it fails on. What is checked later (a value used
//! twice, a file that is missing) has lost its line by then, so [`ConfigFile::error`] finds it
//! again: it walks the text to that key and lets the parser say where it is.

mod faults;
mod file;
mod interface;
mod machines;
mod parse;
mod renamed;
mod values;

pub use file::ConfigFile;
pub use interface::{expect_interface, find_interface};
pub(crate) use machines::is_machine_name;
pub use machines::{Configured, MachineConfig, Machines};
pub use renamed::renamed_keys;
pub use values::{checked, empty_as_none, flag, lowercase, null_as_default, port, text, words};
