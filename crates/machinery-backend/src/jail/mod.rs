//! The jail of a hypervisor's process: which layers hold for a machine, and the command that runs in it.
//!
//! Malware that escapes from its guest is code inside the hypervisor's process. The helper program of the crate
//! `machinery-jail` confines that process before the hypervisor begins, and this module decides what the helper does:
//!
//! ```text
//! Jail (mode, user, what this host offers) + Policy (what the machine needs) ─▶ Confinement ─▶ command
//! ```
//!
//! | layer | needs | content |
//! | --- | --- | --- |
//! | A | the helper, Landlock, seccomp | files, system calls, descriptors, environment, limits |
//! | B | root | a user of the machine's own, an IPC namespace, a network namespace where the machine needs none |
//! | C | a delegated cgroup | limits for the whole run, and its end as a whole |
//!
//! A layer that cannot be applied is left out with a reason. [`JailMode::Strict`] refuses a machine without A and B.
//!
//! | module | content |
//! | --- | --- |
//! | `host_support` | the support for jails on this computer |
//! | `users` | the user of each machine |
//! | `reach` | whether a user can reach a file |
//! | `layers` | which layers hold, and why not the others |
//! | `cgroup` | the cgroup of a run |
//! | [`taps`] | taps that the host opens in the hypervisor's place |

mod cgroup;
mod host_support;
mod layers;
mod reach;
pub mod taps;
mod users;

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use command_fds::{CommandFdExt, FdMapping};
use machinery::{Error, Result};
use serde::Deserialize;

pub use cgroup::Cgroup;
use host_support::{HostSupport, found_in_path};
pub use layers::Layers;
pub use machinery_jail::{Limits, Network, Policy, User};
pub use users::{UserRange, key_among};

/// The reason why a program of the host has neither a user nor a cgroup.
const NOT_A_MACHINE: &str = "the program runs for the host";

/// The mode of a machine's jail.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JailMode {
    /// With each layer that can be applied.
    #[default]
    Auto,
    /// With layers A and B at least: a machine without them does not start.
    Strict,
    /// Not at all.
    Off,
}

/// The jail of one machine.
#[derive(Debug, Clone)]
pub struct Jail {
    mode: JailMode,
    host: HostSupport,
    /// The machine's own user, or the reason why it has none.
    user: std::result::Result<User, String>,
    /// The cgroup of the machine's runs, or the reason why it has none.
    cgroup: std::result::Result<Cgroup, String>,
}

/// A jail with what the machine needs: the layers that hold, and the policy of the helper.
#[derive(Debug, Clone)]
pub struct Confinement {
    helper: Option<PathBuf>,
    policy: Policy,
    layers: Layers,
    /// The limits of the cgroup, also of a process that has not the limits of a user.
    limits: Limits,
    cgroup: Option<Cgroup>,
    /// The network namespace that the process enters.
    network: Option<Arc<OwnedFd>>,
}

impl Jail {
    /// Creates the jail of a machine. `key` distinguishes the machine from all others of this computer: the path of a
    /// file of its own.
    pub fn new(mode: JailMode, key: &Path, users: UserRange) -> Jail {
        let host = HostSupport::find().clone();
        let user = match host.kernel.missing_in_b() {
            Some(why) => Err(why.to_owned()),
            None if mode == JailMode::Off => Err("the jail is off".to_owned()),
            None => users.user_of(key).map_err(|error| format!("it has no user of its own: {error}")),
        };
        Jail { mode, host, user, cgroup: Cgroup::of(key) }
    }

    /// Adds the machine's user to the group of that key, which several machines have in common: the path of a file that
    /// belongs to them.
    #[must_use]
    pub fn with_group_of(mut self, key: &Path, users: UserRange) -> Jail {
        self.user = self.user.and_then(|user| match users.user_of(key) {
            Ok(group) => Ok(User { groups: vec![group.gid], ..user }),
            Err(error) => Err(format!("its files have no group of their own: {error}")),
        });
        self
    }

