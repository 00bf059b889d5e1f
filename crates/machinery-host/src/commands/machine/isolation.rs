//! The network of a new machine whose runs are isolated: its addresses, and its section of `machinery-host.yaml`.
//!
//! | | `ip` in `qemu.yaml`, by which the host reaches the guest while the machine is made | address inside |
//! | --- | --- | --- |
//! | `--isolated` | `--ip` | `--guest-ip`, else `--ip` |
//! | `--clones` | the first of `--clone-ips` | `--guest-ip`, else `--ip` |

use std::net::{IpAddr, Ipv4Addr};

use machinery::{Error, Result};
use serde_yaml::{Mapping, Value};

use super::options::Create;
use crate::commands::address_range::AddressRange;

/// The name of the bridge in each run's network. No interface of the host has to have it.
pub const BRIDGE: &str = "br0";

/// The addresses of an isolated machine, or of its clones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Isolation {
    /// The machine's own address; that of the first clone, if it has clones.
    pub address: Ipv4Addr,
    /// The address inside.
    pub guest: Ipv4Addr,
    pub clones: Option<(u16, AddressRange)>,
}

impl Isolation {
    /// Returns the addresses of the new machine, if it is to be isolated.
    ///
    /// # Errors
    /// An address is missing, or is none of IPv4.
    pub fn of(create: &Create) -> Result<Option<Isolation>> {
        let network = &create.network;
        let clones = network.clones.zip(network.clone_ips);
        if !network.isolated && clones.is_none() {
            return match network.guest_ip {
                None => Ok(None),
                Some(_) => Err(Error::configuration("--guest-ip is for a machine whose network is isolated")
                    .advice("Add --isolated, or give only --ip")),
            };
        }
        let ip = create.ip.map(|ip| match ip {
            IpAddr::V4(ip) => Ok(ip),
            IpAddr::V6(ip) => {
                Err(Error::configuration(format!("{ip} is no IPv4 address, which an isolated network needs")))
            }
        });
        let ip = ip.transpose()?;
        let Some(guest) = network.guest_ip.or(ip) else {
            return Err(Error::configuration("the address that is set in the guest is unknown")
                .advice("Give --guest-ip ADDRESS"));
        };
        let address = clones.map_or(ip.unwrap_or(guest), |(_, range)| range.first());
        Ok(Some(Isolation { address, guest, clones }))
    }

    /// Returns all addresses by which the host reaches guests.
    pub fn addresses(&self) -> Vec<String> {
        let listed = match self.clones {
            None => vec![self.address],
            Some((count, range)) => range.addresses().take(count.into()).collect(),
        };
        listed.iter().map(Ipv4Addr::to_string).collect()
    }

    /// Returns the section of the machine.
    pub fn section(&self) -> Mapping {
        let mut keys = Mapping::new();
        let mut set = |key: &str, value: Value| keys.insert(key.into(), value);
        match self.clones {
            None => set("network", "isolated".into()),
            Some((count, _)) => set("clones", count.into()),
        };
        if let Some((_, range)) = self.clones {
            set("clone_ips", range.to_string().into());
        }
        if self.guest != self.address {
            set("guest_ip", self.guest.to_string().into());
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isolation(words: &[&str]) -> Result<Option<Isolation>> {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            create: Create,
        }
        let given = ["create", "m", "--disk", "/d/base.qcow2"].iter().chain(words);
        Isolation::of(&<Command as clap::Parser>::try_parse_from(given).unwrap().create)
    }

    fn section(words: &[&str]) -> (String, String) {
        let isolation = isolation(words).unwrap().unwrap();
        (isolation.address.to_string(), serde_yaml::to_string(&isolation.section()).unwrap())
    }

    #[test]
    fn section_has_the_clones_and_the_address_inside() {
        let (address, keys) = section(&["--isolated", "--ip", "10.0.0.5"]);
        assert_eq!((address.as_str(), keys.as_str()), ("10.0.0.5", "network: isolated\n"));
        let (address, keys) = section(&["--isolated", "--ip", "10.0.0.5", "--guest-ip", "192.168.30.11"]);
        assert_eq!(
            (address.as_str(), keys.as_str()),
            ("10.0.0.5", "network: isolated\nguest_ip: 192.168.30.11\n")
        );
        // Without --guest-ip, the address of a machine with clones is the one inside.
        for inside in ["--ip", "--guest-ip"] {
            let (address, keys) =
                section(&["--clones", "2", "--clone-ips", "10.0.0.5-10.0.0.9", inside, "192.168.30.11"]);
            assert_eq!(address, "10.0.0.5");
            assert_eq!(keys, "clones: 2\nclone_ips: 10.0.0.5-9\nguest_ip: 192.168.30.11\n");
        }
        let clones = isolation(&["--clones", "2", "--clone-ips", "10.0.0.255-10.0.1.9", "--ip", "10.9.9.9"]);
        assert_eq!(clones.unwrap().unwrap().addresses(), ["10.0.0.255", "10.0.1.0"]);
    }

    #[test]
    fn address_inside_is_refused_when_the_network_is_not_isolated_or_it_is_unknown() {
        assert_eq!(isolation(&["--bridge", "br0", "--ip", "10.0.0.5"]).unwrap(), None);
        let refused = isolation(&["--isolated", "--ip", "fe80::1"]).unwrap_err().to_string();
        assert!(refused.contains("no IPv4 address"), "{refused}");
    }
}
