//! Access of QEMU's user to `/dev/kvm`.
//!
//! If the device exists and that user may not open it, domains of type `kvm` do not start. libvirt then also
//! probes QEMU again at each of its starts, which takes seconds.
//!
//! libvirt names the user, by number, in its capabilities (`<baselabel type='kvm'>`, model `dac`). Source: libvirt's
//! docs/formatcaps.rst and src/qemu/qemu_capabilities.c.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::description::label_of_qemu;

/// The path of the device.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// A user and its group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// Owner and mode of a file.
#[derive(Debug, Clone, Copy)]
pub struct Permissions {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
}

impl Permissions {
    /// Returns the permissions of a file; `None` if it does not exist.
    pub fn of(path: &Path) -> Option<Permissions> {
        let file = fs::metadata(path).ok()?;
        Some(Permissions { uid: file.uid(), gid: file.gid(), mode: file.mode() })
    }

    /// Reports whether the user may read and write the file; `groups` are its further groups.
    pub fn allow(self, user: User, groups: &[u32]) -> bool {
        let bits = if user.uid == 0 {
            0o6
        } else if user.uid == self.uid {
            self.mode >> 6
        } else if user.gid == self.gid || groups.contains(&self.gid) {
            self.mode >> 3
        } else {
            self.mode
        };
        bits & 0o6 == 0o6
    }
}

/// Returns the user of QEMU from libvirt's capabilities.
pub fn user_of_qemu(capabilities: &str) -> Option<User> {
    let label = label_of_qemu(capabilities)?;
    let (uid, gid) = label.strip_prefix('+')?.split_once(":+")?;
    Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
}

/// Returns the name of a user from the text of `/etc/passwd`.
pub fn name_of(uid: u32, passwd: &str) -> Option<&str> {
    let entries = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    entries
        .filter(|fields| fields.get(2).and_then(|number| number.parse().ok()) == Some(uid))
        .find_map(|fields| fields.first().copied())
}

/// Returns the groups that list the user in the text of `/etc/group`.
pub fn groups_of(name: &str, group: &str) -> Vec<u32> {
    let listed = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let members = fields.get(3)?;
        members.split(',').find(|member| *member == name)?;
        fields.get(2)?.parse().ok()
    };
    group.lines().filter_map(listed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const QEMU: User = User { uid: 64055, gid: 64055 };

    #[test]
    fn user_of_qemu_is_read_from_the_capabilities() {
        let xml = "<host><secmodel>\n<model>apparmor</model>\n<doi>0</doi></secmodel><secmodel>\n<model>dac</model>\n\
                   <doi>0</doi>\n<baselabel type='kvm'>+64055:+64055</baselabel>\n\
                   <baselabel type='qemu'>+64055:+64055</baselabel></secmodel></host>";
        assert_eq!(user_of_qemu(xml), Some(QEMU));
        assert_eq!(user_of_qemu("<capabilities/>"), None);
    }

    #[test]
    fn permissions_allow_owner_group_and_others() {
        let device = |gid, mode| Permissions { uid: 0, gid, mode };
        assert!(!device(0, 0o600).allow(QEMU, &[]));
        assert!(device(0, 0o666).allow(QEMU, &[]));
        assert!(device(108, 0o660).allow(QEMU, &[108]));
        assert!(!device(108, 0o660).allow(QEMU, &[107]));
        assert!(device(64055, 0o660).allow(QEMU, &[]));
        assert!(!device(64055, 0o606).allow(QEMU, &[]));
        assert!(device(0, 0o600).allow(User { uid: 0, gid: 0 }, &[]));
    }

    #[test]
    fn groups_are_read_from_the_files_of_the_system() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\nlibvirt-qemu:x:64055:64055:Libvirt Qemu,,,:/:/bin/false\n";
        assert_eq!(name_of(64055, passwd), Some("libvirt-qemu"));
        assert_eq!(name_of(1, passwd), None);
        let group = "root:x:0:\nkvm:x:108:someone,libvirt-qemu\nlibvirt:x:109:someone\n";
        assert_eq!(groups_of("libvirt-qemu", group), [108]);
    }
}