    /// Returns the group that the machine has in common with others.
    pub fn shared_group(&self) -> Option<u32> {
        self.user.as_ref().ok()?.groups.first().copied()
    }

    /// Creates the jail of a program that runs for a moment and is the host's own: it keeps the host's user. A strict jail
    /// is about machines.
    pub fn of_a_tool(mode: JailMode) -> Jail {
        let mode = if mode == JailMode::Strict { JailMode::Auto } else { mode };
        let cgroup = Err(NOT_A_MACHINE.to_owned());
        Jail { mode, host: HostSupport::find().clone(), user: Err(NOT_A_MACHINE.to_owned()), cgroup }
    }

    /// Returns the jail with the user of its processes, if this host can give them one.
    #[must_use]
    pub fn with_user(mut self, user: Option<User>) -> Jail {
        if let Some(user) = user.filter(|_| self.host.kernel.root) {
            self.user = Ok(user);
        }
        self
    }

    /// Returns the user of the machine's processes, if this host can give the machine one of its own.
    pub fn user(&self) -> Option<&User> {
        self.user.as_ref().ok()
    }

    /// Returns the cgroup of a run that an earlier host has started, if it has one, with the limits of that policy.
    pub fn adopted_cgroup(&self, policy: &Policy) -> Option<Cgroup> {
        let cgroup = self.cgroup.as_ref().ok()?;
        cgroup.limit_again(&policy.limits);
        Some(cgroup.clone())
    }

    /// Ends what a killed host has left in the machine's cgroup.
    pub fn end_leftovers(&self) {
        if let Ok(cgroup) = &self.cgroup {
            cgroup.end();
        }
    }

    /// Combines the jail with what the machine needs.
    ///
    /// # Errors
    /// The mode is strict, and layer A or B does not hold; the helper program is missing.
    pub fn confine(&self, policy: Policy) -> Result<Confinement> {
        if self.mode != JailMode::Off {
            self.host.helper.clone()?;
        }
        let confinement = self.as_far_as_possible(policy);
        match confinement.layers.missing_in_strict().filter(|_| self.mode == JailMode::Strict) {
            None => Ok(confinement),
            Some(missing) => Err(Error::environment(format!("the jail is strict, and {missing}"))
                .advice("Change that, or set jail: auto for the machine in machinery-host.yaml")),
        }
    }

    /// Returns the layers that hold for a machine with that policy.
    pub fn layers(&self, policy: Policy) -> Layers {
        self.as_far_as_possible(policy).layers
    }

    fn as_far_as_possible(&self, mut policy: Policy) -> Confinement {
        let limits = policy.limits.clone();
        let helper = match (&self.host.helper, self.mode) {
            (_, JailMode::Off) => Err("jail: off (machinery-host.yaml)".to_owned()),
            (helper, _) => helper.clone().map_err(|error| error.reason().to_string()),
        };
        let helper = match helper {
            Ok(helper) => helper,
            Err(why) => {
                return Confinement {
                    helper: None,
                    policy,
                    layers: Layers::none(&why),
                    limits,
                    cgroup: None,
                    network: None,
                };
            }
        };
        let user = self.user_for(&policy);
        policy.own_network &= self.host.kernel.root;
        policy.user = user.as_ref().ok().cloned();
        if policy.user.is_none() {
            // A limit of processes counts those of all machines and of the host, if they have the same user.
            policy.limits.processes = None;
        }
        policy.cgroup = self.cgroup.as_ref().ok().map(|cgroup| cgroup.path().to_owned());
        let layers = Layers {
            a: self.host.kernel.missing_in_a().map(str::to_owned),
            b: user.err(),
            c: self.cgroup.as_ref().err().cloned(),
        };
        let cgroup = self.cgroup.clone().ok();
        Confinement { helper: Some(helper), policy, layers, limits, cgroup, network: None }
    }

