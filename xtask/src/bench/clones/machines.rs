//! The machine, its clones, and its copies.
//!
//! The guest is that of analyses, with the testkit's agent. It has a fixed address inside, on a tap. A copy has files of
//! its own, as a machine that somebody has made for itself.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use machinery_testkit::guest::analysis::Agent;
use machinery_testkit::lab::{Lab, TestNetwork};

use crate::run::{Context, Result};

/// The RAM of the guest.
pub const RAM_MIB: u32 = 256;
/// The machine that has clones.
pub const BASE: &str = "m1";
/// The address inside the snapshot, which all machines have.
pub const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 11);

/// The machines of the benchmark.
pub struct Machines {
    lab: Lab,
    copies: Vec<Machine>,
}

/// A machine of a measurement, with the address on which its agent answers.
#[derive(Clone)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its own address.
    pub ip: Ipv4Addr,
}

impl Machines {
    /// Makes a machine, and that many copies.
    pub fn new(copies: usize) -> Result<Self> {
        let lab = Lab::with_agents(1, Agent::Own)?;
        let lab = lab.ok_or_else(|| "only root can make the networks of clones".to_owned())?;
        lab.cwd().change_cuckoo_yaml("listen_ip: 127.0.0.1", &format!("listen_ip: {}", TestNetwork::HOST))?;
        let serial = lab.folder(BASE).probe.serial.display().to_string();
        let own = serial.replace("serial.log", "%MACHINE%.log");
        lab.change_start_args(BASE, |args| {
            args.iter_mut().for_each(|arg| *arg = arg.replace(&serial, &own))
        })?;
        let copies = (0..copies).map(|index| machine(&format!("copy{}", index + 1), index)).collect();
        Ok(Machines { lab, copies })
    }

    /// Returns the lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Configures that many clones, and returns them.
    pub fn clones(&self, count: usize) -> Result<Vec<Machine>> {
        let clones: Vec<Machine> =
            (0..count).map(|index| machine(&format!("{BASE}-{}", index + 1), index)).collect();
        let ips: Vec<String> = clones.iter().map(|clone| clone.ip.to_string()).collect();
        // Only files that are used count as disk space.
        for copy in &self.copies {
            let folder = self.folder_of(&copy.name);
            if folder.exists() {
                fs::remove_dir_all(&folder).context(|| format!("cannot remove {}", folder.display()))?;
            }
        }
        let keys = format!("machines: {{{BASE}: {{clones: {count}, clone_ips: [{}]}}}}", ips.join(", "));
        self.configure(count, &keys, &self.yaml_of_base()?)?;
        Ok(clones)
    }

    /// Configures that many copies, and returns them.
    pub fn copies(&self, count: usize) -> Result<Vec<Machine>> {
        let copies = self.copies[..count].to_vec();
        let base = self.yaml_of_base()?;
        let (head, entry) = base
            .split_once(&format!("  {BASE}:\n"))
            .ok_or_else(|| "the lab's qemu.yaml has no machine".to_owned())?;
        let from = self.lab.folder(BASE).dir.display().to_string();
        let mut yaml = head.to_owned();
        for copy in &copies {
            let to = self.folder_of(&copy.name).display().to_string();
            copy_folder(&from, &to)?;
            let entry =
                entry.replace(&from, &to).replace(&format!("ip: {INSIDE}"), &format!("ip: {}", copy.ip));
            yaml += &format!("  {}:\n{}\n", copy.name, entry.trim_end());
        }
        let options = copies.iter().map(|copy| format!("{}: {{guest_ip: {INSIDE}}}", copy.name));
        let keys = format!("network: isolated, machines: {{{}}}", options.collect::<Vec<_>>().join(", "));
        self.configure(count, &keys, &yaml)?;
        Ok(copies)
    }

    /// Returns the disk space of all files, in MiB.
    pub fn disk(&self) -> Result<f64> {
        Ok(allocated(self.lab.cwd().root())? as f64 / f64::from(1 << 20))
    }

    fn folder_of(&self, copy: &str) -> PathBuf {
        self.lab.folder(BASE).dir.with_file_name(copy)
    }

    fn configure(&self, count: usize, keys: &str, yaml: &str) -> Result<()> {
        let memory = (count as u64 * u64::from(RAM_MIB)).div_ceil(1024) + 1;
        let limits = format!("instant_space_limit: 64GiB, standby: on, standby_memory: {memory}GiB");
        let host =
            format!("free_space_reserve: 0\nmachineries: {{qemu: {{instant: auto, {limits}, {keys}}}}}\n");
        self.lab.cwd().host_yaml(&host)?;
        Ok(self.lab.write_yaml(yaml)?)
    }

    /// Returns `qemu.yaml` with the base machine only.
    fn yaml_of_base(&self) -> Result<String> {
        Ok(self.lab.fresh_yaml())
    }
}

fn machine(name: &str, index: usize) -> Machine {
    let number = u8::try_from(index % 250 + 1).unwrap_or(1);
    let block = u8::try_from(index / 250).unwrap_or(u8::MAX);
    Machine { name: name.to_owned(), ip: Ipv4Addr::new(10, 77, block, number) }
}

/// Copies a machine's files, and has its arguments name the copies.
fn copy_folder(from: &str, to: &str) -> Result<()> {
    let what = || format!("cannot copy {from}");
    if Path::new(to).exists() {
        return Ok(());
    }
    fs::create_dir_all(to).context(what)?;
    for entry in fs::read_dir(from).context(what)? {
        let (file, name) = entry
            .and_then(|entry| Ok((entry.file_type()?.is_file().then(|| entry.path()), entry.file_name())))
            .context(what)?;
        let Some(file) = file else { continue };
        let copy = Path::new(to).join(&name);
        match name.to_str() {
            Some("machineinfo.json") => {
                let text = fs::read_to_string(&file).context(what)?;
                fs::write(&copy, text.replace(from, to)).context(what)?;
            }
            _ => drop(fs::copy(&file, &copy).context(what)?),
        }
    }
    Ok(())
}

/// Returns the allocated bytes of all files below a folder.
fn allocated(folder: &Path) -> Result<u64> {
    let what = || format!("cannot read {}", folder.display());
    let mut sum = 0;
    for entry in fs::read_dir(folder).context(what)? {
        let path = entry.context(what)?.path();
        // A file of a run may end meanwhile.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        sum += if metadata.is_dir() { allocated(&path)? } else { metadata.blocks() * 512 };
    }
    Ok(sum)
}
