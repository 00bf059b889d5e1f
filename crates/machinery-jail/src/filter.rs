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
const DENIED: [i64; 73] = [
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_setsid,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setaffinity,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    // The owner, mode, times and attributes of files: Landlock does not restrict them.
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    SYS_FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    SYS_SETXATTRAT,
    SYS_REMOVEXATTRAT,
    // Parts of the kernel that no hypervisor needs.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    // The computer.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_open_tree,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_syslog,
];

/// Older calls of this architecture, which newer ones replace elsewhere.
#[cfg(target_arch = "x86_64")]
const DENIED_HERE: [i64; 9] = [
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_kexec_file_load,
    libc::SYS_iopl,
    libc::SYS_ioperm,
];
#[cfg(not(target_arch = "x86_64"))]
const DENIED_HERE: [i64; 0] = [];

/// Calls that are newer than the library. All architectures have the same numbers for them. Source: the kernel's
/// scripts/syscall.tbl.
const SYS_FCHMODAT2: i64 = 452;
const SYS_SETXATTRAT: i64 = 463;
const SYS_REMOVEXATTRAT: i64 = 466;

/// Commands of `fcntl` and `ioctl` that have the kernel send signals to any process of the same user. Sources: fcntl(2),
/// the kernel's asm-generic/sockios.h.
const SIGNALLING: [(i64, u64); 5] = [
    (libc::SYS_fcntl, libc::F_SETOWN as u64),
    (libc::SYS_fcntl, 10),
    (libc::SYS_fcntl, 15),
    (libc::SYS_ioctl, 0x8901),
    (libc::SYS_ioctl, 0x8902),
];

/// Sends data with a connection, which `connect` would make. Source: tcp(7).
const MSG_FASTOPEN: u64 = libc::MSG_FASTOPEN as u64;

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
    let always = DENIED.iter().chain(&DENIED_HERE);
    let mut denied: Vec<(i64, Vec<SeccompRule>)> = always.map(|call| (*call, Vec::new())).collect();
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        denied.push((call, vec![rule(&[(0, SeccompCmpOp::Ne, own.into())])?]));
    }
    // 0 is the process itself.
    let others = [(0, SeccompCmpOp::Ne, 0), (0, SeccompCmpOp::Ne, own.into())];
    denied.push((libc::SYS_prlimit64, vec![rule(&others)?]));
    for call in [libc::SYS_fcntl, libc::SYS_ioctl] {
        let commands = SIGNALLING.iter().filter(|(of, _)| *of == call);
        let rules = commands.map(|(_, command)| rule(&[(1, SeccompCmpOp::Eq, *command)]));
        denied.push((call, rules.collect::<Result<_, _>>()?));
    }
    denied.extend(denied_sockets(policy)?);
    let mut filters = vec![filter(denied, libc::EPERM)?];
    if !policy.spawn {
        filters.push(filter(new_processes()?, libc::EPERM)?);
        // The flags of `clone3` are in memory, which a filter cannot read. Without it, libraries use `clone`.
        filters.push(filter(vec![(libc::SYS_clone3, Vec::new())], libc::ENOSYS)?);
    }
    Ok(filters)
}

/// Denies the sockets that the policy does not allow, and connections where it allows none. A pair of stream sockets
/// reaches nobody else; another pair sends to the path of any socket.
fn denied_sockets(policy: &Policy) -> Result<Vec<(i64, Vec<SeccompRule>)>, Error> {
    if policy.network == Network::Any {
        return Ok(Vec::new());
    }
    let mut pairs = vec![rule(&[(0, SeccompCmpOp::Ne, libc::AF_UNIX as u64)])?];
    pairs.extend(other_types(1)?);
    let mut denied = vec![(libc::SYS_socketpair, pairs)];
    let mut families: Vec<i32> = Vec::new();
    if policy.network != Network::None {
        families.extend([libc::AF_INET, libc::AF_INET6]);
    }
    if !policy.sockets.is_empty() {
        families.push(libc::AF_UNIX);
    }
    let others: Vec<_> = families.into_iter().map(|family| (0, SeccompCmpOp::Ne, family as u64)).collect();
    // A rule without a condition is not allowed, and a call without a rule is denied always.
    let mut sockets = if others.is_empty() { Vec::new() } else { vec![rule(&others)?] };
    if policy.network != Network::Internet {
        if !sockets.is_empty() {
            sockets.extend(other_types(1)?);
            // Multipath TCP is a protocol of its own, which falls back to TCP.
            let protocols = [(2, SeccompCmpOp::Ne, 0), (2, SeccompCmpOp::Ne, libc::IPPROTO_TCP as u64)];
            sockets.push(rule(&protocols)?);
        }
        denied.push((libc::SYS_connect, Vec::new()));
        for (call, flags) in [(libc::SYS_sendto, 3), (libc::SYS_sendmsg, 2), (libc::SYS_sendmmsg, 3)] {
            let opens = (flags, SeccompCmpOp::MaskedEq(MSG_FASTOPEN), MSG_FASTOPEN);
            denied.push((call, vec![rule(&[opens])?]));
        }
    }
    denied.push((libc::SYS_socket, sockets));
    Ok(denied)
}

/// Returns the rules that match every type of socket but streams, in that argument.
fn other_types(argument: u8) -> Result<Vec<SeccompRule>, Error> {
    let types = (0..=SOCKET_TYPES).filter(|kind| *kind != libc::SOCK_STREAM as u64);
    types.map(|kind| rule(&[(argument, SeccompCmpOp::MaskedEq(SOCKET_TYPES), kind)])).collect()
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