    /// Returns the machine's user with the groups of its devices, or the reason why the machine cannot have one.
    fn user_for(&self, policy: &Policy) -> std::result::Result<User, String> {
        let mut user = self.user.clone()?;
        let group = |device: &PathBuf| std::fs::metadata(device).ok().map(|found| found.gid());
        user.groups.extend(policy.devices.iter().filter_map(group).filter(|group| *group != 0));
        user.groups.dedup();
        for path in &policy.read {
            reach::expect_readable(path, &user)?;
        }
        for device in &policy.devices {
            reach::expect_usable(device, &user)?;
        }
        for path in &policy.write {
            reach::expect_reachable(path)?;
        }
        for folder in &policy.sockets {
            reach::expect_writable(folder)?;
        }
        Ok(user)
    }
}

impl Confinement {
    /// Returns the layers that hold.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// Reports whether the process runs in the helper.
    pub fn is_confined(&self) -> bool {
        self.helper.is_some()
    }

    /// Returns the cgroup that the process joins.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Gives an open file to the machine's user. `path` is for messages.
    ///
    /// # Errors
    /// The owner cannot be changed.
    pub fn give(&self, file: &File, path: &Path) -> Result<()> {
        let Some(user) = &self.policy.user else { return Ok(()) };
        fchown(file, Some(user.uid), Some(user.gid))
            .map_err(|error| Error::io("give to the machine's user", path, &error))
    }

    /// Sets a variable of the process's environment.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.policy.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Makes the process enter that network namespace, in place of one of its own: see [`Cell`](crate::cell::Cell).
    ///
    /// # Errors
    /// The process is not confined, or there are too many open files.
    pub fn enter_network(&mut self, namespace: BorrowedFd<'_>) -> Result<()> {
        if self.helper.is_none() {
            let reason = format!("an isolated network needs the jail, which is {}", self.layers);
            return Err(Error::environment(reason)
                .advice("Remove jail: off or network: isolated of the machine in machinery-host.yaml"));
        }
        let namespace = namespace.try_clone_to_owned();
        let namespace =
            namespace.map_err(|error| Error::environment(format!("cannot keep a namespace: {error}")))?;
        self.network = Some(Arc::new(namespace));
        self.policy.own_network = false;
        Ok(())
    }

    /// Allows the process to open the file of a descriptor that it inherits once more, by `/proc/self/fd`.
    pub fn allow_reopening(&mut self, number: i32, for_writing: bool) {
        let path = PathBuf::from(format!("/proc/self/fd/{number}"));
        if for_writing { self.policy.write.push(path) } else { self.policy.read.push(path) }
    }

