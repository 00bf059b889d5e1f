//! The parts of a guest: a disk, and QEMU's arguments.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::linux::Image;
use super::{DISK_PLACEHOLDER, Guest, Qemu, analysis, cape, micro};
use crate::error::Context;
use crate::network::TestNetwork;
use crate::{Result, cache, command};

/// The port of agents, Cuckoo's default.
pub const AGENT_PORT: u16 = 8000;

/// Increment it to invalidate masters of an older testkit.
const GENERATION: u32 = 2;

/// A guest with all files that it needs.
#[derive(Debug, Clone)]
pub enum Recipe {
    /// See [`Guest::Micro`].
    Micro,
    /// See [`Guest::Vmcloak`].
    Vmcloak,
    /// See [`Guest::Linux`].
    Linux { image: Image, ram_mib: u32, noise_mib: u32, network: Network },
    /// See [`Guest::Analysis`].
    Analysis { image: Image, number: u8 },
}

/// The network of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// QEMU's user networking.
    User,
    /// The tap of a [`TestNetwork`].
    Tap,
    /// The tap of the machine with this number in a [`TestNetwork`].
    Bridge(u8),
}

impl Recipe {
    /// Returns the recipe of `guest`, whose files are in `cache`.
    pub fn of(guest: Guest, cache: &Path) -> Result<Self> {
        let linux = |ram_mib, noise_mib, network| {
            Ok(Self::Linux { image: Image::in_cache(cache)?, ram_mib, noise_mib, network })
        };
        match guest {
            Guest::Cape { number } => {
                let (image, network) = (cape::image(cache)?, Network::Bridge(number));
                Ok(Self::Linux { image, ram_mib: cape::RAM_MIB, noise_mib: 0, network })
            }
            Guest::Micro => Ok(Self::Micro),
            Guest::Vmcloak => Ok(Self::Vmcloak),
            Guest::Linux { ram_mib, noise_mib } => linux(ram_mib, noise_mib, Network::User),
            Guest::TrafficSource => linux(256, 0, Network::Tap),
            Guest::Analysis { number, agent } => {
                Ok(Self::Analysis { image: analysis::image(cache, agent)?, number })
            }
        }
    }

    /// Returns a name that differs for another guest, QEMU or testkit.
    pub fn name(&self, qemu: &Qemu) -> Result<String> {
        let version = qemu.version()?;
        let args = self.start_args(Path::new("serial.log"), None);
        let content = cache::fingerprint(&(GENERATION, &version, args, self.first_sectors()));
        let guest = match self {
            Self::Micro => "micro".to_owned(),
            Self::Vmcloak => "vmcloak".to_owned(),
            Self::Linux { network: Network::Tap, .. } => "talker".to_owned(),
            Self::Linux { ram_mib, noise_mib, .. } => format!("linux-{ram_mib}-{noise_mib}"),
            Self::Analysis { number, .. } => format!("analysis-{number}"),
        };
        let number = version.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        Ok(format!("{guest}-qemu-{}-{content}", number.unwrap_or("unknown")))
    }

    /// Makes the disk of the guest's first boot.
    pub fn make_disk(&self, qemu: &Qemu, disk: &Path) -> Result<()> {
        let raw = disk.with_extension("raw");
        let what = || format!("making {}", raw.display());
        fs::write(&raw, self.first_sectors()).context(what)?;
        let size =
            File::options().write(true).open(&raw).and_then(|file| file.set_len(self.disk_mib() << 20));
        size.context(what)?;
        let mut convert = Command::new(&qemu.img);
        let as_vmcloak_does = "lazy_refcounts=on,cluster_size=2M";
        convert
            .args(["convert", "-f", "raw", "-O", "qcow2", "-o", as_vmcloak_does])
            .args([raw.as_path(), disk]);
        command::output(&mut convert)?;
        fs::remove_file(&raw).context(|| format!("removing {}", raw.display()))
    }

    /// Returns the files that the guest boots from, besides its disk.
    pub fn boot_files(&self) -> Vec<PathBuf> {
        match self {
            Self::Micro | Self::Vmcloak => Vec::new(),
            Self::Linux { image, .. } | Self::Analysis { image, .. } => {
                vec![image.kernel(), image.initramfs()]
            }
        }
    }

    /// Returns QEMU's arguments. The agent's port is forwarded from the address `agent`. Without an address,
    /// while the snapshot is made, no port is forwarded, so that concurrent builds do not collide.
    pub fn start_args(&self, serial: &Path, agent: Option<Ipv4Addr>) -> Vec<String> {
        let serial = format!("file:{}", serial.display());
        if let Self::Vmcloak = self {
            return vmcloak_args(&serial);
        }
        let mut args =
            strings(["-machine", "pc", "-accel", "tcg", "-nodefaults", "-display", "none", "-vga", "std"]);
        args.extend(strings(["-serial", &serial]));
        args.extend(match self {
            Self::Micro | Self::Vmcloak => strings(["-m", "32", "-drive", &drive("ide")]),
            Self::Linux { image, ram_mib, noise_mib, network } => {
                linux_args(image, *ram_mib, *noise_mib, *network, agent)
            }
            Self::Analysis { image, number } => analysis::args(image, *number, agent),
        });
        args
    }

