//! The seccomp filter: system calls that no hypervisor needs, and that reach beyond its files.
//!
//! The filter denies and does not kill: a library that tries a forbidden call and lives without it keeps working. QEMU's
//! own `-sandbox` remains in force beside it. Source: seccomp(2).

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::policy::{Network, Policy};

/// Calls that are denied whatever their arguments are.
const DENIED: [i64; 41] = [
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_setsid,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_swapon,
    libc::SYS_reboot,
    libc::SYS_personality,
    libc::SYS_pidfd_open,
    libc::SYS_process_madvise,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_process_mrelease,
];

/// The bits of a socket's type without its flags. Source: `SOCK_TYPE_MASK` in the kernel's linux/net.h.
const SOCKET_TYPES: u64 = 0xf;

/// Installs the filter for this process and its children. No new privileges must be set before.
///
/// # Errors
/// The kernel refuses the filter.
pub fn install(policy: &Policy) -> Result<(), Error> {
    for program in programs(policy, std::process::id())? {
        seccompiler::apply_filter(&program)?;
    }
    #[cfg(target_arch = "x86_64")]
    seccompiler::apply_filter(&x32::denied())?;
    Ok(())
}

/// Returns the filters of a process with that number. `execve` keeps the number.
fn programs(policy: &Policy, own: u32) -> Result<Vec<BpfProgram>, Error> {
    let mut denied: Vec<(i64, Vec<SeccompRule>)> = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        denied.push((call, vec![rule(&[(0, SeccompCmpOp::Ne, own.into())])?]));
    }
    // 0 is the process itself.
    let others = [(0, SeccompCmpOp::Ne, 0), (0, SeccompCmpOp::Ne, own.into())];
    denied.push((libc::SYS_prlimit64, vec![rule(&others)?]));
    // A pair of datagram sockets, other than one of streams, sends to any path.
    let datagrams = (1, SeccompCmpOp::MaskedEq(SOCKET_TYPES), libc::SOCK_DGRAM as u64);
    denied.push((libc::SYS_socketpair, vec![rule(&[datagrams])?]));
    for call in [libc::SYS_tkill, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo] {
        denied.push((call, Vec::new()));
    }
    if policy.network != Network::Any {
        denied.push((libc::SYS_socket, denied_sockets(policy)?));
    }
    let mut filters = vec![filter(denied, libc::EPERM)?];
    if !policy.spawn {
        filters.push(filter(new_processes()?, libc::EPERM)?);
        // The flags of `clone3` are in memory, which a filter cannot read. Without it, libraries use `clone`.
        filters.push(filter(vec![(libc::SYS_clone3, Vec::new())], libc::ENOSYS)?);
    }
    Ok(filters)
}

/// Denies each family of sockets that the policy does not allow. A pair of sockets reaches nobody else.
fn denied_sockets(policy: &Policy) -> Result<Vec<SeccompRule>, Error> {
    let mut allowed: Vec<i32> = Vec::new();
    if policy.network != Network::None {
        allowed.extend([libc::AF_INET, libc::AF_INET6]);
    }
    if !policy.sockets.is_empty() {
        allowed.push(libc::AF_UNIX);
    }
    let families: Vec<_> = allowed.into_iter().map(|family| (0, SeccompCmpOp::Ne, family as u64)).collect();
    // A rule without a condition is not allowed, and a call without a rule is denied always.
    if families.is_empty() { Ok(Vec::new()) } else { Ok(vec![rule(&families)?]) }
}

/// Denies new processes, and allows new threads.
fn new_processes() -> Result<Vec<(i64, Vec<SeccompRule>)>, Error> {
    let thread = libc::CLONE_THREAD as u64;
    let mut calls = vec![(libc::SYS_clone, vec![rule(&[(0, SeccompCmpOp::MaskedEq(thread), 0)])?])];
    #[cfg(target_arch = "x86_64")]
    calls.extend([(libc::SYS_fork, Vec::new()), (libc::SYS_vfork, Vec::new())]);
    Ok(calls)
}

fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, Error> {
    let conditions = conditions.iter().map(|(argument, operator, value)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator.clone(), *value)
    });
    Ok(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?)
}

fn filter(denied: Vec<(i64, Vec<SeccompRule>)>, errno: i32) -> Result<BpfProgram, Error> {
    let architecture = std::env::consts::ARCH.try_into()?;
    let deny = SeccompAction::Errno(errno.cast_unsigned());
    let filter = SeccompFilter::new(denied.into_iter().collect(), SeccompAction::Allow, deny, architecture)?;
    Ok(filter.try_into()?)
}

/// The calls of the x32 interface, which have other numbers and the same architecture: a filter by numbers does not see
/// them. Source: `__X32_SYSCALL_BIT` in the kernel's asm/unistd.h.
#[cfg(target_arch = "x86_64")]
mod x32 {
    use seccompiler::{BpfProgram, sock_filter};

    const FIRST: u32 = 0x4000_0000;

    /// Returns a filter that denies all calls of that interface. It is written in the instructions of the kernel's
    /// linux/bpf_common.h and linux/seccomp.h, because the library compares no numbers of calls.
    pub fn denied() -> BpfProgram {
        let load_number = sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
        let is_below = sock_filter { code: 0x35, jt: 0, jf: 1, k: FIRST };
        let deny = sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x0005_0000 | libc::EPERM.cast_unsigned() };
        let allow = sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
        vec![load_number, is_below, deny, allow]
    }
}
