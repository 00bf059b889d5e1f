//! A domain at its snapshot, as libvirt describes it: its disks and network cards, and each part that a process of QEMU
//! without libvirt cannot have.
//!
//! Source: libvirt's docs/formatdomain.rst and docs/formatsnapshot.rst.

use std::path::PathBuf;

use machinery::Result;
use machinery_images::{Header, SnapshotMemory};
use roxmltree::{Document, Node};

use super::super::xml::{child, parse};

/// The devices that cannot come over, and the reasons.
const REFUSED: [(&str, &str); 8] = [
    ("hostdev", "a device of this computer"),
    ("filesystem", "a folder of this computer, which runs would change"),
    ("smartcard", "a smartcard of this computer"),
    ("shmem", "memory that it shares with this computer"),
    ("vsock", "a socket of this computer"),
    ("crypto", "a cryptographic device of this computer"),
    ("tpm", "a TPM, whose state is not in the snapshot"),
    ("pstore", "a store that runs would change"),
];

/// A domain at its snapshot.
#[derive(Debug, Default)]
pub struct Source {
    /// The description, for libvirt's translation.
    pub xml: String,
    pub uuid: String,
    /// The disks, the media and the firmware's variables.
    pub images: Vec<Image>,
    pub cards: Vec<Card>,
    /// The reasons why the domain cannot become a machine.
    pub faults: Vec<String>,
}

/// A file of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The name of the disk in libvirt.
    pub target: String,
    pub path: PathBuf,
    pub format: String,
    pub is_read_only: bool,
    pub is_nvram: bool,
}

/// A network card.
#[derive(Debug, PartialEq, Eq)]
pub struct Card {
    pub mac: String,
    pub network: CardNetwork,
}

#[derive(Debug, PartialEq, Eq)]
pub enum CardNetwork {
    /// The network of libvirt with this name.
    Named(String),
    Bridge(String),
    User,
}

impl Source {
    /// Reads the description of a snapshot.
    ///
    /// # Errors
    /// The text is not XML.
    pub fn read(snapshot: &str) -> Result<Source> {
        let document = parse(snapshot, "snapshot")?;
        let root = document.root_element();
        let mut source = Source::default();
        match child(root, "memory").and_then(|memory| memory.attribute("snapshot")) {
            Some("internal") => {}
            Some("external") => source.fault("its memory is in a file of its own (an external snapshot)"),
            _ => source.fault("it has no memory"),
        }
        let Some(domain) = child(root, "domain") else {
            source.fault("libvirt has not kept the domain's description in it");
            return Ok(source);
        };
        source.xml = snapshot[domain.range()].to_owned();
        source.uuid = child(domain, "uuid").and_then(|uuid| uuid.text()).unwrap_or_default().to_owned();
        source.domain(&document, domain);
        Ok(source)
    }

    fn domain(&mut self, document: &Document<'_>, domain: Node<'_, '_>) {
        if child(domain, "launchSecurity").is_some() {
            self.fault("the domain's memory is encrypted (launchSecurity)");
        }
        if let Some(nvram) = child(domain, "os").and_then(|os| child(os, "nvram")) {
            self.nvram(nvram);
        }
        let root = document.root_element();
        let kept = child(root, "disks").into_iter().flat_map(|disks| disks.children());
        let kept: Vec<_> =
            kept.filter_map(|disk| Some((disk.attribute("name")?, disk.attribute("snapshot")?))).collect();
        for device in child(domain, "devices").into_iter().flat_map(|devices| devices.children()) {
            let tag = device.tag_name().name();
            if let Some((_, what)) = REFUSED.iter().find(|(refused, _)| *refused == tag) {
                self.fault(format!("the domain has {what} ({tag})"));
            }
            match tag {
                "disk" => self.disk(device, &kept),
                "interface" => self.card(device),
                "memory" if device.attribute("model") == Some("nvdimm") => {
                    self.fault("the domain has persistent memory, which runs would change (nvdimm)");
                }
                _ => {}
            }
        }
    }

    fn fault(&mut self, reason: impl Into<String>) {
        self.faults.push(reason.into());
    }

