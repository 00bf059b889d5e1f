//! libvirt's description of a new machine's domain. It has the devices of [`arguments`](super::arguments).
//!
//! libvirt replaces the machine type by that of the present QEMU, so that a snapshot is not lost when QEMU is upgraded. Each
//! restore gets another generation id. The VNC server listens nowhere: libvirt passes a connection to a console.
//!
//! Source: libvirt's docs/formatdomain.rst.

use std::path::Path;

use super::domain::Domain;
use super::options::{Accel, Create, Platform};

/// The connection of a network card.
pub enum Card<'a> {
    /// To a bridge of this host.
    Bridge(&'a str),
    /// To a network of libvirt.
    Network(&'a str),
    /// By arguments of QEMU.
    Arguments,
}

/// Returns the description of a domain with this disk and network card. `args` are further arguments of QEMU.
pub fn description(
    create: &Create,
    domain: &Domain,
    accel: Accel,
    disk: &Path,
    (card, mac): (&Card<'_>, &str),
    args: &[String],
) -> String {
    let (kind, processor) = match accel {
        Accel::Kvm => ("kvm", "<cpu mode='host-passthrough'/>"),
        Accel::Tcg => ("qemu", ""),
    };
    let (target, model, clock) = match create.platform {
        Platform::Windows => ("dev='sda' bus='sata'", CARD_OF_WINDOWS, "localtime"),
        Platform::Linux => ("dev='vda' bus='virtio'", "virtio", "utc"),
    };
    let sound =
        if create.platform == Platform::Windows && !create.no_sound { "<sound model='ich6'/>" } else { "" };
    let tpm = if create.tpm { TPM } else { "" };
    let source = match card {
        Card::Bridge(bridge) => Some(("bridge", format!("bridge='{}'", escaped(bridge)))),
        Card::Network(network) => Some(("network", format!("network='{}'", escaped(network)))),
        Card::Arguments => None,
    };
    let card = source.map_or_else(String::new, |(kind, source)| {
        format!(
            "<interface type='{kind}'><mac address='{mac}'/><source {source}/><model type='{model}'/></interface>"
        )
    });
    let args: String = args.iter().map(|arg| format!("<qemu:arg value='{}'/>", escaped(arg))).collect();
    let (label, uuid, disk) = (escaped(&domain.label), &domain.uuid, escaped(&disk.display().to_string()));
    let (ram, cpus) = (create.ram, create.cpus);
    format!(
        "<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{label}</name><uuid>{uuid}</uuid><genid/>
  <memory unit='MiB'>{ram}</memory><vcpu>{cpus}</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/><apic/></features>
  {processor}
  <clock offset='{clock}'><timer name='rtc' tickpolicy='catchup'/></clock>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/><target {target}/></disk>
    <controller type='usb' model='ich9-ehci1'/>
    <input type='tablet' bus='usb'/>
    {card}
    {sound}
    {tpm}
    <graphics type='vnc' sharePolicy='ignore'><listen type='none'/></graphics>
    <video><model type='vga'/></video>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>{args}</qemu:commandline>
</domain>
"
    )
}

/// A TPM 2.0 that libvirt emulates.
const TPM: &str = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";

/// The network card for which Windows has a driver.
pub const CARD_OF_WINDOWS: &str = "e1000";

/// Returns the text as that of an attribute or an element.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use roxmltree::Document;

    fn described(words: &[&str], card: &Card<'_>, args: &[&str]) -> String {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            create: Create,
        }
        let given = ["create", "m", "--disk", "/d", "--ip", "10.0.0.9", "--user"].iter().chain(words);
        let create = <Command as clap::Parser>::try_parse_from(given).unwrap().create;
        let domain = Domain::new("qemu:///system", "m").unwrap();
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let accel = create.accel.unwrap_or(Accel::Kvm);
        description(&create, &domain, accel, Path::new("/a 'b' & c/disk"), (card, "52:54:00:00:00:01"), &args)
    }

    fn value(text: &str, element: &str, attribute: &str) -> Option<String> {
        let document = Document::parse(text).unwrap();
        let found = document.descendants().find(|node| node.tag_name().name() == element)?;
        found.attribute(attribute).map(str::to_owned)
    }

    #[test]
    fn description_has_the_devices_of_the_platform() {
        let windows = described(&["--ram", "2G"], &Card::Bridge("br7"), &[]);
        let of = |element: &str, attribute: &str| value(&windows, element, attribute).unwrap();
        assert_eq!([of("domain", "type"), of("cpu", "mode")], ["kvm", "host-passthrough"]);
        assert_eq!(
            [of("target", "bus"), of("sound", "model"), of("clock", "offset")],
            ["sata", "ich6", "localtime"]
        );
        assert!(
            windows.contains("<source bridge='br7'/><model type='e1000'/>") && windows.contains(">2048<")
        );
        let linux = described(&["--platform", "linux", "--accel", "tcg"], &Card::Network("lab"), &[]);
        assert_eq!(value(&linux, "domain", "type").unwrap(), "qemu");
        assert!(
            linux.contains("<source network='lab'/><model type='virtio'/>") && linux.contains("bus='virtio'")
        );
        assert_eq!((value(&linux, "cpu", "mode"), value(&linux, "sound", "model")), (None, None));
    }

    #[test]
    fn values_of_the_operator_are_escaped() {
        let text = described(&["--no-sound"], &Card::Arguments, &["-append", "a='<b>' & \"c\""]);
        let document = Document::parse(&text).unwrap();
        let source = document.descendants().find(|node| node.has_tag_name("source")).unwrap();
        assert_eq!(source.attribute("file"), Some("/a 'b' & c/disk"));
        assert!(text.contains(
            "<qemu:arg value='-append'/><qemu:arg value='a=&apos;&lt;b>&apos; &amp; &quot;c&quot;'/>"
        ));
        assert_eq!((value(&text, "interface", "type"), value(&text, "sound", "model")), (None, None));
    }
}
