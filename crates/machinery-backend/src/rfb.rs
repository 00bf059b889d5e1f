//! Reads the screen of a VNC server, for a hypervisor that has no command for a screenshot.
//!
//! ```text
//! version ─▶ security: none ─▶ init ─▶ encoding ─▶ one full update ─▶ pixels
//! ```
//!
//! The pixels stay in the server's own format, because not every server can change it. Only a server without true colours is
//! asked for another one.
//!
//! The server belongs to a machine that runs malware, so each length that it sends has a limit. Source: RFC 6143.

use std::io::{self, Read, Write};

use machinery::{Deadline, Error, Result};

use crate::picture::rgb_to_png;

/// The maximum width and height of a screen, in pixels.
const MAX_SIDE: u16 = 4096;
/// The maximum length of a text of the server, in bytes.
const MAX_TEXT: u32 = 64 * 1024;
/// The security type without authentication.
const SECURITY_NONE: u8 = 1;
/// The pixel format: 32 bits a pixel, 24 of colour, little-endian, true colour, 255 levels, red 16, green 8, blue 0.
const PIXEL_FORMAT: [u8; 16] = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];

/// The format of pixels with true colours.
#[derive(Debug, Clone, Copy)]
struct Format {
    bytes: usize,
    big_endian: bool,
    /// The highest value of red, green and blue, and the place of its lowest bit.
    colors: [(u32, u8); 3],
}

impl Format {
    /// Reads the record of the protocol; returns none for a format without true colours.
    fn from_record(record: [u8; 16]) -> Option<Format> {
        let [bits, _, big_endian, true_color, maxima @ .., red, green, blue, _, _, _] = record;
        let max = |n: usize| u32::from(u16::from_be_bytes([maxima[2 * n], maxima[2 * n + 1]]));
        let colors = [(max(0), red), (max(1), green), (max(2), blue)];
        let is_valid = matches!(bits, 8 | 16 | 32)
            && true_color != 0
            && colors.iter().all(|(max, shift)| *max > 0 && *shift < bits);
        is_valid.then(|| Format { bytes: usize::from(bits / 8), big_endian: big_endian != 0, colors })
    }

    /// Returns red, green and blue of a pixel, with 255 as the highest value.
    fn rgb(self, pixel: &[u8]) -> [u8; 3] {
        let value = |value: u32, byte: &u8| (value << 8) | u32::from(*byte);
        let value = match self.big_endian {
            true => pixel.iter().fold(0, value),
            false => pixel.iter().rev().fold(0, value),
        };
        self.colors.map(|(max, shift)| {
            let level = ((value >> shift) & max).min(max) * 255 / max;
            u8::try_from(level).unwrap_or(u8::MAX)
        })
    }
}

/// The content of a screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Screen {
    /// The width in pixels.
    pub width: u16,
    /// The height in pixels.
    pub height: u16,
    /// Red, green and blue of each pixel, row by row from the top.
    pub rgb: Vec<u8>,
}

/// Writes the screen of the server as PNG to `file`. Set a timeout of the stream's reads, with
/// [`Deadline::left`]: a server that sends nothing blocks otherwise.
///
/// # Errors
/// The server demands a password, speaks another protocol, or does not answer in time; the file cannot be written.
pub fn screenshot(stream: impl Read + Write, file: impl Write, deadline: Deadline) -> Result<()> {
    let screen = read_screen(stream, deadline)?;
    rgb_to_png(u32::from(screen.width), u32::from(screen.height), &screen.rgb, file)
}

/// Reads the screen of the server.
///
/// # Errors
/// As [`screenshot`].
pub fn read_screen(stream: impl Read + Write, deadline: Deadline) -> Result<Screen> {
    let mut server = Server { stream: Timed { stream, deadline } };
    server.read_screen().map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => deadline.timeout("the VNC server to answer"),
        _ => Error::failed(format!("cannot read the screen of the VNC server: {error}")),
    })
}

struct Server<S> {
    stream: Timed<S>,
}

/// A stream that can be read until the deadline. The timeout of the stream's own reads bounds a single one, and a server
/// may send one byte at a time.
struct Timed<S> {
    stream: S,
    deadline: Deadline,
}

impl<S: Read> Read for Timed<S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.deadline.passed() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.read(bytes)
    }
}

