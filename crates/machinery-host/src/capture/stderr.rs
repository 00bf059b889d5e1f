//! Interprets the messages of tcpdump on its standard error.
//!
//! Source: `tcpdump.c` of tcpdump 4.99, and the messages of libpcap 1.10 on Linux.

use std::path::Path;

use machinery::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

use super::settings::permission_advice;

/// The length of a line that is kept, in bytes, at most. The rest of a longer line is dropped.
const MAX_LINE: usize = 4096;

/// Reads lines of bounded length.
#[derive(Debug)]
pub struct Lines<R> {
    reader: R,
    line: Vec<u8>,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    /// Returns the lines of that reader.
    pub fn new(reader: R) -> Self {
        Lines { reader, line: Vec::new() }
    }

    /// Returns the next line, or `None` at the end. A call that is dropped loses nothing.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            let chunk = self.reader.fill_buf().await.ok()?;
            let is_end = chunk.is_empty();
            let newline = chunk.iter().position(|byte| *byte == b'\n');
            let length = newline.unwrap_or(chunk.len());
            let kept = length.min(MAX_LINE - self.line.len());
            self.line.extend_from_slice(&chunk[..kept]);
            self.reader.consume(length + usize::from(newline.is_some()));
            if newline.is_some() || (is_end && !self.line.is_empty()) {
                return Some(String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned());
            }
            if is_end {
                return None;
            }
        }
    }
}

/// The message after which tcpdump misses no packet.
const LISTENING: &str = "listening on ";

/// Splits a line into its parts. tcpdump begins most lines with its own name, which is the name of the file
/// that the host has executed.
fn parts(line: &str) -> impl Iterator<Item = &str> {
    line.split(": ")
}

/// The packet counts of tcpdump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    captured: u64,
    received: u64,
    dropped: u64,
}

impl Counts {
    /// Parses the line that answers SIGUSR1.
    pub fn of(line: &str) -> Option<Self> {
        let number = |what: &str| {
            let part = parts(line).last()?.split(", ").find(|part| part.ends_with(what))?;
            part.split(' ').next()?.parse().ok()
        };
        Some(Counts {
            captured: number(" captured")?,
            received: number(" received by filter")?,
            dropped: number(" dropped by kernel")?,
        })
    }

    /// Returns the number of lost packets and the number of all packets, if any were lost.
    pub fn lost(&self) -> Option<(u64, u64)> {
        (self.dropped > 0).then_some((self.dropped, self.received))
    }

    /// Reports whether every packet that arrived is written or lost.
    pub fn all_read(&self) -> bool {
        self.captured + self.dropped >= self.received
    }
}

/// Reports whether the line means that tcpdump listens.
pub fn is_listening(line: &str) -> bool {
    line.contains(LISTENING)
}

/// Reports whether the line is no error.
pub fn is_harmless(line: &str) -> bool {
    let starts = [
        LISTENING,
        "data link type ",
        "verbose output suppressed",
        "dropped privs to ",
        "WARNING",
        "Warning",
    ];
    let ends = [
        "packet captured",
        "packets captured",
        "packet received by filter",
        "packets received by filter",
        "packet dropped by kernel",
        "packets dropped by kernel",
        "packet dropped by interface",
        "packets dropped by interface",
    ];
    line.trim().is_empty()
        || parts(line).any(|part| starts.iter().any(|start| part.starts_with(start)))
        || ends.iter().any(|end| line.ends_with(end))
}

