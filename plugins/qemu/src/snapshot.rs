//! Memory snapshots: QEMU's migration stream in a file, plain or compressed.
//!
//! The format is recognized by its content. QEMU itself reads a plain snapshot; a compressed one is decompressed
//! here, into a pipe that QEMU reads. No shell ever sees a path.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufReader, PipeReader, PipeWriter, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use machinery::{Error, Result};

/// The format of a snapshot's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Plain,
    Gzip,
    Lz4,
    Zstd,
}

/// The first bytes of every snapshot, once it is decompressed.
const QEVM: &[u8] = b"QEVM";

/// The first bytes of each format. Sources: QEMU's migration/savevm.c (`QEMU_VM_FILE_MAGIC`), RFC
/// 1952, the LZ4 frame format, RFC 8878.
const MAGIC: [(&[u8], Format); 4] = [
    (QEVM, Format::Plain),
    (&[0x1f, 0x8b], Format::Gzip),
    (&[0x04, 0x22, 0x4d, 0x18], Format::Lz4),
    (&[0x28, 0xb5, 0x2f, 0xfd], Format::Zstd),
];

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Plain => "plain",
            Format::Gzip => "gzip",
            Format::Lz4 => "lz4",
            Format::Zstd => "zstd",
        })
    }
}

/// An opened snapshot file.
pub struct Snapshot {
    path: PathBuf,
    file: File,
    format: Format,
}

/// The number of bytes that are moved at once.
const CHUNK: usize = 256 * 1024;
/// The size of the pipe, in bytes: the maximum for unprivileged users (pipe(7)). Decompression runs ahead by so
/// much.
const PIPE: usize = 1024 * 1024;

impl Snapshot {
    /// Opens the file and recognizes its format.
    ///
    /// # Errors
    /// The file cannot be read, is empty, or is no snapshot.
    pub fn open(path: &Path) -> Result<Snapshot> {
        let failed = |error: io::Error| unreadable(path, &error);
        // To open a pipe would wait for its writer.
        if !fs::metadata(path).map_err(failed)?.is_file() {
            return Err(Error::configuration(format!("{} is not a file", path.display()))
                .advice("Name the file that QEMU saved the machine's state into"));
        }
        let mut file = File::open(path).map_err(failed)?;
        let mut start = [0; 4];
        let length = read_up_to(&mut file, &mut start).map_err(failed)?;
        io::Seek::rewind(&mut file).map_err(failed)?;
        let start = &start[..length];
        let known = MAGIC.into_iter().find(|(magic, _)| start.starts_with(magic));
        let Some((_, format)) = known else {
            let content =
                if start.is_empty() { "is empty".to_owned() } else { format!("begins with {start:02x?}") };
            let reason = format!("{} {content}, so it is no memory snapshot", path.display());
            return Err(Error::configuration(reason).advice(
                "Take the snapshot anew; QEMU's migration stream, plain or packed with gzip, lz4 (frame) or zstd, is read",
            ));
        };
        Ok(Snapshot { path: path.to_owned(), file, format })
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the plain file, for QEMU to read.
    pub fn into_file(self) -> OwnedFd {
        self.file.into()
    }

    /// Starts to decompress into a pipe, after it has read the first bytes: QEMU would wait forever for the first
    /// byte of an empty pipe.
    ///
    /// # Errors
    /// The content is no snapshot, or no pipe or thread can be created.
    pub fn decompress(self) -> Result<(PipeReader, Feeder)> {
        let (path, format) = (self.path.clone(), self.format);
        let undecoded = |error: io::Error| broken(&path, format, &error.to_string());
        let mut source = self.unpacked().map_err(undecoded)?;
        let mut start = [0; QEVM.len()];
        let length = read_up_to(&mut source, &mut start).map_err(undecoded)?;
        if start[..length] != *QEVM {
            let reason =
                format!("what is packed in the {format} file {} is no memory snapshot", path.display());
            return Err(Error::configuration(reason).advice("Take the snapshot anew"));
        }
        let failed = |error: io::Error| Error::environment(format!("cannot start to decompress: {error}"));
        let (reader, writer) = io::pipe().map_err(failed)?;
        // A small pipe works as well, only slower.
        let _ = rustix::pipe::fcntl_setpipe_size(&writer, PIPE);
        let thread = std::thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || feed(QEVM.chain(source), writer))
            .map_err(failed)?;
        Ok((reader, Feeder { path, format, thread }))
    }

    fn unpacked(self) -> io::Result<Box<dyn Read + Send>> {
        let file = BufReader::with_capacity(CHUNK, self.file);
        Ok(match self.format {
            Format::Plain => Box::new(file),
            Format::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Format::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(file)),
            Format::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(file)?;
                // A file of `zstd --long=31` needs the largest window.
                decoder.window_log_max(31)?;
                Box::new(decoder)
            }
        })
    }
}

