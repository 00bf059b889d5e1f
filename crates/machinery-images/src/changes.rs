//! Detects whether a qcow2 image holds content that a return to one of its snapshots would discard.
//!
//! The clusters of an image are reached through two levels of tables. A snapshot has a first-level table of
//! its own, and shares the second level with the image. A write copies the second-level table that it
//! changes, so the image's first-level entry then refers to the copy. An image whose first-level entries
//! equal those of a snapshot therefore holds the content of this snapshot, and nothing else.
//!
//! Source: QEMU's `docs/interop/qcow2.rst` and `qcow2_snapshot_goto` in its `block/qcow2-snapshot.c`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use machinery::{Error, Result};

use crate::Header;
use crate::qcow2::Reader;

/// The bits of a first-level entry that hold the offset of a second-level table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit of the version 3 field `incompatible_features`: second-level entries have 16 bytes.
const EXTENDED_ENTRIES: u64 = 1 << 4;
/// The maximum size of a first-level table, in entries; QEMU opens no larger one.
const MAX_ENTRIES: u64 = (32 << 20) / 8;

/// Reports whether the qcow2 image at `path` holds changes that are in none of its snapshots. An image without
/// content of its own, such as a new overlay, has none. Returns `None` if the file is not a qcow2 image.
///
/// No program may write to the image during the call.
///
/// # Errors
/// The file cannot be read, or its header or tables are invalid.
pub fn has_unsaved_changes(path: &Path) -> Result<Option<bool>> {
    let Some(header) = Header::read(path)? else { return Ok(None) };
    let file = File::open(path).map_err(|error| Error::io("open the image", path, &error))?;
    let differs = Tables { reader: Reader(&file), disk_size: header.size }.differ_from_all_snapshots();
    differs.map(Some).map_err(|error| Error::io("read the tables of the image", path, &error))
}

/// Reports whether the qcow2 image at `path` holds the content of this snapshot, and nothing else.
///
/// No program may write to the image during the call.
///
/// # Errors
/// As [`has_unsaved_changes`].
pub fn is_at_snapshot(path: &Path, snapshot: &str) -> Result<bool> {
    let Some(header) = Header::read(path)? else { return Ok(false) };
    let file = File::open(path).map_err(|error| Error::io("open the image", path, &error))?;
    let tables = Tables { reader: Reader(&file), disk_size: header.size };
    let wanted = header.snapshots.iter().position(|one| one.name == snapshot);
    let found = tables.snapshots_with_same_content();
    let found = found.map_err(|error| Error::io("read the tables of the image", path, &error))?;
    Ok(wanted.is_some_and(|wanted| found.iter().any(|same| *same as usize == wanted)))
}

/// The first-level tables of an open image.
struct Tables<'a> {
    reader: Reader<'a>,
    disk_size: u64,
}