/// Returns the error behind these messages of tcpdump.
pub fn diagnose(messages: &[String], tcpdump: &Path, interface: &str) -> Error {
    let words = messages.join(" ");
    let has = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
    let error = if has(&["permission", "Operation not permitted"]) {
        Error::environment(format!("tcpdump may not capture on {interface}"))
            .advice(permission_advice(tcpdump))
    } else if has(&["No such device", "SIOCGIFHWADDR"]) {
        Error::environment(format!("there is no interface {interface}"))
            .advice("Create it, or correct `interface` in the machinery's configuration")
    } else if has(&["went down", "is not up", "Network is down", "disappeared", "no longer exists"]) {
        Error::environment(format!("the interface {interface} went away or down"))
            .advice(format!("Set it up: ip link set {interface} up"))
    } else if has(&["filter expression", "syntax error", "unknown host", "invalid IP"]) {
        Error::configuration("tcpdump does not understand the filter")
            .advice("Check the machine's `ip`, and `resultserver.listen_ip` in cuckoo.yaml")
    } else {
        Error::failed("tcpdump failed").advice("Look at the host's log, and try tcpdump by hand")
    };
    if words.is_empty() { error } else { error.detail(&words) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnosis(line: &str) -> String {
        diagnose(&[line.to_owned()], Path::new("/usr/bin/tcpdump"), "virbr7").to_string()
    }

    #[test]
    fn diagnose_recognises_each_failure() {
        for (line, expected) in [
            ("tcpdump: virbr7: You don't have permission to perform this capture on that device", "setcap"),
            ("(socket: Operation not permitted)", "may not capture on virbr7"),
            ("tcpdump: virbr7: No such device exists", "there is no interface virbr7"),
            ("tcpdump: pcap_loop: The interface disappeared", "went away or down"),
            ("tcpdump: can't parse filter expression: syntax error", "resultserver.listen_ip"),
            ("tcpdump: something new", "tcpdump failed: tcpdump: something new"),
        ] {
            let text = diagnosis(line);
            assert!(text.contains(expected) && text.contains(line), "{line}: {text}");
        }
    }

    #[tokio::test]
    async fn line_is_cut_when_it_is_long() {
        let text = [&b"one\n"[..], &[b'x'; 3 * MAX_LINE], b"\n\xff\n\nlast"].concat();
        let mut lines = Lines::new(tokio::io::BufReader::with_capacity(100, &*text));
        let expected = ["one", &"x".repeat(MAX_LINE), "\u{fffd}", "", "last"];
        for line in expected {
            assert_eq!(lines.next().await.as_deref(), Some(line));
        }
        assert_eq!(lines.next().await, None);
    }

    #[test]
    fn usual_lines_are_harmless() {
        for line in [
            "tcpdump: listening on lo, link-type EN10MB (Ethernet), snapshot length 262144 bytes",
            "dropped privs to root",
            "tcpdump: WARNING: virbr0: no promiscuous mode",
            "1 packet captured",
            "12 packets received by filter",
            "0 packets dropped by kernel",
            "tcpdump: 3 packets captured, 4 packets received by filter, 0 packets dropped by kernel",
            "",
        ] {
            assert!(is_harmless(line), "{line}");
        }
        assert!(!is_harmless("tcpdump: lo: No such device exists"));
    }

    #[test]
    fn lines_are_understood_when_the_program_has_another_name() {
        for line in [
            "netdump: listening on lo, link-type EN10MB (Ethernet), snapshot length 262144 bytes",
            "tcpdump-4.99: WARNING: virbr0: no promiscuous mode",
            "my tcpdump: 3 packets captured, 4 packets received by filter, 0 packets dropped by kernel",
        ] {
            assert!(is_harmless(line), "{line}");
        }
        let line = "netdump: 3 packets captured, 4 packets received by filter, 1 packet dropped by kernel";
        assert_eq!(Counts::of(line).unwrap().lost(), Some((1, 4)));
        assert!(!is_harmless("netdump: virbr0: No such device exists"));
    }

    #[test]
    fn counts_report_unread_and_lost_packets() {
        let line = "tcpdump: 3 packets captured, 4 packets received by filter, 0 packets dropped by kernel";
        assert!(!Counts::of(line).unwrap().all_read());
        let line = "tcpdump: 1 packet captured, 4 packets received by filter, 3 packets dropped by kernel";
        assert!(Counts::of(line).unwrap().all_read());
        assert_eq!(Counts::of(line).unwrap().lost(), Some((3, 4)));
        assert_eq!(Counts::of("4 packets captured"), None);
    }
}