    fn first_sectors(&self) -> Vec<u8> {
        match self {
            Self::Micro | Self::Vmcloak => micro::boot_sector().to_vec(),
            Self::Linux { .. } | Self::Analysis { .. } => Vec::new(),
        }
    }

    fn disk_mib(&self) -> u64 {
        match self {
            Self::Micro | Self::Vmcloak => 1,
            Self::Linux { .. } | Self::Analysis { .. } => 64,
        }
    }
}

/// Returns the arguments with which VMCloak's QEMU machinery starts a Windows machine with user networking.
/// Source: VMCloak's `vmcloak/platforms/qemu.py`.
fn vmcloak_args(serial: &str) -> Vec<String> {
    let devices = [
        "rtl8139,netdev=net0,mac=52:54:00:00:02:01,bus=pcie.0,addr=3",
        "ich9-ahci,id=ahci",
        "ide-hd,bus=ahci.0,unit=0,drive=disk,bootindex=2",
        "ide-cd,bus=ahci.1,unit=0,drive=cdrom,bootindex=1",
        "usb-ehci,id=ehci",
        "usb-tablet,bus=ehci.0",
        "intel-hda",
        "hda-duplex",
    ];
    let mut args = strings(["-nodefaults", "-M", "q35", "-vga", "std", "-smp", "1", "-m", "64"]);
    args.extend(strings(["-overcommit", "mem-lock=off", "-rtc", "base=localtime,driftfix=slew"]));
    args.extend(strings(["-netdev", "type=user,restrict=on,id=net0"]));
    args.extend(devices.iter().flat_map(|device| strings(["-device", device])));
    args.extend(strings(["-drive", "if=none,id=cdrom,readonly=on"]));
    args.extend(strings(["-drive", &format!("file={DISK_PLACEHOLDER},format=qcow2,if=none,id=disk")]));
    args.extend(strings(["-display", "none", "-serial", serial]));
    args
}

fn linux_args(
    image: &Image,
    ram_mib: u32,
    noise_mib: u32,
    network: Network,
    agent: Option<Ipv4Addr>,
) -> Vec<String> {
    let (kernel, initramfs) = (image.kernel(), image.initramfs());
    let netdevs = match (network, agent) {
        (Network::User, None) => vec!["user,id=net0".to_owned()],
        (Network::User, Some(ip)) => {
            vec![format!("user,id=net0,hostfwd=tcp:{ip}:{AGENT_PORT}-:{AGENT_PORT}")]
        }
        // A hub without another member discards all packets. It needs a second port to send at all. Unlike
        // user networking, it is not part of a snapshot.
        (Network::Tap | Network::Bridge(_), None) => {
            ["net0", "none"].map(|id| format!("hubport,id={id},hubid=0")).to_vec()
        }
        (Network::Tap, Some(_)) => vec![tap(TestNetwork::TAP)],
        (Network::Bridge(number), Some(_)) => vec![tap(&TestNetwork::tap_of(number))],
    };
    let mut card = "virtio-net-pci,netdev=net0,romfile=".to_owned();
    let mut append = format!("console=ttyS0 quiet panic=-1 noise={noise_mib}");
    if network == Network::Tap {
        append += &format!(" net={}/24,{},{}", TestNetwork::GUEST, TestNetwork::HOST, TestNetwork::HOST_MAC);
    }
    if let Network::Bridge(number) = network {
        append += &format!(" net={}/24", TestNetwork::machine(number));
        card += &format!(",mac=52:54:00:42:01:{number:02x}");
    }
    let mut args = strings(["-m", &ram_mib.to_string(), "-drive", &drive("virtio")]);
    args.extend(strings(["-kernel", &kernel.to_string_lossy(), "-initrd", &initramfs.to_string_lossy()]));
    args.extend(strings(["-append", &append]));
    // The card starts faster without its boot ROM.
    args.extend(netdevs.iter().flat_map(|netdev| strings(["-netdev", netdev])));
    args.extend(strings(["-device", &card]));
    args
}

/// Returns a tap without offloads: some QEMUs' `filter-dump` writes the offload header as part of the packet.
fn tap(name: &str) -> String {
    format!("tap,id=net0,ifname={name},script=no,downscript=no,vnet_hdr=off")
}

fn drive(interface: &str) -> String {
    format!("file={DISK_PLACEHOLDER},format=qcow2,if={interface}")
}

fn strings<const N: usize>(args: [&str; N]) -> Vec<String> {
    args.map(str::to_owned).to_vec()
}
