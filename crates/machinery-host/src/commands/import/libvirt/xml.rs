//! libvirt's descriptions and tables, as far as an import needs them.
//!
//! Source: libvirt's docs/formatdomain.rst, docs/formatsnapshot.rst, docs/formatnetwork.rst.

use machinery::{Error, Result};
use roxmltree::{Document, Node};

/// The namespace in which virt-manager and virt-install write the operating system.
const LIBOSINFO: &str = "http://libosinfo.org/xmlns/libvirt/domain/1.0";

/// A domain.
#[derive(Debug, Default)]
pub struct Domain {
    pub name: String,
    /// The processor architecture, in Cuckoo's words.
    pub architecture: Option<String>,
    /// The ID of the operating system in libosinfo.
    pub system: Option<String>,
    pub is_uefi: bool,
    pub cards: Vec<Card>,
    pub uuid: String,
    /// The files of its disks.
    pub disks: Vec<String>,
}

/// A network card of a domain.
#[derive(Debug, Default)]
pub struct Card {
    /// The MAC address, in lowercase.
    pub mac: Option<String>,
    /// The network of libvirt that the card is in.
    pub network: Option<String>,
    /// The bridge, or the host's network card, that the card is connected to.
    pub device: Option<String>,
    /// The guest's address, if the definition has it.
    pub ip: Option<String>,
}

/// A network of libvirt.
#[derive(Debug, Default)]
pub struct Network {
    pub bridge: Option<String>,
    reservations: Vec<Reservation>,
    /// The table of leases, as virsh prints it; empty while the network is off.
    pub leases: String,
}

/// A reserved address: of a MAC address, or of a host's name.
#[derive(Debug)]
struct Reservation {
    mac: Option<String>,
    name: Option<String>,
    ip: String,
}

/// A snapshot of a domain.
#[derive(Debug)]
pub struct Snapshot {
    pub has_memory: bool,
}

impl Domain {
    /// # Errors
    /// The text is not XML.
    pub fn read(xml: &str) -> Result<Self> {
        let document = parse(xml, "domain")?;
        let root = document.root_element();
        let os = child(root, "os");
        let loader = os.and_then(|os| child(os, "loader"));
        let nvram = os.and_then(|os| child(os, "nvram"));
        let by_efi = os.and_then(|os| os.attribute("firmware")) == Some("efi");
        let by_flash = loader.and_then(|loader| loader.attribute("type")) == Some("pflash");
        let architecture = os.and_then(|os| child(os, "type")?.attribute("arch"));
        let mut metadata = child(root, "metadata").into_iter().flat_map(|metadata| metadata.descendants());
        let system = metadata.find(|node| node.has_tag_name((LIBOSINFO, "os")));
        let devices = child(root, "devices").into_iter().flat_map(|devices| devices.children());
        let disks = devices.clone().filter(|node| node.has_tag_name("disk"));
        Ok(Domain {
            name: child(root, "name").and_then(|name| name.text()).unwrap_or_default().to_owned(),
            architecture: architecture.map(architecture_of),
            system: system.and_then(|system| system.attribute("id")).map(str::to_owned),
            is_uefi: by_efi || by_flash || nvram.is_some(),
            cards: devices.filter(|node| node.has_tag_name("interface")).map(Card::of).collect(),
            uuid: child(root, "uuid").and_then(|uuid| uuid.text()).unwrap_or_default().to_owned(),
            disks: disks
                .filter_map(|disk| child(disk, "source")?.attribute("file"))
                .map(str::to_owned)
                .collect(),
        })
    }
}

/// Returns Cuckoo's word for an architecture.
fn architecture_of(arch: &str) -> String {
    match arch {
        "x86_64" => "amd64",
        "i686" => "x86",
        other => other,
    }
    .to_owned()
}

impl Card {
    fn of(interface: Node) -> Self {
        let source = child(interface, "source");
        let from = |name| source.and_then(|source| source.attribute(name)).map(str::to_owned);
        let mac = child(interface, "mac").and_then(|mac| mac.attribute("address"));
        let mut addresses = interface.children().filter(|node| node.has_tag_name("ip"));
        let ip = addresses.find(|ip| ip.attribute("family").is_none_or(|family| family == "ipv4"));
        Card {
            mac: mac.map(str::to_lowercase),
            network: from("network"),
            device: from("bridge").or_else(|| from("dev")),
            ip: ip.and_then(|ip| ip.attribute("address")).map(str::to_owned),
        }
    }
}

