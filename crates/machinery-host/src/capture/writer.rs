//! Copies tcpdump's output into the file of a capture.
//!
//! tcpdump writes to a pipe, so it needs no right to the file. Only whole packets are copied: whenever a capture ends,
//! also at its limit or by the death of tcpdump, its file is complete. Source of the format: pcap-savefile(5).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use crate::client_file::PassedFile;

/// The length of the file's header, and of the header of a packet, in bytes.
const FILE_HEADER: usize = 24;
const PACKET_HEADER: usize = 16;
/// The length of a packet, in bytes, at most. Source: `MAXIMUM_SNAPLEN` in libpcap's pcap-int.h.
const MAX_PACKET: usize = 256 << 10;
/// The number of bytes that are read at once.
const CHUNK: usize = 64 << 10;

/// The file of a capture.
#[derive(Debug)]
pub enum CaptureFile {
    /// A file that the host has opened.
    Opened(File),
    /// A file with packets from an earlier host, which stay. It is written from its position on.
    Continued(File),
    /// A file or a pipe that the task has passed.
    Passed(PassedFile),
}

impl CaptureFile {
    /// Makes the file of an earlier host one that can be continued: it ends with its last whole packet, and is written from
    /// there on. An empty file is begun anew.
    ///
    /// # Errors
    /// The file is no capture; it cannot be read or truncated.
    pub fn continued(mut file: File) -> io::Result<CaptureFile> {
        let length = whole_length(&mut file)?;
        if length == 0 && file.metadata()?.len() >= FILE_HEADER as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its content is no capture"));
        }
        file.set_len(length)?;
        file.seek(SeekFrom::End(0))?;
        Ok(if length == 0 { CaptureFile::Opened(file) } else { CaptureFile::Continued(file) })
    }

    /// Returns the file. A passed file is truncated.
    ///
    /// # Errors
    /// The file cannot be truncated.
    pub fn file(&self) -> io::Result<&File> {
        match self {
            CaptureFile::Opened(file) | CaptureFile::Continued(file) => Ok(file),
            CaptureFile::Passed(file) => file.rewound(),
        }
    }
}

/// The end of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// tcpdump has ended.
    All,
    /// The next packet would exceed the limit.
    UpToLimit,
}

/// Copies whole packets, as they arrive, until the end of `tcpdump` or the limit.
///
/// # Errors
/// `tcpdump` cannot be read or is no capture; the file cannot be written.
pub fn copy_into(tcpdump: impl Read, file: &CaptureFile, limit: Option<u64>) -> io::Result<Copied> {
    let limit = limit.unwrap_or(u64::MAX);
    match file {
        CaptureFile::Continued(file) => {
            let mut header = [0; FILE_HEADER];
            file.read_exact_at(&mut header, 0)?;
            copy(tcpdump, file, limit.saturating_sub(file.metadata()?.len()), &header)
        }
        _ => copy(tcpdump, file.file()?, limit, &[]),
    }
}

/// Copies as [`copy_into`] does. The output has to begin with the bytes `known`, which are left out: the file has them.
fn copy(mut tcpdump: impl Read, mut file: impl Write, limit: u64, mut known: &[u8]) -> io::Result<Copied> {
    let mut packets = Packets::default();
    let mut left = limit.saturating_add(known.len() as u64);
    loop {
        if !packets.read(&mut tcpdump)? {
            return Ok(Copied::All);
        }
        let whole = packets.whole(left)?;
        let bytes = packets.take(whole.length);
        let (expected, rest) = known.split_at(known.len().min(bytes.len()));
        let new = bytes.strip_prefix(expected).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "its packets are of another kind than those before")
        })?;
        file.write_all(new)?;
        known = rest;
        left -= whole.length as u64;
        if whole.limit_reached {
            return Ok(Copied::UpToLimit);
        }
    }
}

