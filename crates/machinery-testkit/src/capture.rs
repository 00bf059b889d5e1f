//! Capture files, and the processes that write them.
//!
//! This module parses single packets, also of a file that is still being written. `tshark` validates whole
//! files.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs, io};

use rustix::process::Pid;

use crate::error::{Context, Error};
use crate::file_content::{ContentWatch, Wait};
use crate::host::{self, CommandOutput};
use crate::{Result, processes};

/// Returns the path of tcpdump.
pub fn tcpdump() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // A plain user's path lacks the administrator's folders.
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders.map(|folder| folder.join("tcpdump")).find(|path| path.is_file());
    found.ok_or_else(|| Error::new("there is no tcpdump: install it"))
}

/// Returns the processes that have this file on their command line.
pub fn writers(pcap: &Path) -> Result<Vec<Pid>> {
    let pcap = pcap.display().to_string();
    let processes = processes::list()?.into_iter().filter(|(_, command)| command.contains(&pcap));
    Ok(processes.map(|(pid, _)| pid).collect())
}

/// Lets `tshark` read the whole file.
pub fn tshark(pcap: &Path) -> Result<CommandOutput> {
    let mut tshark = Command::new("tshark");
    tshark.args(["-n", "-r"]).arg(pcap);
    host::run_command(tshark)
}

/// One end of a conversation; the port is 0 in protocols without ports.
pub type End = (Ipv4Addr, u16);

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Packet {
    /// Sender and receiver; `None` in packets that are neither IPv4 nor ARP.
    pub ends: Option<(End, End)>,
    /// The protocol number, such as that of TCP, UDP or ICMP; 0 in packets that are not IPv4.
    pub protocol: u8,
    /// The content behind the header of UDP; in other protocols behind that of IPv4.
    pub payload: Vec<u8>,
    /// The whole packet. Checksums of TCP and UDP are zeroed: the card may compute them after the capture.
    pub frame: Vec<u8>,
}

/// The protocol number of TCP.
pub const TCP: u8 = 6;
/// The protocol number of UDP.
pub const UDP: u8 = 17;

const ETHERNET: usize = 14;

impl Packet {
    fn new(frame: &[u8]) -> Self {
        let unknown = Packet { ends: None, protocol: 0, payload: Vec::new(), frame: frame.to_vec() };
        match frame.get(12..ETHERNET) {
            Some([0x08, 0x00]) => Self::ipv4(frame).unwrap_or(unknown),
            Some([0x08, 0x06]) => {
                let address = |at| Some((address(frame, at)?, 0));
                Packet { ends: address(ETHERNET + 14).zip(address(ETHERNET + 24)), ..unknown }
            }
            _ => unknown,
        }
    }

    fn ipv4(frame: &[u8]) -> Option<Self> {
        let mut frame = frame.to_vec();
        let body = ETHERNET + usize::from(frame.get(ETHERNET)? & 0x0f) * 4;
        // Padding follows.
        let end = ETHERNET + usize::from(number(&frame, ETHERNET + 2)?);
        frame.truncate(end);
        let protocol = *frame.get(ETHERNET + 9)?;
        let checksum = match protocol {
            TCP => Some(body + 16),
            UDP => Some(body + 6),
            _ => None,
        };
        if let Some(at) = checksum {
            frame.get_mut(at..at + 2)?.fill(0);
        }
        let port = |at| if checksum.is_some() { number(&frame, at) } else { Some(0) };
        let from = (address(&frame, ETHERNET + 12)?, port(body)?);
        let to = (address(&frame, ETHERNET + 16)?, port(body + 2)?);
        let payload = frame.get(body + if protocol == UDP { 8 } else { 0 }..)?.to_vec();
        Some(Packet { ends: Some((from, to)), protocol, payload, frame })
    }

    /// Reports whether one of its ends is this one.
    pub fn is_with(&self, end: End) -> bool {
        self.ends.is_some_and(|(from, to)| from == end || to == end)
    }

    /// Reports whether it comes from that address.
    pub fn is_from(&self, address: Ipv4Addr) -> bool {
        self.ends.is_some_and(|((from, _), _)| from == address)
    }

    /// Reports whether it goes to that address.
    pub fn is_to(&self, address: Ipv4Addr) -> bool {
        self.ends.is_some_and(|(_, (to, _))| to == address)
    }
}

