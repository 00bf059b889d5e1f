//! `import libvirt --as qemu`: reads the domains that become machines of the machinery `qemu`. The module `machine` makes
//! these.
//!
//! ```text
//! snapshot ─▶ the domain's description ─▶ faults, files, cards        (source)
//!                        └─▶ libvirt's command line ─▶ arguments      (native)
//! kvm.yaml, libvirt ─▶ ip, platform, …                                (import libvirt)
//! ```
//!
//! Nothing of the domain changes: libvirt only describes and translates, and the snapshot's memory is read from the disk.

mod native;
mod source;

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use machinery::{Error, Result};
use serde_yaml::Value;

use super::super::entry::Machine;
use super::super::given::Assignment;
use super::super::outcome::collect_all;
use super::reader::{Reader, is_in};
use crate::commands::shell_word;
use native::Places;
pub use source::Image;
use source::{CardNetwork, Source};

/// The machinery that gets the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// The domains themselves
    Kvm,
    /// Copies of the domains at their snapshots, which QEMU runs without libvirt
    Qemu,
}

/// The disks of a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Disks {
    /// Copies
    #[default]
    Copy,
    /// Overlays on the disks of the domain, which nobody may write to any more
    Overlay,
}

/// The options of machines of `qemu`.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "With --as qemu")]
pub struct Options {
    /// Name of a machine [default: the domain's name]
    #[arg(long, value_name = "[DOMAIN=]NAME", requires = "target")]
    pub(super) name: Vec<Assignment>,
    /// Copy the disks, or make overlays on those of the domain, which nobody may write to any more
    #[arg(long, value_enum, default_value = "copy", requires = "target")]
    pub disks: Disks,
    /// Remove the entries of the domains from kvm.yaml once the machines are restored
    #[arg(long, requires = "target")]
    pub replace: bool,
    /// Folder in which the machines' folders are made [default: machines in the CWD]
    #[arg(long, value_name = "DIR", requires = "target")]
    pub folder: Option<PathBuf>,
    /// Restore the machines without waiting for their agents
    #[arg(long, requires = "target")]
    pub no_agent: bool,
}

/// A domain that becomes a machine.
#[derive(Debug)]
pub struct Domain {
    pub label: String,
    /// The address of its libvirt.
    pub dsn: String,
    pub uuid: String,
    pub snapshot: String,
    /// The name of the machine.
    pub name: String,
    pub arguments: Vec<String>,
    /// The images that the guest writes to, with their names in the machine's folder.
    pub images: Vec<(Image, String)>,
    /// The image with the memory of the snapshot.
    pub memory: PathBuf,
    /// Further files of the machine, with their names in its folder.
    pub files: Vec<(PathBuf, String)>,
    pub notes: Vec<String>,
    keys: Vec<(&'static str, Value)>,
}

/// The name of a machine's first disk.
const DISK: &str = "disk.qcow2";
/// The placeholder for the path of its overlay.
const PLACEHOLDER: &str = "%DISPOSABLE_DISK_PATH%";
/// The name of the firmware's variables.
const NVRAM: &str = "efivars.qcow2";

impl Domain {
    /// Returns a key of the machine's entry; empty if it has none.
    pub fn text(&self, key: &str) -> String {
        let value = self.keys.iter().find(|(own, _)| *own == key).map(|(_, value)| value);
        match value {
            Some(Value::Number(number)) => number.to_string(),
            value => value.and_then(Value::as_str).unwrap_or_default().to_owned(),
        }
    }

