//! Comparison of the configuration of a machine with its domain, and of the disks of all domains.
//!
//! A difference breaks no restore, but the analysis: traffic that is not captured, or an agent at another
//! address. So `check` warns of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use machinery::{Error, MachineInfo, Result};
use machinery_images::Chain;
use virt::connect::Connect;
use virt::domain::Domain;

use crate::description::{Description, Interface, reserved_addresses};
use crate::domain;
use crate::dsn::is_local;

/// Describes the differences, for people. Each text is a sentence without the name of the machine.
///
/// # Errors
/// libvirt cannot describe the domain.
pub fn warnings(connect: &Connect, domain: &Domain, info: &MachineInfo) -> Result<Vec<String>> {
    let described = domain::described(domain)?;
    let cards: Vec<Card> = described.interfaces.iter().map(|card| Card::of(connect, card)).collect();
    let mut found = differences(info, &cards);
    if domain.autostart().unwrap_or(false) {
        found.push(format!(
            "libvirt starts its domain when the computer boots, and the host then stops it. Disable that \
             with `virsh autostart --disable {}`",
            info.label
        ));
    }
    Ok(found)
}

/// A network card of the domain.
#[derive(Debug, Clone, Default)]
struct Card {
    mac: Option<String>,
    /// The bridge, or the host's network card, that the card is connected to, if libvirt knows one.
    device: Option<String>,
    /// The address that libvirt's network assigns to the card.
    address: Option<String>,
}

impl Card {
    fn of(connect: &Connect, card: &Interface) -> Card {
        let network = card.network.as_ref().and_then(|name| connect.lookup_network_by_name(name).ok());
        let bridge = network.as_ref().and_then(|network| network.bridge_name().ok());
        let xml = network.and_then(|network| network.xml_desc(0).ok()).unwrap_or_default();
        let reserved = reserved_addresses(&xml).unwrap_or_default();
        let address = reserved.into_iter().find(|(mac, _)| Some(mac) == card.mac.as_ref());
        Card {
            mac: card.mac.clone(),
            device: card.device.clone().or(bridge),
            address: address.map(|(_, address)| address),
        }
    }
}

/// Compares the machine with the network cards of its domain.
fn differences(info: &MachineInfo, cards: &[Card]) -> Vec<String> {
    let mut found = Vec::new();
    let devices: Vec<&str> = cards.iter().filter_map(|card| card.device.as_deref()).collect();
    if let Some(interface) = &info.interface
        && !devices.is_empty()
        && devices.len() == cards.len()
        && !devices.contains(&interface.as_str())
    {
        found.push(format!(
            "its interface is {interface}, and its domain is connected to {}: its traffic is not captured. Correct \
             the interface in kvm.yaml, or the domain",
            devices.join(", ")
        ));
    }
    let macs: Vec<&str> = cards.iter().filter_map(|card| card.mac.as_deref()).collect();
    if let Some(mac) = &info.mac_address
        && !macs.is_empty()
        && !macs.contains(&mac.as_str())
    {
        found.push(format!(
            "its mac_address is {mac}, and its domain has {}. Correct mac_address in kvm.yaml",
            macs.join(", ")
        ));
    }
    let addresses: Vec<&str> = cards.iter().filter_map(|card| card.address.as_deref()).collect();
    if !addresses.is_empty() && !addresses.contains(&info.ip.as_str()) {
        found.push(format!(
            "its ip is {}, and libvirt's network gives its domain {}. Correct the ip in kvm.yaml, or the reservation \
             (`virsh net-edit`)",
            info.ip,
            addresses.join(", ")
        ));
    }
    found
}

/// The domain of a machine, to be compared with those of other machines.
pub struct Described {
    machine: String,
    dsn: String,
    uuid: String,
    /// None if its files are on another computer.
    description: Option<Description>,
}

impl Described {
    /// Describes the machine's domain without the overlays of a run, whose headers that run can rewrite; `None` if libvirt
    /// cannot.
    pub fn of(connect: &Connect, dsn: &str, info: &MachineInfo) -> Option<Described> {
        let domain = domain::domain(connect, &info.label).ok()?;
        let uuid = domain::uuid(&domain).ok()?;
        let description = is_local(dsn).then(|| domain::defined(&domain)).transpose().ok()?;
        Some(Described { machine: info.name.clone(), dsn: dsn.to_owned(), uuid, description })
    }
}