    /// Adds the firmware's variables.
    fn nvram(&mut self, nvram: Node<'_, '_>) {
        let file = child(nvram, "source").and_then(|source| source.attribute("file"));
        let Some(path) = nvram.text().map(str::trim).filter(|text| !text.is_empty()).or(file) else {
            return self.fault("the firmware's variables are not in a file (nvram)");
        };
        let format = nvram.attribute("format").unwrap_or("raw");
        if format != "qcow2" {
            let reason = format!(
                "the firmware's variables in {path} are not in the format qcow2, so the snapshot has none"
            );
            return self.fault(reason);
        }
        let (path, format, target) = (path.into(), format.to_owned(), "nvram".to_owned());
        self.images.push(Image { target, path, format, is_read_only: false, is_nvram: true });
    }

    fn disk(&mut self, disk: Node<'_, '_>, kept: &[(&str, &str)]) {
        let target = child(disk, "target").and_then(|target| target.attribute("dev")).unwrap_or_default();
        let Some(source) = child(disk, "source") else { return };
        let kind = disk.attribute("type").unwrap_or_default();
        let Some(path) = source.attribute("file").filter(|_| kind == "file") else {
            return self.fault(format!("its disk {target} is no file (type {kind})"));
        };
        let format = child(disk, "driver").and_then(|driver| driver.attribute("type")).unwrap_or("raw");
        let is_read_only = child(disk, "readonly").is_some() || disk.attribute("device") == Some("cdrom");
        if disk.descendants().any(|node| node.has_tag_name("encryption")) {
            self.fault(format!("its disk {target} is encrypted"));
        }
        if let Some(shared) = ["shareable", "transient"].into_iter().find(|name| child(disk, name).is_some())
        {
            self.fault(format!("its disk {target} is {shared}"));
        }
        let how = kept.iter().find(|(name, _)| *name == target).map_or("no", |(_, how)| *how);
        if !is_read_only && how != "internal" {
            self.fault(match how {
                "external" => {
                    format!("its disk {target} has its state in another file (an external snapshot)")
                }
                _ => format!("it does not have the disk {target}"),
            });
        }
        let (path, format, target) = (path.into(), format.to_owned(), target.to_owned());
        self.images.push(Image { target, path, format, is_read_only, is_nvram: false });
    }

    fn card(&mut self, card: Node<'_, '_>) {
        let kind = card.attribute("type").unwrap_or_default();
        let mac = child(card, "mac").and_then(|mac| mac.attribute("address")).unwrap_or_default();
        let from = |name| child(card, "source").and_then(|source| source.attribute(name)).map(str::to_owned);
        let queues = child(card, "driver").and_then(|driver| driver.attribute("queues"));
        if child(card, "virtualport").is_some() {
            self.fault(format!("its network card {mac} is on a virtual switch (virtualport)"));
        }
        if queues.is_some_and(|queues| queues != "1") {
            self.fault(format!("its network card {mac} has more than one queue"));
        }
        let network = match kind {
            "network" => from("network").map(CardNetwork::Named),
            "bridge" => from("bridge").map(CardNetwork::Bridge),
            "user" => Some(CardNetwork::User),
            _ => None,
        };
        match network {
            Some(network) => self.cards.push(Card { mac: mac.to_lowercase(), network }),
            None => self.fault(format!("its network card {mac} is on no bridge (type {kind})")),
        }
    }

    /// Returns the image with the memory of the snapshot. Adds a fault for each image without the snapshot.
    ///
    /// # Errors
    /// An image cannot be read.
    pub fn memory_in(&mut self, snapshot: &str) -> Result<Option<PathBuf>> {
        let mut found = None;
        let mut faults = Vec::new();
        for image in self.written() {
            let has = |header: Header| header.snapshot(snapshot).is_some();
            if !Header::read(&image.path)?.is_some_and(has) {
                faults.push(format!("{} does not have it", image.path.display()));
            } else if SnapshotMemory::open(&image.path, snapshot)?.is_some() {
                found = Some(image.path.clone());
            }
        }
        if found.is_none() && faults.is_empty() && self.faults.is_empty() {
            faults.push("no disk has its memory".to_owned());
        }
        self.faults.extend(faults);
        Ok(found)
    }