impl Network {
    /// # Errors
    /// The text is not XML.
    pub fn read(xml: &str) -> Result<Self> {
        let document = parse(xml, "network")?;
        let root = document.root_element();
        let addresses = root.children().filter(|node| node.has_tag_name("ip"));
        let addresses = addresses.filter(|ip| ip.attribute("family").is_none_or(|family| family == "ipv4"));
        let hosts = addresses.filter_map(|ip| child(ip, "dhcp")).flat_map(|dhcp| dhcp.children());
        let hosts = hosts.filter(|node| node.has_tag_name("host"));
        let reservation = |host: Node| {
            Some(Reservation {
                mac: host.attribute("mac").map(str::to_lowercase),
                name: host.attribute("name").map(str::to_owned),
                ip: host.attribute("ip")?.to_owned(),
            })
        };
        Ok(Network {
            bridge: child(root, "bridge").and_then(|bridge| bridge.attribute("name")).map(str::to_owned),
            reservations: hosts.filter_map(reservation).collect(),
            leases: String::new(),
        })
    }

    /// Returns the address that is reserved for the card, or for the guest's name.
    pub fn reserved(&self, mac: Option<&str>, name: &str) -> Option<String> {
        let by_mac = |host: &&Reservation| mac.is_some() && host.mac.as_deref() == mac;
        let by_name = |host: &&Reservation| host.mac.is_none() && host.name.as_deref() == Some(name);
        let mut all = self.reservations.iter();
        let found = all.clone().find(by_mac).or_else(|| all.find(by_name));
        found.map(|host| host.ip.clone())
    }
}

impl Snapshot {
    /// # Errors
    /// The text is not XML.
    pub fn read(xml: &str) -> Result<Self> {
        let document = parse(xml, "snapshot")?;
        let root = document.root_element();
        let state = child(root, "state").and_then(|state| state.text()).unwrap_or_default();
        let kept = child(root, "memory").and_then(|memory| memory.attribute("snapshot"));
        let is_off = matches!(state, "shutoff" | "disk-snapshot");
        // If the description does not mention the memory, a running domain's snapshot includes it.
        Ok(Snapshot { has_memory: kept.map_or(!is_off, |kept| kept != "no") })
    }
}

/// Returns the IPv4 address of a MAC address in a table of virsh: `… MAC ipv4 ADDRESS/PREFIX …`.
pub fn address_in(table: &str, mac: Option<&str>) -> Option<String> {
    let mac = mac?;
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| !word.eq_ignore_ascii_case(mac)).skip(1);
        let address = words.next().filter(|protocol| *protocol == "ipv4").and_then(|_| words.next())?;
        address.split('/').next().map(str::to_owned)
    })
}

pub fn parse<'a>(xml: &'a str, what: &str) -> Result<Document<'a>> {
    let failed =
        |error| Error::failed(format!("libvirt's description of the {what} cannot be read: {error}"));
    Document::parse(xml).map_err(failed)
}

