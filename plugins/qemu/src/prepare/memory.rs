//! The memory of this computer that templates need for a while.

use std::io;

use machinery::{Error, format_bytes};
use machinery_backend::Memory;

/// The memory of this computer, in bytes, that a build leaves to running guests.
const MIN_FREE_MEMORY: u64 = 512 << 20;

/// Describes a lack of memory for work that needs that much, in bytes; `None` if there is enough.
pub fn memory_shortage(what: &str, needed: u64) -> Option<String> {
    let available = Memory::now()?.available;
    (needed.saturating_add(MIN_FREE_MEMORY) > available).then(|| {
        format!(
            "{what} takes {} of memory, and only {} are available",
            format_bytes(needed),
            format_bytes(available)
        )
    })
}

/// Returns the error of a file in memory.
pub fn no_memory(error: &io::Error) -> Error {
    Error::environment(format!("cannot make a file in memory: {error}"))
}
