//! The user of each machine: a number that belongs to nobody else.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use machinery::config::checked;
use machinery_jail::User;
use serde::{Deserialize, Deserializer};

use crate::sync::lock;

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

/// The users that this process has given away, and for which machine.
static GIVEN: Mutex<Option<HashMap<u32, PathBuf>>> = Mutex::new(None);

impl UserRange {
    /// Returns the user of the machine with that key. It is the same in every process, unless two keys want the same
    /// number: then the later one gets the next free number.
    pub fn user_of(self, key: &Path) -> User {
        let mut given = lock(&GIVEN);
        let given = given.get_or_insert_default();
        let wanted = hash(key) % self.count;
        let number = |step: u32| self.first + (wanted + step) % self.count;
        let is_free = |uid: &u32| given.get(uid).is_none_or(|of| of == key);
        let uid = (0..self.count).map(number).find(is_free).unwrap_or_else(|| number(0));
        given.insert(uid, key.to_owned());
        User { uid, gid: uid, groups: Vec::new() }
    }
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
    fn machine_has_a_user_of_its_own_and_keeps_it() {
        let range = UserRange { first: 100_000, count: 3 };
        let of = |name: &str| range.user_of(Path::new(name)).uid;
        let users = ["/c/a", "/c/b", "/c/c"].map(of);
        assert_eq!(["/c/a", "/c/b", "/c/c"].map(of), users);
        let mut sorted = users;
        sorted.sort_unstable();
        assert_eq!(sorted, [100_000, 100_001, 100_002]);
    }

    #[test]
    fn user_never_changes() {
        assert_eq!(hash(Path::new("a")), 0xe40c_292c, "the published value of FNV-1a");
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
