//! Reads the lines of a client, each of bounded length.

use tokio::io::{self, AsyncBufRead, AsyncBufReadExt};

/// The length of a client's line, in bytes, at most.
pub const MAX_LINE: usize = 1024 * 1024;

/// The result of reading.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A line, without its newline.
    Whole(Vec<u8>),
    /// More than [`MAX_LINE`] bytes without an end of line.
    TooLong,
    /// The client has closed its end. An unfinished line is dropped.
    End,
}

/// Reads the next line.
///
/// # Errors
/// The connection is broken.
pub async fn next<R: AsyncBufRead + Unpin>(reader: &mut R) -> io::Result<Line> {
    let mut line = Vec::new();
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(Line::End);
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(chunk.len());
        if line.len() + taken > MAX_LINE {
            return Ok(Line::TooLong);
        }
        line.extend_from_slice(&chunk[..taken]);
        reader.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            return Ok(Line::Whole(line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(bytes: &[u8]) -> Vec<Line> {
        let mut reader = io::BufReader::with_capacity(16, bytes);
        let mut lines = Vec::new();
        loop {
            match next(&mut reader).await.unwrap() {
                Line::Whole(line) => lines.push(Line::Whole(line)),
                last => {
                    lines.push(last);
                    return lines;
                }
            }
        }
    }

    #[tokio::test]
    async fn lines_end_at_newlines_and_unfinished_one_is_dropped() {
        let lines = all(b"one\n\na line longer than the buffer\nhalf").await;
        let whole = |text: &str| Line::Whole(text.as_bytes().to_vec());
        assert_eq!(lines, [whole("one"), whole(""), whole("a line longer than the buffer"), Line::End]);
    }

    #[tokio::test]
    async fn line_longer_than_limit_is_refused() {
        let mut long = vec![b'x'; MAX_LINE];
        long.push(b'\n');
        assert!(matches!(&all(&long).await[..], [Line::Whole(_), Line::End]));
        long.insert(0, b'x');
        assert_eq!(all(&long).await, [Line::TooLong]);
    }
}