impl<S: Write> Write for Timed<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<S: Read + Write> Server<S> {
    fn read_screen(&mut self) -> io::Result<Screen> {
        self.agree_on_version_and_security()?;
        // A shared session: other viewers stay connected.
        self.stream.write_all(&[1])?;
        let (width, height) = (self.u16()?, self.u16()?);
        if width > MAX_SIDE || height > MAX_SIDE {
            return Err(invalid(format!("a screen of {width}×{height} pixels is too large")));
        }
        let own = Format::from_record(self.bytes()?);
        let name = self.u32()?;
        self.skip_text(name)?;
        if own.is_none() {
            self.stream.write_all(&[&[0, 0, 0, 0][..], &PIXEL_FORMAT].concat())?;
        }
        let wanted = || Format::from_record(PIXEL_FORMAT).ok_or_else(|| invalid("the format has no colours"));
        let format = own.map_or_else(wanted, Ok)?;
        // One encoding: raw.
        self.stream.write_all(&[2, 0, 0, 1, 0, 0, 0, 0])?;
        let [wide, high] = [width, height].map(u16::to_be_bytes);
        self.stream.write_all(&[&[3, 0, 0, 0, 0, 0][..], &wide, &high].concat())?;
        self.stream.flush()?;
        let pixels = usize::from(width) * usize::from(height);
        let mut screen = Screen { width, height, rgb: vec![0; pixels * 3] };
        let mut missing = pixels;
        while missing > 0 {
            missing = missing.saturating_sub(self.message(&mut screen, format)?);
        }
        Ok(screen)
    }

    fn agree_on_version_and_security(&mut self) -> io::Result<()> {
        let mut version = [0; 12];
        self.stream.read_exact(&mut version)?;
        let minor = match &version {
            b"RFB 003.003\n" => 3,
            b"RFB 003.007\n" => 7,
            known if known.starts_with(b"RFB 003.") || known.starts_with(b"RFB 004.") => 8,
            _ => return Err(invalid("it is no VNC server")),
        };
        self.stream.write_all(format!("RFB 003.00{minor}\n").as_bytes())?;
        if minor == 3 {
            return match self.u32()? {
                kind if kind == u32::from(SECURITY_NONE) => Ok(()),
                _ => Err(invalid("it demands a password")),
            };
        }
        let count = self.u8()?;
        let mut kinds = vec![0; usize::from(count)];
        self.stream.read_exact(&mut kinds)?;
        if !kinds.contains(&SECURITY_NONE) {
            return Err(invalid("it demands a password"));
        }
        self.stream.write_all(&[SECURITY_NONE])?;
        // The result of the authentication exists from version 3.8 on if there was none.
        if minor == 8 && self.u32()? != 0 {
            return Err(invalid("it refuses the connection"));
        }
        Ok(())
    }

    /// Reads one message, and returns the number of pixels that it has.
    fn message(&mut self, screen: &mut Screen, format: Format) -> io::Result<usize> {
        match self.u8()? {
            0 => {
                self.skip(1)?;
                let rectangles = self.u16()?;
                (0..rectangles).map(|_| self.rectangle(screen, format)).sum()
            }
            // A bell.
            2 => Ok(0),
            // A text of the clipboard.
            3 => {
                self.skip(3)?;
                let length = self.u32()?;
                self.skip_text(length).map(|()| 0)
            }
            other => Err(invalid(format!("it sends a message of the unknown type {other}"))),
        }
    }

    fn rectangle(&mut self, screen: &mut Screen, format: Format) -> io::Result<usize> {
        let [x, y, width, height] = [self.u16()?, self.u16()?, self.u16()?, self.u16()?];
        let fits =
            |start: u16, length: u16, side: u16| start.checked_add(length).is_some_and(|end| end <= side);
        if self.u32()? != 0 || !fits(x, width, screen.width) || !fits(y, height, screen.height) {
            return Err(invalid("it sends a rectangle that was not requested"));
        }
        let mut row = vec![0; usize::from(width) * format.bytes];
        for line in y..y + height {
            self.stream.read_exact(&mut row)?;
            let start = (usize::from(line) * usize::from(screen.width) + usize::from(x)) * 3;
            let target = &mut screen.rgb[start..start + usize::from(width) * 3];
            for (rgb, pixel) in target.chunks_exact_mut(3).zip(row.chunks_exact(format.bytes)) {
                rgb.copy_from_slice(&format.rgb(pixel));
            }
        }
        Ok(usize::from(width) * usize::from(height))
    }

