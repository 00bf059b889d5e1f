//! Writes a memory dump as an ELF core file, for a hypervisor that only returns the bytes.
//!
//! The file has one `PT_LOAD` segment for each range of physical memory, which is what tools for memory analysis read.
//! Source: the ELF-64 format of the System V ABI; elf(5).

use std::io::{self, Read, Write};

/// The size of the file's header, and of the header of one segment, in bytes.
const FILE_HEADER: u64 = 64;
const SEGMENT_HEADER: u64 = 56;
/// The alignment of the segments in the file, in bytes: a page.
const ALIGNMENT: u64 = 4096;

/// The architecture of a guest. Source: `EM_*` in elf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// i386.
    X86,
    /// x86-64.
    X86_64,
    /// AArch64.
    Arm64,
}

impl Architecture {
    fn number(self) -> u16 {
        match self {
            Architecture::X86 => 3,
            Architecture::X86_64 => 62,
            Architecture::Arm64 => 183,
        }
    }
}

/// A range of the guest's physical memory.
pub struct Segment<'a> {
    /// The physical address of the first byte.
    pub address: u64,
    /// The length in bytes.
    pub length: u64,
    /// The content; it must have the whole length.
    pub memory: &'a mut dyn Read,
}

/// Writes memory that begins at the physical address 0 as a core file. The file ends with the memory.
///
/// # Errors
/// The file cannot be written.
pub fn write_memory(file: impl Write, architecture: Architecture, mut memory: &[u8]) -> io::Result<()> {
    let length = memory.len() as u64;
    write_core(file, architecture, &mut [Segment { address: 0, length, memory: &mut memory }])
}

/// Writes the segments as a core file.
///
/// # Errors
/// A segment is shorter than its length; the file cannot be written.
pub fn write_core(
    mut file: impl Write,
    architecture: Architecture,
    segments: &mut [Segment<'_>],
) -> io::Result<()> {
    let count = u16::try_from(segments.len()).map_err(|_| io::Error::other("too many segments"))?;
    file.write_all(&file_header(architecture, count))?;
    let headers_end = FILE_HEADER + SEGMENT_HEADER * u64::from(count);
    let mut offset = headers_end;
    for segment in segments.iter() {
        offset = offset.next_multiple_of(ALIGNMENT);
        file.write_all(&segment_header(offset, segment))?;
        offset += segment.length;
    }
    let mut written = headers_end;
    for segment in segments {
        let start = written.next_multiple_of(ALIGNMENT);
        io::copy(&mut io::repeat(0).take(start - written), &mut file)?;
        let copied = io::copy(&mut segment.memory.take(segment.length), &mut file)?;
        if copied != segment.length {
            let message = format!("{copied} bytes of {} at {:#x}", segment.length, segment.address);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        written = start + copied;
    }
    file.flush()
}

fn file_header(architecture: Architecture, segments: u16) -> Vec<u8> {
    // 64 bits, little-endian, version 1.
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    // ET_CORE.
    header.extend(4_u16.to_le_bytes());
    header.extend(architecture.number().to_le_bytes());
    header.extend(1_u32.to_le_bytes());
    // The entry point, and the places of the segments' and the sections' headers.
    [0, FILE_HEADER, 0].iter().for_each(|value: &u64| header.extend(value.to_le_bytes()));
    header.extend(0_u32.to_le_bytes());
    let (file_header, segment_header) = (FILE_HEADER as u16, SEGMENT_HEADER as u16);
    [file_header, segment_header, segments, 0, 0, 0]
        .iter()
        .for_each(|value| header.extend(value.to_le_bytes()));
    header
}

fn segment_header(offset: u64, segment: &Segment<'_>) -> Vec<u8> {
    // PT_LOAD; readable, writable, executable.
    let mut header = [1_u32, 7].map(u32::to_le_bytes).concat();
    let Segment { address, length, .. } = *segment;
    [offset, 0, address, length, length, ALIGNMENT]
        .iter()
        .for_each(|value| header.extend(value.to_le_bytes()));
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::read::elf::ElfFile64;
    use object::{Object, ObjectKind, ObjectSegment};

    #[test]
    fn core_has_the_memory_at_its_physical_addresses() {
        let (mut low, mut high) = (&[1_u8; 5000][..], &[2_u8; 100][..]);
        let mut file = Vec::new();
        let mut segments = [
            Segment { address: 0, length: 5000, memory: &mut low },
            Segment { address: 1 << 32, length: 100, memory: &mut high },
        ];
        write_core(&mut file, Architecture::X86_64, &mut segments).unwrap();
        let core = ElfFile64::<object::Endianness>::parse(&*file).unwrap();
        assert_eq!((core.kind(), core.architecture()), (ObjectKind::Core, object::Architecture::X86_64));
        let headers = core.elf_program_headers();
        let addresses: Vec<u64> = headers.iter().map(|header| header.p_paddr.get(core.endian())).collect();
        assert_eq!(addresses, [0, 1 << 32]);
        let contents: Vec<&[u8]> = core.segments().map(|segment| segment.data().unwrap()).collect();
        assert_eq!(contents, [&[1; 5000][..], &[2; 100]]);
    }

    #[test]
    fn core_ends_with_its_only_memory() {
        let mut file = Vec::new();
        write_memory(&mut file, Architecture::Arm64, b"memory").unwrap();
        let core = ElfFile64::<object::Endianness>::parse(&*file).unwrap();
        let contents: Vec<&[u8]> = core.segments().map(|segment| segment.data().unwrap()).collect();
        assert_eq!(contents, [b"memory"]);
        assert!(file.ends_with(b"memory"));
    }

    #[test]
    fn core_is_refused_when_the_memory_is_too_short() {
        let mut memory = &[1_u8; 5][..];
        let mut segments = [Segment { address: 0, length: 6, memory: &mut memory }];
        let error = write_core(Vec::new(), Architecture::X86, &mut segments).unwrap_err();
        assert_eq!(error.to_string(), "5 bytes of 6 at 0x0");
    }
}
