//! libvirt's descriptions of domains and snapshots, as far as this plugin uses them.
//!
//! All XML of the plugin is read here, into types that have only the used parts. Source: libvirt's docs/formatdomain.rst, docs/formatsnapshot.rst,
//! docs/formatnetwork.rst, docs/formatcaps.rst.

use std::path::PathBuf;

use machinery::{Error, Result};
use roxmltree::{Document, Node};

/// Elements whose text is the path of a file that QEMU reads. Each attribute `file` is such a path as well.
const PATH_ELEMENTS: [&str; 8] = ["loader", "nvram", "kernel", "initrd", "dtb", "shim", "emulator", "table"];

/// A domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Description {
    /// The domain's type, such as `kvm`.
    pub kind: String,
    pub disks: Vec<Disk>,
    pub interfaces: Vec<Interface>,
    /// Every file that must exist for a start, including those of the disks.
    pub files: Vec<PathBuf>,
    pub firmware: Firmware,
    /// True if the domain has a TPM that libvirt emulates. Its state is in a save image.
    pub has_tpm: bool,
    /// True if the domain has a TPM that outlives it.
    pub has_outer_tpm: bool,
    pub has_nvdimm: bool,
    /// True if the guest can write to a folder of the host's.
    pub has_shared_folder: bool,
    /// The index of the first VNC server among the domain's graphics.
    pub vnc: Option<u32>,
    /// The arguments that the domain adds to QEMU's command line.
    pub arguments: Vec<String>,
}

/// A disk, CD or floppy of a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// The disk's name in the domain, such as `vda`.
    pub target: String,
    /// The disk's file; `None` for a disk on a network or in a pool, and for an empty drive.
    pub path: Option<PathBuf>,
    /// The image's format, such as `qcow2`.
    pub format: String,
    /// True if the guest cannot write to it.
    pub read_only: bool,
    /// True if the disk is for this domain alone, and not encrypted.
    pub is_plain: bool,
    /// True if its source has no settings of its own, such as a label, and libvirt keeps what is written.
    pub is_bare: bool,
}

/// The firmware that boots the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firmware {
    /// True if the firmware is in flash memory, such as UEFI. The guest can write its variables.
    pub is_flash: bool,
    pub nvram: Option<PathBuf>,
    pub nvram_is_qcow2: bool,
}

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// The MAC address, in lowercase.
    pub mac: Option<String>,
    /// The network of libvirt that the card is in.
    pub network: Option<String>,
    /// The bridge, or the host's network card, that the card is connected to.
    pub device: Option<String>,
}

/// A snapshot, and the domain at that time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotDescription {
    /// The time of the snapshot, in seconds since 1970.
    pub created: String,
    /// The domain's state at that time, such as `running` or `disk-snapshot`.
    pub state: String,
    /// True if memory or a disk is kept outside of the domain's disks.
    pub external: bool,
    pub has_memory: bool,
    /// The file of the memory, if the memory is kept outside of the disks.
    pub memory_file: Option<PathBuf>,
    /// The disks that contain a part of the snapshot, by their names in the domain.
    pub internal_disks: Vec<String>,
    pub domain: Option<Description>,
    /// A disk of the domain at that time that its definition did not have: the snapshot was taken of a run with overlays.
    pub overlay: Option<PathBuf>,
}

impl Description {
    /// Reads the description of a domain.
    ///
    /// # Errors
    /// The text is not XML.
    pub fn read(xml: &str) -> Result<Description> {
        let document = parse(xml, "domain")?;
        Ok(Description::of(document.root_element()))
    }

    fn of(domain: Node) -> Description {
        let all = |name| domain.descendants().filter(move |node| node.has_tag_name(name));
        let is_vnc = |node: Node| node.attribute("type") == Some("vnc");
        let vnc = all("graphics").filter(|node| is_in(*node, "devices")).position(is_vnc);
        let arguments = domain.descendants().filter(|node| node.tag_name().name() == "arg");
        Description {
            kind: attribute(domain, "type"),
            disks: all("disk").map(Disk::of).collect(),
            interfaces: all("interface").filter(|node| is_in(*node, "devices")).map(Interface::of).collect(),
            files: files(domain),
            firmware: Firmware::of(domain),
            has_tpm: all("tpm").any(is_emulated),
            has_outer_tpm: all("tpm").any(|tpm| !is_emulated(tpm)),
            has_nvdimm: all("memory").any(|memory| memory.attribute("model").is_some_and(is_nvdimm)),
            has_shared_folder: all("filesystem").any(|folder| child(folder, "readonly").is_none()),
            vnc: vnc.and_then(|index| u32::try_from(index).ok()),
            arguments: arguments.filter_map(|node| node.attribute("value")).map(str::to_owned).collect(),
        }
    }