/// Returns the length of the whole packets of a capture with its header; 0 if the file has no such header.
fn whole_length(file: &mut File) -> io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let (mut reader, mut packets) = (BufReader::new(&*file), Packets::default());
    packets.bytes.resize(FILE_HEADER, 0);
    if end < FILE_HEADER as u64 || reader.read_exact(&mut packets.bytes).is_err() {
        return Ok(0);
    }
    if packets.file_header().is_err() {
        return Ok(0);
    }
    let swapped = packets.swapped.unwrap_or(false);
    let mut length = FILE_HEADER as u64;
    packets.bytes.resize(PACKET_HEADER, 0);
    while length + PACKET_HEADER as u64 <= end {
        reader.read_exact(&mut packets.bytes)?;
        let captured = packets.number(8).unwrap_or(0);
        let captured = u64::from(if swapped { captured.swap_bytes() } else { captured });
        let next = length + PACKET_HEADER as u64 + captured;
        if next > end || captured > MAX_PACKET as u64 {
            break;
        }
        length = next;
        reader.seek_relative(captured.cast_signed())?;
    }
    Ok(length)
}

/// The bytes that were read and not written.
#[derive(Default)]
struct Packets {
    bytes: Vec<u8>,
    /// True if the lengths have the other byte order than this computer. `None` before the file's header.
    swapped: Option<bool>,
}

/// The whole packets at the begin of the bytes.
struct Whole {
    length: usize,
    limit_reached: bool,
}