    /// Returns the command that runs the program in the jail, with these descriptors under these numbers.
    ///
    /// # Errors
    /// The policy cannot be passed on, or two descriptors have the same number.
    pub fn command(&self, program: &Path, mut descriptors: Vec<(OwnedFd, i32)>) -> Result<Command> {
        let failed = |error: String| Error::failed(format!("cannot pass the descriptors on: {error}"));
        let mut command = match &self.helper {
            None => {
                let mut command = machinery::command(program);
                command.envs(self.policy.environment.iter().map(|(name, value)| (name, value)));
                command
            }
            Some(helper) => {
                let mut policy = self.policy.clone();
                if let Some(Err(error)) = self.cgroup.as_ref().map(|cgroup| cgroup.make(&self.limits)) {
                    tracing::warn!(%error, "a run has no cgroup");
                    policy.cgroup = None;
                }
                policy.descriptors.extend(descriptors.iter().map(|(_, number)| *number));
                if let Some(namespace) = &self.network {
                    let highest = descriptors.iter().map(|(_, number)| *number).max();
                    let number = highest.unwrap_or(2) + 1;
                    policy.network_namespace = Some(number);
                    let namespace = namespace.try_clone().map_err(|error| failed(error.to_string()))?;
                    descriptors.push((namespace, number));
                }
                let policy = serde_json::to_string(&policy);
                let policy =
                    policy.map_err(|error| Error::failed(format!("cannot write a policy: {error}")))?;
                let mut command = machinery::command(helper);
                command.arg(policy).arg(found_in_path(program));
                command
            }
        };
        let mappings = descriptors.into_iter();
        let mappings = mappings.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
        command.fd_mappings(mappings).map_err(|error| failed(error.to_string()))?;
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery_jail::Support;
    use std::os::fd::AsFd;

    /// Returns the jail of a machine on a computer that offers this.
    fn jail(mode: JailMode, landlock: bool, root: bool) -> Jail {
        let kernel = Support { landlock, seccomp: true, root };
        let user = User { uid: 70_000, gid: 70_000, groups: Vec::new() };
        let user = if root { Ok(user) } else { Err("the host does not run as root".to_owned()) };
        let host = HostSupport { kernel, helper: Ok("/usr/bin/cuckoo-machinery-jail".into()) };
        Jail { mode, host, user, cgroup: Err("no cgroup".to_owned()) }
    }

    #[test]
    fn jail_is_incomplete_and_says_so_when_the_kernel_has_no_landlock() {
        let confinement = jail(JailMode::Auto, false, true).confine(Policy::default()).unwrap();
        assert!(confinement.is_confined());
        let layers = confinement.layers().to_string();
        assert!(layers.starts_with("B; not A: the kernel has no Landlock"), "{layers}");
        let refused = jail(JailMode::Strict, false, true).confine(Policy::default()).unwrap_err().to_string();
        assert!(refused.contains("layer A does not hold: the kernel has no Landlock"), "{refused}");
        assert!(refused.contains("jail: auto"), "{refused}");
    }

    #[test]
    fn jail_gives_no_user_and_no_limit_of_processes_when_the_host_is_not_root() {
        let limits = Limits { processes: Some(9), ..Limits::default() };
        let policy = Policy { limits, own_network: true, ..Policy::default() };
        let confinement = jail(JailMode::Auto, true, false).confine(policy.clone()).unwrap();
        assert_eq!(confinement.layers().names(), "A");
        let confined = &confinement.policy;
        assert_eq!((&confined.user, confined.own_network, confined.limits.processes), (&None, false, None));
        assert!(jail(JailMode::Strict, true, false).confine(policy).is_err());
    }

    #[test]
    fn jail_is_refused_when_the_helper_is_missing() {
        let missing = || Err(Error::environment("there is no program helper"));
        for mode in [JailMode::Auto, JailMode::Strict] {
            let jail = jail(mode, true, true);
            let jail = Jail { host: HostSupport { helper: missing(), ..jail.host.clone() }, ..jail };
            assert!(jail.confine(Policy::default()).unwrap_err().to_string().contains("no program helper"));
            assert_eq!(jail.layers(Policy::default()).names(), "off");
        }
    }

    #[test]
    fn process_enters_a_network_in_place_of_its_own_and_only_in_the_jail() {
        let null = File::open("/dev/null").unwrap();
        let policy = Policy { own_network: true, ..Policy::default() };
        let mut confinement = jail(JailMode::Auto, true, true).confine(policy.clone()).unwrap();
        confinement.enter_network(null.as_fd()).unwrap();
        let descriptors = vec![(null.try_clone().unwrap().into(), 7)];
        let command = confinement.command(Path::new("/usr/bin/qemu"), descriptors).unwrap();
        let passed = command.get_args().next().unwrap().to_str().unwrap();
        let passed: Policy = serde_json::from_str(passed).unwrap();
        assert_eq!((passed.network_namespace, passed.own_network), (Some(8), false));
        assert_eq!(passed.descriptors, [7]);
        let mut confinement = jail(JailMode::Off, true, true).confine(policy).unwrap();
        let refused = confinement.enter_network(null.as_fd()).unwrap_err().to_string();
        assert!(refused.contains("jail: off"), "{refused}");
    }

    #[test]
    fn process_is_not_confined_when_the_jail_is_off() {
        let confinement = jail(JailMode::Off, true, true).confine(Policy::default()).unwrap();
        assert!(!confinement.is_confined());
        assert_eq!(confinement.layers().names(), "off");
        let command = confinement.command(Path::new("/usr/bin/qemu"), Vec::new()).unwrap();
        assert_eq!(command.get_program(), "/usr/bin/qemu");
    }
}
