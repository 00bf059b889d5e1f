//! Reads the memory that an internal snapshot of a qcow2 image holds: a migration stream of QEMU.
//!
//! QEMU writes the stream behind the end of the disk, and the snapshot's tables lead to it. No program may write to the
//! image meanwhile. The image may be from an untrusted QEMU, so each length is checked, and a table is read when it is
//! needed.
//!
//! Source: QEMU's `docs/interop/qcow2.rst`, and `qcow2_vm_state_offset` in its `block/qcow2.h`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use machinery::{Error, Result};

use crate::Header;
use crate::qcow2::Reader;

/// The bits of a table's entry that hold an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of a second-level entry: a compressed cluster, and one that reads as zeros.
const COMPRESSED: u64 = 1 << 62;
const ZEROS: u64 = 1;
/// Bit of the version 3 field `incompatible_features`: second-level entries have 16 bytes.
const EXTENDED_ENTRIES: u64 = 1 << 4;
/// The maximum size of a first-level table, in entries; QEMU opens no larger one.
const MAX_ENTRIES: u64 = (32 << 20) / 8;

/// The memory of an internal snapshot.
#[derive(Debug)]
pub struct SnapshotMemory {
    file: File,
    cluster: u64,
    /// The offsets of the second-level tables behind the end of the disk.
    tables: Vec<u64>,
    /// The present second-level table, with its index in `tables`.
    table: Option<(usize, Vec<u64>)>,
    at: u64,
    size: u64,
}

impl SnapshotMemory {
    /// Opens the memory of the snapshot with this name; `None` if the image has no such snapshot, or one without memory.
    ///
    /// # Errors
    /// The file cannot be read, its header or tables are invalid, or its form is unknown.
    pub fn open(path: &Path, snapshot: &str) -> Result<Option<SnapshotMemory>> {
        let Some(header) = Header::read(path)? else { return Ok(None) };
        let Some(index) = header.snapshots.iter().position(|one| one.name == snapshot && one.memory > 0)
        else {
            return Ok(None);
        };
        let size = header.snapshots[index].memory;
        let file = File::open(path).map_err(|error| Error::io("open the image", path, &error))?;
        let is_elsewhere = header.data_file.is_some();
        let found = if is_elsewhere { Err(unknown("a data file")) } else { tables(&file, &header, index) };
        let found = found.and_then(|found| expect_held(&file, &found, size).map(|()| found));
        let (cluster, tables) =
            found.map_err(|error| Error::io("read the snapshot's memory in", path, &error))?;
        Ok(Some(SnapshotMemory { file, cluster, tables, table: None, at: 0, size }))
    }

    /// Returns the size of the memory, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the second-level entry of the cluster with this number.
    fn entry(&mut self, number: u64) -> io::Result<u64> {
        let entries = self.cluster / 8;
        let index = usize::try_from(number / entries).map_err(io::Error::other)?;
        if self.table.as_ref().is_none_or(|(known, _)| *known != index) {
            let offset = *self.tables.get(index).ok_or_else(|| io::Error::other("its tables end early"))?;
            let mut bytes = vec![0; usize::try_from(self.cluster).map_err(io::Error::other)?];
            if offset != 0 {
                self.file.read_exact_at(&mut bytes, offset)?;
            }
            let (numbers, _) = bytes.as_chunks();
            self.table = Some((index, numbers.iter().map(|number| u64::from_be_bytes(*number)).collect()));
        }
        let at = usize::try_from(number % entries).map_err(io::Error::other)?;
        let entry = self.table.as_ref().and_then(|(_, table)| table.get(at));
        entry.copied().ok_or_else(|| io::Error::other("its tables end early"))
    }
}

impl Read for SnapshotMemory {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let within = self.at % self.cluster;
        let length = (self.size - self.at).min(self.cluster - within).min(buffer.len() as u64);
        let buffer = &mut buffer[..usize::try_from(length).map_err(io::Error::other)?];
        if buffer.is_empty() {
            return Ok(0);
        }
        let entry = self.entry(self.at / self.cluster)?;
        if entry & COMPRESSED != 0 {
            return Err(unknown("compressed clusters"));
        }
        match entry & OFFSET {
            offset if offset == 0 || entry & ZEROS != 0 => buffer.fill(0),
            offset => self.file.read_exact_at(buffer, offset + within)?,
        }
        self.at += length;
        Ok(buffer.len())
    }
}

/// Returns the size of a cluster, and the second-level tables of the memory of the snapshot with this index.
fn tables(file: &File, header: &Header, index: usize) -> io::Result<(u64, Vec<u64>)> {
    let reader = Reader(file);
    let cluster_bits = reader.u32(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(io::Error::other(format!("its clusters have 2^{cluster_bits} bytes")));
    }
    if reader.u32(32)? != 0 {
        return Err(unknown("an encrypted disk"));
    }
    if reader.u32(4)? >= 3 && reader.u64(72)? & EXTENDED_ENTRIES != 0 {
        return Err(unknown("subclusters"));
    }
    let mut at = reader.u64(64)?;
    for _ in 0..index {
        at = at.checked_add(entry_length(&reader, at)?).ok_or_else(|| io::Error::other("it has no end"))?;
    }
    let disk_size = if reader.u32(at + 36)? >= 16 { reader.u64(at + 48)? } else { header.size };
    let first = disk_size.div_ceil(1 << (2 * cluster_bits - 3));
    let (table, entries) = (reader.u64(at)?, u64::from(reader.u32(at + 8)?));
    if entries > MAX_ENTRIES || first > entries {
        return Err(io::Error::other(format!("its first-level table has {entries} entries")));
    }
    let mut bytes = vec![0; usize::try_from((entries - first) * 8).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, table.saturating_add(first * 8))?;
    let (numbers, _) = bytes.as_chunks();
    Ok((1 << cluster_bits, numbers.iter().map(|number| u64::from_be_bytes(*number) & OFFSET).collect()))
}

