//! Reads the lines of a client, each of bounded length.

use std::time::Duration;

use tokio::io::{self, AsyncBufRead, AsyncBufReadExt};
use tokio::time::timeout;

use super::limits::ClientBudget;

/// The length of a client's line, in bytes, at most.
pub const MAX_LINE: usize = 1024 * 1024;
/// The length of a line that is read without a permit, in bytes.
const LONG_LINE: usize = 16 * 1024;
/// The time that a long line has to arrive. Others wait for its permit.
const LONG_LINE_TIMEOUT: Duration = Duration::from_secs(30);

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

/// Reads the next line. A long line waits for a permit of the client's user.
///
/// # Errors
/// The connection is broken, or a long line does not arrive in time.
pub async fn next<R: AsyncBufRead + Unpin>(reader: &mut R, budget: &ClientBudget) -> io::Result<Line> {
    next_within(reader, budget, LONG_LINE_TIMEOUT).await
}

async fn next_within<R>(reader: &mut R, budget: &ClientBudget, long_line: Duration) -> io::Result<Line>
where
    R: AsyncBufRead + Unpin,
{
    let mut line = Vec::new();
    if let Some(read) = read_until(reader, &mut line, LONG_LINE).await? {
        return Ok(read);
    }
    let _permit = budget.long_line().await;
    let read = timeout(long_line, read_until(reader, &mut line, MAX_LINE)).await;
    let read = read.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(read.unwrap_or(Line::TooLong))
}

/// Reads up to the end of the line. Returns `None` when the line would be longer than `max`.
async fn read_until<R>(reader: &mut R, line: &mut Vec<u8>, max: usize) -> io::Result<Option<Line>>
where
    R: AsyncBufRead + Unpin,
{
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(Some(Line::End));
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(chunk.len());
        if line.len() + taken > max {
            return Ok(None);
        }
        line.extend_from_slice(&chunk[..taken]);
        reader.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            return Ok(Some(Line::Whole(std::mem::take(line))));
        }
    }
}

/// The number of values in a line, at most. A value takes many times its text in memory.
pub const MAX_VALUES: usize = 10_000;

/// Returns a number that the values of this JSON do not exceed. Separators within texts do not count.
pub fn count_values(line: &[u8]) -> usize {
    let (mut count, mut in_text, mut escaped) = (1, false, false);
    for byte in line {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b',' | b'[' | b'{' if !in_text => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(bytes: &[u8]) -> Vec<Line> {
        let mut reader = io::BufReader::with_capacity(16, bytes);
        let (mut lines, budget) = (Vec::new(), ClientBudget::default());
        loop {
            match next(&mut reader, &budget).await.unwrap() {
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

    #[tokio::test]
    async fn long_line_has_a_permit_until_it_is_read() {
        let (mut client, server) = io::duplex(2 * MAX_LINE);
        let (mut reader, budget) = (io::BufReader::new(server), ClientBudget::default());
        let free = budget.free_long_lines();
        io::AsyncWriteExt::write_all(&mut client, &vec![b'x'; MAX_LINE]).await.unwrap();
        {
            let mut reading = std::pin::pin!(next(&mut reader, &budget));
            assert!(timeout(Duration::from_millis(50), &mut reading).await.is_err());
            assert_eq!(budget.free_long_lines(), free - 1);
            io::AsyncWriteExt::write_all(&mut client, b"\nshort\n").await.unwrap();
            assert!(matches!(reading.await, Ok(Line::Whole(_))));
        }
        assert_eq!(budget.free_long_lines(), free);
        let held = std::iter::repeat_with(|| budget.long_line()).take(free);
        let mut permits = Vec::new();
        for permit in held {
            permits.push(permit.await);
        }
        assert!(matches!(next(&mut reader, &budget).await, Ok(Line::Whole(line)) if line == b"short"));
    }

    #[tokio::test]
    async fn long_line_fails_when_it_does_not_arrive_in_time() {
        let (mut client, server) = io::duplex(2 * MAX_LINE);
        io::AsyncWriteExt::write_all(&mut client, &vec![b'x'; 2 * LONG_LINE]).await.unwrap();
        let (mut reader, budget) = (io::BufReader::new(server), ClientBudget::default());
        let read = next_within(&mut reader, &budget, Duration::from_millis(10)).await;
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