impl Tables<'_> {
    fn differ_from_all_snapshots(&self) -> io::Result<bool> {
        let active = self.active()?;
        Ok(active.iter().any(|entry| *entry != 0) && self.snapshots_with_same_content()?.is_empty())
    }

    /// Returns the active table.
    fn active(&self) -> io::Result<Vec<u64>> {
        self.table(self.reader.u64(40)?, self.reader.u32(36)?, self.entries()?)
    }

    /// Returns the indices of the snapshots whose tables equal the active one.
    fn snapshots_with_same_content(&self) -> io::Result<Vec<u32>> {
        let (active, entries) = (self.active()?, self.entries()?);
        let mut same = Vec::new();
        let mut at = self.reader.u64(64)?;
        for index in 0..self.reader.u32(60)? {
            let (table, length) = self.snapshot(at, entries)?;
            if table.is_some_and(|table| table == active) {
                same.push(index);
            }
            at = at.checked_add(length).ok_or_else(|| io::Error::other("its snapshot table has no end"))?;
        }
        Ok(same)
    }

    /// Returns the number of first-level entries of the disk; the entries after them hold a snapshot's
    /// memory.
    fn entries(&self) -> io::Result<u64> {
        let cluster_bits = self.reader.u32(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(io::Error::other(format!("its clusters have 2^{cluster_bits} bytes")));
        }
        let is_extended = self.reader.u32(4)? >= 3 && self.reader.u64(72)? & EXTENDED_ENTRIES != 0;
        let covered = 1_u64 << (2 * cluster_bits - if is_extended { 4 } else { 3 });
        match self.disk_size.div_ceil(covered) {
            entries if entries <= MAX_ENTRIES => Ok(entries),
            entries => Err(io::Error::other(format!("its first-level table has {entries} entries"))),
        }
    }

    /// Returns the first `entries` offsets of a table, padded with zeros.
    fn table(&self, at: u64, length: u32, entries: u64) -> io::Result<Vec<u64>> {
        let length = u64::from(length).min(entries);
        let mut bytes = vec![0; usize::try_from(length * 8).map_err(io::Error::other)?];
        self.reader.0.read_exact_at(&mut bytes, at)?;
        let (numbers, _) = bytes.as_chunks();
        let mut table: Vec<u64> = numbers.iter().map(|number| u64::from_be_bytes(*number) & OFFSET).collect();
        table.resize(usize::try_from(entries).map_err(io::Error::other)?, 0);
        Ok(table)
    }

    /// Reads the snapshot entry at offset `at` of the snapshot table; returns the snapshot's table and the
    /// length of the entry. The table is `None` if the disk had another size then.
    fn snapshot(&self, at: u64, entries: u64) -> io::Result<(Option<Vec<u64>>, u64)> {
        let extra = self.reader.u32(at + 36)?;
        let same_size = extra < 16 || self.reader.u64(at + 48)? == self.disk_size;
        let table = match same_size {
            true => Some(self.table(self.reader.u64(at)?, self.reader.u32(at + 8)?, entries)?),
            false => None,
        };
        let names = u64::from(self.reader.u16(at + 12)?) + u64::from(self.reader.u16(at + 14)?);
        Ok((table, (40 + u64::from(extra) + names).next_multiple_of(8)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    fn run(folder: &Path, program: &str, args: &[&str]) {
        let ran = Command::new(program).args(args).current_dir(folder).output().unwrap();
        assert!(ran.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    fn qemu_img(folder: &Path, args: &str) {
        run(folder, "qemu-img", &args.split(' ').collect::<Vec<_>>());
    }

    fn write(folder: &Path, place: &str) {
        run(folder, "qemu-io", &["-f", "qcow2", "-c", &format!("write -P 0x5a {place} 512"), "i"]);
    }

    /// Creates an image in the folder, with content at its beginning and its end.
    fn image(folder: &Path, options: &str) -> PathBuf {
        qemu_img(folder, &format!("create -q -f qcow2{options} i 1G"));
        write(folder, "0");
        write(folder, "1023M");
        folder.join("i")
    }

    fn has_changes(path: &Path) -> bool {
        has_unsaved_changes(path).unwrap().unwrap()
    }

    #[test]
    fn image_has_unsaved_changes_when_it_was_written_to_after_its_last_snapshot() {
        for options in ["", " -o compat=0.10", " -o cluster_size=4k", " -o extended_l2=on,cluster_size=32k"] {
            let folder = tempfile::tempdir().unwrap();
            let path = image(folder.path(), options);
            assert!(has_changes(&path), "{options}: no snapshot has this content");
            qemu_img(folder.path(), "snapshot -c clean i");
            assert!(!has_changes(&path), "{options}");
            for place in ["0", "64k", "512M", "1023M"] {
                write(folder.path(), place);
                assert!(has_changes(&path), "{options}: {place}");
                qemu_img(folder.path(), "snapshot -a clean i");
                assert!(!has_changes(&path), "{options}: {place}");
            }
            // Content that another snapshot holds is not lost either.
            write(folder.path(), "64k");
            qemu_img(folder.path(), "snapshot -c a-later-one i");
            assert!(!has_changes(&path), "{options}");
            let is_at = |snapshot| is_at_snapshot(&path, snapshot).unwrap();
            assert!(is_at("a-later-one") && !is_at("clean") && !is_at("none"), "{options}");
            qemu_img(folder.path(), "snapshot -d a-later-one i");
            assert!(has_changes(&path), "{options}");
        }
    }

    #[test]
    fn image_has_unsaved_changes_when_it_was_resized() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "");
        qemu_img(folder.path(), "snapshot -c clean i");
        qemu_img(folder.path(), "resize -q i 1025M");
        assert!(has_changes(&path));
    }

    #[test]
    fn overlay_has_no_unsaved_changes_until_it_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("base"), vec![1; 1 << 20]).unwrap();
        qemu_img(folder.path(), "create -q -f qcow2 -F raw -b base i");
        let path = folder.path().join("i");
        assert!(!has_changes(&path));
        write(folder.path(), "0");
        assert!(has_changes(&path));
    }

    #[test]
    fn error_names_the_file_when_its_tables_are_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "");
        qemu_img(folder.path(), "snapshot -c clean i");
        let sound = fs::read(&path).unwrap();
        for at in [20, 24, 36, 40, 60, 64] {
            for byte in [0x00, 0x7f, 0xff] {
                let mut damaged = sound.clone();
                damaged[at..at + 4].fill(byte);
                fs::write(&path, &damaged).unwrap();
                if let Err(error) = has_unsaved_changes(&path) {
                    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
                }
            }
        }
        fs::write(&path, "no image").unwrap();
        assert_eq!(has_unsaved_changes(&path).unwrap(), None);
    }
}
