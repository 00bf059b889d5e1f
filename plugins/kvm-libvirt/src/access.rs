//! Whether the user that libvirt runs QEMU as may use `/dev/kvm`.
//!
//! Where the device is there and that user may not open it, libvirt does not keep what it learns about
//! QEMU, and learns it anew at each of its starts, which takes seconds; and domains of type `kvm` do
//! not start. libvirt names the user, by number, in its capabilities (`<baselabel type='kvm'>`, model
//! `dac`). Source: libvirt's docs/formatcaps.rst and src/qemu/qemu_capabilities.c.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::description::label_of_qemu;

/// The device.
pub const KVM: &str = "/dev/kvm";

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
    /// Those of a file; `None` if it is not there.
    pub fn of(path: &Path) -> Option<Permissions> {
        let file = fs::metadata(path).ok()?;
        Some(Permissions { uid: file.uid(), gid: file.gid(), mode: file.mode() })
    }

    /// Whether the user may read and write it; `groups` are its further groups.
    pub fn is_open_to(self, user: User, groups: &[u32]) -> bool {
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

/// The user of QEMU in libvirt's capabilities.
pub fn user_of_qemu(capabilities: &str) -> Option<User> {
    let label = label_of_qemu(capabilities)?;
    let (uid, gid) = label.strip_prefix('+')?.split_once(":+")?;
    Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
}

/// The name of a user in the text of `/etc/passwd`.
pub fn name_of(uid: u32, passwd: &str) -> Option<&str> {
    let entries = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    entries
        .filter(|fields| fields.get(2).and_then(|number| number.parse().ok()) == Some(uid))
        .find_map(|fields| fields.first().copied())
}

/// The groups that list the user, in the text of `/etc/group`.
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
    fn the_user_is_found_in_the_capabilities() {
        let xml = "<host><secmodel>\n<model>apparmor</model>\n<doi>0</doi></secmodel><secmodel>\n<model>dac</model>\n\
                   <doi>0</doi>\n<baselabel type='kvm'>+64055:+64055</baselabel>\n\
                   <baselabel type='qemu'>+64055:+64055</baselabel></secmodel></host>";
        assert_eq!(user_of_qemu(xml), Some(QEMU));
        assert_eq!(user_of_qemu("<capabilities/>"), None);
    }

    #[test]
    fn a_user_gets_in_by_itself_by_a_group_or_as_anyone() {
        let device = |gid, mode| Permissions { uid: 0, gid, mode };
        assert!(!device(0, 0o600).is_open_to(QEMU, &[]));
        assert!(device(0, 0o666).is_open_to(QEMU, &[]));
        assert!(device(108, 0o660).is_open_to(QEMU, &[108]));
        assert!(!device(108, 0o660).is_open_to(QEMU, &[107]));
        assert!(device(64055, 0o660).is_open_to(QEMU, &[]));
        assert!(!device(64055, 0o606).is_open_to(QEMU, &[]));
        assert!(device(0, 0o600).is_open_to(User { uid: 0, gid: 0 }, &[]));
    }

    #[test]
    fn groups_are_read_as_the_system_keeps_them() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\nlibvirt-qemu:x:64055:64055:Libvirt Qemu,,,:/:/bin/false\n";
        assert_eq!(name_of(64055, passwd), Some("libvirt-qemu"));
        assert_eq!(name_of(1, passwd), None);
        let group = "root:x:0:\nkvm:x:108:someone,libvirt-qemu\nlibvirt:x:109:someone\n";
        assert_eq!(groups_of("libvirt-qemu", group), [108]);
    }
}
