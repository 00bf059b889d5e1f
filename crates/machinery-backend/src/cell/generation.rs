//! The generation of the rules of nftables. Each change of any rule, by anybody, adds one to its number.
//!
//! Source: `nf_tables_getgen` in Linux's net/netfilter/nf_tables_api.c.

use std::io;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

use netlink_packet_core::NLM_F_REQUEST;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// The question and its answer. Sources: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.
const GET: u16 = 10 << 8 | 16;
const NEW: u16 = 10 << 8 | 15;
/// The attribute with the number.
const ID: u16 = 1;
/// The length of a message's header, and of that with the header of netfilter.
const HEADER: usize = 16;
const HEADERS: usize = 20;

/// The rules of a namespace at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation {
    namespace: u64,
    number: u32,
}

impl Generation {
    /// Returns the generation of the rules of this thread's namespace.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn now() -> io::Result<Generation> {
        let namespace = Path::new("/proc/thread-self/ns/net").metadata()?.st_ino();
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.send(&request(), 0)?;
        let (answer, _) = socket.recv_from_full()?;
        let number = number_in(&answer).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Generation { namespace, number })
    }

    /// Reports whether exactly one change is between the earlier one and this.
    pub fn is_next_of(self, earlier: Generation) -> bool {
        self == Generation { number: earlier.number.wrapping_add(1), ..earlier }
    }
}

fn request() -> [u8; HEADERS] {
    let mut request = [0; HEADERS];
    request[..4].copy_from_slice(&(HEADERS as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&GET.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request
}

/// Returns the number in an answer.
fn number_in(answer: &[u8]) -> Option<u32> {
    let kind = answer.get(4..6)?;
    if kind != NEW.to_ne_bytes() || answer.len() < HEADER {
        return None;
    }
    let mut rest = answer.get(HEADERS..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        if kind == ID {
            return Some(u32::from_be_bytes(rest.get(4..8)?.try_into().ok()?));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_is_found_behind_other_attributes_and_never_in_another_message() {
        let mut answer = request().to_vec();
        answer[4..6].copy_from_slice(&NEW.to_ne_bytes());
        assert_eq!(number_in(&answer), None);
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        answer.extend(attribute(3, b"nft\0x"));
        answer.extend(attribute(ID, &7u32.to_be_bytes()));
        assert_eq!(number_in(&answer), Some(7));
        assert_eq!(number_in(&answer[..answer.len() - 1]), None);
        answer[4..6].copy_from_slice(&2u16.to_ne_bytes());
        assert_eq!(number_in(&answer), None);
    }

    #[test]
    fn generation_is_the_next_one_of_the_same_namespace_only() {
        let of = |namespace, number| Generation { namespace, number };
        assert!(of(1, 0).is_next_of(of(1, u32::MAX)) && of(1, 3).is_next_of(of(1, 2)));
        assert!(!of(1, 4).is_next_of(of(1, 2)) && !of(2, 3).is_next_of(of(1, 2)));
    }
}