pub fn child<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain type='kvm'><name>win 10</name>
      <metadata><x:libosinfo xmlns:x='http://libosinfo.org/xmlns/libvirt/domain/1.0'>
        <x:os id='http://microsoft.com/win/10'/></x:libosinfo></metadata>
      <os><type arch='x86_64'>hvm</type></os>
      <devices>
        <interface type='network'><mac address='52:54:00:AA:bb:01'/><source network='lab'/></interface>
        <interface type='bridge'><mac address='52:54:00:aa:bb:02'/><source bridge='br1'/></interface>
        <interface type='direct'><source dev='eth1' mode='bridge'/></interface>
        <interface type='user'><ip family='ipv6' address='fd00::2'/><ip address='10.0.2.20' prefix='24'/></interface>
      </devices></domain>";

    #[test]
    fn domain_has_its_system_and_the_connection_of_each_card() {
        let domain = Domain::read(DOMAIN).unwrap();
        assert_eq!((domain.name.as_str(), domain.is_uefi), ("win 10", false));
        assert_eq!(domain.system.as_deref(), Some("http://microsoft.com/win/10"));
        assert_eq!(domain.architecture.as_deref(), Some("amd64"));
        let [network, bridge, direct, user] = &domain.cards[..] else { panic!("{domain:?}") };
        assert_eq!(network.mac.as_deref(), Some("52:54:00:aa:bb:01"));
        assert_eq!((network.network.as_deref(), network.device.as_deref()), (Some("lab"), None));
        assert_eq!((bridge.device.as_deref(), direct.device.as_deref()), (Some("br1"), Some("eth1")));
        assert_eq!((user.mac.as_deref(), user.ip.as_deref()), (None, Some("10.0.2.20")));
        let error = Domain::read("<domain>").unwrap_err().to_string();
        assert!(error.contains("description of the domain cannot be read"), "{error}");
    }

    #[test]
    fn domain_boots_by_uefi_when_its_firmware_is_in_flash() {
        for (os, is_uefi) in [
            ("<os firmware='efi'/>", true),
            ("<os><loader type='pflash'>/f</loader></os>", true),
            ("<os><nvram>/f</nvram></os>", true),
            ("<os firmware='bios'><loader type='rom'>/f</loader></os>", false),
        ] {
            assert_eq!(Domain::read(&format!("<domain>{os}</domain>")).unwrap().is_uefi, is_uefi, "{os}");
        }
    }

    #[test]
    fn network_reserves_addresses_for_cards_and_names() {
        let network = Network::read(
            "<network><bridge name='virbr7'/><ip family='ipv6' address='fd00::1'><dhcp>
               <host name='c' ip='fd00::9'/></dhcp></ip>
             <ip address='10.7.0.1'><dhcp><range start='10.7.0.2' end='10.7.0.9'/>
               <host mac='52:54:00:AA:00:01' name='b' ip='10.7.0.5'/><host name='c' ip='10.7.0.6'/></dhcp></ip></network>",
        )
        .unwrap();
        assert_eq!(network.bridge.as_deref(), Some("virbr7"));
        let reserved = |mac, name| network.reserved(mac, name);
        assert_eq!(reserved(Some("52:54:00:aa:00:01"), "a").as_deref(), Some("10.7.0.5"));
        assert_eq!(reserved(Some("52:54:00:aa:00:02"), "c").as_deref(), Some("10.7.0.6"));
        assert_eq!((reserved(None, "a"), reserved(Some("52:54:00:aa:00:02"), "b")), (None, None));
    }

    #[test]
    fn snapshot_has_memory_when_it_was_taken_of_a_domain_that_was_on() {
        for (xml, has_memory) in [
            ("<state>running</state><memory snapshot='internal'/>", true),
            ("<state>paused</state>", true),
            ("<state>running</state><memory snapshot='no'/>", false),
            ("<state>shutoff</state>", false),
            ("<state>disk-snapshot</state>", false),
        ] {
            let snapshot = Snapshot::read(&format!("<domainsnapshot>{xml}</domainsnapshot>")).unwrap();
            assert_eq!(snapshot.has_memory, has_memory, "{xml}");
        }
    }

    #[test]
    fn address_is_found_in_the_tables_of_leases_and_of_a_guest() {
        let leases = " Expiry Time           MAC address         Protocol   IP address       Hostname   Client ID\n\
                      ----------------------------------------------------------------\n \
                      2026-01-01 10:00:00   52:54:00:aa:00:01   ipv6   fd00::5/64   -   -\n \
                      2026-01-01 10:00:00   52:54:00:AA:00:01   ipv4   10.7.0.5/24   win   -\n";
        assert_eq!(address_in(leases, Some("52:54:00:aa:00:01")).as_deref(), Some("10.7.0.5"));
        assert_eq!(address_in(leases, Some("52:54:00:aa:00:02")), None);
        assert_eq!(address_in(leases, None), None);
        let guest = " vnet0      52:54:00:aa:00:03    ipv4         10.7.0.8/24\n";
        assert_eq!(address_in(guest, Some("52:54:00:aa:00:03")).as_deref(), Some("10.7.0.8"));
    }
}
