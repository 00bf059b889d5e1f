//! A test guest as a domain.

use std::path::Path;

use crate::guest::Qemu;
use crate::guest::recipe::{AGENT_PORT, Recipe};

/// The values that differ between domains of one guest.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The name in libvirt.
    pub name: String,
    pub uuid: String,
    /// The folder of its disk and its serial port, as text.
    pub dir: String,
    /// The address of its agent.
    pub agent: String,
}

pub const DISK: &str = "disk.qcow2";
pub const SERIAL: &str = "serial.log";

/// Returns the domain's description for `virsh define`. To the guest it is the same machine as that of the
/// recipe's QEMU arguments.
pub fn xml(qemu: &Qemu, recipe: &Recipe, identity: &Identity) -> String {
    let Identity { name, uuid, dir, agent } = identity;
    let emulator = text(&qemu.system);
    let (memory, bus, boot, network) = match recipe {
        Recipe::Micro | Recipe::Vmcloak | Recipe::Analysis { .. } => {
            (32, "target dev='hda' bus='ide'", String::new(), String::new())
        }
        Recipe::Linux { image, ram_mib, noise_mib, .. } => {
            let boot = format!(
                "<kernel>{}</kernel><initrd>{}</initrd><cmdline>console=ttyS0 quiet panic=-1 noise={noise_mib}</cmdline>",
                text(&image.kernel()),
                text(&image.initramfs())
            );
            (*ram_mib, "target dev='vda' bus='virtio'", boot, network(agent))
        }
    };
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{dir}/{DISK}'/><{bus}/>
    </disk>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{dir}/{SERIAL}'/><target port='0'/></serial>
    <video><model type='vga'/></video>
    <memballoon model='none'/>
  </devices>
  {network}
</domain>
"
    )
}

/// Forwards the agent's port by QEMU: libvirt needs further programs for that.
fn network(agent: &str) -> String {
    format!(
        "<qemu:commandline><qemu:arg value='-netdev'/>\
         <qemu:arg value='user,id=net0,hostfwd=tcp:{agent}:{AGENT_PORT}-:{AGENT_PORT}'/>\
         <qemu:arg value='-device'/><qemu:arg value='virtio-net-pci,netdev=net0,romfile=,addr=0x10'/>\
         </qemu:commandline>"
    )
}

/// Returns a path as XML text.
fn text(path: &Path) -> String {
    path.display().to_string().replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}