    /// Returns a disk that the guest can write to and that the other description does not have.
    fn disk_beyond(&self, other: &Description) -> Option<PathBuf> {
        let mut disks = self.writable_disks().filter_map(|disk| disk.path.as_ref());
        disks.find(|disk| !other.files.contains(disk)).cloned()
    }

    /// Returns the disks that the guest can write to.
    pub fn writable_disks(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| !disk.read_only)
    }
}

fn is_emulated(tpm: Node) -> bool {
    child(tpm, "backend").is_some_and(|backend| backend.attribute("type") == Some("emulator"))
}

fn is_nvdimm(model: &str) -> bool {
    matches!(model, "nvdimm" | "virtio-pmem")
}

impl Disk {
    fn of(disk: Node) -> Disk {
        let source = child(disk, "source");
        let path = source.and_then(|source| source.attribute("file").or(source.attribute("dev")));
        let encrypted = disk.descendants().any(|node| node.has_tag_name("encryption"));
        Disk {
            target: child(disk, "target").map(|target| attribute(target, "dev")).unwrap_or_default(),
            path: path.map(PathBuf::from),
            format: child(disk, "driver").map(|driver| attribute(driver, "type")).unwrap_or_default(),
            read_only: is_read_only(disk),
            is_plain: child(disk, "shareable").is_none() && !encrypted,
            is_bare: child(disk, "transient").is_none()
                && source.is_none_or(|source| !source.children().any(|node| node.is_element())),
        }
    }
}

/// Reports whether the guest cannot write to the disk.
pub fn is_read_only(disk: Node) -> bool {
    child(disk, "readonly").is_some() || disk.attribute("device") == Some("cdrom")
}

impl Firmware {
    fn of(domain: Node) -> Firmware {
        let Some(os) = child(domain, "os") else { return Firmware::default() };
        let loader = child(os, "loader");
        let nvram = child(os, "nvram");
        let is_flash = os.attribute("firmware") == Some("efi")
            || loader.is_some_and(|loader| loader.attribute("type") == Some("pflash"))
            || nvram.is_some();
        let path = nvram.and_then(|nvram| {
            let source = child(nvram, "source").and_then(|source| source.attribute("file"));
            source.or(nvram.text().map(str::trim)).filter(|path| !path.is_empty())
        });
        Firmware {
            is_flash,
            nvram: path.map(PathBuf::from),
            nvram_is_qcow2: nvram.is_some_and(|nvram| nvram.attribute("format") == Some("qcow2")),
        }
    }
}

impl Interface {
    fn of(interface: Node) -> Interface {
        let source = child(interface, "source");
        let from = |name| source.and_then(|source| source.attribute(name)).map(str::to_owned);
        let mac = child(interface, "mac").and_then(|mac| mac.attribute("address"));
        Interface {
            mac: mac.map(str::to_lowercase),
            network: from("network"),
            device: from("bridge").or_else(|| from("dev")),
        }
    }
}

impl SnapshotDescription {
    /// Reads the description of a snapshot.
    ///
    /// # Errors
    /// The text is not XML.
    pub fn read(xml: &str) -> Result<SnapshotDescription> {
        let document = parse(xml, "snapshot")?;
        let root = document.root_element();
        let text = |name| child(root, name).and_then(|node| node.text()).unwrap_or("unknown").to_owned();
        let state = text("state");
        let memory = child(root, "memory");
        let kept = memory.and_then(|memory| memory.attribute("snapshot"));
        let disks = child(root, "disks");
        let disks =
            disks.into_iter().flat_map(|disks| disks.children()).filter(|disk| disk.has_tag_name("disk"));
        let (mut internal_disks, mut external) = (Vec::new(), kept == Some("external"));
        for disk in disks {
            match disk.attribute("snapshot") {
                Some("internal") => internal_disks.push(attribute(disk, "name")),
                Some("external") => external = true,
                _ => {}
            }
        }
        let domain = child(root, "domain").map(Description::of);
        let defined = child(root, "inactiveDomain").map(Description::of);
        Ok(SnapshotDescription {
            overlay: domain.as_ref().zip(defined).and_then(|(domain, defined)| domain.disk_beyond(&defined)),
            created: text("creationTime"),
            // If the description does not mention the memory, a running domain's snapshot includes it.
            has_memory: kept.map_or(!is_without_memory(&state), |kept| kept != "no"),
            memory_file: memory.and_then(|memory| memory.attribute("file")).map(PathBuf::from),
            state,
            external,
            internal_disks,
            domain,
        })
    }
}