/// Warns of two machines whose domains have one UUID: two addresses may be those of the same libvirt.
pub fn same_domains(domains: &[Described]) -> Vec<String> {
    let mut seen = BTreeMap::new();
    let twins = domains.iter().filter_map(|domain| Some((seen.insert(&domain.uuid, domain)?, domain)));
    let warning = |(one, other): (&Described, &Described)| {
        format!(
            "machine '{}': its domain at {} has the UUID of the domain of machine '{}' at {}. If both are addresses of the \
             same libvirt, the machines have one domain, and disturb each other. Remove one of them then",
            other.machine, other.dsn, one.machine, one.dsn
        )
    };
    twins.map(warning).collect()
}

/// Reports disks that two machines write to, or that one machine writes to and another is based on.
pub fn shared_disks(domains: &[Described]) -> Vec<Error> {
    let local =
        domains.iter().filter_map(|domain| Some((domain.machine.as_str(), domain.description.as_ref()?)));
    shared(&local.collect::<Vec<_>>())
}

fn shared(machines: &[(&str, &Description)]) -> Vec<Error> {
    let mut writers: BTreeMap<PathBuf, &str> = BTreeMap::new();
    let mut found = Vec::new();
    let error = |file: &PathBuf, name: &str, other: &str, how: &str| {
        let what =
            format!("its domain {how} {}, which the domain of machine '{other}' writes to", file.display());
        Error::environment(what).machine(name).advice("Give each domain a disk of its own")
    };
    for (name, domain) in machines {
        for file in domain.writable_disks().filter(|disk| disk.is_plain).filter_map(|disk| disk.path.as_ref())
        {
            match writers.get(file) {
                Some(other) => found.push(error(file, name, other, "writes to the disk")),
                None => drop(writers.insert(file.clone(), name)),
            }
        }
    }
    for (name, domain) in machines {
        let disks = domain.disks.iter().filter_map(|disk| Chain::of(disk.path.as_ref()?, None).ok());
        for file in disks.flat_map(|chain| chain.files.into_iter().skip(1)) {
            if let Some(other) = writers.get(&file) {
                found.push(error(&file, name, other, "has a disk that is based on"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_driver::{DSN, TestDomain, connect};
    use machinery::config::MachineConfig;

    fn info() -> MachineInfo {
        let shared = MachineConfig {
            ip: "10.0.0.5".to_owned(),
            platform: "windows".to_owned(),
            os_version: "10".to_owned(),
            architecture: "amd64".to_owned(),
            interface: None,
            agent_port: 8000,
            mac_address: Some("52:54:00:00:00:01".to_owned()),
            tags: Vec::new(),
        };
        MachineInfo::new("m", &shared, "m".to_owned(), None, "virbr0")
    }

    fn card(mac: &str, device: &str, address: &str) -> Card {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Card { mac: some(mac), device: some(device), address: some(address) }
    }

    #[test]
    fn machine_has_a_warning_for_each_difference_from_its_domain() {
        let right = card("52:54:00:00:00:01", "virbr0", "10.0.0.5");
        assert_eq!(differences(&info(), std::slice::from_ref(&right)), [""; 0]);
        assert_eq!(differences(&info(), &[card("52:54:00:00:00:09", "br9", ""), right]), [""; 0]);
        assert_eq!(differences(&info(), &[]), [""; 0]);
        let found = differences(&info(), &[card("52:54:00:00:00:02", "virbr1", "10.0.0.6")]);
        for (text, words) in found.iter().zip(["virbr1", "52:54:00:00:00:02", "10.0.0.6"]) {
            assert!(text.contains(words), "no {words} in {text}");
        }
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn machine_has_no_warning_when_its_domain_does_not_say_enough() {
        let known = card("52:54:00:00:00:01", "virbr1", "");
        assert_eq!(differences(&info(), &[known, card("", "", "")]), [""; 0], "the other card may be right");
        let unnamed = [card("", "virbr0", "")];
        assert_eq!(differences(&info(), &unnamed), [""; 0], "libvirt chooses the address");
        let anywhere = MachineInfo { interface: None, mac_address: None, ..info() };
        assert_eq!(differences(&anywhere, &[card("52:54:00:00:00:02", "virbr1", "")]), [""; 0]);
    }

    /// A network of libvirt's test driver, which is removed with this value.
    struct TestNetwork(virt::network::Network);

    impl Drop for TestNetwork {
        fn drop(&mut self) {
            let _ = self.0.destroy();
        }
    }

    #[test]
    fn domain_is_compared_by_its_networks_and_its_autostart() {
        let connect = connect();
        let hosts =
            "<host mac='52:54:00:00:00:09' ip='10.9.0.9'/><host mac='52:54:00:00:00:01' ip='10.9.0.5'/>";
        let xml = format!(
            "<network><name>compare</name><bridge name='virbr9'/><ip address='10.9.0.1' netmask='255.255.255.0'>\
             <dhcp><range start='10.9.0.2' end='10.9.0.9'/>{hosts}</dhcp></ip></network>"
        );
        let _network = TestNetwork(connect.create_network_xml(&xml).unwrap());
        let card = "<interface type='network'><mac address='52:54:00:00:00:01'/><source network='compare'/></interface>";
        let test = TestDomain::with_devices(card, "compare-network");
        let warnings = |info: &MachineInfo| warnings(&connect, &test.domain, info).unwrap();
        let right = MachineInfo { interface: Some("virbr9".to_owned()), ip: "10.9.0.5".to_owned(), ..info() };
        assert_eq!(warnings(&right), [""; 0]);
        let [interface, ip] = &warnings(&info())[..] else { panic!("{:?}", warnings(&info())) };
        assert!(interface.contains("its domain is connected to virbr9"), "{interface}");
        assert!(ip.contains("libvirt's network gives its domain 10.9.0.5"), "{ip}");
        test.domain.set_autostart(true).unwrap();
        let [boot] = &warnings(&right)[..] else { panic!("{:?}", warnings(&right)) };
        assert!(boot.contains("virsh autostart --disable m"), "{boot}");
    }

    #[test]
    fn disks_of_the_domains_are_compared_where_libvirt_is_local() {
        let disk = "<disk type='file' device='disk'><source file='/none/shared'/><target dev='vda'/></disk>";
        let test = ["compare-a", "compare-b"].map(|name| TestDomain::with_devices(disk, name));
        let infos = ["compare-a", "compare-b", "compare-none"].map(|name| MachineInfo {
            name: name.to_owned(),
            label: name.to_owned(),
            ..info()
        });
        let described = |info| Described::of(&test[0].connect, DSN, info);
        let mut domains: Vec<_> = infos.iter().filter_map(described).collect();
        assert_eq!(same_domains(&domains), [""; 0]);
        let found = shared_disks(&domains);
        let [problem] = &found[..] else { panic!("{found:?}") };
        assert!(
            problem.to_string().contains("machine 'compare-b': its domain writes to the disk /none/shared")
        );
        domains.extend(Described::of(&test[0].connect, "test+tcp://lab/default", &infos[0]));
        let [twin] = &same_domains(&domains)[..] else { panic!("not one twin") };
        assert!(twin.contains(DSN) && twin.contains("test+tcp://lab/default"), "{twin}");
        assert_eq!(shared_disks(&domains).len(), 1, "the files of another computer are not compared");
    }

    #[test]
    fn disk_is_a_problem_when_two_machines_write_to_it() {
        let domain = |path: &str, more: &str| {
            let xml = format!(
                "<domain><devices><disk type='file' device='disk'><source file='{path}'/>{more}</disk></devices></domain>"
            );
            Description::read(&xml).unwrap()
        };
        let [one, other] = ["/d/a", "/d/b"].map(|path| domain(path, ""));
        assert_eq!(shared(&[("a", &one), ("b", &other)]), []);
        let found = shared(&[("a", &one), ("b", &one)]);
        assert!(
            found[0].to_string().starts_with("machine 'b': its domain writes to the disk /d/a"),
            "{found:?}"
        );
        let shareable = domain("/d/a", "<shareable/>");
        assert_eq!(shared(&[("a", &shareable), ("b", &shareable)]), []);
        let readonly = domain("/d/a", "<readonly/>");
        assert_eq!(shared(&[("a", &readonly), ("b", &readonly)]), []);
    }
}
