//! The version of the interface.

use std::fmt;

/// The version of the interface, as plain data: the host reads it before any code of a plugin runs.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceVersion {
    /// Distinguishes a machinery plugin from other libraries.
    pub magic: [u8; 16],
    /// Interfaces with different major versions are incompatible.
    pub major: u32,
    /// A host accepts plugins of its own minor version and of all earlier ones.
    pub minor: u32,
}

impl InterfaceVersion {
    /// This crate's version.
    pub const OURS: InterfaceVersion = InterfaceVersion {
        magic: *b"cuckoo-machinery",
        major: number(env!("CARGO_PKG_VERSION_MAJOR")),
        minor: number(env!("CARGO_PKG_VERSION_MINOR")),
    };
}

// This runs at compile time, where a panic is a compile error.
#[allow(clippy::panic)]
const fn number(digits: &str) -> u32 {
    match u32::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => panic!("cargo gives versions as numbers"),
    }
}

impl fmt::Display for InterfaceVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