    pub fn tags(&self) -> Vec<String> {
        let tags = self.keys.iter().find(|(own, _)| *own == "tags").and_then(|(_, tags)| tags.as_sequence());
        tags.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }
}

/// Reads the domains.
///
/// # Errors
/// As an import, and each part of a domain that cannot come over.
pub fn read(reader: &mut Reader<'_>, options: &Options, machines: Vec<Machine>) -> Result<Vec<Domain>> {
    let active = reader.virsh.names(&["list", "--name"])?;
    expect_one_name(&options.name, machines.len())?;
    collect_all(machines.into_iter().map(|machine| {
        let label = machine.name.clone();
        domain(reader, options, machine, is_in(&active, &label)).map_err(|error| error.machine(label))
    }))
}

fn expect_one_name(names: &[Assignment], domains: usize) -> Result<()> {
    if domains > 1 && names.iter().any(|name| name.machine.is_none()) {
        let reason = "--name without DOMAIN= names each of the machines";
        return Err(Error::configuration(reason).advice("Give --name DOMAIN=NAME"));
    }
    Ok(())
}

fn domain(reader: &mut Reader<'_>, options: &Options, mut machine: Machine, is_on: bool) -> Result<Domain> {
    let label = machine.name.clone();
    let mut problems = machine.take_faults();
    if is_on {
        let advice = format!(
            "Shut it off, or `virsh destroy {}`. If a host has it as a machine of kvm, end that host first",
            shell_word(&label)
        );
        problems.push(Error::environment("its domain is on").machine(&label).advice(advice));
    }
    let snapshot =
        machine.keys.iter().find(|(key, _)| *key == "snapshot").and_then(|(_, name)| name.as_str());
    let Some(snapshot) = snapshot.map(str::to_owned) else {
        return Err(all(problems, "its domain has no snapshot"));
    };
    let xml = reader.virsh.read(&["snapshot-dumpxml", "--domain", &label, "--snapshotname", &snapshot])?;
    let mut source = Source::read(&xml)?;
    let memory = if source.faults.is_empty() { source.memory_in(&snapshot)? } else { None };
    if !source.faults.is_empty() {
        let reason = format!("the snapshot '{snapshot}' cannot come over: {}", source.faults.join("; "));
        let advice = "Remove these parts from the domain and take a new snapshot, or leave the domain out";
        problems.push(Error::configuration(reason).machine(&label).advice(advice));
    }
    let (Some(memory), true) = (memory, problems.is_empty()) else {
        return Err(all(problems, "its snapshot has no memory"));
    };
    let images = named(&source);
    let networks = source.cards.iter().map(|card| Ok((card.mac.clone(), network(reader, &card.network)?)));
    let places = Places { images: placeholders(&images), networks: networks.collect::<Result<_>>()? };
    let line = translated_by_libvirt(reader, &source.xml)?;
    let translated = native::translate(&line, &places).map_err(Error::configuration)?;
    let name = options.name.iter().rfind(|name| name.machine.as_ref().is_none_or(|of| *of == label));
    Ok(Domain {
        name: name.map_or_else(|| label.clone(), |name| name.value.clone()),
        label,
        dsn: reader.virsh.dsn.to_owned(),
        uuid: source.uuid,
        snapshot,
        arguments: translated.arguments,
        images,
        memory,
        files: translated.files,
        notes: machine.notes,
        keys: machine.keys,
    })
}

fn all(problems: Vec<Error>, reason: &str) -> Error {
    Error::all(problems).unwrap_or_else(|| Error::configuration(reason))
}

/// Names the images that the guest writes to.
fn named(source: &Source) -> Vec<(Image, String)> {
    let mut disks = 0;
    let mut name = |image: &Image| {
        if image.is_nvram {
            return NVRAM.to_owned();
        }
        disks += 1;
        if disks == 1 { DISK.to_owned() } else { format!("disk-{disks}.qcow2") }
    };
    source.written().map(|image| (image.clone(), name(image))).collect()
}

/// Returns the places of the images in the arguments.
fn placeholders(images: &[(Image, String)]) -> HashMap<PathBuf, String> {
    let place = |name: &String| if name == DISK { PLACEHOLDER } else { name }.to_owned();
    images.iter().map(|(image, name)| (image.path.clone(), place(name))).collect()
}

/// Returns the value of `-netdev` for a card, without its id.
fn network(reader: &mut Reader<'_>, network: &CardNetwork) -> Result<String> {
    let bridge = match network {
        CardNetwork::User => return Ok("user".to_owned()),
        CardNetwork::Bridge(bridge) => bridge.clone(),
        CardNetwork::Named(name) => reader.network(name)?.bridge.clone().ok_or_else(|| {
            Error::configuration(format!("its network '{name}' has no bridge"))
                .advice("Connect the domain to a bridge and take a new snapshot, or leave the domain out")
        })?,
    };
    if bridge.contains(',') {
        return Err(Error::configuration(format!("'{bridge}' is no name of a bridge")));
    }
    Ok(format!("bridge,br={bridge}"))
}

/// Has libvirt translate the description of a domain into a command line. This changes nothing, but libvirt refuses it on
/// a read-only connection.
fn translated_by_libvirt(reader: &Reader<'_>, xml: &str) -> Result<String> {
    let failed =
        |error| Error::environment(format!("cannot write the domain's description for virsh: {error}"));
    let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
    file.write_all(xml.as_bytes()).map_err(failed)?;
    let path = file.path().display().to_string();
    reader.virsh.run(&["domxml-to-native", "--format", "qemu-argv", "--xml", &path])
}