/// Returns the addresses that a network of libvirt reserves: pairs of MAC, in lowercase, and IP.
///
/// # Errors
/// The text is no XML.
pub fn reserved_addresses(network: &str) -> Result<Vec<(String, String)>> {
    let document = parse(network, "network")?;
    let hosts = document.descendants().filter(|node| node.has_tag_name("host") && is_in(*node, "dhcp"));
    let pairs = hosts.filter_map(|host| Some((host.attribute("mac")?.to_lowercase(), host.attribute("ip")?)));
    Ok(pairs.map(|(mac, ip)| (mac, ip.to_owned())).collect())
}

/// Returns QEMU's user and group, as `+uid:+gid`, from libvirt's capabilities.
pub fn label_of_qemu(capabilities: &str) -> Option<String> {
    let document = Document::parse(capabilities).ok()?;
    let mut models = document.descendants().filter(|node| node.has_tag_name("secmodel"));
    let dac = models.find(|model| child(*model, "model").and_then(|name| name.text()) == Some("dac"))?;
    let mut labels = dac.children().filter(|node| node.has_tag_name("baselabel"));
    labels.find(|label| label.attribute("type") == Some("kvm"))?.text().map(str::to_owned)
}

fn is_without_memory(state: &str) -> bool {
    matches!(state, "shutoff" | "disk-snapshot")
}

/// Returns each file that QEMU opens, or libvirt for QEMU, but no file that a run creates, such as a log.
fn files(domain: Node) -> Vec<PathBuf> {
    let named = domain.descendants().filter_map(|node| {
        let name = node.tag_name().name();
        let attribute = node.attribute("file").filter(|_| name != "log");
        let device = node.attribute("dev").filter(|_| name == "source" && is_in(node, "disk"));
        let text = || node.text().map(str::trim).filter(|_| names_a_file(node));
        attribute.or(device).or_else(text).filter(|path| path.starts_with('/'))
    });
    let mut files: Vec<PathBuf> = named.map(PathBuf::from).collect();
    files.sort();
    files.dedup();
    files
}

fn names_a_file(node: Node) -> bool {
    let name = node.tag_name().name();
    // libvirt creates the variables of a firmware from their template at the first start.
    let is_made = name == "nvram" && node.attribute("template").is_some();
    PATH_ELEMENTS.contains(&name) && !is_made || name == "path" && is_in(node, "memory")
}

/// Parses a description.
///
/// # Errors
/// The text is no XML.
pub fn parse<'a>(xml: &'a str, what: &str) -> Result<Document<'a>> {
    Document::parse(xml).map_err(|error| {
        Error::failed(format!("libvirt's description of the {what} cannot be read: {error}"))
    })
}

/// Returns the first child of that name.
pub fn child<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn attribute(node: Node, name: &'static str) -> String {
    node.attribute(name).unwrap_or_default().to_owned()
}

