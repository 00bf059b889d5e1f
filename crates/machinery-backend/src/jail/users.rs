//! The user of each machine: a number that belongs to nobody else.
//!
//! All hosts of a computer take their users from a folder with a file for each number that is given away. The file has the
//! machine's key, which is the path of its disk. Machines that share a disk have a second path in their keys. The folder
//! is empty after a boot.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use machinery::config::checked;
use machinery_jail::User;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Deserializer};

/// The folder of the users that are given away. Only root writes there.
const GIVEN: &str = "/run/cuckoo-machinery-users";

/// Returns the key of one of several machines that have the file in common. A path has no NUL.
pub fn key_among(file: &Path, own: &Path) -> PathBuf {
    let bytes = [file, own].map(|path| path.as_os_str().as_bytes()).join(&0);
    PathBuf::from(OsString::from_vec(bytes))
}

/// The numbers of the users that machines get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
    count: u32,
}

impl Default for UserRange {
    /// Numbers that neither distributions nor systemd give to users or containers. Source: systemd's
    /// docs/UIDS-GIDS.md, which has the range from 1879048192 to 2147352575 as unused.
    fn default() -> Self {
        UserRange { first: 1_900_000_000, count: 1 << 16 }
    }
}

impl UserRange {
    /// Returns the user of the machine with that key. It is the same for every host of this computer, unless two keys want
    /// the same number: then the later one gets the next free number.
    ///
    /// # Errors
    /// Somebody else has numbers of the range; the folder of the users cannot be used, or all numbers are given away.
    pub fn user_of(self, key: &Path) -> io::Result<User> {
        for file in ["/etc/passwd", "/etc/subuid", "/etc/subgid"] {
            // A computer may have none.
            self.expect_free(file, &fs::read_to_string(file).unwrap_or_default())?;
        }
        self.user_in(Path::new(GIVEN), key)
    }

    /// Expects that the file gives no number of the range to an account, or to an account's containers. Sources: passwd(5),
    /// subuid(5).
    fn expect_free(self, file: &str, text: &str) -> io::Result<()> {
        let is_taken = |line: &&str| {
            let mut fields = line.split(':').skip(1);
            let (first, second) = (fields.next(), fields.next());
            let number = |field: Option<&str>| field.and_then(|field| field.parse::<u64>().ok());
            let taken = match (number(first), number(second)) {
                (Some(first), Some(count)) => first..first.saturating_add(count),
                (None, Some(uid)) => uid..uid + 1,
                _ => return false,
            };
            let own = u64::from(self.first)..u64::from(self.first) + u64::from(self.count);
            taken.start < own.end && own.start < taken.end
        };
        match text.lines().find(is_taken) {
            None => Ok(()),
            Some(line) => Err(io::Error::other(format!(
                "{file} gives numbers of jail_users to others ({line}): set jail_users to numbers that nobody has"
            ))),
        }
    }

    fn user_in(self, folder: &Path, key: &Path) -> io::Result<User> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let lock = File::create(folder.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let wanted = hash(key) % self.count;
        for step in 0..self.count {
            let uid = self.first + (wanted + step) % self.count;
            if claim(&folder.join(uid.to_string()), key)? {
                return Ok(User { uid, gid: uid, groups: Vec::new() });
            }
        }
        Err(io::Error::other("all users of jail_users are given away"))
    }
}

/// Writes the key into the file of a number, unless another machine has the number. A machine whose disk is gone has none.
fn claim(file: &Path, key: &Path) -> io::Result<bool> {
    let mut file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(file)?;
    let mut owner = Vec::new();
    file.read_to_end(&mut owner)?;
    let key = key.as_os_str().as_encoded_bytes();
    if owner == key {
        return Ok(true);
    }
    let owner = String::from_utf8_lossy(&owner).into_owned();
    let disk = owner.split('\0').next().unwrap_or_default();
    if !disk.is_empty() && Path::new(disk).exists() {
        return Ok(false);
    }
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(key)?;
    Ok(true)
}

