//! The header of a plugin file, read from the file itself.
//!
//! Loading a library runs its initialisers, and the linker maps a file without looking whether it is whole:
//! touching what is missing kills the process. So what a file is, that all of it is there, and the version
//! of its interface are read beforehand. Source: the ELF-64 format of the System V ABI.

use std::fs::File;
use std::path::Path;

use object::read::elf::ElfFile64;
use object::{Object, ObjectSegment, ObjectSymbol, ReadCache, ReadRef};

use super::OpenError;
use crate::abi::InterfaceVersion;

/// The name of the static that `export_machinery!` defines.
const SYMBOL: &str = "MACHINERY_INTERFACE";

/// The version of the interface that the plugin was built for.
///
/// # Errors
/// It is not a whole library, or no plugin.
pub fn interface_of(path: &Path) -> Result<InterfaceVersion, OpenError> {
    let failed = |error: std::io::Error| OpenError::NotALibrary(error.to_string());
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let cache = ReadCache::new(file);
    let library = ElfFile64::<object::Endianness, _>::parse(&cache)
        .map_err(|error| OpenError::NotALibrary(format!("it is no whole ELF file: {error}")))?;
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

/// The bytes of the header, where the library has one.
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