fn is_in(node: Node, name: &'static str) -> bool {
    node.ancestors().skip(1).any(|above| above.has_tag_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
      <os><loader readonly='yes' type='pflash'>/f/code.fd</loader><nvram format='qcow2'>/f/vars.qcow2</nvram>
        <kernel>/f/vmlinuz</kernel><initrd>/f/initrd</initrd><cmdline>quiet</cmdline></os>
      <devices>
        <emulator>/usr/bin/qemu-system-x86_64</emulator>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/d/a &amp; b'>
          </source><backingStore type='file'><source file='/d/base'/></backingStore><target dev='vda'/></disk>
        <disk type='file' device='cdrom'><driver type='raw'/><source file='/d/iso'/><target dev='sda'/></disk>
        <disk type='block' device='disk'><source dev='/dev/vg/lv'/><target dev='vdb'/><shareable/></disk>
        <interface type='network'><mac address='52:54:00:AA:bb:cc'/><source network='lab'/></interface>
        <interface type='bridge'><source bridge='br1'/></interface>
        <serial type='file'><source path='/d/serial.log'/><log file='/d/log'/></serial>
      </devices>
      <qemu:commandline><qemu:arg value='-drive'/><qemu:arg value='file=/d/x'/></qemu:commandline>
    </domain>";

    #[test]
    fn description_has_disks_cards_firmware_and_arguments() {
        let domain = Description::read(DOMAIN).unwrap();
        assert_eq!(domain.kind, "kvm");
        let [disk, cd, block] = &domain.disks[..] else { panic!("{:?}", domain.disks) };
        assert_eq!((disk.target.as_str(), disk.format.as_str()), ("vda", "qcow2"));
        assert_eq!(disk.path.as_deref(), Some("/d/a & b".as_ref()));
        assert!(disk.is_plain && !disk.read_only && cd.read_only && !block.is_plain);
        assert_eq!(domain.writable_disks().count(), 2);
        let [network, bridge] = &domain.interfaces[..] else { panic!("{:?}", domain.interfaces) };
        assert_eq!(network.mac.as_deref(), Some("52:54:00:aa:bb:cc"));
        assert_eq!((network.network.as_deref(), bridge.device.as_deref()), (Some("lab"), Some("br1")));
        let firmware = &domain.firmware;
        assert!(firmware.is_flash && firmware.nvram_is_qcow2);
        assert_eq!(firmware.nvram.as_deref(), Some("/f/vars.qcow2".as_ref()));
        assert_eq!(domain.arguments, ["-drive", "file=/d/x"]);
        assert!(Description::read("<domain>").is_err());
    }

    #[test]
    fn files_are_those_that_a_start_reads() {
        let files = Description::read(DOMAIN).unwrap().files;
        let files: Vec<&str> = files.iter().filter_map(|file| file.to_str()).collect();
        let wanted = [
            "/d/a & b",
            "/d/base",
            "/d/iso",
            "/dev/vg/lv",
            "/f/code.fd",
            "/f/initrd",
            "/f/vars.qcow2",
            "/f/vmlinuz",
            "/usr/bin/qemu-system-x86_64",
        ];
        assert_eq!(files, wanted);
        // libvirt creates these variables itself.
        let made = DOMAIN.replace("<nvram format='qcow2'>", "<nvram template='/f/t'>");
        assert!(!Description::read(&made).unwrap().files.contains(&"/f/vars.qcow2".into()));
    }

    #[test]
    fn snapshot_has_an_overlay_when_the_definition_of_its_domain_lacks_the_disk() {
        let domain = |name: &str, disk: &str| {
            format!("<{name}><devices><disk device='disk'><source file='{disk}'/></disk></devices></{name}>")
        };
        let overlay = |parts: &str| {
            SnapshotDescription::read(&format!("<domainsnapshot>{parts}</domainsnapshot>")).unwrap().overlay
        };
        let of_run = domain("domain", "/d/o.qcow2") + &domain("inactiveDomain", "/d/own.qcow2");
        assert_eq!(overlay(&of_run), Some("/d/o.qcow2".into()));
        let own = domain("domain", "/d/own.qcow2");
        assert_eq!(overlay(&(own.clone() + &domain("inactiveDomain", "/d/own.qcow2"))), None);
        assert_eq!(overlay(&own), None);
    }

    #[test]
    fn snapshot_has_memory_only_when_its_description_says_so() {
        let snapshot = |state: &str, memory: &str| {
            let xml = format!(
                "<domainsnapshot><name>s</name><state>{state}</state><creationTime>7</creationTime>{memory}<disks>\
                 <disk name='vda' snapshot='internal'/><disk name='sda' snapshot='no'/></disks>\
                 <domain type='qemu'><state>x</state><disk snapshot='external'/></domain></domainsnapshot>"
            );
            SnapshotDescription::read(&xml).unwrap()
        };
        let running = snapshot("running", "<memory snapshot='internal'/>");
        assert!(running.has_memory && !running.external);
        assert_eq!((running.state.as_str(), running.created.as_str()), ("running", "7"));
        assert_eq!(running.internal_disks, ["vda"]);
        let outside = snapshot("running", "<memory snapshot='external' file='/d/m'/>");
        assert!(outside.external && outside.has_memory);
        assert_eq!(outside.memory_file.as_deref(), Some("/d/m".as_ref()));
        assert!(!snapshot("disk-snapshot", "<memory snapshot='no'/>").has_memory);
        assert!(!snapshot("running", "<memory snapshot='no'/>").has_memory);
        assert!(!snapshot("disk-snapshot", "").has_memory && !snapshot("shutoff", "").has_memory);
        assert!(snapshot("paused", "").has_memory);
    }

    #[test]
    fn network_has_reserved_addresses() {
        let network = "<network><ip address='10.0.0.1'><dhcp><range start='10.0.0.2' end='10.0.0.9'/>\
                       <host mac='52:54:00:AA:00:01' name='w' ip='10.0.0.5'/></dhcp></ip></network>";
        let pair = ("52:54:00:aa:00:01".to_owned(), "10.0.0.5".to_owned());
        assert_eq!(reserved_addresses(network).unwrap(), [pair]);
    }
}
