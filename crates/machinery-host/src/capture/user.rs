//! Chooses the user that tcpdump changes to when the host is root.
//!
//! tcpdump opens the interface as root, and then parses packets that malware has sent. It gets them out of a socket
//! and writes them to a pipe, so it needs no right by then.

use std::fs;
use std::sync::OnceLock;

use nix::unistd::User;

/// The users that are tried, in this order. Distributions make the first one with their package.
const USERS: [&str; 2] = ["tcpdump", "nobody"];

/// Returns the name of the user, which is `root` if there is no other.
pub fn of_tcpdump() -> &'static str {
    static CHOSEN: OnceLock<&str> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let is_usable = |name: &&&str| {
            let found = User::from_name(name).ok().flatten();
            found.is_some_and(|user| {
                is_mapped("uid_map", user.uid.as_raw()) && is_mapped("gid_map", user.gid.as_raw())
            })
        };
        USERS.iter().find(is_usable).copied().unwrap_or_else(|| {
            tracing::warn!(
                "tcpdump keeps its rights: there is neither a user `tcpdump` nor a user `nobody` here"
            );
            "root"
        })
    })
}

/// Reports whether the user namespace of the host has that number. Source: user_namespaces(7).
fn is_mapped(map: &str, number: u32) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/self/{map}")) else { return false };
    has_number(&text, number)
}

fn has_number(map: &str, number: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(first)), _, Some(Ok(count))) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        (first..first.saturating_add(count)).contains(&u64::from(number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_is_found_in_the_ranges_of_a_namespace() {
        let all = "         0          0 4294967295\n";
        assert!(has_number(all, 0) && has_number(all, 102));
        let one = "         0       1000          1\n";
        assert!(has_number(one, 0) && !has_number(one, 102));
        assert!(!has_number("", 0) && !has_number("x y z\n", 0));
    }
}
