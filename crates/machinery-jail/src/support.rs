//! The layers that this host can apply.

use std::fs;
use std::path::Path;

use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use rustix::thread::{CapabilitySet, capabilities};

/// The reason why a host without the rights of root applies no layer B.
pub const NOT_ROOT: &str = "the host does not run as root";

/// The parts of the layers that this host can apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Support {
    /// True if the kernel has Landlock and it is enabled.
    pub landlock: bool,
    /// True if the kernel has seccomp filters.
    pub seccomp: bool,
    /// True if this process may change the user and the namespaces of its children.
    pub root: bool,
}

impl Support {
    /// Asks the kernel.
    pub fn of_this_host() -> Support {
        Support {
            landlock: has_landlock(),
            seccomp: Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
            root: is_initial_user_namespace() && has_capabilities(),
        }
    }

    /// Returns the reason why layer A is incomplete, if it is.
    pub fn missing_in_a(&self) -> Option<&'static str> {
        match (self.landlock, self.seccomp) {
            (true, true) => None,
            (false, _) => Some("the kernel has no Landlock (since 5.13; see the boot parameter lsm=)"),
            (true, false) => Some("the kernel has no seccomp filters"),
        }
    }

    /// Returns the reason why layer B cannot be applied, if it cannot.
    pub fn missing_in_b(&self) -> Option<&'static str> {
        (!self.root).then_some(NOT_ROOT)
    }
}

/// Reports whether a ruleset that handles anything can be made.
fn has_landlock() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessFs::Execute).and_then(Ruleset::create).is_ok()
}

/// Reports whether this process has the capabilities of layer B. Root in a container may lack them.
fn has_capabilities() -> bool {
    let needed =
        CapabilitySet::SYS_ADMIN | CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::CHOWN;
    capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

/// Reports whether user 0 is the kernel's root, and not that of a user namespace. Source: user_namespaces(7).
fn is_initial_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}
