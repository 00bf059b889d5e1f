//! The formats of a memory snapshot.
//!
//! A snapshot is a QEMU migration stream, often compressed. A machinery detects the format by content.
//! Reading and writing are streams, so a snapshot may be larger than memory.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::Result;
use crate::error::{Context, Error};

/// The format of a memory snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SnapshotFormat {
    /// The migration stream as QEMU writes it.
    Plain,
    /// gzip.
    Gzip,
    /// The lz4 frame format.
    Lz4,
    /// zstd.
    Zstd,
}

impl SnapshotFormat {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Gzip, Self::Lz4, Self::Zstd];

    /// Returns the first bytes of a file in this format.
    pub fn magic(self) -> &'static [u8] {
        match self {
            Self::Plain => b"QEVM",
            Self::Gzip => &[0x1f, 0x8b],
            Self::Lz4 => &[0x04, 0x22, 0x4d, 0x18],
            Self::Zstd => &[0x28, 0xb5, 0x2f, 0xfd],
        }
    }

    /// Returns the usual suffix of a file's name, empty for [`SnapshotFormat::Plain`].
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Gzip => ".gz",
            Self::Lz4 => ".lz4",
            Self::Zstd => ".zst",
        }
    }

    /// Detects the format of the file at `path` by its content.
    pub fn of(path: &Path) -> Result<Self> {
        format_of(&mut open(path)?, path)
    }

    /// Writes `plain`, a whole migration stream, into `into` in this format.
    pub fn write(self, plain: &mut impl Read, into: impl Write) -> io::Result<()> {
        match self {
            Self::Plain => finish(plain, into, Ok),
            Self::Gzip => {
                finish(plain, flate2::write::GzEncoder::new(into, flate2::Compression::fast()), |w| {
                    w.finish()
                })
            }
            Self::Lz4 => finish(plain, lz4_flex::frame::FrameEncoder::new(into), |w| Ok(w.finish()?)),
            Self::Zstd => finish(plain, zstd::Encoder::new(into, 1)?, |w| w.finish()),
        }
    }
}

/// Opens the migration stream in the file at `path`, in any format.
pub fn read(path: &Path) -> Result<Box<dyn Read + Send>> {
    let mut file = open(path)?;
    let format = format_of(&mut file, path)?;
    let stored = BufReader::with_capacity(1 << 20, file);
    Ok(match format {
        SnapshotFormat::Plain => Box::new(stored),
        SnapshotFormat::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stored)),
        SnapshotFormat::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(stored)),
        SnapshotFormat::Zstd => {
            let decoder = zstd::Decoder::with_buffer(stored);
            Box::new(decoder.context(|| format!("reading the snapshot {}", path.display()))?)
        }
    })
}

fn open(path: &Path) -> Result<File> {
    File::open(path).context(|| format!("opening the snapshot {}", path.display()))
}

fn format_of(file: &mut File, path: &Path) -> Result<SnapshotFormat> {
    let what = || format!("reading the snapshot {}", path.display());
    let mut start = Vec::new();
    file.take(4).read_to_end(&mut start).context(what)?;
    file.seek(SeekFrom::Start(0)).context(what)?;
    let found = SnapshotFormat::ALL.into_iter().find(|format| start.starts_with(format.magic()));
    found.ok_or_else(|| {
        let path = path.display();
        Error::new(format!(
            "the snapshot {path} starts with {start:02x?}, which is no snapshot format: make it again"
        ))
    })
}

/// Copies all of `from` through `writer`, then ends the format.
fn finish<W: Write, I: Write>(
    from: &mut impl Read,
    mut writer: W,
    end: impl FnOnce(W) -> io::Result<I>,
) -> io::Result<()> {
    io::copy(from, &mut writer)?;
    end(writer)?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_round_trip_and_are_recognised() {
        let plain: Vec<u8> =
            b"QEVM".iter().copied().chain((0..300_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8)).collect();
        let dir = tempfile::tempdir().unwrap();
        for format in SnapshotFormat::ALL {
            let path = dir.path().join(format!("memory.snapshot{}", format.suffix()));
            format.write(&mut plain.as_slice(), File::create(&path).unwrap()).unwrap();
            assert_eq!(SnapshotFormat::of(&path).unwrap(), format);
            let mut back = Vec::new();
            read(&path).unwrap().read_to_end(&mut back).unwrap();
            assert!(back == plain, "{format:?} gives back what was written");
        }
    }

    #[test]
    fn snapshot_is_refused_when_its_format_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory.snapshot");
        std::fs::write(&path, b"no").unwrap();
        let error = SnapshotFormat::of(&path).unwrap_err().to_string();
        assert!(error.contains("memory.snapshot") && error.contains("6e, 6f"), "{error}");
    }
}
