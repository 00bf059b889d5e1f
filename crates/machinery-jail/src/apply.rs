//! Applies a policy to this process, and executes the hypervisor.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use crate::policy::{Network, Policy, User};
use crate::support::Support;
use crate::{filter, paths};

/// The environment of a confined process.
const ENVIRONMENT: [(&str, &str); 2] = [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")];

/// A step that failed. The process must not go on.
#[derive(Debug)]
pub struct JailError {
    step: &'static str,
    why: String,
}

impl fmt::Display for JailError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.step, self.why)
    }
}

impl std::error::Error for JailError {}

fn failed<E: fmt::Display>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError { step, why: error.to_string() }
}

/// Applies the policy to this process, which has a single thread, and executes the program. It returns only if a step
/// fails; the process must end then.
pub fn enter(policy: &Policy, program: &OsString, args: &[OsString]) -> JailError {
    match confine(policy, Path::new(program)) {
        Ok(()) => {
            let mut command = Command::new(program);
            let own = policy.environment.iter().map(|(name, value)| (name, value));
            let error = command.args(args).env_clear().envs(ENVIRONMENT).envs(own).exec();
            JailError { step: "execute the program", why: format!("{}: {error}", program.display()) }
        }
        Err(error) => error,
    }
}

fn confine(policy: &Policy, program: &Path) -> Result<(), JailError> {
    if let Some(cgroup) = &policy.cgroup {
        // 0 is the process that writes. Source: cgroups(7).
        fs::write(cgroup.join("cgroup.procs"), "0").map_err(failed("join the cgroup"))?;
    }
    keep_descriptors(&policy.descriptors).map_err(failed("close the descriptors"))?;
    set_limits(policy).map_err(failed("set the limits"))?;
    if let Some(namespace) = policy.network_namespace {
        enter_network(policy, namespace).map_err(failed("enter the network namespace"))?;
    }
    if has(CapabilitySet::SYS_ADMIN) {
        let network = if policy.own_network { CloneFlags::CLONE_NEWNET } else { CloneFlags::empty() };
        let ipc = if policy.network == Network::Any { CloneFlags::empty() } else { CloneFlags::CLONE_NEWIPC };
        unshare(ipc | network).map_err(failed("make the namespaces"))?;
    }
    if let Some(user) = &policy.user {
        become_user(user).map_err(failed("change the user"))?;
    } else if policy.network != Network::Any {
        drop_capabilities().map_err(failed("drop the capabilities"))?;
    }
    set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    paths::restrict(policy, program).map_err(failed("restrict the files"))?;
    match filter::install(policy) {
        // The host says that layer A is incomplete.
        Err(_) if !Support::of_this_host().seccomp => Ok(()),
        installed => installed.map_err(failed("restrict the system calls")),
    }
}

/// Enters the namespace of that descriptor, which is closed when the program is executed. A network of its own would
/// replace it.
fn enter_network(policy: &Policy, namespace: i32) -> nix::Result<()> {
    if policy.own_network || policy.descriptors.contains(&namespace) {
        return Err(nix::Error::EINVAL);
    }
    // SAFETY: the borrow ends with this statement. A number that is not open makes the call fail.
    setns(unsafe { BorrowedFd::borrow_raw(namespace) }, CloneFlags::CLONE_NEWNET)
}

/// Has all descriptors but 0, 1, 2 and these closed when the program is executed.
fn keep_descriptors(kept: &[i32]) -> io::Result<()> {
    let (first, last, flags) = (3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: the call changes a flag of descriptors and no memory, and closes none now.
    if unsafe { libc::close_range(first, last, flags.cast_signed()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for descriptor in kept {
        // SAFETY: the borrow ends with this statement. A number that is not open makes the call fail.
        fcntl_setfd(unsafe { BorrowedFd::borrow_raw(*descriptor) }, FdFlags::empty())?;
    }
    Ok(())
}

fn set_limits(policy: &Policy) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let set = |resource, limit: Option<u64>| limit.map_or(Ok(()), |limit| setrlimit(resource, limit, limit));
    set(Resource::RLIMIT_FSIZE, policy.limits.file_size)?;
    set(Resource::RLIMIT_NPROC, policy.limits.processes)
}

fn has(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// Drops all capabilities, of a root too that stays root: a program that it executes gets none.
fn drop_capabilities() -> rustix::io::Result<()> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    if has(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().iter() {
            // A capability that the kernel does not know is in no set.
            match remove_capability_from_bounding_set(capability) {
                Err(Errno::INVAL) | Ok(()) => {}
                failed => return failed,
            }
        }
    }
    clear_ambient_capability_set()?;
    set_capabilities(None, none)
}

/// Gives up root for good: the kernel clears all capabilities when the last of the three numbers leaves 0.
fn become_user(user: &User) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}