/// Returns the packets in the file, in their order, without an incomplete last one.
pub fn packets(pcap: &Path) -> Result<Vec<Packet>> {
    match fs::read(pcap) {
        Ok(bytes) => in_bytes(&bytes).context(|| format!("reading {}", pcap.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).context(|| format!("reading {}", pcap.display())),
    }
}

/// Waits until `wanted` accepts the packets in the file, which need not exist yet.
pub fn wait_for(pcap: &Path, timeout: Duration, wanted: impl Fn(&[Packet]) -> bool) -> Result<Vec<Packet>> {
    let watch = ContentWatch::new(pcap)?;
    let mut last = Vec::new();
    let waited = watch.wait_for(timeout, None, || {
        last = packets(pcap)?;
        Ok(wanted(&last).then_some(()))
    })?;
    match waited {
        Wait::Found(()) => Ok(last),
        Wait::GaveUp(why) => {
            let path = pcap.display();
            Err(Error::new(format!("{path} does not get the packets: {why}; there are {}", last.len())))
        }
    }
}

/// Parses a capture of Ethernet packets in this machine's byte order, as `tcpdump` and QEMU write it here.
fn in_bytes(bytes: &[u8]) -> Result<Vec<Packet>> {
    let word = |at: usize| bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word));
    let (Some(magic), Some(link)) = (word(0), word(20)) else { return Ok(Vec::new()) };
    if (magic, link) != (0xa1b2_c3d4, 1) {
        return Err(Error::new(format!("it is no file of Ethernet packets (magic {magic:x}, type {link})")));
    }
    let (mut packets, mut at) = (Vec::new(), 24);
    while let (Some(here), Some(sent)) = (word(at + 8), word(at + 12)) {
        if here != sent {
            return Err(Error::new(format!("a packet of {sent} bytes was cut to {here}")));
        }
        let Some(frame) = bytes.get(at + 16..at + 16 + here as usize) else { break };
        packets.push(Packet::new(frame));
        at += 16 + here as usize;
    }
    Ok(packets)
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|number| u16::from_be_bytes(*number))
}

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    bytes.get(at..)?.first_chunk::<4>().map(|address| Ipv4Addr::from(*address))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);
    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 2);

    /// Returns a datagram with the payload `hi`, padded to the minimum frame length.
    fn datagram() -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14..18].copy_from_slice(&[0x45, 0, 0, 30]);
        frame[23] = UDP;
        frame[26..30].copy_from_slice(&GUEST.octets());
        frame[30..34].copy_from_slice(&HOST.octets());
        frame[34..44].copy_from_slice(&[0x80, 1, 2, 2, 0, 10, 0xaa, 0xbb, b'h', b'i']);
        frame
    }

    fn file(frames: &[Vec<u8>]) -> Vec<u8> {
        let words = [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65535, 1];
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        for frame in frames {
            let words = [1, 2, frame.len() as u32, frame.len() as u32];
            bytes.extend(words.into_iter().flat_map(u32::to_ne_bytes));
            bytes.extend(frame);
        }
        bytes
    }

    #[test]
    fn datagram_is_parsed() {
        let packets = in_bytes(&file(&[datagram()])).unwrap();
        let [packet] = packets.as_slice() else { panic!("{packets:?}") };
        assert_eq!(packet.ends, Some(((GUEST, 0x8001), (HOST, 514))));
        assert_eq!((packet.protocol, packet.payload.as_slice()), (UDP, b"hi".as_slice()));
        assert_eq!(packet.frame.len(), 44);
        assert_eq!(packet.frame[40..42], [0, 0]);
        assert!(packet.is_with((HOST, 514)) && !packet.is_with((GUEST, 514)));
        assert!(packet.is_from(GUEST) && packet.is_to(HOST) && !packet.is_from(HOST));
    }

    #[test]
    fn arp_request_has_ends() {
        let mut frame = vec![0; 42];
        frame[12..14].copy_from_slice(&[8, 6]);
        frame[28..32].copy_from_slice(&HOST.octets());
        frame[38..42].copy_from_slice(&GUEST.octets());
        assert_eq!(Packet::new(&frame).ends, Some(((HOST, 0), (GUEST, 0))));
        assert_eq!(Packet::new(&frame[..20]).ends, None);
    }

    #[test]
    fn incomplete_packet_is_skipped() {
        let whole = file(&[datagram(), datagram()]);
        for length in [0, 10, 24, 30, 50, 24 + 16 + 59] {
            assert_eq!(in_bytes(&whole[..length]).unwrap().len(), 0, "{length}");
        }
        assert_eq!(in_bytes(&whole[..24 + 16 + 60]).unwrap().len(), 1);
        assert_eq!(in_bytes(&whole).unwrap().len(), 2);
        assert!(in_bytes(&[7; 30]).is_err());
    }
}