fn feed(mut source: impl Read, mut pipe: PipeWriter) -> Fed {
    let mut chunk = vec![0; CHUNK];
    let mut last = None;
    loop {
        let length = match source.read(&mut chunk) {
            Ok(0) if is_end(last) => return Fed::Whole,
            Ok(0) => return Fed::Cut,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Fed::Unreadable(error),
        };
        last = Some(chunk[length - 1]);
        if pipe.write_all(&chunk[..length]).is_err() {
            return Fed::Unwanted;
        }
    }
}

/// Reports whether a snapshot can end with that byte. A snapshot ends with the description of its devices, which is
/// JSON. For a machine type without this description, it ends with an end mark. Source:
/// `qemu_savevm_state_complete_precopy_non_iterable` in QEMU's migration/savevm.c.
fn is_end(last: Option<u8>) -> bool {
    matches!(last, Some(b'}' | 0))
}

const CUT: &str = "it does not end as a snapshot does";

/// Checks that a plain snapshot has a valid end.
///
/// # Errors
/// The snapshot has none.
pub fn is_whole(path: &Path) -> Result<()> {
    let last = || {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last).map(|()| last[0])
    };
    match last() {
        Ok(last) if is_end(Some(last)) => Ok(()),
        Ok(_) => Err(broken(path, Format::Plain, CUT)),
        Err(error) => Err(broken(path, Format::Plain, &error.to_string())),
    }
}

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

/// The outcome of feeding the pipe.
enum Fed {
    /// The pipe has got the whole snapshot.
    Whole,
    /// The whole file was fed, but its end is not the end of a snapshot.
    Cut,
    /// QEMU has closed its end: it has loaded the snapshot, or reports its own failure.
    Unwanted,
    /// The file cannot be decompressed.
    Unreadable(io::Error),
}

/// The decompression, which runs while QEMU reads.
pub struct Feeder {
    path: PathBuf,
    format: Format,
    thread: JoinHandle<Fed>,
}

impl Feeder {
    /// Waits for the end of the decompression, which comes at the latest when QEMU closes its end of the pipe.
    /// `loaded` is true if QEMU has loaded the snapshot.
    ///
    /// # Errors
    /// The file cannot be decompressed to its end, or ends early.
    pub fn finish(self, loaded: bool) -> Result<()> {
        match self.thread.join() {
            Ok(Fed::Whole | Fed::Unwanted) => Ok(()),
            // If QEMU has loaded the snapshot, the snapshot is complete.
            Ok(Fed::Cut) if loaded => Ok(()),
            Ok(Fed::Cut) => Err(broken(&self.path, self.format, CUT)),
            Ok(Fed::Unreadable(error)) => Err(broken(&self.path, self.format, &error.to_string())),
            Err(_) => Err(broken(&self.path, self.format, "the decompressor panicked")),
        }
    }
}

/// The error for a snapshot that cannot be opened. A missing file does not return by itself.
fn unreadable(path: &Path, error: &io::Error) -> Error {
    let reason = Error::io("read the snapshot", path, error);
    match error.kind() {
        io::ErrorKind::NotFound => {
            Error::configuration(reason.reason()).advice("Check that the path is right")
        }
        _ => reason,
    }
}