    fn skip_text(&mut self, length: u32) -> io::Result<()> {
        if length > MAX_TEXT {
            return Err(invalid("it sends a text that is too long"));
        }
        self.skip(length.into())
    }

    fn skip(&mut self, length: u64) -> io::Result<()> {
        let skipped = io::copy(&mut Read::by_ref(&mut self.stream).take(length), &mut io::sink())?;
        if skipped == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn u8(&mut self) -> io::Result<u8> {
        self.bytes().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.bytes().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use std::time::Duration;

    /// A server that has sent everything already.
    struct Recorded(Cursor<Vec<u8>>);

    impl Read for Recorded {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.0.read(bytes)
        }
    }

    impl Write for Recorded {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn read(parts: &[&[u8]]) -> Result<Screen> {
        read_screen(Recorded(Cursor::new(parts.concat())), Deadline::after(Duration::from_secs(60)))
    }

    const INIT: &[&[u8]] = &[&[0, 2, 0, 2], &[0; 16], &[0, 0, 0, 1, b'q']];
    /// Two updates of one row each, with a bell between them.
    const ROWS: &[&[u8]] = &[
        &[0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0, 0, 3, 2, 1, 0, 6, 5, 4, 0],
        &[2],
        &[0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 1, 0, 0, 0, 0, 9, 8, 7, 0, 12, 11, 10, 0],
    ];

    #[test]
    fn pixels_are_read_in_the_servers_own_format() {
        let format = |record| Format::from_record(record).unwrap();
        // Bochs: 8 bits, 3 of red, 3 of green, 2 of blue from the lowest bit.
        let bochs = format([8, 8, 1, 1, 0, 7, 0, 7, 0, 3, 0, 3, 6, 0, 0, 0]);
        assert_eq!(bochs.rgb(&[0b01_000_111]), [255, 0, 85]);
        let high_color = format([16, 16, 1, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0]);
        assert_eq!(high_color.rgb(&[0xf8, 0x1f]), [255, 0, 255]);
        assert_eq!(format(PIXEL_FORMAT).rgb(&[1, 2, 3, 0]), [3, 2, 1]);
        assert!(Format::from_record([0; 16]).is_none(), "a server with a table of colours");
        assert!(Format::from_record([8, 8, 1, 1, 0, 0, 0, 7, 0, 3, 0, 3, 6, 0, 0, 0]).is_none());
    }

    #[test]
    fn screen_is_read_with_each_version_of_the_protocol() {
        let starts: [&[u8]; 3] = [
            b"RFB 003.003\n\x00\x00\x00\x01",
            b"RFB 003.007\n\x02\x02\x01",
            b"RFB 003.008\n\x01\x01\x00\x00\x00\x00",
        ];
        for start in starts {
            let screen = read(&[&[start], INIT, ROWS].concat()).unwrap();
            assert_eq!((screen.width, screen.height), (2, 2));
            assert_eq!(screen.rgb, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        }
    }

    #[test]
    fn screen_is_refused_when_the_server_demands_a_password() {
        for start in [&b"RFB 003.003\n\x00\x00\x00\x02"[..], b"RFB 003.008\n\x01\x02"] {
            let error = read(&[start]).unwrap_err().to_string();
            assert!(error.contains("it demands a password"), "{error}");
        }
    }

    #[test]
    fn screen_is_refused_when_the_server_sends_nonsense() {
        let start = &b"RFB 003.008\n\x01\x01\x00\x00\x00\x00"[..];
        let large = [start, &[0xff; 24], &[0; 4]];
        let outside: &[&[u8]] = &[&[0, 0, 0, 1, 0, 1, 0, 0, 0, 2, 0, 1, 0, 0, 0, 0]];
        let long_name = [start, &[0, 2, 0, 2], &[0; 16], &[0xff; 4]];
        for (sent, why) in [
            (vec![&b"SSH-2.0-Ope\n"[..]], "no VNC server"),
            (large.to_vec(), "is too large"),
            (long_name.to_vec(), "a text that is too long"),
            ([&[start], INIT, outside].concat(), "was not requested"),
            ([&[start], INIT].concat(), "failed to fill whole buffer"),
            ([&[start], INIT, &[&[77][..]]].concat(), "unknown type 77"),
        ] {
            let error = read(&sent).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
