//! Clones: machines that share the files of one machine of `qemu.yaml`.
//!
//! ```text
//! machines: {win10_1: {clones: 20, clone_ips: 192.168.30.110-129}}   ─▶ win10_1-1 … win10_1-20
//! machines: {win10_1: {clones: [{name: a, ip: 192.168.30.110}, …]}}  ─▶ a …
//! ```

use std::fmt;
use std::net::Ipv4Addr;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

/// The maximum number of clones of one machine.
const MAX_CLONES: u64 = 4096;

/// The key `clones`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clones {
    /// The number of clones, with names by number and the addresses of `clone_ips`.
    Count(usize),
    Listed(Vec<NamedClone>),
}

/// The name and the address of a clone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedClone {
    #[serde(deserialize_with = "machinery::config::text")]
    pub name: String,
    pub ip: Ipv4Addr,
}

/// The key `clone_ips`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloneAddresses {
    Range { first: Ipv4Addr, last: Ipv4Addr },
    Listed(Vec<Ipv4Addr>),
}

impl CloneAddresses {
    /// Returns the number of addresses.
    pub fn count(&self) -> usize {
        match self {
            CloneAddresses::Range { first, last } => {
                let count = u64::from(last.to_bits().saturating_sub(first.to_bits())) + 1;
                usize::try_from(count).unwrap_or(usize::MAX)
            }
            CloneAddresses::Listed(listed) => listed.len(),
        }
    }

    /// Returns the first addresses, at most `count`.
    fn take(&self, count: usize) -> Vec<Ipv4Addr> {
        match self {
            CloneAddresses::Range { first, last } => {
                (first.to_bits()..=last.to_bits()).map(Ipv4Addr::from_bits).take(count).collect()
            }
            CloneAddresses::Listed(listed) => listed.iter().copied().take(count).collect(),
        }
    }

    /// Returns the addresses beyond the first ones, as a text; `None` if there are none.
    pub fn beyond(&self, count: usize) -> Option<String> {
        match self {
            _ if self.count() <= count => None,
            CloneAddresses::Range { first, last } => {
                let unused = first.to_bits().saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
                let unused = Ipv4Addr::from_bits(unused);
                Some(if unused == *last { last.to_string() } else { format!("{unused}-{last}") })
            }
            CloneAddresses::Listed(listed) => {
                let unused: Vec<String> = listed.iter().skip(count).map(Ipv4Addr::to_string).collect();
                Some(unused.join(", "))
            }
        }
    }

    fn of_range(text: &str) -> Result<CloneAddresses, String> {
        let wrong = || {
            format!(
                "'{text}' is no range of addresses: write FIRST-LAST, such as 192.168.30.110-129, or a list of \
                 addresses"
            )
        };
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let first: Ipv4Addr = first.trim().parse().map_err(|_| wrong())?;
        let last = last.trim();
        let last = match last.parse::<u8>() {
            Ok(octet) => {
                let [a, b, c, _] = first.octets();
                Ipv4Addr::new(a, b, c, octet)
            }
            Err(_) => last.parse().map_err(|_| wrong())?,
        };
        if last < first {
            return Err(format!("the range '{text}' ends before it begins"));
        }
        Ok(CloneAddresses::Range { first, last })
    }
}

/// The names and the addresses of machines.
pub type Named = Vec<(String, String)>;

/// A key that does not fit to the others, the reason, and the advice.
pub type Misfit = (&'static str, String, &'static str);

/// Returns the names and the addresses of the clones of the machine `base`.
///
/// # Errors
/// The keys do not fit together.
pub fn clones_of(base: &str, clones: &Clones, addresses: Option<&CloneAddresses>) -> Result<Named, Misfit> {
    let count = match (clones, addresses) {
        (Clones::Listed(listed), None) => {
            return Ok(listed.iter().map(|clone| (clone.name.clone(), clone.ip.to_string())).collect());
        }
        (Clones::Listed(_), Some(_)) => {
            let reason = "the list `clones` has the address of each clone already".to_owned();
            return Err(("clone_ips", reason, "Remove clone_ips, or write the number of clones"));
        }
        (Clones::Count(count), _) => *count,
    };
    let Some(addresses) = addresses else {
        let reason = format!("{count} clones have no addresses");
        return Err(("clones", reason, "Add clone_ips, such as 192.168.30.110-129"));
    };
    if addresses.count() < count {
        let reason = format!("it has {} addresses, and there are {count} clones", addresses.count());
        return Err(("clone_ips", reason, "Extend the range, or lower `clones`"));
    }
    let clone = |(number, ip): (usize, Ipv4Addr)| (format!("{base}-{number}"), ip.to_string());
    Ok((1..).zip(addresses.take(count)).map(clone).collect())
}

impl<'de> Deserialize<'de> for Clones {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ClonesVisitor)
    }
}

struct ClonesVisitor;

impl<'de> Visitor<'de> for ClonesVisitor {
    type Value = Clones;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of clones, or a list of clones with `name` and `ip`")
    }

    fn visit_u64<E: de::Error>(self, count: u64) -> Result<Clones, E> {
        match usize::try_from(count) {
            Ok(count @ 1..) if count as u64 <= MAX_CLONES => Ok(Clones::Count(count)),
            _ => Err(E::custom(format!(
                "{count} clones are not possible: write a number from 1 to {MAX_CLONES}"
            ))),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Clones, A::Error> {
        let mut listed = Vec::new();
        while let Some(clone) = list.next_element()? {
            listed.push(clone);
        }
        if listed.is_empty() {
            return Err(de::Error::custom("the list of clones is empty: remove the key, or list a clone"));
        }
        Ok(Clones::Listed(listed))
    }
}

impl<'de> Deserialize<'de> for CloneAddresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AddressesVisitor)
    }
}

struct AddressesVisitor;

impl<'de> Visitor<'de> for AddressesVisitor {
    type Value = CloneAddresses;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a range of addresses such as 192.168.30.110-129, or a list of addresses")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<CloneAddresses, E> {
        CloneAddresses::of_range(text).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<CloneAddresses, A::Error> {
        let mut listed = Vec::new();
        while let Some(address) = list.next_element()? {
            listed.push(address);
        }
        Ok(CloneAddresses::Listed(listed))
    }
}
