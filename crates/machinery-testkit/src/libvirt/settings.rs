//! The configuration of a private libvirtd.

use std::fs;
use std::path::Path;

use rustix::process::geteuid;

use crate::Result;
use crate::error::Context;

/// QEMU runs as the user of the tests, without services of the system.
const QEMU_CONF: &str = "security_driver = \"none\"\nstdio_handler = \"file\"\n";

/// Root must be configured; other users have no choice.
const QEMU_CONF_OF_ROOT: &str = "\
user = \"root\"
group = \"root\"
swtpm_user = \"root\"
swtpm_group = \"root\"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
";

/// The users that distributions compile in as QEMU's (Debian and Ubuntu, Fedora). libvirtd looks up its user
/// before it reads `qemu.conf`, and ends if that user is missing. Only a package that the lab does not need
/// creates the user. No process runs as one of these users, so any number is valid: here that of `nobody`.
const USERS: [&str; 2] = ["libvirt-qemu:x:65534:65534::/:/bin/false", "qemu:x:65534:65534::/:/bin/false"];

/// The groups that distributions compile in.
const GROUPS: [&str; 3] = ["libvirt-qemu:x:65534:", "kvm:x:65534:", "qemu:x:65534:"];

/// Writes the configuration of libvirtd and of QEMU, and the users that they expect, below `folder`.
pub fn write(folder: &Path) -> Result<()> {
    let what = || format!("configuring a libvirtd in {}", folder.display());
    let of_root = if geteuid().is_root() { QEMU_CONF_OF_ROOT } else { "" };
    fs::write(folder.join("etc/libvirt/qemu.conf"), [QEMU_CONF, of_root].concat()).context(what)?;
    fs::write(folder.join("libvirtd.conf"), libvirtd_conf(folder)).context(what)?;
    for (path, wanted) in [("etc/passwd", USERS.as_slice()), ("etc/group", GROUPS.as_slice())] {
        let system = fs::read_to_string(Path::new("/").join(path)).context(what)?;
        fs::write(folder.join(path), with_entries(&system, wanted)).context(what)?;
    }
    Ok(())
}

/// Returns the text of `libvirtd.conf`.
pub fn libvirtd_conf(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "unix_sock_dir = \"{folder}/sockets\"\nunix_sock_rw_perms = \"0700\"\nauth_unix_rw = \"none\"\n\
         auth_unix_ro = \"none\"\nlog_outputs = \"3:file:{folder}/libvirtd.log\"\n"
    )
}

/// Returns the text of a `passwd` or `group` file with the entries of `wanted` whose names it lacks.
fn with_entries(system: &str, wanted: &[&str]) -> String {
    let name = |entry: &str| entry.split(':').next().unwrap_or_default().to_owned();
    let known: Vec<String> = system.lines().map(name).collect();
    let lacking = wanted.iter().copied().filter(|entry| !known.contains(&name(entry)));
    system.lines().chain(lacking).map(|entry| format!("{entry}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_added_when_their_names_are_missing() {
        let system = "root:x:0:0::/root:/bin/sh\nqemu:x:107:107::/:/sbin/nologin";
        let extended = with_entries(system, &USERS);
        let lines: Vec<&str> = extended.lines().collect();
        assert_eq!(lines[..2], system.lines().collect::<Vec<_>>());
        assert_eq!(lines[2..], [USERS[0]]);
        assert_eq!(with_entries(&extended, &USERS), extended);
    }
}