/// Expects that the tables lead to that many bytes, and that the file holds them: QEMU leaves out no cluster of a stream,
/// and no two have the same one.
fn expect_held(file: &File, (cluster, tables): &(u64, Vec<u64>), size: u64) -> io::Result<()> {
    let mapped = (tables.len() as u64).saturating_mul(cluster / 8).saturating_mul(*cluster);
    let held = mapped.min(file.metadata()?.len());
    if size <= held {
        return Ok(());
    }
    Err(io::Error::other(format!("it has {size} bytes, and the image holds at most {held}")))
}

/// Returns the length of the entry at offset `at` of the snapshot table.
fn entry_length(reader: &Reader<'_>, at: u64) -> io::Result<u64> {
    let names = u64::from(reader.u16(at + 12)?) + u64::from(reader.u16(at + 14)?);
    Ok((40 + u64::from(reader.u32(at + 36)?) + names).next_multiple_of(8))
}

fn unknown(what: &str) -> io::Error {
    io::Error::other(format!("it has {what}, which cannot be read here"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};

    /// Creates an image with two snapshots of a QEMU without a guest, and returns it.
    fn image(folder: &Path, options: &str) -> PathBuf {
        let path = folder.join("i");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]).args(options.split_whitespace()).arg(&path).arg("5M");
        assert!(create.status().unwrap().success());
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "none", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio", "-drive"]);
        qemu.arg(format!("if=none,format=qcow2,file={}", path.display()));
        let mut qemu = qemu.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        qemu.stdin.take().unwrap().write_all(b"savevm first\nsavevm clean\nquit\n").unwrap();
        assert!(qemu.wait().unwrap().success());
        path
    }

    fn memory(path: &Path, snapshot: &str) -> Vec<u8> {
        let mut memory = SnapshotMemory::open(path, snapshot).unwrap().unwrap();
        let mut bytes = Vec::new();
        memory.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, memory.size());
        bytes
    }

    #[test]
    fn memory_is_qemus_stream_in_each_form_of_an_image() {
        for options in ["", "-o compat=0.10", "-o cluster_size=512", "-o cluster_size=2M"] {
            let folder = tempfile::tempdir().unwrap();
            let path = image(folder.path(), options);
            for snapshot in ["first", "clean"] {
                let bytes = memory(&path, snapshot);
                // The stream begins with its magic number, and ends with the description of its devices.
                assert_eq!(bytes[..4], *b"QEVM", "{options}");
                assert!(bytes.ends_with(b"}"), "{options}: {:?}", &bytes[bytes.len() - 9..]);
            }
            assert!(SnapshotMemory::open(&path, "other").unwrap().is_none());
        }
    }

    #[test]
    fn memory_is_none_without_it_and_an_error_in_an_unknown_form() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "-o extended_l2=on");
        let error = SnapshotMemory::open(&path, "clean").unwrap_err().to_string();
        assert!(error.contains("subclusters") && error.contains(path.to_str().unwrap()), "{error}");
        fs::write(&path, "no image").unwrap();
        assert!(SnapshotMemory::open(&path, "clean").unwrap().is_none());
    }

    #[test]
    fn reading_ends_when_the_tables_are_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "");
        let sound = fs::read(&path).unwrap();
        let table = u64::from_be_bytes(sound[64..72].try_into().unwrap()) as usize;
        for at in [20, 24, 64, table, table + 8, table + 36, table + 40, table + 48] {
            for byte in [0x00, 0x7f, 0xff] {
                let mut damaged = sound.clone();
                damaged[at..at + 4].fill(byte);
                fs::write(&path, &damaged).unwrap();
                if let Ok(Some(mut memory)) = SnapshotMemory::open(&path, "clean") {
                    assert!(memory.size() <= sound.len() as u64);
                    let read = io::copy(&mut memory, &mut io::sink());
                    assert!(read.is_err() || memory.size() > 0);
                }
            }
        }
    }

    #[test]
    fn size_is_refused_when_the_image_cannot_hold_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "");
        let mut content = fs::read(&path).unwrap();
        let mut table = u64::from_be_bytes(content[64..72].try_into().unwrap());
        table += entry_length(&Reader(&File::open(&path).unwrap()), table).unwrap();
        for size in [u64::MAX, 1 << 62, 1 << 40, content.len() as u64 + 1] {
            let at = table as usize + 40;
            content[at..at + 8].copy_from_slice(&size.to_be_bytes());
            fs::write(&path, &content).unwrap();
            let refused = SnapshotMemory::open(&path, "clean").unwrap_err().to_string();
            assert!(refused.contains("the image holds at most"), "{refused}");
        }
    }
}
