//! Reads the header of a plugin from its file.
//!
//! Loading a library runs its initialisers. The linker also maps a file without checking its length, and an
//! access to a missing page kills the process. This module therefore checks the file's format and length, and
//! reads the version of its interface, before the file is loaded. Source: the ELF-64 format of the System V ABI.

use std::fs::File;
use std::path::Path;

use object::read::elf::ElfFile64;
use object::{Object, ObjectSegment, ObjectSymbol, ReadCache, ReadRef};

use super::open_error::OpenError;
use crate::abi::InterfaceVersion;

/// The name of the static that `export_machinery!` defines.
const SYMBOL: &str = "MACHINERY_INTERFACE";

/// Returns the version of the interface that the plugin was built for.
///
/// # Errors
/// The file is not a complete library, or not a plugin.
pub fn interface_of(path: &Path) -> Result<InterfaceVersion, OpenError> {
    let failed = |error: std::io::Error| OpenError::NotALibrary(error.to_string());
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let cache = ReadCache::new(file);
    let library = ElfFile64::<object::Endianness, _>::parse(&cache)
        .map_err(|error| OpenError::NotALibrary(format!("it is not a complete ELF file: {error}")))?;
    expect_whole(&library, length)?;
    let header = bytes_of(&library).ok_or(OpenError::NotAPlugin)?;
    parsed(header)
        .filter(|version| version.magic == InterfaceVersion::OURS.magic)
        .ok_or(OpenError::NotAPlugin)
}

fn expect_whole<'data>(
    library: &ElfFile64<'data, object::Endianness, impl ReadRef<'data>>,
    length: u64,
) -> Result<(), OpenError> {
    let ends = library.segments().map(|segment| {
        let (start, size) = segment.file_range();
        start.saturating_add(size)
    });
    match ends.max() {
        Some(end) if end > length => {
            let why = format!("it is cut short: it has {length} bytes of at least {end}");
            Err(OpenError::NotALibrary(why))
        }
        _ => Ok(()),
    }
}

/// Returns the bytes of the header, if the library has one.
fn bytes_of<'data>(
    library: &ElfFile64<'data, object::Endianness, impl ReadRef<'data>>,
) -> Option<&'data [u8]> {
    let symbol = library.dynamic_symbols().find(|symbol| symbol.name() == Ok(SYMBOL))?;
    let size = u64::try_from(size_of::<InterfaceVersion>()).ok()?;
    library.segments().find_map(|segment| segment.data_range(symbol.address(), size).ok().flatten())
}

fn parsed(bytes: &[u8]) -> Option<InterfaceVersion> {
    let (magic, numbers) = bytes.split_first_chunk::<16>()?;
    let (major, minor) = numbers.split_first_chunk::<4>()?;
    Some(InterfaceVersion {
        magic: *magic,
        major: u32::from_ne_bytes(*major),
        minor: u32::from_ne_bytes(*minor.first_chunk::<4>()?),
    })
}
