//! The header of a qcow2 image. Source of the layout: QEMU's `docs/interop/qcow2.rst`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use machinery::{Error, Result};

/// The first four bytes of a qcow2 image.
pub const MAGIC: &[u8; 4] = b"QFI\xfb";

/// The length of a version 2 header, in bytes. A version 3 header states its own length.
const V2_LENGTH: u64 = 72;

/// QEMU's limits for names and tables that the header refers to; larger values mark a damaged file.
const MAX_NAME: u32 = 1023;
const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_EXTENSIONS: u32 = 1 << 20;

/// Bits of the version 3 field `incompatible_features`.
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;

/// Types of header extensions.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xE279_2ACA;
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// The content of a qcow2 header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The disk's size as the guest sees it, in bytes.
    pub size: u64,
    /// The image that this image is an overlay of.
    pub backing: Option<Backing>,
    /// The file with the clusters, if they are in a separate file; empty if the header does not name the file.
    pub data_file: Option<String>,
    /// QEMU has marked the image as corrupt, and opens it for reading only.
    pub corrupt: bool,
    /// The internal snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// The backing file as named in the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// A path (relative to the image's folder), a URL, or QEMU's `json:` form.
    pub file: String,
    /// The format of the backing file; QEMU probes the file if the header names no format.
    pub format: Option<String>,
}

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The snapshot's number, as text.
    pub id: String,
    /// The snapshot's name.
    pub name: String,
    /// The time of the snapshot, in seconds since 1970.
    pub taken: u32,
    /// The size of the saved memory, in bytes; 0 if the snapshot has none.
    pub memory: u64,
}

impl Header {
    /// Reads the header of the image at `path`; `None` if the file is no qcow2 image.
    ///
    /// # Errors
    /// The file cannot be read, or its header is invalid.
    pub fn read(path: &Path) -> Result<Option<Header>> {
        let file = File::open(path).map_err(|error| Error::io("open the image", path, &error))?;
        let mut magic = [0; 4];
        match file.read_exact_at(&mut magic, 0) {
            Ok(()) if magic == *MAGIC => {}
            Ok(()) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(Error::io("read the image", path, &error)),
        }
        Reader(&file).header().map(Some).map_err(|error| {
            let damaged = Error::configuration(format!(
                "the qcow2 header of {} cannot be read: {error}",
                path.display()
            ));
            damaged.advice("Inspect it with `qemu-img check`, or replace it from a backup")
        })
    }

    /// Returns the internal snapshot of that name.
    pub fn snapshot(&self, name: &str) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name)
    }
}

/// Reads big-endian fields of an open image.
pub(crate) struct Reader<'a>(pub(crate) &'a File);

impl Reader<'_> {
    fn header(&self) -> io::Result<Header> {
        let version = self.u32(4)?;
        if !(2..=3).contains(&version) {
            return Err(io::Error::other(format!("its version is {version}, and only 2 and 3 are known")));
        }
        let (incompatible, length) =
            if version == 3 { (self.u64(72)?, u64::from(self.u32(100)?)) } else { (0, V2_LENGTH) };
        let extensions = self.extensions(length)?;
        // QEMU uses the last extension of a type.
        let extension = |wanted: u32| {
            extensions.iter().rev().find(|(kind, _)| *kind == wanted).map(|(_, value)| value.clone())
        };
        let backing = self.backing_file()?;
        Ok(Header {
            size: self.u64(24)?,
            backing: backing.map(|file| Backing { file, format: extension(BACKING_FORMAT) }),
            data_file: (incompatible & DATA_FILE != 0).then(|| extension(DATA_FILE_NAME).unwrap_or_default()),
            corrupt: incompatible & CORRUPT != 0,
            snapshots: self.snapshots()?,
        })
    }

    fn backing_file(&self) -> io::Result<Option<String>> {
        let (offset, length) = (self.u64(8)?, self.u32(16)?);
        if offset == 0 || length == 0 {
            return Ok(None);
        }
        within(length, MAX_NAME, "the backing file's name")?;
        self.text(offset, length).map(Some)
    }

    /// Returns the header extensions that hold a name, up to the end mark.
    fn extensions(&self, from: u64) -> io::Result<Vec<(u32, String)>> {
        let mut found = Vec::new();
        let mut at = from;
        // A header without extensions is followed by the backing file's name, or by the next cluster.
        let backing = self.u64(8)?;
        let end = if backing == 0 { 1_u64 << self.u32(20)?.min(30) } else { backing };
        while at.saturating_add(8) <= end {
            let (kind, length) = (self.u32(at)?, self.u32(at + 4)?);
            if kind == END {
                break;
            }
            within(length, MAX_EXTENSIONS, "a header extension")?;
            if [BACKING_FORMAT, DATA_FILE_NAME].contains(&kind) {
                within(length, MAX_NAME, "a name in a header extension")?;
                found.push((kind, self.text(at + 8, length)?));
            }
            at = at + 8 + u64::from(length).next_multiple_of(8);
        }
        Ok(found)
    }

    fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        let count = self.u32(60)?;
        within(count, MAX_SNAPSHOTS, "the number of snapshots")?;
        let mut at = self.u64(64)?;
        let mut snapshots = Vec::new();
        for _ in 0..count {
            let (snapshot, length) = self.snapshot(at)?;
            snapshots.push(snapshot);
            at = at.checked_add(length).ok_or_else(|| io::Error::other("its snapshot table has no end"))?;
        }
        Ok(snapshots)
    }

    /// Returns the entry at offset `at` of the snapshot table, and its length.
    fn snapshot(&self, at: u64) -> io::Result<(Snapshot, u64)> {
        if at > i64::MAX as u64 {
            return Err(io::Error::other("its snapshot table is beyond all files"));
        }
        let (id_length, name_length) = (self.u16(at + 12)?, self.u16(at + 14)?);
        let extra = self.u32(at + 36)?;
        within(extra, MAX_EXTENSIONS, "a snapshot's extra data")?;
        // The 32-bit size is 0 or too small if the extra data holds the 64-bit size.
        let memory = if extra >= 8 { self.u64(at + 40)? } else { u64::from(self.u32(at + 32)?) };
        let id = at + 40 + u64::from(extra);
        let name = id + u64::from(id_length);
        let snapshot = Snapshot {
            id: self.text(id, u32::from(id_length))?,
            name: self.text(name, u32::from(name_length))?,
            taken: self.u32(at + 16)?,
            memory,
        };
        Ok((snapshot, (name + u64::from(name_length) - at).next_multiple_of(8)))
    }

    fn text(&self, at: u64, length: u32) -> io::Result<String> {
        let mut bytes = vec![0; length as usize];
        self.0.read_exact_at(&mut bytes, at)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(crate) fn bytes<const N: usize>(&self, at: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    pub(crate) fn u16(&self, at: u64) -> io::Result<u16> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&self, at: u64) -> io::Result<u32> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&self, at: u64) -> io::Result<u64> {
        self.bytes(at).map(u64::from_be_bytes)
    }
}

