//! A range of addresses, as `machinery-host.yaml` and the command line have it.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A range of addresses, as in `192.168.30.110-129`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    first: Ipv4Addr,
    last: Ipv4Addr,
}

impl AddressRange {
    /// Returns the first address.
    pub fn first(self) -> Ipv4Addr {
        self.first
    }

    /// Returns all addresses.
    pub fn addresses(self) -> impl Iterator<Item = Ipv4Addr> {
        (self.first.to_bits()..=self.last.to_bits()).map(Ipv4Addr::from_bits)
    }
}

impl FromStr for AddressRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = text.split_once('-').and_then(|(first, last)| {
            let first: Ipv4Addr = first.parse().ok()?;
            let [a, b, c, _] = first.octets();
            let in_network = |octet| Ipv4Addr::new(a, b, c, octet);
            let last = last.parse::<u8>().map(in_network).or_else(|_| last.parse()).ok()?;
            Some(AddressRange { first, last })
        });
        let range = range.filter(|range| range.first <= range.last);
        range.ok_or_else(|| "write the first address and the last one, such as 192.168.30.110-129".to_owned())
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.first.octets(), self.last.octets());
        match first[..3] == last[..3] {
            true => write!(f, "{}-{}", self.first, last[3]),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_is_refused_when_it_is_none_or_ends_before_it_begins() {
        assert_eq!("10.0.0.1-10.0.0.1".parse::<AddressRange>().unwrap().to_string(), "10.0.0.1-1");
        let over_a_network: AddressRange = "10.0.0.255-10.0.1.1".parse().unwrap();
        assert_eq!(
            (over_a_network.addresses().count(), over_a_network.to_string().as_str()),
            (3, "10.0.0.255-10.0.1.1")
        );
        for wrong in ["10.0.0.1", "10.0.0.9-8", "10.0.0.1-256", "a-b", ""] {
            assert!(wrong.parse::<AddressRange>().is_err(), "{wrong}");
        }
    }
}
