//! The lines of the monitor, each of bounded length.
//!
//! Code in QEMU may be an attacker's, so a line that QEMU does not end must not fill this computer's memory.

use std::io::{BufRead, BufReader, Read};

/// The maximum length of a line, in bytes. The longest answers are descriptions of block devices, with some KiB.
pub const MAX_LINE: usize = 4 << 20;
/// The maximum number of values in a line: in memory, a value takes many times its text.
const MAX_VALUES: usize = 100_000;
/// The capacity that the buffer for lines keeps, in bytes.
const KEPT_BUFFER: usize = 64 << 10;

/// Reads lines.
pub struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: Read> Lines<R> {
    pub fn new(stream: R) -> Self {
        Lines { reader: BufReader::new(stream), line: Vec::new() }
    }

    /// Returns the next line, or none at the end.
    ///
    /// # Errors
    /// The line exceeds a limit. The text has the reason.
    pub fn next(&mut self) -> Result<Option<&[u8]>, String> {
        self.line.clear();
        self.line.shrink_to(KEPT_BUFFER);
        let read = (&mut self.reader).take(MAX_LINE as u64 + 1).read_until(b'\n', &mut self.line);
        // Both an end of file and a reset are the end of the connection.
        if !matches!(read, Ok(1..)) {
            return Ok(None);
        }
        if self.line.len() > MAX_LINE {
            return Err(format!("its monitor sent more than {} MiB without an end of line", MAX_LINE >> 20));
        }
        let separators = self.line.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{'));
        if separators.count() > MAX_VALUES {
            return Err(format!("its monitor sent a line with more than {MAX_VALUES} values"));
        }
        Ok(Some(&self.line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_refused_when_it_does_not_end_or_has_too_many_values() {
        let mut endless = Lines::new(std::io::repeat(b'x'));
        assert!(endless.next().unwrap_err().contains("4 MiB without an end of line"));
        let longest = [&vec![b'x'; MAX_LINE - 1][..], b"\nlast\n"].concat();
        let mut lines = Lines::new(&longest[..]);
        assert_eq!(lines.next().unwrap().map(<[u8]>::len), Some(MAX_LINE));
        assert_eq!(lines.next(), Ok(Some(&b"last\n"[..])));
        assert_eq!(lines.next(), Ok(None));
        let values = b"[1,".repeat(MAX_VALUES);
        assert!(Lines::new(&values[..]).next().unwrap_err().contains("more than 100000 values"));
    }
}