fn within(value: u32, limit: u32, what: &str) -> io::Result<()> {
    if value <= limit {
        return Ok(());
    }
    Err(io::Error::other(format!("{what} is {value}, and at most {limit} is possible")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    fn qemu_img(folder: &Path, args: &str) {
        let ran = Command::new("qemu-img").args(args.split(' ')).current_dir(folder).output().unwrap();
        assert!(ran.status.success(), "{args}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    fn image(folder: &Path, args: &str) -> PathBuf {
        qemu_img(folder, &format!("create -q -f qcow2 {args}"));
        folder.join("i")
    }

    #[test]
    fn header_gives_size_backing_and_snapshots_as_qemu_img_wrote_them() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("base.raw"), vec![0; 1 << 20]).unwrap();
        for compat in ["0.10", "1.1"] {
            let path = image(folder.path(), &format!("-o compat={compat} -F raw -b base.raw i 3M"));
            qemu_img(folder.path(), "snapshot -c clean i");
            qemu_img(folder.path(), "snapshot -c a-second-one i");
            let header = Header::read(&path).unwrap().unwrap();
            assert_eq!(header.size, 3 << 20);
            let backing = Backing { file: "base.raw".into(), format: Some("raw".into()) };
            assert_eq!(header.backing, Some(backing));
            let names: Vec<&str> = header.snapshots.iter().map(|one| one.name.as_str()).collect();
            assert_eq!(names, ["clean", "a-second-one"]);
            assert_eq!((header.snapshots[0].id.as_str(), header.snapshots[0].memory), ("1", 0));
            assert!(header.snapshots[0].taken > 1_600_000_000);
            assert!(!header.corrupt);
        }
    }

    #[test]
    fn header_names_the_data_file_when_clusters_are_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "-o data_file=data.raw i 1M");
        assert_eq!(Header::read(&path).unwrap().unwrap().data_file.as_deref(), Some("data.raw"));
    }

    #[test]
    fn read_returns_none_when_the_file_is_not_a_qcow2_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        for content in [&b""[..], b"QF", b"just some text"] {
            fs::write(&path, content).unwrap();
            assert_eq!(Header::read(&path).unwrap(), None);
        }
        assert!(Header::read(&folder.path().join("none")).unwrap_err().to_string().contains("none"));
    }

    #[test]
    fn read_fails_and_names_the_file_when_the_header_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "i 1M");
        qemu_img(folder.path(), "snapshot -c clean i");
        let sound = fs::read(&path).unwrap();
        let damages: [(usize, &[u8]); 5] = [
            (4, &[0, 0, 0, 9]),
            (60, &[0xff; 4]),
            (64, &[0xff; 8]),
            (64, &[0x7f; 8]),
            (100, &[0, 0, 0x20, 0]),
        ];
        for (at, bytes) in damages {
            let mut damaged = sound.clone();
            damaged[at..at + bytes.len()].copy_from_slice(bytes);
            fs::write(&path, &damaged).unwrap();
            // Reading returns for any content; most results are errors.
            if let Err(error) = Header::read(&path) {
                assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            }
        }
        fs::write(&path, &sound[..20]).unwrap();
        let text = Header::read(&path).unwrap_err().to_string();
        assert!(text.contains("qemu-img check"), "{text}");
    }
}
