//! Access of QEMU's user to `/dev/kvm`, and to the disks.
//!
//! If the device exists and that user may not open it, domains of type `kvm` do not start. libvirt then also
//! probes QEMU again at each of its starts, which takes seconds.
//!
//! libvirt names the user, by number, in its capabilities (`<baselabel type='kvm'>`, model `dac`). Source: libvirt's
//! docs/formatcaps.rst and src/qemu/qemu_capabilities.c.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
        self.bits(user, groups) & 0o6 == 0o6
    }

    fn bits(self, user: User, groups: &[u32]) -> u32 {
        let bits = if user.uid == 0 {
            0o7
        } else if user.uid == self.uid {
            self.mode >> 6
        } else if user.gid == self.gid || groups.contains(&self.gid) {
            self.mode >> 3
        } else {
            self.mode
        };
        bits & 0o7
    }
}

/// The access of QEMU's user to files that it only has to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// It may read all of them, and write to none; or it is root.
    Reads,
    /// It may write to this one, or owns it and so can allow itself that.
    Writes(PathBuf),
    /// It may not read this one.
    None(PathBuf),
}

impl Access {
    /// Returns the user's access to all these files.
    pub fn of(user: User, files: Vec<PathBuf>) -> Access {
        let groups = user.all_groups();
        let mut access = Access::Reads;
        for file in files {
            let Some((found, bits)) = Permissions::of(&file).map(|found| (found, found.bits(user, &groups)))
            else {
                return Access::None(file);
            };
            if bits & 0o4 == 0 {
                return Access::None(file);
            }
            if user.uid != 0 && (bits & 0o2 != 0 || found.uid == user.uid) {
                access = Access::Writes(file);
            }
        }
        access
    }
}

impl User {
    /// Returns the folder above the file, or above such a folder, that the user may not enter.
    pub fn closed_folder(self, file: &Path) -> Option<&Path> {
        let groups = self.all_groups();
        let is_closed = |folder: &&Path| {
            Permissions::of(folder).is_some_and(|found| found.bits(self, &groups) & 0o1 == 0)
        };
        file.ancestors().skip(1).find(is_closed)
    }

    /// Returns the further groups of a user of this computer.
    fn all_groups(self) -> Vec<u32> {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        name_of(self.uid, &passwd).map(|name| groups_of(name, &group)).unwrap_or_default()
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
    use std::os::unix::fs::PermissionsExt;

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
    fn access_is_that_to_the_most_and_the_least_open_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = |mode: u32| {
            let path = folder.path().join(format!("{mode:o}"));
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let (read, written, hidden) = (file(0o644), file(0o646), file(0o600));
        let own = User { uid: Permissions::of(&read).unwrap().uid, gid: 1 };
        let access = |user, files: &[&PathBuf]| Access::of(user, files.iter().copied().cloned().collect());
        assert_eq!(access(QEMU, &[&read]), Access::Reads);
        assert_eq!(access(QEMU, &[&read, &written]), Access::Writes(written.clone()));
        assert_eq!(access(QEMU, &[&written, &hidden]), Access::None(hidden.clone()));
        let none = folder.path().join("none");
        assert_eq!(access(QEMU, &[&none]), Access::None(none.clone()));
        let of_owner = if own.uid == 0 { Access::Reads } else { Access::Writes(hidden.clone()) };
        assert_eq!(access(own, &[&hidden]), of_owner);
    }

    #[test]
    fn folder_is_closed_when_the_user_may_not_enter_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let file = inner.join("file");
        for (mode, closed) in [(0o711, None), (0o700, Some(inner.as_path()))] {
            fs::set_permissions(&inner, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(QEMU.closed_folder(&file), closed);
        }
        assert_eq!(User { uid: 0, gid: 0 }.closed_folder(&file), None);
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