/// Computes FNV-1a with 32 bits: the same in every build, because the files of a machine keep their owner.
fn hash(key: &Path) -> u32 {
    let mix = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    key.as_os_str().as_encoded_bytes().iter().fold(0x811c_9dc5, mix)
}

impl<'de> Deserialize<'de> for UserRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        checked(deserializer, |text| {
            let wrong =
                || format!("'{text}' is no range of users: write FIRST-LAST, such as 1900000000-1900065535");
            let (first, last) = text.split_once('-').ok_or_else(wrong)?;
            let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
            let (first, last) = (number(first)?, number(last)?);
            // 65534 is nobody, and the highest number means no user at all.
            let fits = first > 65_534 && last < u32::MAX && first <= last;
            if fits { Ok(UserRange { first, count: last - first + 1 }) } else { Err(wrong()) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_has_a_user_of_its_own_until_its_disk_is_gone() {
        let (folder, range) = (tempfile::tempdir().unwrap(), UserRange { first: 100_000, count: 3 });
        let disks = ["a", "b", "c", "d"].map(|name| folder.path().join(name));
        disks.iter().for_each(|disk| fs::write(disk, "").unwrap());
        let given = folder.path().join("given");
        let of = |disk: &Path| range.user_in(&given, disk).map(|user| user.uid);
        let first = [0, 1, 2].map(|index| of(&disks[index]).unwrap());
        assert_eq!([0, 1, 2].map(|index| of(&disks[index]).unwrap()), first);
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, [100_000, 100_001, 100_002]);
        assert!(of(&disks[3]).unwrap_err().to_string().contains("given away"));
        fs::remove_file(&disks[1]).unwrap();
        assert_eq!(of(&disks[3]).unwrap(), first[1]);
    }

    #[test]
    fn machines_that_share_a_disk_have_users_of_their_own_until_it_is_gone() {
        let (folder, range) = (tempfile::tempdir().unwrap(), UserRange { first: 100_000, count: 2 });
        let (disk, given) = (folder.path().join("disk"), folder.path().join("given"));
        fs::write(&disk, "").unwrap();
        let of =
            |overlay: &str| range.user_in(&given, &key_among(&disk, Path::new(overlay))).map(|user| user.uid);
        let (a, b) = (of("/a").unwrap(), of("/b").unwrap());
        assert_ne!(a, b);
        assert_eq!((of("/a").unwrap(), of("/b").unwrap()), (a, b));
        assert!(of("/c").is_err());
        fs::remove_file(&disk).unwrap();
        assert!(of("/c").is_ok());
    }

    #[test]
    fn user_never_changes() {
        assert_eq!(hash(Path::new("a")), 0xe40c_292c, "the published value of FNV-1a");
    }

    #[test]
    fn range_is_refused_when_an_account_or_its_containers_have_its_numbers() {
        let range = UserRange { first: 200_000, count: 10 };
        let refused = |file: &str, text: &str| range.expect_free(file, text).is_err();
        assert!(refused("/etc/passwd", "root:x:0:0::/:/bin/sh\nmalory:x:200003:7::/:/bin/sh\n"));
        assert!(!refused("/etc/passwd", "root:x:0:0::/:/bin/sh\nalice:x:200010:200003::/:/bin/sh\n\n"));
        assert!(refused("/etc/subuid", "alice:165536:65536\n"));
        assert!(!refused("/etc/subuid", "alice:100000:65536\nbob:200010:1\n"));
    }

    #[test]
    fn range_is_refused_when_it_has_users_of_the_system() {
        let read = |text: &str| serde_yaml::from_str::<UserRange>(text);
        assert_eq!(read("200000-200009").unwrap(), UserRange { first: 200_000, count: 10 });
        for wrong in ["0-100", "1000-2000", "9-8", "200000", "a-b", "200009-200000", "65535-4294967295"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
