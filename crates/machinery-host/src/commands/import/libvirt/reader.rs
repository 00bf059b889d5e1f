//! Reads single domains of a libvirt: their values, their network cards and their snapshots.

use std::collections::HashMap;

use machinery::{Error, Result};

use super::super::entry::{Machine, Origin};
use super::super::given::Given;
use super::os;
use super::virsh::Virsh;
use super::xml::{Card, Domain, Network, Snapshot, address_in};
use crate::commands::shell_word;

/// Reads the domains of one libvirt.
pub struct Reader<'a> {
    pub virsh: Virsh<'a>,
    given: &'a Given,
    /// The networks that were read, by their names.
    networks: HashMap<String, Network>,
}

impl<'a> Reader<'a> {
    pub fn new(dsn: &'a str, given: &'a Given) -> Result<Self> {
        Ok(Reader { virsh: Virsh::new(dsn)?, given, networks: HashMap::new() })
    }

    pub fn machine(&mut self, label: &str, is_running: bool) -> Result<Machine> {
        let domain = Domain::read(&self.virsh.read(&["dumpxml", "--inactive", "--domain", label])?)?;
        if domain.name != label {
            // virsh takes a name that is a number for that of a running domain.
            return Err(Error::failed(format!("virsh describes the domain '{}'", domain.name)).machine(label));
        }
        let mut machine = Machine::new(label, Origin::default());
        machine.set("label", Some(label));
        machine.set("architecture", domain.architecture.clone());
        let (platform, version) = domain.system.as_deref().map(os::of_id).unwrap_or_default();
        machine.set("platform", platform);
        machine.set("os_version", version);
        if domain.is_uefi {
            machine.notes.push("its domain boots by UEFI".to_owned());
        }
        match self.snapshot(label, &mut machine.notes) {
            Ok(name) => machine.set("snapshot", Some(name)),
            Err(fault) => machine.faults.push(fault),
        }
        if let Err(fault) = self.connect(&domain, is_running, &mut machine) {
            machine.faults.push(fault);
        }
        self.given.apply(&mut machine);
        Ok(machine)
    }

    /// Sets the keys of the network card: the first card whose address is known, or else the first one.
    fn connect(&mut self, domain: &Domain, is_running: bool, machine: &mut Machine) -> Result<()> {
        let addresses = domain.cards.iter().map(|card| self.address(domain, card, is_running));
        let addresses: Vec<_> = addresses.collect::<Result<_>>()?;
        let known = addresses.iter().position(Option::is_some).unwrap_or_default();
        let Some(card) = domain.cards.get(known) else { return Ok(()) };
        machine.set("mac_address", card.mac.clone());
        let bridge = card.network.as_ref().and_then(|name| self.networks.get(name)?.bridge.clone());
        machine.set("interface", card.device.clone().or(bridge));
        if let Some(Address { ip, note }) = addresses.into_iter().nth(known).flatten() {
            machine.set("ip", Some(ip));
            if self.given.value("ip", &domain.name).is_none() {
                machine.has_changing_ip = note.is_some();
                machine.notes.extend(note);
            }
        }
        Ok(())
    }

    /// Returns the address of a card, if libvirt knows it.
    fn address(&mut self, domain: &Domain, card: &Card, is_running: bool) -> Result<Option<Address>> {
        let mut lease = None;
        if let Some(name) = &card.network {
            let network = self.network(name)?;
            if let Some(ip) = network.reserved(card.mac.as_deref(), &domain.name) {
                return Ok(Some(Address { ip, note: None }));
            }
            lease = address_in(&network.leases, card.mac.as_deref());
        }
        if let Some(ip) = card.ip.clone() {
            return Ok(Some(Address { ip, note: None }));
        }
        let how = if lease.is_some() { "a lease" } else { "that of the running guest" };
        let ip = lease.or_else(|| if is_running { self.used_address(domain, card) } else { None });
        Ok(ip.map(|ip| Address { note: Some(not_reserved(&ip, how)), ip }))
    }