/// The error for a snapshot that cannot be loaded to its end. Another try would end in the same way.
pub fn broken(path: &Path, format: Format, why: &str) -> Error {
    Error::configuration(format!("the {format} snapshot {} is truncated or corrupt: {why}", path.display()))
        .advice("Restore it from a backup, or take the snapshot anew")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(format: Format, data: &[u8]) -> Vec<u8> {
        match format {
            Format::Plain => data.to_vec(),
            Format::Gzip => {
                let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                packer.write_all(data).unwrap();
                packer.finish().unwrap()
            }
            Format::Lz4 => {
                let mut packer = lz4_flex::frame::FrameEncoder::new(Vec::new());
                packer.write_all(data).unwrap();
                packer.finish().unwrap()
            }
            Format::Zstd => zstd::encode_all(data, 1).unwrap(),
        }
    }

    const ALL: [Format; 4] = [Format::Plain, Format::Gzip, Format::Lz4, Format::Zstd];

    fn data() -> Vec<u8> {
        let noise = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8);
        b"QEVM".iter().copied().chain(noise).chain(*b"}").collect()
    }

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// Returns the decompressed content of a file, as QEMU would read it.
    fn unpack(content: &[u8]) -> Result<Vec<u8>> {
        let file = file(content);
        let (mut reader, feeder) = Snapshot::open(file.path())?.decompress()?;
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        feeder.finish(false).map(|()| read)
    }

    #[test]
    fn snapshot_is_recognized_and_read_in_each_format() {
        let data = data();
        for format in ALL {
            let packed = packed(format, &data);
            assert_eq!(Snapshot::open(file(&packed).path()).unwrap().format(), format);
            assert!(unpack(&packed).unwrap() == data, "{format}");
        }
    }

    #[test]
    fn snapshot_is_reported_as_truncated_when_its_end_is_missing() {
        for format in [Format::Gzip, Format::Lz4, Format::Zstd] {
            let whole = packed(format, &data());
            let text = unpack(&whole[..whole.len() / 2]).unwrap_err().to_string();
            assert!(text.contains("truncated or corrupt") && text.contains(&format.to_string()), "{text}");
            let kind = unpack(&whole[..whole.len() / 2]).unwrap_err().kind();
            assert_eq!(kind, machinery::ErrorKind::Configuration);
        }
    }

    #[test]
    fn snapshot_is_broken_when_it_was_cut_before_compression_unless_qemu_has_loaded_it() {
        let data = data();
        for format in [Format::Gzip, Format::Lz4, Format::Zstd] {
            let file = file(&packed(format, &data[..data.len() - 1]));
            for loaded in [true, false] {
                let (mut reader, feeder) = Snapshot::open(file.path()).unwrap().decompress().unwrap();
                io::copy(&mut reader, &mut io::sink()).unwrap();
                assert_eq!(feeder.finish(loaded).is_ok(), loaded, "{format}");
            }
        }
        assert!(is_whole(file(&data).path()).is_ok());
        let cut = is_whole(file(&data[..data.len() - 1]).path()).unwrap_err().to_string();
        assert!(cut.contains("truncated or corrupt"), "{cut}");
    }

    #[test]
    fn snapshot_is_refused_by_its_checksum_when_a_bit_flips() {
        let mut whole = packed(Format::Gzip, &data());
        let middle = whole.len() / 2;
        whole[middle] ^= 0x10;
        assert!(unpack(&whole).is_err());
    }

    #[test]
    fn compressed_file_is_refused_when_its_content_is_no_snapshot() {
        for format in [Format::Gzip, Format::Lz4, Format::Zstd] {
            for content in [&b""[..], b"QEV", b"something else"] {
                let text = unpack(&packed(format, content)).unwrap_err().to_string();
                assert!(text.contains("no memory snapshot") && text.contains(&format.to_string()), "{text}");
            }
            let garbage = [&packed(format, &data())[..7], &[0xff; 100]].concat();
            assert!(unpack(&garbage).is_err(), "{format}");
        }
    }

    /// A source whose first read fails.
    struct FailsOnce<R>(Option<io::ErrorKind>, R);

    impl<R: Read> Read for FailsOnce<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.take().map_or_else(|| self.1.read(buffer), |kind| Err(kind.into()))
        }
    }

    #[test]
    fn read_is_repeated_when_it_was_interrupted_and_not_when_it_failed() {
        let fed = |kind| {
            let (mut reader, writer) = io::pipe().unwrap();
            let fed = feed(FailsOnce(Some(kind), &b"{}"[..]), writer);
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            (fed, read)
        };
        let (interrupted, read) = fed(io::ErrorKind::Interrupted);
        assert!(matches!(interrupted, Fed::Whole) && read == b"{}");
        let (failed, read) = fed(io::ErrorKind::InvalidData);
        assert!(matches!(failed, Fed::Unreadable(_)) && read.is_empty());
    }

    #[test]
    fn decompression_ends_when_the_reader_closes_the_pipe() {
        let file = file(&packed(Format::Zstd, &data()));
        let (reader, feeder) = Snapshot::open(file.path()).unwrap().decompress().unwrap();
        drop(reader);
        feeder.finish(false).unwrap();
    }

    #[test]
    fn file_is_refused_when_it_is_no_snapshot() {
        for (content, expected) in
            [(&b""[..], "is empty"), (b"PK\x03\x04", "begins with"), (b"Q", "begins with")]
        {
            let file = file(content);
            let text = Snapshot::open(file.path()).err().unwrap().to_string();
            assert!(text.contains(expected) && text.contains("no memory snapshot"), "{text}");
        }
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(Snapshot::open(&pipe).err().unwrap().to_string().contains("is not a file"));
        let missing = Snapshot::open(Path::new("/none/m")).err().unwrap();
        assert!(missing.to_string().contains("/none/m"));
        assert_eq!(missing.kind(), machinery::ErrorKind::Configuration);
    }
}
