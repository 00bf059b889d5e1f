//! Memory as an ELF core file, for hypervisors that only return the memory.

use std::io::{self, Write};

/// The size of the headers, which the memory follows.
const HEADERS: u64 = ELF_HEADER + PROGRAM_HEADER;
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// A 64-bit little-endian file of the current version, for System V.
const IDENT: [u8; 16] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0";
const TYPE_CORE: u16 = 4;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const READ_WRITE: u32 = 6;

/// Writes the memory of an x86-64 guest as an ELF core file with one segment, at the physical address 0. The file ends
/// with the memory.
///
/// # Errors
/// The file cannot be written.
pub fn write_core(memory: &[u8], mut to: impl Write) -> io::Result<()> {
    let length = memory.len() as u64;
    let mut headers = Vec::from(IDENT);
    put(&mut headers, &[&TYPE_CORE.to_le_bytes(), &MACHINE_X86_64.to_le_bytes(), &1_u32.to_le_bytes()]);
    // No entry point and no section headers. The program header follows this header.
    put(&mut headers, &[0, ELF_HEADER, 0].map(u64::to_le_bytes).each_ref().map(<[u8; 8]>::as_slice));
    put(&mut headers, &[&0_u32.to_le_bytes()]);
    let sizes = [ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0];
    put(&mut headers, &sizes.map(u16::to_le_bytes).each_ref().map(<[u8; 2]>::as_slice));
    put(&mut headers, &[&SEGMENT_LOAD.to_le_bytes(), &READ_WRITE.to_le_bytes()]);
    // Offset, virtual and physical address, sizes in the file and in memory, alignment.
    let segment = [HEADERS, 0, 0, length, length, 0];
    put(&mut headers, &segment.map(u64::to_le_bytes).each_ref().map(<[u8; 8]>::as_slice));
    to.write_all(&headers)?;
    to.write_all(memory)
}

fn put(headers: &mut Vec<u8>, fields: &[&[u8]]) {
    fields.iter().for_each(|field| headers.extend_from_slice(field));
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::{Object, ObjectKind, ObjectSegment};

    #[test]
    fn core_file_has_the_memory_as_its_only_segment() {
        let mut file = Vec::new();
        write_core(b"memory", &mut file).unwrap();
        assert_eq!(file.len() as u64, HEADERS + 6);
        let core = object::File::parse(&*file).unwrap();
        assert_eq!(core.kind(), ObjectKind::Core);
        let segments: Vec<_> = core.segments().map(|segment| segment.data().unwrap().to_owned()).collect();
        assert_eq!(segments, [b"memory"]);
    }
}
