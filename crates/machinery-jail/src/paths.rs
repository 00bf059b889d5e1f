//! The Landlock rules: the files that a process may open, and the ports that it may listen on.
//!
//! Landlock does not stop `connect` to the path of a socket; the [filter](crate::filter) does. An older kernel knows
//! fewer rights, and applies those that it knows. Source: landlock(7).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope,
};

use crate::policy::{Network, Policy};

/// The newest set of rights that this program knows.
const NEWEST: ABI = ABI::V6;

/// Programs, libraries and data of the system, which every hypervisor reads.
const SYSTEM: [&str; 7] = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime"];

/// Devices that every process may use.
const SYSTEM_DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];

/// Files that the resolution of names reads. QEMU answers its guest's queries for names by `resolv.conf`. Source: nss(5),
/// and `get_dns_addr` in libslirp.
const NAMES: [&str; 7] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
];

/// A failure of one of the steps, for people.
type Error = Box<dyn std::error::Error>;

/// Restricts this process and its children to the paths and ports of the policy, and to the program.
///
/// # Errors
/// A path does not exist; the kernel refuses a rule.
pub fn restrict(policy: &Policy, program: &Path) -> Result<(), Error> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(NEWEST))?;
    if !matches!(policy.network, Network::Internet | Network::Any) {
        ruleset = ruleset.handle_access(AccessNet::ConnectTcp)?;
    }
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::from_all(NEWEST) & !AccessFs::Execute & !AccessFs::IoctlDev;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let mut rules = ruleset.create()?;
    for path in SYSTEM.map(Path::new).into_iter().filter(|path| path.exists()) {
        rules = allow(rules, path, AccessFs::from_read(NEWEST))?;
    }
    for path in SYSTEM_DEVICES.map(Path::new) {
        rules = allow(rules, path, device)?;
    }
    if policy.network != Network::None {
        for path in NAMES.map(Path::new).into_iter().filter(|path| path.exists()) {
            rules = allow(rules, path, read)?;
        }
    }
    rules = allow(rules, program, AccessFs::ReadFile | AccessFs::Execute)?;
    let socket = AccessFs::MakeSock.into();
    let own =
        [(&policy.read, read), (&policy.write, write), (&policy.devices, device), (&policy.sockets, socket)];
    for (paths, access) in own {
        for path in paths {
            rules = allow(rules, path, access)?;
        }
    }
    for port in &policy.listen {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
    }
    rules.restrict_self()?;
    Ok(())
}

fn allow(rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, Error> {
    let file = PathFd::new(path)?;
    // The kernel refuses the rights of a folder for anything else.
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
    Ok(rules.add_rule(PathBeneath::new(file, access))?)
}