    /// Returns the address that the running guest uses, from the host's ARP table or from QEMU's agent in the guest.
    fn used_address(&self, domain: &Domain, card: &Card) -> Option<String> {
        let of = |source| ["domifaddr", "--domain", &domain.name, "--source", source];
        let arp = self.virsh.read(&of("arp")).ok().and_then(|table| address_in(&table, card.mac.as_deref()));
        // libvirt asks the agent only for a client that may also change domains.
        arp.or_else(|| address_in(&self.virsh.run(&of("agent")).ok()?, card.mac.as_deref()))
    }

    pub fn network(&mut self, name: &str) -> Result<&Network> {
        if !self.networks.contains_key(name) {
            let mut network = Network::read(&self.virsh.read(&["net-dumpxml", "--network", name])?)?;
            // A network that is off has no leases.
            network.leases = self.virsh.read(&["net-dhcp-leases", "--network", name]).unwrap_or_default();
            self.networks.insert(name.to_owned(), network);
        }
        self.networks.get(name).ok_or_else(|| Error::failed(format!("the network '{name}' was not read")))
    }

    /// Returns the snapshot to restore: the given one, or the current one, or the only one.
    fn snapshot(&self, label: &str, notes: &mut Vec<String>) -> Result<String> {
        let names = self.virsh.names(&["snapshot-list", "--name", "--domain", label])?;
        let take = format!(
            "Start the domain, wait until Cuckoo's agent runs in it, and take one with `virsh snapshot-create-as --domain {} \
             --name clean`",
            shell_word(label)
        );
        let given = self.given.value("snapshot", label);
        let current = || self.virsh.current_snapshot(label);
        let chosen = match (given, &names[..]) {
            (_, []) => {
                let advice = format!("{take}; or name only the domains to import");
                return Err(Error::configuration("its domain has no snapshot").advice(advice));
            }
            (Some(given), _) if is_in(&names, given) => given.to_owned(),
            (Some(given), _) => {
                let reason = format!("its domain has no snapshot '{given}': it has {}", names.join(", "));
                return Err(Error::configuration(reason));
            }
            (None, [only]) => only.clone(),
            (None, _) => match current()? {
                Some(current) => current,
                None => {
                    let reason = format!("its domain has no current snapshot: it has {}", names.join(", "));
                    return Err(Error::configuration(reason)
                        .advice(format!("Add --snapshot {}", shell_word(&format!("{label}=NAME")))));
                }
            },
        };
        let has_memory = |name: &str| self.describe(label, name).map(|snapshot| snapshot.has_memory);
        if has_memory(&chosen)? {
            return Ok(chosen);
        }
        let reason = format!(
            "the snapshot '{chosen}' has no memory (it was taken while the domain was off, or with --disk-only), so each \
             restore would boot the guest"
        );
        if given.is_some() {
            notes.push(reason);
            return Ok(chosen);
        }
        let mut usable = Vec::new();
        for name in names.iter().filter(|name| **name != chosen) {
            if has_memory(name)? {
                usable.push(name.as_str());
            }
        }
        let advice = match &usable[..] {
            [] => {
                let option = shell_word(&format!("{label}={chosen}"));
                format!("{take}; or add --snapshot {option} to use it nevertheless")
            }
            some => {
                let option = shell_word(&format!("{label}=NAME"));
                format!("Add --snapshot {option}; these have memory: {}", some.join(", "))
            }
        };
        Err(Error::configuration(reason).advice(advice))
    }

    fn describe(&self, label: &str, name: &str) -> Result<Snapshot> {
        Snapshot::read(&self.virsh.read(&["snapshot-dumpxml", "--domain", label, "--snapshotname", name])?)
    }
}

/// An address of a guest.
struct Address {
    ip: String,
    /// A warning, if another guest may get the address.
    note: Option<String>,
}

fn not_reserved(ip: &str, how: &str) -> String {
    format!(
        "its ip {ip} is {how}, which may change. Reserve it in libvirt's network (`virsh net-edit`), or set it in the guest"
    )
}

/// Reports whether the name is one of these.
pub fn is_in(names: &[String], name: &str) -> bool {
    names.iter().any(|known| known == name)
}
