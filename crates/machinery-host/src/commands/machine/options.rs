//! The arguments of the commands. The docs of each item are its help text.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use machinery::{Error, Result};

use super::context::{KVM, MACHINERY};
use crate::commands::address_range::AddressRange;

/// The machine to make.
#[derive(Debug, Clone, Args)]
pub struct Create {
    /// Name of the machine, unique over all machineries
    pub name: String,
    /// Installed disk (qcow2), which stays as it is: the machine's own disk is an overlay of it
    #[arg(long, value_name = "FILE")]
    pub disk: PathBuf,
    /// Address of the machine. It has to be set in the guest or by its DHCP server, unless --guest-ip is
    #[arg(long, value_name = "ADDRESS", required_unless_present = "guest_ip")]
    pub ip: Option<IpAddr>,
    #[command(flatten)]
    pub network: Network,
    /// Machinery of the machine: a process of QEMU, or a domain of libvirt
    #[arg(long, value_enum, default_value = "qemu")]
    pub machinery: Machinery,
    /// Address of libvirt, with --machinery kvm [default: dsn in kvm.yaml]
    #[arg(long, value_name = "URI")]
    pub dsn: Option<String>,
    /// Operating system of the guest, for its devices
    #[arg(long, value_enum, default_value = "windows")]
    pub platform: Platform,
    /// Version of the operating system
    #[arg(long, value_name = "VERSION", default_value = "10")]
    pub os_version: String,
    /// Port of Cuckoo's agent in the guest
    #[arg(long, value_name = "PORT", default_value = "8000", value_parser = clap::value_parser!(u16).range(1..))]
    pub agent_port: u16,
    /// Tags, such as software in the guest
    #[arg(long, value_name = "TAG,TAG", value_delimiter = ',')]
    pub tags: Vec<String>,
    /// Memory of the guest: a whole number of M or G
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = mebibytes)]
    pub ram: u64,
    /// Processors of the guest
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cpus: u16,
    /// Boot by UEFI (OVMF) instead of BIOS
    #[arg(long)]
    pub uefi: bool,
    /// Give the guest a TPM 2.0 (swtpm), which Windows 11 needs besides --uefi
    #[arg(long)]
    pub tpm: bool,
    /// Leave out the sound card of a Windows guest
    #[arg(long)]
    pub no_sound: bool,
    /// Run the guest by KVM, or by emulation [default: KVM where /dev/kvm can be opened]
    #[arg(long, value_enum)]
    pub accel: Option<Accel>,
    /// File with further arguments of QEMU: an option and its value in each line
    #[arg(long, value_name = "FILE")]
    pub args: Option<PathBuf>,
    /// Copy a file into the machine's folder, so that the arguments can name it; can be repeated
    #[arg(long = "file", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Folder in which the machine's folder is made [default: machines in the CWD]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    #[command(flatten)]
    pub ready: Ready,
}

/// The network of a machine.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = true)]
pub struct Network {
    /// Bridge of the guest's network card, which must exist
    #[arg(long, value_name = "BRIDGE", conflicts_with_all = ["libvirt_network", "user", "isolated", "clones", "guest_ip"])]
    pub bridge: Option<String>,
    /// Network of libvirt, with --machinery kvm
    #[arg(long, value_name = "NETWORK", conflicts_with_all = ["user", "isolated", "clones", "guest_ip"])]
    pub libvirt_network: Option<String>,
    /// Connect the guest to nothing but the agent's port, at a loopback address of this host
    #[arg(long, conflicts_with_all = ["isolated", "clones", "guest_ip"])]
    pub user: bool,
    /// Give each run a network of its own, and add that to machinery-host.yaml
    #[arg(long)]
    pub isolated: bool,
    /// Make this number of clones of the machine, each with a network and an address of its own
    #[arg(long, value_name = "N", requires = "clone_ips", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub clones: Option<u16>,
    /// Addresses of the clones, such as 192.168.30.110-129
    #[arg(long, value_name = "RANGE", requires = "clones")]
    pub clone_ips: Option<AddressRange>,
    /// Address that is set in the guest of an isolated machine or of clones [default: --ip]
    #[arg(long, value_name = "ADDRESS")]
    pub guest_ip: Option<Ipv4Addr>,
}