    /// Returns the images that a guest writes to.
    pub fn written(&self) -> impl Iterator<Item = &Image> {
        self.images.iter().filter(|image| !image.is_read_only)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(devices: &str) -> Source {
        let text = format!(
            "<domainsnapshot><memory snapshot='internal'/><disks><disk name='vda' snapshot='internal'/>
             <disk name='vdb' snapshot='no'/><disk name='vdc' snapshot='external'/></disks>
             <domain type='kvm'><uuid>u</uuid><os><type>hvm</type></os><devices>{devices}</devices></domain>
             </domainsnapshot>"
        );
        Source::read(&text).unwrap()
    }

    #[test]
    fn source_has_the_files_and_the_cards_of_the_domain() {
        let source = source(
            "<disk type='file' device='disk'><driver type='qcow2'/><source file='/d/a'/><target dev='vda'/></disk>
             <disk type='file' device='cdrom'><source file='/d/cd'/><target dev='hdc'/><readonly/></disk>
             <disk type='file' device='cdrom'><target dev='hdd'/></disk>
             <interface type='bridge'><mac address='52:54:00:AA:00:01'/><source bridge='br7'/></interface>
             <interface type='network'><mac address='52:54:00:aa:00:02'/><source network='lab'/></interface>
             <interface type='user'><mac address='52:54:00:aa:00:03'/></interface>",
        );
        assert_eq!(source.faults, Vec::<String>::new());
        assert_eq!((source.uuid.as_str(), source.written().count()), ("u", 1));
        assert!(source.xml.starts_with("<domain type='kvm'>") && source.xml.ends_with("</domain>"));
        let cd = source.images.iter().find(|image| image.target == "hdc").unwrap();
        assert!(cd.is_read_only && cd.format == "raw");
        let networks: Vec<_> = source.cards.iter().map(|card| &card.network).collect();
        let [CardNetwork::Bridge(bridge), CardNetwork::Named(name), CardNetwork::User] = networks[..] else {
            panic!("{networks:?}")
        };
        assert_eq!((bridge.as_str(), name.as_str()), ("br7", "lab"));
        assert_eq!(source.cards[0].mac, "52:54:00:aa:00:01");
    }

    #[test]
    fn part_that_cannot_come_over_is_named() {
        for (device, named) in [
            ("<hostdev/>", "a device of this computer"),
            ("<filesystem type='mount'/>", "a folder of this computer"),
            ("<tpm/>", "a TPM"),
            ("<memory model='nvdimm'/>", "persistent memory"),
            (
                "<disk type='network'><source name='x'/><target dev='vda'/></disk>",
                "vda is no file (type network)",
            ),
            (
                "<disk type='block'><source dev='/dev/x'/><target dev='vda'/></disk>",
                "vda is no file (type block)",
            ),
            ("<disk type='file'><source file='/d/b'/><target dev='vdb'/></disk>", "not have the disk vdb"),
            ("<disk type='file'><source file='/d/c'/><target dev='vdc'/></disk>", "an external snapshot"),
            (
                "<disk type='file'><source file='/d/a'><encryption/></source><target dev='vda'/></disk>",
                "vda is encrypted",
            ),
            ("<disk type='file'><source file='/d/a'/><shareable/><target dev='vda'/></disk>", "is shareable"),
            (
                "<interface type='direct'><mac address='m'/><source dev='eth0'/></interface>",
                "m is on no bridge",
            ),
            ("<interface type='vhostuser'><mac address='m'/></interface>", "(type vhostuser)"),
            (
                "<interface type='bridge'><mac address='m'/><source bridge='b'/><virtualport/></interface>",
                "a virtual switch",
            ),
            (
                "<interface type='bridge'><mac address='m'/><source bridge='b'/><driver queues='4'/></interface>",
                "more than one queue",
            ),
        ] {
            let faults = source(device).faults.join("; ");
            assert!(faults.contains(named), "{device}: {faults}");
        }
        for (snapshot, named) in [
            ("<memory snapshot='external' file='/m'/><domain/>", "in a file of its own"),
            ("<memory snapshot='no'/><domain/>", "no memory"),
            ("<memory snapshot='internal'/>", "not kept the domain's description"),
            (
                "<memory snapshot='internal'/><domain><os><nvram>/v.fd</nvram></os></domain>",
                "/v.fd are not in the format qcow2",
            ),
            ("<memory snapshot='internal'/><domain><launchSecurity/></domain>", "encrypted"),
        ] {
            let source = Source::read(&format!("<domainsnapshot>{snapshot}</domainsnapshot>")).unwrap();
            assert!(source.faults.join("; ").contains(named), "{snapshot}: {:?}", source.faults);
        }
    }
}
