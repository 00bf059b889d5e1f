//! The analysis guest: a Linux in which a sandbox runs its samples.
//!
//! The guest has Debian's cloud kernel, a static busybox, a Python, and an agent: [Cuckoo's own](Agent::Cuckoo), or
//! [ours](Agent::Own), which speaks the same protocol. Python and its modules are those of this computer. Cuckoo3 has a
//! stager and a monitor for Windows only, so [`STAGER`] and [`MONITOR`] stand in for them, and the guest passes for a
//! Windows.
//!
//! Its network is a [`TestNetwork`] with [a bridge](TestNetwork::add_machines): Cuckoo's result server knows a machine by
//! its address.

use std::collections::BTreeSet;
use std::fs;
use std::iter;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::DISK_PLACEHOLDER;
pub use super::agent::{Agent, CUCKOO_AGENT, CUCKOO_AGENT_PYTHON};
use super::cpio::Archive;
use super::linux::{self, Image};
use crate::error::{Context, Error};
use crate::network::TestNetwork;
use crate::{Result, cache, command};

/// The stand-in for Cuckoo's stager.
pub const STAGER: &str = include_str!("analysis/stager.py");
/// The stand-in for Cuckoo's monitor.
pub const MONITOR: &str = include_str!("analysis/monitor.py");
/// The sample of an analysis; `TOKEN` is a word that its request to the server contains.
pub const SAMPLE: &str = include_str!("analysis/sample.py");

const INIT: &str = include_str!("analysis/init.sh");
const START: &str = include_str!("analysis/start.py");
const COLLECT: &str = include_str!("analysis/collect.py");
const RAM_MIB: &str = "256";

/// Returns the image of the guest with that agent. Makes it if it does not exist.
pub(crate) fn image(cache: &Path, agent: Agent) -> Result<Image> {
    let (agent, python) = agent.files()?;
    let parts = [&agent, INIT, START, COLLECT, STAGER, MONITOR, SAMPLE, &python.to_string_lossy()];
    let content = cache::fingerprint(&(parts, linux::MODULES));
    let folder = cache::folder(cache, &format!("analysis-image-{content}"), |folder| {
        linux::build_with(folder, |root| initramfs(root, &agent, &python))
    })?;
    Ok(Image::at(folder))
}

fn initramfs(root: &Path, agent: &str, python: &Path) -> Result<Vec<u8>> {
    let files = python_files(agent, python)?;
    let mut archive = Archive::default();
    let folders = ["agent", "bin", "modules"].map(PathBuf::from).into_iter();
    let of_python = files.iter().filter_map(|file| file.strip_prefix("/").ok()?.parent());
    let of_python = of_python.flat_map(|folder| folder.ancestors().map(Path::to_owned));
    // A parent sorts before its folders.
    for folder in folders.chain(of_python).filter(|folder| folder != Path::new("")).collect::<BTreeSet<_>>() {
        archive.folder(&folder.to_string_lossy());
    }
    for file in &files {
        archive.program(file.to_string_lossy().trim_start_matches('/'), &linux::content(file)?);
    }
    let program = files.iter().find(|file| file.parent().is_some_and(|folder| folder.ends_with("bin")));
    let program = program.ok_or_else(|| Error::new(format!("{} is in no folder bin", python.display())))?;
    archive.link("bin/python", &program.to_string_lossy());
    archive.file("agent/agent.py", agent.as_bytes());
    archive.file("agent/start.py", START.as_bytes());
    archive.program("init", INIT.as_bytes());
    linux::add_system(&mut archive, root)?;
    Ok(archive.finish())
}

/// Returns the files of `python` that the guest's scripts need.
fn python_files(agent: &str, python: &Path) -> Result<Vec<PathBuf>> {
    let what = || "looking for the files of a Python".to_owned();
    let folder = tempfile::tempdir().context(what)?;
    let scripts = [START, agent, STAGER, MONITOR, SAMPLE];
    let paths = (0..scripts.len()).map(|n| folder.path().join(format!("script{n}.py")));
    let paths: Vec<_> = iter::once(folder.path().join("collect.py")).chain(paths).collect();
    for (path, script) in paths.iter().zip(iter::once(COLLECT).chain(scripts)) {
        fs::write(path, script).context(what)?;
    }
    let listed = command::output(Command::new(python).arg("-B").args(&paths))?;
    Ok(listed.lines().map(PathBuf::from).collect())
}

/// Returns QEMU's arguments for the machine with that number. While the snapshot is made, it has no network.
pub(crate) fn args(image: &Image, number: u8, agent: Option<Ipv4Addr>) -> Vec<String> {
    let netdevs = match agent {
        None => ["net0", "none"].map(|id| format!("hubport,id={id},hubid=0")).to_vec(),
        Some(_) => {
            let tap = TestNetwork::tap_of(number);
            vec![format!("tap,id=net0,ifname={tap},script=no,downscript=no,vnet_hdr=off")]
        }
    };
    let append = format!("console=ttyS0 quiet panic=-1 address={}/24", TestNetwork::machine(number));
    let device = format!("virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:42:01:{number:02x}");
    let drive = format!("file={DISK_PLACEHOLDER},format=qcow2,if=virtio");
    let (kernel, initramfs) = (image.kernel(), image.initramfs());
    let (kernel, initramfs) = (kernel.to_string_lossy(), initramfs.to_string_lossy());
    let mut args = vec!["-m", RAM_MIB, "-drive", &drive, "-kernel", &kernel, "-initrd", &initramfs];
    args.extend(["-append", &append]);
    args.extend(netdevs.iter().flat_map(|netdev| ["-netdev", netdev]));
    args.extend(["-device", &device]);
    args.into_iter().map(str::to_owned).collect()
}
