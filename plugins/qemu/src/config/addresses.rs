//! Checks the addresses of isolated machines, and that of the result server, which they have to reach.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::validator::Validator;
use super::wanted::{Files, Wanted};

/// Networks whose addresses no machine can have: the length of their prefix, and their kind. Source: the IANA IPv4
/// Special-Purpose Address Registry.
const IMPOSSIBLE: [(Ipv4Addr, u32, &str); 4] = [
    (Ipv4Addr::UNSPECIFIED, 8, "no address of a host"),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "a loopback address"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "a link-local address"),
    (Ipv4Addr::new(224, 0, 0, 0), 3, "an address of multicast, of broadcast, or reserved"),
];

const ADVICE: &str = "Write an address that nothing else has";

impl Validator<'_> {
    /// Refuses addresses that no isolated machine can have, outside or inside.
    pub fn addresses(&mut self, files: &Files<'_>, wanted: &[Wanted], server: Option<SocketAddr>) {
        let why = |address: Ipv4Addr| match server {
            Some(server) if server.ip() == IpAddr::V4(address) => Some("the address of the result server"),
            _ => kind_of_impossible(address),
        };
        for one in wanted {
            let Some(guest) = one.guest else { continue };
            let own = one.machine.shared.ip.parse().ok().and_then(|own| Some((own, why(own)?)));
            if let Some((own, why)) = own {
                let reason = format!("'{own}' of machine '{}' is {why}", one.machine.name);
                self.problems.push(one.error(files, "ip", reason).advice(ADVICE));
            }
            // All clones have the same one.
            if let Some(why) = why(guest).filter(|_| own.is_none_or(|(own, _)| own != guest)) {
                let reason = format!("'{guest}', the address inside the snapshot, is {why}");
                let entry = one.entry();
                let is_own = files.section.machines.get(entry).is_some_and(|own| own.guest_ip.is_some());
                let error = match is_own {
                    true => files.host_error(entry, "guest_ip", reason),
                    false => files.own.error(&["machines", entry, "ip"], reason),
                };
                self.problems.push(error.advice("Write the address that is set inside the guest"));
            }
        }
    }
}

fn kind_of_impossible(address: Ipv4Addr) -> Option<&'static str> {
    let has = |network: Ipv4Addr, length: u32| (address.to_bits() ^ network.to_bits()) >> (32 - length) == 0;
    IMPOSSIBLE.iter().find(|(network, length, _)| has(*network, *length)).map(|(_, _, kind)| *kind)
}

/// Returns the warnings about addresses that do no harm to the host, and that nobody can want.
pub fn warnings(files: &Files<'_>, wanted: &[Wanted], server: Option<SocketAddr>) -> Vec<String> {
    let is_isolated = wanted.iter().any(|machine| machine.guest.is_some());
    let unreachable = is_isolated.then(|| why_unreachable(server)).flatten().map(|why| {
        format!(
            "qemu: isolated machines cannot send their results, because {why}. Set resultserver.listen_ip in cuckoo.yaml to \
             an IPv4 address of this host"
        )
    });
    let unused = files.section.machines.iter().filter_map(|(name, own)| {
        let (super::clones::Clones::Count(count), Some(addresses)) = (own.clones.as_ref()?, &own.clone_ips)
        else {
            return None;
        };
        let reason = format!("no clone uses {}: there are {count} clones", addresses.beyond(*count)?);
        let error = files.host_error(name, "clone_ips", reason);
        Some(error.advice("Raise `clones`, or shorten the range").to_string())
    });
    unreachable.into_iter().chain(unused).collect()
}

/// Returns the reason why no guest reaches the result server, if there is one.
fn why_unreachable(server: Option<SocketAddr>) -> Option<String> {
    match server {
        None => Some("the result server has no IP address and port in cuckoo.yaml".to_owned()),
        Some(SocketAddr::V6(server)) => {
            Some(format!("the result server has the IPv6 address {}", server.ip()))
        }
        Some(SocketAddr::V4(server)) => kind_of_impossible(*server.ip())
            .map(|kind| format!("the result server's address {} is {kind}", server.ip())),
    }
}