/// The moment at which the guest is saved. By default, that is when the agent answers.
#[derive(Debug, Clone, Args)]
pub struct Ready {
    /// Save the guest this many seconds after its boot, instead of when the agent answers
    #[arg(long, value_name = "SECONDS", conflicts_with = "ready_key")]
    pub ready_after: Option<u64>,
    /// Save the guest when Enter is pressed, instead of when the agent answers
    #[arg(long)]
    pub ready_key: bool,
    /// Give up if the guest is not ready after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "1800")]
    pub timeout: u64,
    /// Write the guest's screen to this file (PNG) whenever it changes
    #[arg(long, value_name = "FILE")]
    pub screenshot: Option<PathBuf>,
}

impl Create {
    /// Expects that the options are those of the machinery.
    ///
    /// # Errors
    /// One is of the other machinery.
    pub fn expect_of_machinery(&self) -> Result<()> {
        let is_kvm = self.machinery == Machinery::Kvm;
        let network = &self.network;
        let of_libvirt =
            [("--dsn", self.dsn.is_some()), ("--libvirt-network", network.libvirt_network.is_some())];
        let of_qemu = [
            ("--isolated", network.isolated),
            ("--clones", network.clones.is_some()),
            ("--guest-ip", network.guest_ip.is_some()),
        ];
        let given = if is_kvm { &of_qemu[..] } else { &of_libvirt };
        match given.iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) if is_kvm => {
                return Err(Error::unsupported(&format!("{option}: libvirt makes the network of a domain"))
                    .advice("Give --bridge or --libvirt-network, or leave out --machinery kvm"));
            }
            Some((option, _)) => {
                return Err(
                    Error::configuration(format!("{option} is about libvirt")).advice("Add --machinery kvm")
                );
            }
            None => {}
        }
        if is_kvm && self.uefi {
            return Err(Error::unsupported(
                "a domain with UEFI, of which most versions of libvirt take no internal snapshot",
            )
            .advice(
                "Leave out --machinery kvm. Or define the domain yourself, and add it with `import libvirt`",
            ));
        }
        Ok(())
    }
}

impl Ready {
    /// Returns the moment at which the guest of a snapshot that is not taken here is ready: at once, or when its agent
    /// answers.
    pub fn restored(no_agent: bool) -> Ready {
        Ready { ready_after: no_agent.then_some(0), ready_key: false, timeout: 0, screenshot: None }
    }

    /// Expects that the guest can be ready before the command gives up.
    ///
    /// # Errors
    /// It cannot.
    pub fn expect_in_time(&self) -> Result<()> {
        match self.ready_after {
            Some(seconds) if seconds >= self.timeout => Err(Error::configuration(format!(
                "--ready-after {seconds} does not end before --timeout {}",
                self.timeout
            ))
            .advice("Give a longer --timeout")),
            _ => Ok(()),
        }
    }
}

/// The machineries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Machinery {
    /// A process of QEMU, in the jail of this program
    Qemu,
    /// A domain of libvirt
    Kvm,
}

impl Machinery {
    /// Returns the machinery's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Machinery::Qemu => MACHINERY,
            Machinery::Kvm => KVM,
        }
    }
}

/// The operating systems with arguments of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Platform {
    /// Devices for which Windows has drivers
    Windows,
    /// Paravirtual devices (virtio)
    Linux,
}

impl Platform {
    /// Returns Cuckoo's name of the platform.
    pub fn as_str(self) -> &'static str {
        match self {
            Platform::Windows => "windows",
            Platform::Linux => "linux",
        }
    }
}

/// The ways to run a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// By the processor
    Kvm,
    /// By emulation
    Tcg,
}

fn mebibytes(text: &str) -> Result<u64, String> {
    let units = [("M", 1), ("G", 1024)];
    let text = text.trim_end_matches("iB");
    let size = units
        .iter()
        .find_map(|(unit, size)| text.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*size));
    size.filter(|size| *size > 0).ok_or_else(|| "write a whole number of M or G, such as 4G".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_is_refused_when_it_is_ready_only_after_the_timeout() {
        let ready = |ready_after, timeout| Ready { ready_after, ready_key: false, timeout, screenshot: None };
        assert!(ready(Some(10), 11).expect_in_time().is_ok() && ready(None, 0).expect_in_time().is_ok());
        assert!(
            ready(Some(11), 11).expect_in_time().is_err() && ready(Some(12), 11).expect_in_time().is_err()
        );
    }

    #[test]
    fn memory_is_a_whole_number_with_a_unit() {
        assert_eq!([mebibytes("4G"), mebibytes("512M"), mebibytes("2GiB")], [Ok(4096), Ok(512), Ok(2048)]);
        for wrong in ["4", "0G", "-1G", "1.5G", "G", "4T", "99999999999999999999G"] {
            assert!(mebibytes(wrong).is_err(), "{wrong}");
        }
    }
}