impl Packets {
    /// Reads what there is. Returns false at the end.
    fn read(&mut self, from: &mut impl Read) -> io::Result<bool> {
        let length = self.bytes.len();
        self.bytes.resize(length + CHUNK, 0);
        let read = loop {
            match from.read(&mut self.bytes[length..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.bytes.truncate(length + *read.as_ref().unwrap_or(&0));
        Ok(read? > 0)
    }

    /// Returns the length of the whole packets, as far as they fit into `left` bytes.
    fn whole(&mut self, left: u64) -> io::Result<Whole> {
        let mut length = 0;
        loop {
            let next = match self.swapped {
                None => self.file_header()?,
                Some(swapped) => self.packet(length, swapped)?,
            };
            let Some(next) = next else { return Ok(Whole { length, limit_reached: false }) };
            if (length + next) as u64 > left {
                return Ok(Whole { length, limit_reached: true });
            }
            length += next;
        }
    }

    /// Returns the length of the file's header, if it is there.
    fn file_header(&mut self) -> io::Result<Option<usize>> {
        if self.bytes.len() < FILE_HEADER {
            return Ok(None);
        }
        // Microseconds, and nanoseconds.
        let is_magic = |number| matches!(number, 0xa1b2_c3d4 | 0xa1b2_3c4d);
        let magic = self.number(0).unwrap_or(0);
        self.swapped = match (is_magic(magic), is_magic(magic.swap_bytes())) {
            (true, _) => Some(false),
            (_, true) => Some(true),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "tcpdump's output is no capture")),
        };
        Ok(Some(FILE_HEADER))
    }

    /// Returns the length of the packet at that place with its header, if it is there as a whole.
    fn packet(&self, at: usize, swapped: bool) -> io::Result<Option<usize>> {
        let Some(captured) = self.number(at + 8) else { return Ok(None) };
        let captured = if swapped { captured.swap_bytes() } else { captured } as usize;
        if captured > MAX_PACKET {
            let error = format!("tcpdump's output is no capture: a packet of {captured} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        let length = PACKET_HEADER + captured;
        Ok((self.bytes.len() >= at + length).then_some(length))
    }

    fn number(&self, at: usize) -> Option<u32> {
        self.bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        let rest = self.bytes.split_off(length);
        std::mem::replace(&mut self.bytes, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(lengths: &[u32], order: impl Fn(u32) -> [u8; 4]) -> Vec<u8> {
        let mut bytes = order(0xa1b2_c3d4).to_vec();
        bytes.resize(FILE_HEADER, 0);
        for length in lengths {
            bytes.extend([[0; 4], [0; 4], order(*length), order(*length)].concat());
            bytes.resize(bytes.len() + *length as usize, 7);
        }
        bytes
    }

    /// Returns one byte more at each read, as slow as a reader can be.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.0.len().min(1);
            self.0.read(&mut buffer[..length])
        }
    }

    #[test]
    fn capture_is_copied_in_both_byte_orders_and_in_pieces_of_any_size() {
        for order in [u32::to_le_bytes, u32::to_be_bytes] {
            let bytes = capture(&[0, 1, 100, 70_000], order);
            for copied in [
                |bytes: &[u8], file: &mut Vec<u8>| copy(bytes, file, u64::MAX, &[]),
                |bytes: &[u8], file: &mut Vec<u8>| copy(Slow(bytes), file, u64::MAX, &[]),
            ] {
                let mut file = Vec::new();
                assert_eq!(copied(&bytes, &mut file).unwrap(), Copied::All);
                assert!(file == bytes);
            }
        }
    }

    #[test]
    fn capture_ends_with_a_whole_packet_when_its_limit_or_its_end_is_reached() {
        let bytes = capture(&[100, 100, 100], u32::to_ne_bytes);
        let length = |packets: usize| FILE_HEADER + packets * 116;
        for (limit, packets) in [(length(2), 2), (length(3) - 1, 2), (length(1), 1), (30, 0)] {
            let mut file = Vec::new();
            assert_eq!(copy(&*bytes, &mut file, limit as u64, &[]).unwrap(), Copied::UpToLimit);
            assert_eq!(file.len(), length(packets));
        }
        let mut file = Vec::new();
        assert_eq!(copy(&bytes[..length(2) + 50], &mut file, 1 << 20, &[]).unwrap(), Copied::All);
        assert_eq!(file.len(), length(2));
        assert_eq!(copy(&*bytes, Vec::new(), bytes.len() as u64, &[]).unwrap(), Copied::All);
    }

    #[test]
    fn capture_continues_after_its_last_whole_packet_and_within_its_limit() {
        let (first, second) = (capture(&[10, 20], u32::to_ne_bytes), capture(&[30], u32::to_ne_bytes));
        for cut in [0, 3, 25] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&first).unwrap();
            file.write_all(&second[FILE_HEADER..FILE_HEADER + cut]).unwrap();
            let file = CaptureFile::continued(file).unwrap();
            assert_eq!(copy_into(&*second, &file, None).unwrap(), Copied::All);
            let (mut content, mut file) = (Vec::new(), file.file().unwrap());
            file.rewind().unwrap();
            file.read_to_end(&mut content).unwrap();
            assert!(content == capture(&[10, 20, 30], u32::to_ne_bytes));
            file.rewind().unwrap();
            let file = CaptureFile::continued(file.try_clone().unwrap()).unwrap();
            let full = content.len() as u64;
            assert_eq!(copy_into(&*second, &file, Some(full)).unwrap(), Copied::UpToLimit);
        }
        let written = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            CaptureFile::continued(file)
        };
        let file = written(b"").unwrap();
        copy_into(&*second, &file, None).unwrap();
        assert_eq!(file.file().unwrap().metadata().unwrap().len(), second.len() as u64);
        assert!(written(b"no capture at all, but longer than a header").is_err());
        let mut other = first.clone();
        // The kind of the packets. Source: pcap-savefile(5).
        other[20] = 7;
        assert!(copy_into(&*second, &written(&other).unwrap(), None).is_err());
    }

    #[test]
    fn copy_fails_when_the_output_is_no_capture() {
        let mut huge = capture(&[], u32::to_ne_bytes);
        huge.extend([[0; 4], [0; 4], [0xff; 4], [0xff; 4]].concat());
        for bytes in [vec![b'x'; 100], huge] {
            let error = copy(&*bytes, Vec::new(), u64::MAX, &[]).unwrap_err();
            assert!(error.to_string().contains("no capture"), "{error}");
        }
    }
}
