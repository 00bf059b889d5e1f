//! Writes a plugin's files for its caller: memory dumps and screenshots.
//!
//! The interface requires that such a file belongs to the caller, that it appears only when it is complete, and that
//! a failure leaves no file. An [`Output`] meets the requirement for any hypervisor: for one that gets a descriptor,
//! and for one that opens a path by itself. [`ppm_to_png`] converts the screenshot of a hypervisor to the required
//! PNG. [`write_core`] writes the memory that a hypervisor returns as an ELF core file.
//!
//! The crate is not part of the interface; plugins need not use it.

#![warn(missing_docs)]

mod core_file;
mod output;
mod picture;

pub use core_file::write_core;
pub use output::Output;
pub use picture::{is_ppm, ppm_to_png};
