//! `import libvirt`: reads domains by `virsh`, libvirt's own client.
//!
//! The host does not link libvirt; only the plugin `kvm` does. The plugin also checks the new entries, so the rules of
//! its libvirt about snapshots are not repeated here.
//!
//! `reader` reads single domains, and `qemu` those that become machines of that machinery.
//!
//! ```text
//! domain ─▶ label, architecture, system (libosinfo), cards
//! card ─▶ mac, interface: the bridge of its network ─▶ ip: reservation, definition, lease, running guest
//! snapshot: the given one, or the current one, or the only one; it must have memory
//! ```

mod os;
pub mod qemu;
mod reader;
pub mod virsh;
pub mod xml;

use clap::Args;
use machinery::{Error, Result};

use super::entry::{Found, Machine, interface_of};
use super::given::Given;
use super::outcome::collect_all;
use qemu::{Options, Target};
use reader::{Reader, is_in};

/// The beginning of the address of a libvirt on this computer.
pub const LOCAL: &str = "qemu:///";

/// The arguments of the command.
#[derive(Debug, Clone, Args)]
pub struct Libvirt {
    /// Names of domains [default: all]
    pub domains: Vec<String>,
    /// Address of libvirt [default: dsn in kvm.yaml]
    #[arg(long, value_name = "URI")]
    pub dsn: Option<String>,
    /// Machinery that gets the machines [default: kvm]
    #[arg(long = "as", id = "target", value_enum, value_name = "MACHINERY")]
    pub target: Option<Target>,
    #[command(flatten)]
    pub options: Options,
    #[command(flatten)]
    pub given: Given,
}

/// Reads the domains. `configured` is the libvirt that `kvm.yaml` names.
///
/// # Errors
/// `virsh` is missing or libvirt does not answer. There is no domain of a name. The options name another machine.
pub fn find(libvirt: &Libvirt, configured: &str) -> Result<Found> {
    let dsn = libvirt.dsn.as_deref().unwrap_or(configured);
    let machines = machines(&mut Reader::new(dsn, &libvirt.given)?, libvirt)?;
    Ok(Found { interface: interface_of(&machines), machines, dsn: libvirt.dsn.clone(), ..Found::default() })
}

/// Reads the domains of the libvirt at `dsn` that become machines of `qemu`. `given` has the operator's values and those of
/// the entries in `kvm.yaml`.
///
/// # Errors
/// As [`find`]. libvirt is on another computer. A domain lacks a value, is on, or has a part that cannot come over.
pub fn find_for_qemu(libvirt: &Libvirt, dsn: &str, given: &Given) -> Result<Vec<qemu::Domain>> {
    if !dsn.starts_with(LOCAL) {
        let what = format!("copying the domains of {dsn}, whose disks are files of another computer");
        return Err(Error::unsupported(&what).advice("Run the command on that computer"));
    }
    let mut reader = Reader::new(dsn, given)?;
    let machines = machines(&mut reader, libvirt)?;
    qemu::read(&mut reader, &libvirt.options, machines)
}

fn machines(reader: &mut Reader<'_>, libvirt: &Libvirt) -> Result<Vec<Machine>> {
    let names = selected(&libvirt.domains, reader.virsh.names(&["list", "--all", "--name"])?)?;
    libvirt.given.expect_names(names.iter().map(String::as_str))?;
    let running = reader.virsh.names(&["list", "--state-running", "--name"])?;
    collect_all(names.iter().map(|name| reader.machine(name, running.contains(name))))
}

/// Returns the names of the wanted domains, each once, or else of all.
fn selected(wanted: &[String], all: Vec<String>) -> Result<Vec<String>> {
    let unknown: Vec<&str> = wanted.iter().map(String::as_str).filter(|name| !is_in(&all, name)).collect();
    if !unknown.is_empty() {
        let reason = format!("libvirt has no domain '{}'", unknown.join("', '"));
        let known =
            if all.is_empty() { "It has none".to_owned() } else { format!("It has {}", all.join(", ")) };
        return Err(Error::configuration(reason).advice(known));
    }
    if all.is_empty() {
        let reason = "libvirt has no domain";
        return Err(Error::configuration(reason).advice("Check dsn in kvm.yaml, or give --dsn"));
    }
    Ok(all.into_iter().filter(|name| wanted.is_empty() || is_in(wanted, name)).collect())
}

#[cfg(test)]
mod tests;
